"""``trainer.find_batch_size``: how many samples a rank should take in one forward pass, by trying.

The global batch is part of the recipe and stays; what is looked for is the micro-batch with which the rank is fastest in the
memory that it has. The networks are tried without DeepSpeed (whose own autotuner starts a job for each try, and knows one
engine): without collectives a rank may run out of memory alone, and its peers learn of it afterwards. Weights, gradients and
Adam's moments are whole, so that at ZeRO 1 to 3 there is memory to spare.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from wads_dist.common.errors import ConfigError, is_out_of_memory
from wads_dist.common.files import write_text
from wads_dist.common.heartbeat import Heartbeat
from wads_dist.common.host_memory import give_back_freed_memory
from wads_dist.common.ranks import Ranks
from wads_dist.config.deepspeed import resolve_precision
from wads_dist.config.schema import Config
from wads_dist.data.training import TrainingData
from wads_dist.model.layers import use_kernels
from wads_dist.model.networks import Discriminator, Wads
from wads_dist.runs.folder import BATCH_SIZE
from wads_dist.training import engines
from wads_dist.training.losses import objective_weights
from wads_dist.training.progress import Progress
from wads_dist.training.timing import synchronise
from wads_dist.training.trainer import Trainer

LEAST = 8
"""Fewer samples are tried only if so many do not fit: BatchNorm's statistics are of one forward pass."""
STEPS = 3
SLOWER = 1.1
"""A try that takes so many times as long for a sample as the best one ends the search."""
MEMORY = 0.9
"""The fraction of the memory that a try may reach: fragments, buckets and evaluation need some as well."""


class Bare(nn.Module):
    """A network where the trainer expects DeepSpeed's engine."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor | bool) -> tuple[Tensor, ...]:
        return self.module(*inputs)


class Rehearsal(Trainer):
    """The trainer's step in plain PyTorch, on this rank alone."""

    def __init__(self, config: Config, ranks: Ranks, data: TrainingData) -> None:
        # Marks of its own: a rank that runs out of memory passes fewer than its peers, who must not blame it for it later.
        self.config, self.ranks, self.data, self.heartbeat, self.progress = config, ranks, data, Heartbeat(), Progress()
        self.precision = resolve_precision(config.trainer.precision, ranks.device.type)
        self.weights = objective_weights(config.objective)
        self.loss_scale = engines.LossScale.for_precision(self.precision)
        size, rate, betas = config.data.image_size, config.trainer.learning_rate, config.trainer.betas
        wads = Wads(config.model, size, self.precision).to(ranks.device)
        discriminator = Discriminator(size, config.model.width, self.precision).to(ranks.device)
        for network in (wads, discriminator):
            use_kernels(network, config.trainer.kernels)
        self.generator_engine, self.discriminator_engine = Bare(wads).train(), Bare(discriminator).train()
        self.optimizers = [engines.adam(network, rate, betas) for network in self.both]

    def seconds(self, micro: int) -> float:
        """Time of the passes of ``micro`` samples; infinite if there is not the memory."""
        device, elapsed, used = self.ranks.device, [], 0.0
        try:
            for i in range(STEPS + 1):  # the first warms up
                synchronise(device)
                started = time.perf_counter()
                losses = self.losses(self.data.batch(torch.arange(micro, device=device)))
                if i == 0:
                    used = memory_used(device)  # of a host: while all that backward needs is there
                losses["total"].backward()
                losses["discriminator"].backward()
                synchronise(device)
                elapsed.append(time.perf_counter() - started)
                for optimizer in self.optimizers:  # once a global batch, however it is divided: not timed
                    optimizer.step()
                    optimizer.zero_grad()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        finally:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            used = max(used, memory_used(device))
            give_back_freed_memory()  # or it would count against the next try, and stay with the worker
        return math.inf if used > MEMORY else min(elapsed[1:])


def memory_used(device: torch.device) -> float:
    """The fraction of a GPU's memory that was in use at most since the last call; of this host's, now, with the freed blocks
    that a worker keeps."""
    if device.type == "cpu":
        return psutil.virtual_memory().percent / 100
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    used = (others + torch.cuda.max_memory_allocated(device)) / total
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.empty_cache()
    return used


def choose(share: int, seconds_a_sample: Callable[[int], float]) -> dict[int, float]:
    """Tries divisors of a rank's ``share`` of the global batch: seconds a sample of each, infinite where it does not fit."""
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    least = min(LEAST, share)
    tried: dict[int, float] = {}
    for micro in [n for n in divisors if n >= least]:
        tried[micro] = seconds_a_sample(micro)
        if math.isinf(tried[micro]) or tried[micro] > SLOWER * min(tried.values()):
            break
    for micro in [n for n in reversed(divisors) if n < least]:
        if not math.isinf(min(tried.values())):
            break
        tried[micro] = seconds_a_sample(micro)
    return tried


def find_batch_size(config: Config, ranks: Ranks, data: TrainingData, folder: Path) -> tuple[Config, dict[int, float]]:
    """``config`` with ``trainer.micro_batch_size`` as found now or, on as many ranks with such devices, by an earlier start (it
    is recorded in ``folder``, so that a run which goes on takes the same steps); and the images/s of each that was tried now,
    of its forward and backward passes alone. Collective.

    Raises:
        ConfigError: not even one sample fits.
    """
    record = folder / BATCH_SIZE
    about = {
        "world_size": ranks.world_size,
        "global_batch_size": config.trainer.global_batch_size,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type,
        "precision": resolve_precision(config.trainer.precision, ranks.device.type),
    }
    before = json.loads(record.read_text()) if ranks.is_first and record.is_file() else {}
    # As the first rank sees it: another node may not see the file yet, and all must try, or none.
    found = ranks.gather(before.get("micro_batch_size") if before | about == before else None)[0]
    rates: dict[int, float] = {}
    if found is None:
        rehearsal = Rehearsal(config, ranks, data)
        tried = choose(
            config.trainer.global_batch_size // ranks.world_size,
            lambda micro: max(ranks.gather(rehearsal.seconds(micro) / micro)),
        )
        found = min(tried, key=lambda micro: tried[micro])
        if math.isinf(tried[found]):
            raise ConfigError(
                [
                    "trainer.find_batch_size: a step of one sample does not fit into this device's memory; take smaller "
                    "networks (model.backbone, model.width, data.image_size) or a device that nothing else uses"
                ]
            )
        rates = {micro: round(ranks.world_size / seconds, 3) for micro, seconds in tried.items()}
        if ranks.is_first:
            write_text(record, json.dumps(about | {"micro_batch_size": found, "images_per_second": rates}))
    trainer = config.trainer.model_copy(update={"micro_batch_size": found, "find_batch_size": False})
    return config.model_copy(update={"trainer": trainer}), rates
