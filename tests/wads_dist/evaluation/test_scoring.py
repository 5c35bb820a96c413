"""What a rank keeps of its batches; tests/wads_dist/evaluation/test_evaluate.py has several real ranks."""

import pytest
import torch

from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import EvaluationConfig
from wads_dist.evaluation import histogram
from wads_dist.evaluation.metrics import Truth, curves, map_metrics, rank
from wads_dist.evaluation.scoring import Predictions, pixel_scores, rank_batches

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [0, 1, 31, 32, 33, 110])
def test_all_ranks_together_have_the_batches_of_one(total: int, world_size: int) -> None:
    """The network sees the same batches whatever the number of ranks, and they come in the set's order."""
    together = [b for r in range(world_size) for b in rank_batches(total, 32, Ranks(r, world_size, 0, 1, CPU))]
    assert together == rank_batches(total, 32, ALONE)
    assert [i for batch in together for i in batch] == list(range(total))


def test_scores_added_by_batches_give_the_metrics_and_curves_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.rand(7, 16, 16, generator=generator) * 20).round() / 20
    masks = torch.rand(7, 16, 16, generator=generator) < 0.1
    scores = pixel_scores(EvaluationConfig(), CPU)
    for part in (slice(0, 3), slice(3, 3), slice(3, 7)):
        scores.add(maps[part], Truth.of(masks[part]))
    result = scores.result(ALONE)
    assert result.metrics == map_metrics(maps, masks) and result.bounds is None
    assert result.curves == curves(rank(maps, masks, Truth.of(masks)).vertices())


def test_a_histogram_gives_the_middle_of_its_bounds() -> None:
    maps, masks = torch.rand(2, 16, 16), torch.rand(2, 16, 16) < 0.1
    scores = pixel_scores(EvaluationConfig(metrics="histogram", bins=64), CPU)
    scores.add(maps, Truth.of(masks))
    result = scores.result(ALONE)
    assert result.bounds is not None and result.bounds.aupro is not None and result.metrics.aupro is not None
    low, high = result.bounds.aupro
    assert low < result.metrics.aupro == (low + high) / 2 < high and result.metrics.threshold_at_f1_max is None


def test_components_of_all_ranks_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no rank alone they are too many."""
    monkeypatch.setattr(histogram, "_MOST_COMPONENTS", 3)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value])
    scores = pixel_scores(EvaluationConfig(metrics="histogram", bins=16), CPU)
    scores.add(torch.rand(2, 4, 4), Truth.of(torch.eye(4).bool().expand(2, 4, 4)))
    with pytest.raises(ValueError, match="more than 3 connected components"):
        scores.result(ALONE)


@pytest.mark.parametrize("metrics", ["exact", "histogram"])
def test_without_a_mask_there_is_a_reason_and_no_curve(metrics: str) -> None:
    scores = pixel_scores(EvaluationConfig(metrics=metrics), CPU)  # type: ignore[arg-type]
    scores.add(torch.rand(2, 8, 8), Truth.of(torch.zeros(2, 8, 8, dtype=torch.bool)))
    result = scores.result(ALONE)
    assert result.metrics.undefined == "all are normal" and result.metrics.auroc is None and result.curves == {}


def test_predictions_of_parts_are_those_of_the_whole() -> None:
    whole = Predictions(torch.rand(5, 4, 4), torch.rand(5, 3, 4, 4), torch.rand(5, 2))
    joined = Predictions.join([whole.rows([0, 1]), whole.rows([]), whole.rows([2, 3, 4])])
    assert all(
        torch.equal(getattr(joined, name), getattr(whole, name)) for name in ("probability", "reconstruction", "code")
    )
    surprised = [Predictions(*[torch.rand(n, 2)] * 3, torch.rand(n, 3, 4, 4)) for n in (2, 1)]
    assert torch.equal(Predictions.join(surprised).surprises, torch.cat([part.surprises for part in surprised]))  # type: ignore[arg-type, misc]
