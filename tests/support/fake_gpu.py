"""CUDA tensors without a GPU: shapes, types, strides and autocast are the real dispatcher's, and nothing is computed."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wads_dist.kernels.group_norm import triton as group_norm_triton

DEVICE = "cuda:0"


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Within, a tensor on ``DEVICE`` is one that looks as if it were there."""
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        replace(fake_tensor, "init_gpu_context", lambda *_, **__: None)
        stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        replace(torch.cuda, "is_available", lambda: True)
        yield


def to_gpu(module: nn.Module) -> nn.Module:
    """``module``'s parameters and buffers, made on a CPU, on the fake GPU."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                moved = torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
                part._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    return module


def backward(outputs: Sequence[Tensor]) -> None:
    """What ``torch.autograd.backward`` does, node by node: its engine needs the device itself."""
    incoming: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    waiting, seen, todo = Counter[Any](), set(), [output.grad_fn for output in outputs]
    for output in outputs:
        incoming[output.grad_fn][output.output_nr] = torch.empty_like(output)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            following = [after for after, _ in node.next_functions if after is not None]  # type: ignore[union-attr]
            waiting.update(following)
            todo += following
    ready = [node for node in {output.grad_fn for output in outputs} if not waiting[node]]
    while ready:
        node: Any = ready.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            continue
        arrived = incoming.pop(node, {})
        with torch.no_grad():
            run = node if callable(node) else node.apply  # a Python function's node is not callable
            gradients = run(*(arrived.get(i) for i in range(len(node._input_metadata))))
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for (after, number), gradient in zip(node.next_functions, gradients, strict=False):
            if after is None:
                continue
            if gradient is not None:
                wanted = after._input_metadata[number]
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                before = incoming[after].get(number)
                incoming[after][number] = gradient if before is None else before + gradient
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)


def is_nhwc(x: Tensor) -> bool:
    """Of 1×1 maps every layout is."""
    return x.shape[-2:] == (1, 1) or x.is_contiguous(memory_format=torch.channels_last)


class Layouts(TorchDispatchMode):
    """Counts convolutions, those that see an NCHW tensor, normalisations and upsamplings, and those of them in fp32.

    Without a GPU (not ``real``) the convolutions' results get cuDNN's layout (channels_last if the input or the weight is), and
    GroupNorm's the kernels'.
    """

    def __init__(self, real: bool = False) -> None:
        super().__init__()
        self.real, self.count = real, Counter[str]()

    def __enter__(self) -> "Layouts":
        self.patches = contextlib.ExitStack()
        if not self.real:
            self.patches.enter_context(mock.patch.object(group_norm_triton, "forward", self._norm))
            self.patches.enter_context(mock.patch.object(group_norm_triton, "backward", self._norm_backward))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def _see(self, what: str, *tensors: Tensor) -> None:
        self.count[what] += 1
        self.count[f"{what} in NCHW"] += not all(map(is_nhwc, tensors))
        self.count[f"{what} in fp32"] += any(t.dtype == torch.float32 for t in tensors)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
        self._see("norms", x)
        return torch.empty_like(x), x.new_empty(x.shape[0], groups, 2, dtype=torch.float32)

    def _norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
        self._see("norms", dy, x)
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = operator(*args, **(kwargs or {})), operator._overloadpacket.__name__
        if name == "convolution" and args[8] == 1:  # not the Gaussian, a channel by itself
            self._see("convolutions", args[0])
            return result if self.real else _like(result, args[0], args[1])
        if name == "convolution_backward":
            self._see("convolutions", args[0], args[1])
            if self.real:
                return result
            return (None if result[0] is None else _like(result[0], args[1], args[2]), *result[1:])
        if name.endswith(("batch_norm", "batch_norm_backward")) or "group_norm" in name:
            self._see("norms", args[0])
        if name.startswith(("upsample_nearest2d", "upsample_bilinear2d")):
            self._see("upsamplings", args[0])
        return result


def _like(result: Tensor, *inputs: Tensor) -> Tensor:
    nhwc = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in inputs)
    return torch.empty_like(result, memory_format=torch.channels_last) if nhwc else result
