import json
import subprocess
import sys
from typing import Any

import pytest
import triton

from tests.conftest import REPOSITORY, environment
from wads_dist.kernels.compiled import TARGETS, main

OLD = triton.__version__.startswith("3.6.")


@pytest.fixture(scope="module", params=["sm_90 gfx942", pytest.param(" ".join(TARGETS), marks=pytest.mark.long)])
def targets(request: pytest.FixtureRequest) -> list[str]:
    """One of each vendor, which compilers differ most; all of them on demand."""
    return str(request.param).split()


@pytest.fixture(scope="module")
def report(targets: list[str]) -> list[dict[str, Any]]:
    """Compiled in a process of its own: this one may be interpreting its kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "wads_dist.kernels.compiled", "--json", *targets],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_fits_every_target_without_spilling(report: list[dict[str, Any]], targets: list[str]) -> None:
    assert {k["target"] for k in report} == set(targets)
    for kernel in report:
        spilt = 4 if OLD and kernel["target"] == "gfx942" and kernel["kernel"].startswith("objective_forward") else 0
        assert kernel["spills"] <= spilt, kernel
        assert kernel["shared_bytes"] <= TARGETS[kernel["target"]][1], kernel


@pytest.mark.slow
def test_both_operations_are_reported_for_both_layouts(report: list[dict[str, Any]], targets: list[str]) -> None:
    names = {k["kernel"] for k in report}
    assert len(report) == len(names) * len(targets) - targets.count("gfx942")  # whose warps have no room for two rows
    forwards = ("fp32 contiguous", "fp32 channels_last", "bf16 channels_last", "fp32/bf16 channels_last")
    assert {*(f"objective_forward {variant}" for variant in forwards), "objective_reduce"} <= names


@pytest.mark.slow
def test_the_code_is_what_the_design_counts_on(report: list[dict[str, Any]]) -> None:
    """A row of the seven blurs is 308 fused multiply-adds or half as many packed ones, and its warp meets at one barrier."""
    for kernel in report:
        if kernel["kernel"].startswith("objective_forward"):
            mix = kernel["instructions"]
            assert mix["fma"] > (150 if kernel["target"] in ("sm_100", "gfx942") else 300), kernel
            assert mix["barrier"] <= (4 if "two rows" in kernel["kernel"] else 2) and kernel["shared_bytes"] == 0, (
                kernel
            )
            assert sum(count for kind, count in mix.items() if kind != "total") == mix["total"]


@pytest.mark.slow
def test_an_interpreting_process_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wads_dist.kernels.compiled"],
        cwd=REPOSITORY, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "unset TRITON_INTERPRET" in done.stderr


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SystemExit, match=r"unknown target sm_1; known: sm_80, sm_90, sm_100, gfx942"):
        main(["--json", "sm_1"])
