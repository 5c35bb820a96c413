"""Early stopping by how well the network finds anomalies synthesised on normal images held out of training.

More training is not always better: a segmenter that has seen a few dozen images for long enough knows them, and marks what it
has not seen. The score is the average precision of the segmenter's pixels, with the weights that an evaluation would have
(moving average, BatchNorm's buffers averaged over ranks), on whole images half of which carry an anomaly, always the same; the
test set has no part in it, and neither have other experts, which are made after training. The weights of the best score are
kept, and travel in every checkpoint, so that a resumed run stops where an undisturbed one does.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wads_dist.common.errors import ConfigError, NotFiniteError
from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import Config
from wads_dist.data.images import decode_entries
from wads_dist.data.training import TrainingData, TrainingSplit
from wads_dist.evaluation.metrics import Truth
from wads_dist.evaluation.scoring import ExactScores, predict, rank_batches
from wads_dist.kernels.synthesis import synthesise
from wads_dist.model.layers import use_kernels
from wads_dist.model.weights import separate_model
from wads_dist.shards.source import Dataset
from wads_dist.training.progress import best_of
from wads_dist.training.trainer import Trainer

SAMPLES = 128
"""Of them half carry an anomaly, but for the few whose mask comes out empty."""
FIRST = -1000
"""The first sample id; they fall from there. Training counts from 0, and draws none of them."""


class HeldOutScore:
    """The samples, this rank's part of them, and what the score is of."""

    def __init__(self, config: Config, dataset: Dataset, category: str, data: TrainingData, ranks: Ranks) -> None:
        """Synthesises the samples. Of a category with too few images to hold some out, those trained on serve. Collective.

        Raises:
            ConfigError: no sample has an anomaly.
            DataError: an image cannot be decoded; names it.
        """
        held_out = TrainingSplit.of(dataset, category, config).held_out
        self.source = "images held out" if held_out else "images trained on"
        entries = (held_out or data.entries)[:SAMPLES]
        images = decode_entries(dataset, category, entries, config.data.store_size).to(data.device)
        settings = replace(data.settings, scale=(1.0, 1.0), rotation=0.0, clean_fraction=0.5)
        self.batches: list[tuple[Tensor, Truth]] = []
        anomalous = 0
        for batch in rank_batches(SAMPLES, config.evaluation.batch_size, ranks):
            index = torch.arange(batch.start, batch.stop, device=data.device)
            made = synthesise(
                images,
                data.textures,
                FIRST - index,
                data.seed,
                settings,
                index % len(images),
                len(images),
                data.backend,
            )
            masks = made.mask[:, 0].cpu() > 0
            anomalous += int(masks.sum())
            self.batches.append((made.anomalous.cpu(), Truth.of(masks)))
        everywhere = ranks.gather((anomalous, len(self.batches)))
        self.turns = max(batches for _, batches in everywhere)
        if not sum(pixels for pixels, _ in everywhere):
            raise ConfigError(
                [
                    f"stopping.every {config.stopping.every}: no synthetic anomaly has left a mask, so nothing can be scored; "
                    "lower synthesis.threshold, or set stopping.every to 0"
                ]
            )

    def __call__(self, trainer: Trainer) -> tuple[float, bool]:
        """The score of the trainer's present network, appended to its progress, and whether it is the best; then its weights
        are kept on the first rank. Leaves no other trace in the training. Collective.

        Raises:
            NotFiniteError: the network's probabilities are not finite.
        """
        progress = trainer.progress
        state = trainer.inference_state()
        score = self.measure(trainer, state)
        progress.scores.append((progress.next_sample, score))
        is_best = best_of(progress.scores) == len(progress.scores) - 1
        if is_best and trainer.ranks.is_first:
            trainer.best = state
        return score, is_best

    def measure(self, trainer: Trainer, state: dict[str, Tensor]) -> float:
        """The score of ``inference_state``'s weights. Collective."""
        config, ranks, step = trainer.config, trainer.ranks, trainer.progress.step
        if config.has_experts:  # which do not smooth the segmenter
            config = config.model_copy(update={"model": config.model.model_copy(update={"smoothing": 0.0})})
        model = separate_model(config, state).to(ranks.device)
        use_kernels(model, config.trainer.kernels)
        pixels, tf32, finite = ExactScores(ranks.device), torch.backends.cudnn.allow_tf32, True
        for turn in range(self.turns):
            # A phase a batch, on every rank as many: the supervisor's limit is for one.
            trainer.heartbeat.enter("score", step)
            if turn < len(self.batches):
                images, truth = self.batches[turn]
                probability = predict(model, images, config.evaluation.batch_size, ranks.device).probability
                finite = finite and bool(probability.isfinite().all())
                pixels.add(probability.to(ranks.device).nan_to_num(), truth)
        trainer.heartbeat.enter("score", step)
        torch.backends.cudnn.allow_tf32 = tf32  # scoring turns it off; the training may have it
        if not all(ranks.gather(finite)):
            raise NotFiniteError(
                f"after {trainer.progress.next_sample:,} samples the network's probabilities are not finite; "
                "train with a lower trainer.learning_rate in a new --run.dir"
            )
        score = pixels.ranked(ranks).metrics().average_precision
        assert score is not None  # there are anomalous pixels, and normal ones
        return score

    def record(self, trainer: Trainer) -> dict[str, Any]:
        """What it has come to, for ``metrics.json``."""
        progress = trainer.progress
        samples, score = progress.scores[best_of(progress.scores)]
        early = progress.next_sample < trainer.config.trainer.samples
        count = len(progress.scores)
        return {"samples": samples, "score": score, "scores": count, "early": early, "source": self.source}

    def note(self, trainer: Trainer) -> str:
        """The same, for people."""
        record, spent, budget = self.record(trainer), trainer.progress.next_sample, trainer.config.trainer.samples
        early = f"stopped after {spent:,} of {budget:,} samples; " if record["early"] else ""
        return (
            f"{early}the best of {record['scores']} scores of synthetic anomalies on {self.source} ({record['score']:.3f}) "
            f"came after {record['samples']:,} samples, whose weights are kept"
        )
