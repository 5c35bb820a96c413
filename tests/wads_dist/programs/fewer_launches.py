"""The step as a recorded graph is bitwise the eager one; that of compiled networks, in whole graphs, is to rounding.

On a CPU a graph's recorder runs its body again, and writes its losses where they were, as a replay does.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import join, leave, small_trainer
from exact_resume import assert_same
from torch._dynamo.utils import counters

from wads_dist.common.ranks import Ranks
from wads_dist.training import engines, graph
from wads_dist.training.trainer import Trainer

BAD = frozenset({17})
STEPS = 4
MICRO = 4


def trainer_at(ranks: Ranks, micro: int, stage: int = 0) -> Trainer:
    options = ["--trainer.micro_batch_size", str(micro), "--trainer.ema", "0.9", "--trainer.learning_rate", "1e-3"]
    return small_trainer(ranks, *options, "--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", bad=BAD)


def train(trainer: Trainer) -> dict[str, object]:
    """All that ``STEPS`` steps leave, of which the third is rejected."""
    losses = [trainer.step(trainer.progress.next_sample).means() for _ in range(STEPS)]
    assert trainer.progress.rejected == 1
    del losses[2]
    return {
        "losses": losses,
        "weights": [engines.full_state(e, dict(e.module.named_buffers())) for e in trainer.both],
        "optimisers": [[dict(s) for s in e.optimizer.state.values()] for e in trainer.both],
        "average": trainer.ema.shadow if trainer.ema else None,
    }


def recorded(trainer: Trainer, micro: int) -> graph.StepGraph:
    def record(body: Callable[[], None]) -> Callable[[], None]:
        for _ in range(graph.WARM_UP):
            body()
        kept = step.losses

        def replay() -> None:
            body()
            for name, loss in step.losses.items():
                kept[name].copy_(loss)
            step.losses = kept

        return replay

    step = graph.StepGraph(trainer, micro, trainer.ranks.device, record)
    return step


def graphs(ranks: Ranks) -> None:
    eager, trainer = trainer_at(ranks, MICRO), trainer_at(ranks, MICRO)
    trainer.graph = recorded(trainer, MICRO)
    numbers = assert_same(train(eager), train(trainer), "eager and graph")
    print(f"graph: {numbers:,} numbers are the same", flush=True)


def compiled(ranks: Ranks, backend: str, stages: str) -> None:
    # Adam's first steps have the size of the rate whatever a gradient's: rounding would decide those of one that is zero.
    engines.adam = lambda module, rate, betas: torch.optim.SGD(module.parameters(), 100 * rate)  # type: ignore[assignment]
    for stage in map(int, stages.split(",")):
        torch._dynamo.reset()
        counters.clear()
        eager, trainer = trainer_at(ranks, 8, stage), trainer_at(ranks, 8, stage)
        graph.compile_networks(trainer.both, "default", backend)
        start = engines.full_state(eager.generator_engine, {})
        before = [b.clone() for b in trainer.buffers()]
        trainer.warm_up()
        assert_same(before, trainer.buffers(), "buffers after the warm-up")
        compilations = counters["stats"]["unique_graphs"]
        first, second = train(eager), train(trainer)
        assert counters["stats"]["unique_graphs"] == compilations == 3, counters[
            "stats"
        ]  # D with and without a gradient
        assert not counters["graph_break"], counters["graph_break"]
        (a, _), (b, _) = first["weights"], second["weights"]  # type: ignore[misc]
        apart, moved = (sum((x[k] - y[k]).square().sum().item() for k in start) for x, y in ((a, b), (a, start)))
        difference = math.sqrt(apart / moved)
        assert difference < 1e-3, difference
        print(
            f"compiled: ZeRO-{stage}, the weights' change differs by {difference:.1e} after {STEPS} steps", flush=True
        )


def main() -> None:
    ranks = join()
    if sys.argv[1] == "graph":
        graphs(ranks)
    else:
        compiled(ranks, sys.argv[1], sys.argv[2])
    leave()


if __name__ == "__main__":
    main()
