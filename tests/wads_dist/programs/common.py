"""What the programs that run as real ranks share: a small trainer on images made here."""

import os

import deepspeed
import torch
from torch import Tensor

from tests.support.narrow import NARROW
from wads_dist.common.ranks import Ranks, unname_shared_memory
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.data.training import synthesis_settings
from wads_dist.kernels.synthesis import Batch, synthesise
from wads_dist.training.trainer import Trainer


class Samples:
    """TrainingData's ``batch`` over seeded random images; the sample ids of ``bad`` come out as NaN, those of ``loud`` with a
    target so far off that their loss is more than a hundred times the others'."""

    def __init__(self, config: Config, bad: frozenset[int] = frozenset(), loud: frozenset[int] = frozenset()) -> None:
        generator = torch.Generator().manual_seed(0)
        size = config.data.store_size
        self.images = torch.randint(0, 256, (6, 3, size, size), generator=generator, dtype=torch.uint8)
        self.settings, self.seed = synthesis_settings(config.synthesis, config.data.image_size), config.trainer.seed
        self.bad, self.loud = (torch.tensor(sorted(ids), dtype=torch.int64) for ids in (bad, loud))
        self.backend = config.trainer.kernels

    def batch(self, sample: Tensor, upcoming: Tensor | None = None) -> Batch:
        self.images = self.images.to(sample.device)
        batch = synthesise(self.images, self.images, sample, self.seed, self.settings, backend=self.backend)
        # Nothing is read from the device, which neither host_reads.py nor a capture allows.
        self.bad, self.loud = (ids.to(sample.device) for ids in (self.bad, self.loud))
        bad, loud = (torch.isin(sample, ids)[:, None, None, None] for ids in (self.bad, self.loud))
        batch.anomalous.masked_fill_(bad, float("nan"))
        batch.clean.mul_(torch.where(loud, 300.0, 1.0))
        return batch


def small_config(*overrides: str) -> Config:
    """8 samples a step at 64 pixels, narrow networks, fp32."""
    fixed = (
        f"--data.shards none {NARROW} --trainer.samples 800 --trainer.global_batch_size 8 --trainer.precision fp32 "
        # Noise images have all but equal codes: to standardise those would magnify rounding.
        "--model.standardise_code false"
    )
    return load_config([*fixed.split(), *overrides])


def join() -> Ranks:
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(
        deepspeed.accelerator.get_accelerator().communication_backend_name(), auto_mpi_discovery=False, verbose=False
    )
    ranks = Ranks.from_environment()
    unname_shared_memory(ranks)
    return ranks


def small_trainer(
    ranks: Ranks, *overrides: str, bad: frozenset[int] = frozenset(), loud: frozenset[int] = frozenset()
) -> Trainer:
    torch.set_num_threads(1)
    config = small_config(*overrides)
    trainer = Trainer(config, ranks, Samples(config, bad, loud))  # type: ignore[arg-type]
    for engine in trainer.both:
        engine.train()
    return trainer


def leave() -> None:
    """Ends the process without gloo's teardown, which a peer that has already gone can abort."""
    import sys

    sys.stdout.flush()
    os._exit(0)
