"""torch.compile of the networks, and the step as a CUDA graph, without a GPU: all but the capture itself."""

from collections.abc import Callable
from unittest.mock import Mock

import pytest

from wads_dist.common.errors import ConfigError
from wads_dist.config.load import load_config
from wads_dist.training.graph import compile_networks, why_no_graph

Run = Callable[..., list[str]]
BASE = ["--data.shards", "none"]


@pytest.mark.slow
def test_a_recorded_step_is_the_eager_one(run_ranks: Run) -> None:
    """Bitwise, with accumulation and a step that is rejected."""
    assert "numbers are the same" in run_ranks("fewer_launches.py", 1, "graph")[0]


@pytest.mark.slow
def test_compiled_networks_take_the_eager_step(run_ranks: Run) -> None:
    """Traced as by any backend; nothing breaks, nothing is compiled after the warm-up, and that leaves no trace."""
    assert "compiled: ZeRO-1" in run_ranks("fewer_launches.py", 1, "aot_eager", "1")[0]


@pytest.mark.long
def test_inductor_takes_the_eager_step(run_ranks: Run) -> None:
    assert run_ranks("fewer_launches.py", 1, "inductor", "0,1,2")[0].count("compiled: ZeRO-") == 3


@pytest.mark.long
def test_a_compiled_run_resumes_exactly(run_ranks: Run, tmp_path: object) -> None:
    printed = run_ranks("exact_resume.py", 1, str(tmp_path), "0,1,2", "--trainer.compile", "default")[0]
    assert printed.count("bitwise equal") == 3


@pytest.mark.parametrize(
    ("mode", "stage", "micro_batches", "why"),
    [("default", 3, 1, "ZeRO stages 0 to 2"), ("reduce-overhead", 0, 2, "one micro-batch")],
)
def test_what_cannot_be_compiled_is_refused(mode: str, stage: int, micro_batches: int, why: str) -> None:
    engine = Mock(zero_optimization_stage=lambda: stage, gradient_accumulation_steps=lambda: micro_batches)
    with pytest.raises(ConfigError, match=f"trainer.compile {mode}: .*{why}"):
        compile_networks([engine], mode)


def test_what_stands_against_a_graph() -> None:
    assert why_no_graph(True, "cuda", 1, 0) is None
    assert why_no_graph(False, "cuda", 1, 0) == "trainer.cuda_graph is off"
    assert "GPU" in str(why_no_graph(True, "cpu", 1, 0))
    assert "2 ranks" in str(why_no_graph(True, "cuda", 2, 0)) and "ZeRO-1" in str(why_no_graph(True, "cuda", 1, 1))


@pytest.mark.parametrize(
    "setting",
    [
        ("--trainer.kernels", "torch"),
        ("--data.mode", "streaming"),
        ("--trainer.precision", "fp16"),
        ("--trainer.compile", "reduce-overhead"),
    ],
)
def test_settings_that_a_graph_cannot_have_are_refused(setting: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"trainer.cuda_graph with {setting[0][2:]} {setting[1]}"):
        load_config([*BASE, "--trainer.cuda_graph", "true", *setting])
