"""Whole steps on a GPU, where trouble would be. Each is a process of its own; ``gpu_step.py`` says what it looks at."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., list[str]]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("kernels", "difference, replicated edges: gradients differ from cpu's"),
        ("overflow", "numbers are the same"),
        ("resume", "resume at ZeRO-1"),
        ("layout", "difference, replicated edges: "),
        ("graph", "the steps differ by 0.0e+00"),
        pytest.param("default", "default, bf16: the steps differ", id="compiled"),
        pytest.param("reduce-overhead", "reduce-overhead, bf16: the steps differ", id="compiled to graphs"),
    ],
)
def test_a_step_on_a_gpu(case: str, said: str, run_ranks: Run, tmp_path: Path) -> None:
    printed = run_ranks("gpu_step.py", 1, case, str(tmp_path), accelerator="cuda")[0]
    print(printed)
    assert said in printed


@pytest.mark.gpu
def test_losses_are_those_that_this_type_of_gpu_had(run_ranks: Run, tmp_path: Path) -> None:
    folder = os.environ.get("WADS_RESULTS", str(tmp_path))
    printed = run_ranks("gpu_step.py", 1, "golden", str(tmp_path), folder, accelerator="cuda")[0]
    if "are as known" not in printed:
        pytest.skip(printed.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kernels", "overflow"])
def test_the_cases_themselves_are_right(case: str, run_ranks: Run, tmp_path: Path) -> None:
    """On a CPU, where they must hold too: a GPU's minutes are not for mistakes in a test."""
    print(run_ranks("gpu_step.py", 1, case, str(tmp_path))[0])
