"""What a GPU runs in the place of torch's own, against it, in float64 on a CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torchvision.ops import FeaturePyramidNetwork

from wads_dist.model.layers import Bilinear, Pyramid, Replicate, ReplicateConv2d, set_padding


def gradients(run: object, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)  # type: ignore[operator]
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weight).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 3, 4, 6), (8, 12)), ((1, 2, 5, 3), (5, 12)), ((2, 5, 1, 4), (8, 4)), ((1, 2, 8, 8), (3, 5))],
)
def test_the_gradient_of_bilinear_upsampling_is_torchs(
    shape: tuple[int, ...], size: tuple[int, int], layout: torch.memory_format
) -> None:
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    ours = gradients(lambda x: Bilinear.apply(x, size), x)
    torchs = gradients(lambda x: F.interpolate(x, size, mode="bilinear", align_corners=False), x)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, torchs, strict=True))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 2, 1, 1), (2, 5, 1, 4)])
def test_replicate_padding_is_torchs(shape: tuple[int, ...], width: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    ours = gradients(lambda x: Replicate.apply(x, width), x)
    torchs = gradients(lambda x: F.pad(x, (width,) * 4, mode="replicate"), x)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, torchs, strict=True))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layer", [lambda x: Bilinear.apply(x, (8, 12)), lambda x: Replicate.apply(x, 2)])
def test_torch_compile_takes_them_whole_and_on_one_device(layer: Callable[[Tensor], Tensor]) -> None:
    graphs: list[torch.fx.GraphModule] = []
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    compiled = torch.compile(
        layer,
        backend=aot_autograd(
            bw_compiler=lambda graph, _: graphs.append(graph) or graph, fw_compiler=lambda graph, _: graph
        ),
        fullgraph=True,
    )
    assert all(torch.allclose(a, b) for a, b in zip(gradients(compiled, x), gradients(layer, x), strict=True))
    # A matrix brought from the host would keep the graph from becoming a CUDA graph.
    assert graphs and not [
        n for g in graphs for n in g.graph.nodes if "_to_copy" in str(n.target) and "device" in n.kwargs
    ]


def test_padding_changes_neither_weights_nor_names() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 3, padding=1, bias=False))
    )
    before, x = dict(net.named_parameters()), torch.rand(1, 3, 5, 5)
    set_padding(net, "replicate")
    after = dict(net.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert [type(m) is ReplicateConv2d for m in net.modules() if isinstance(m, nn.Conv2d)] == [True, False, True]
    torchs = nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate")
    torchs.weight, torchs.bias = net[0].weight, net[0].bias  # type: ignore[assignment]
    assert torch.equal(net[0](x), torchs(x))


def test_the_pyramid_is_torchvisions() -> None:
    torch.manual_seed(0)
    ours = Pyramid([4, 8, 16], 8)
    torchs = FeaturePyramidNetwork([4, 8, 16], 8)
    torchs.load_state_dict(ours.state_dict())
    maps = [torch.rand(2, c, s, s) for c, s in ((4, 16), (8, 8), (16, 4))]
    expected = torchs({str(i): m for i, m in enumerate(maps)}).values()
    assert all(torch.equal(a, b) for a, b in zip(ours.levels(maps), expected, strict=True))
