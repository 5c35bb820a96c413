"""Two engines against plain PyTorch, in real processes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from wads_dist.training.engines import LossScale, ParameterAverage

Run = Callable[..., list[str]]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_take_the_step_of_plain_pytorch_at_every_zero_stage(run_ranks: Run, accumulation: int) -> None:
    printed = run_ranks("gradient_equality.py", 2, "0,1,2,3", str(accumulation))[0]
    print(printed)
    assert printed.count("worst relative difference") == 8  # four stages, SGD and Adam


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_step_through_the_triton_kernels_is_the_references(run_ranks: Run) -> None:
    assert "worst relative difference" in run_ranks("triton_step.py", 1, fork=False)[0]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("micro_batch_size", ["4", "2"])
def test_a_rejected_step_leaves_nothing_behind(run_ranks: Run, micro_batch_size: str) -> None:
    printed = run_ranks("rejected_steps.py", 2, "0,1,2,3", micro_batch_size)[0]
    print(printed)
    assert printed.count("nothing left behind") == 4


@pytest.mark.slow
def test_a_step_reads_the_device_once(run_ranks: Run) -> None:
    """For the agreement; DeepSpeed's ZeRO-1 and 2 used to wait for a gradient norm in either engine's step besides, and its
    throughput timer for the device, five times a step."""
    printed = run_ranks("host_reads.py", 1, "0,1,2")[0]
    print(printed)
    assert printed.count("1 agreement, 0 other reads, 0 waits") == 3
    # DeepSpeed's all-reduce among one rank: all gradients into one buffer and back.
    assert "gradients are left where they are" in printed


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_the_agreement_only(run_ranks: Run) -> None:
    """torch itself raises at any other read (``set_sync_debug_mode``)."""
    printed = run_ranks("host_reads.py", 1, "0,1,2", accelerator="cuda")[0]
    assert printed.count("1 agreement, 0 other reads, 0 waits") == 3


@pytest.mark.slow
def test_the_moving_average_is_exported_whole_at_zero_3(run_ranks: Run) -> None:
    """Small parameters stay gathered between ZeRO-3's steps, and were once exported unaveraged."""
    assert "averaged alike" in run_ranks("ema_export.py", 2)[0]


def test_loss_scale_halves_on_overflow_and_grows_after_good_steps() -> None:
    scale = LossScale(scale=8.0, dynamic=True, interval=3)
    scale.update(finite=False)
    assert scale.scale == 4
    for _ in range(3):
        scale.update(finite=True)
    assert scale.scale == 8
    restored = LossScale(dynamic=True)
    restored.load_state_dict(scale.state_dict())
    assert (restored.scale, restored.good_steps) == (8, 3)
    fixed = LossScale()
    fixed.update(finite=False)
    assert fixed.scale == 1


def test_moving_average() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.0)
        average = ParameterAverage(net, 0.9)
        net.weight.fill_(1.0)
        average.update(net, 1000)
    assert average.shadow[0].item() == pytest.approx(0.1)
    with average.applied(net):
        assert net.weight.item() == pytest.approx(0.1)
    assert net.weight.item() == 1.0


@pytest.mark.gpu
def test_an_fp16_overflow_in_either_engine_skips_both(run_ranks: Run) -> None:
    assert "both skipped" in run_ranks("fp16_overflow.py", 1, accelerator="cuda")[0]
