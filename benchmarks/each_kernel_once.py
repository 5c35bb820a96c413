"""Every kernel of ours once, forward and backward, at B = 64 of 3×128×128 on a GPU: for a profiler that counts, such as ncu."""

import torch

from wads_dist.kernels.group_norm import group_norm_act
from wads_dist.kernels.objective import ObjectiveWeights, objective
from wads_dist.kernels.synthesis import SynthesisSettings, synthesise


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU: nothing to count")
        return
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        x = torch.rand(64, 3, 128, 128, device="cuda").to(memory_format=layout)
        x_hat = (x + 0.1 * torch.randn_like(x)).clamp(0, 1).to(dtype).requires_grad_()
        logits = torch.randn(64, 1, 128, 128, device="cuda").to(dtype).requires_grad_()
        mask = (torch.rand(64, 1, 128, 128, device="cuda") > 0.9).to(torch.uint8)
        objective(x, x_hat, logits, mask, ObjectiveWeights()).total.backward()
    images = torch.randint(0, 256, (64, 3, 256, 256), dtype=torch.uint8, device="cuda")
    synthesise(images, images, torch.arange(64, device="cuda"), 0, SynthesisSettings(), dtype=torch.bfloat16)
    maps = torch.randn(64, 64, 64, 64, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight, bias = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    group_norm_act(maps.requires_grad_(), weight, bias, 16, 1e-5, 0.2).float().sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
