"""The joint training step beside what one would write in plain PyTorch, in one run on one rank or several.

    PYTHONPATH=. python benchmarks/training_step.py [--backbones resnet18 resnet50] [--batch 16] [--rounds 5]
[--compile default reduce-overhead] [--json FILE] [SETTINGS]
    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/training_step.py …      (--batch is that of all ranks)

All train the same networks from the same weights with the same losses; rows take turns, a step each, and medians are compared:

* ``eager NCHW fp32``: as it is first written. Contiguous layout, fp32, passes of the discriminator for L_adv and L_disc, the
  losses in PyTorch, one batch in memory again and again.
* ``eager channels_last bf16`` (or what ``trainer.precision`` is here): the same with channels_last, autocast, fused Adam, and
  our compiled losses.
* ``the same, DDP``: in torch's DistributedDataParallel; among several ranks only this and ours add up their gradients.
* ``our step, no DeepSpeed``: the trainer's step with synthesis, in plain PyTorch.
* ``ours``: ``Trainer.step``, what a run does: synthesis, both engines, the agreement on finiteness.
* with ``--compile MODE ...``, ``ours, MODE``: the same with the networks compiled by torch.compile in that mode (``default``;
  ``reduce-overhead``, which on a GPU means CUDA graphs; ``max-autotune``), or, as ``graph``, with ``trainer.cuda_graph`` (one
  rank on a GPU). One that fails says why and is left out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from wads_dist.common.errors import ConfigError
from wads_dist.common.ranks import Ranks
from wads_dist.config.deepspeed import resolve_precision
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.kernels.objective import objective
from wads_dist.kernels.synthesis import Batch
from wads_dist.model.layers import use_kernels
from wads_dist.model.networks import Discriminator, Wads
from wads_dist.profiling.step import RandomImages, threads_of
from wads_dist.profiling.timing import measure_device
from wads_dist.runs.record import code_version
from wads_dist.scheduler.rendezvous import unless_launched
from wads_dist.shards.arguments import Parser, local_path
from wads_dist.training.checkpoint import zero_stage
from wads_dist.training.graph import compile_networks
from wads_dist.training.loop import initialise
from wads_dist.training.losses import WithGradient, adversarial_loss, discriminator_loss, objective_weights
from wads_dist.training.timing import synchronise
from wads_dist.training.trainer import Trainer


class PlainLoop:
    """The same step without DeepSpeed: ``tuned`` has channels_last, bf16, fused Adam and compiled losses, ``synthesis`` makes
    its batches, ``shared`` passes every image through the discriminator once, ``ddp`` adds up gradients over the ranks."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        tuned: bool,
        synthesis: bool = False,
        shared: bool = False,
        ddp: bool = False,
    ) -> None:
        device = ranks.device
        torch.manual_seed(config.trainer.seed)
        self.config, self.tuned, self.synthesis, self.shared = config, tuned, synthesis, shared
        precision = resolve_precision(config.trainer.precision, device.type) if tuned else "fp32"
        size, width = config.data.image_size, config.model.width
        layout = torch.channels_last if tuned else torch.contiguous_format
        self.wads = Wads(config.model, size, precision).to(device).to(memory_format=layout)
        self.discriminator = Discriminator(size, width, precision).to(device).to(memory_format=layout)
        self.parallel_wads, self.parallel_d = (
            (DistributedDataParallel(net) if ddp else net) for net in (self.wads, self.discriminator)
        )
        if not tuned:
            use_kernels(self.wads, "torch")
            use_kernels(self.discriminator, "torch")
            generator = self.wads.generator
            # Ours turns the decoder's first map to channels_last, and all that follows with it.
            generator.decode = lambda z, _: (torch.tanh(generator.decoder(z[:, :, None, None].contiguous())) + 1) / 2
        rate, betas = config.trainer.learning_rate, config.trainer.betas
        self.optimizers = [
            torch.optim.Adam(net.parameters(), rate, betas, fused=tuned or None)
            for net in (self.wads, self.discriminator)
        ]
        self.data, self.weights = RandomImages(config, device), objective_weights(config.objective)
        self.ids = torch.arange(config.trainer.global_batch_size // ranks.world_size, device=device)
        first = self.data.batch(self.ids)
        self.kept = Batch(
            first.clean.contiguous(memory_format=layout), first.anomalous.contiguous(memory_format=layout), first.mask
        )

    def step(self) -> None:
        batch, w = self.data.batch(self.ids) if self.synthesis else self.kept, self.config.objective
        self.ids = self.ids + len(self.ids)
        x_hat, logits, z, z_hat = self.parallel_wads(batch.clean, batch.anomalous, True)
        backend = self.config.trainer.kernels if self.tuned else "torch"
        loss = objective(batch.clean, x_hat, logits, batch.mask, self.weights, backend).total
        loss = loss + w.latent.weight * F.mse_loss(z_hat.float(), z.float())
        adversarial, discriminator = (self.shared_pass if self.shared else self.passes)(batch, x_hat)
        (loss + w.adversarial.weight * adversarial).backward()
        discriminator().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def passes(self, batch: Batch, x_hat: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """L_adv, and how to compute L_disc: a pass of its own over each image for either."""
        with torch.no_grad():
            real = self.discriminator(batch.clean)
        self.discriminator.requires_grad_(False)
        adversarial = adversarial_loss(self.config.objective.adversarial.form, self.discriminator(x_hat), real)
        self.discriminator.requires_grad_(True)
        images = torch.cat([batch.clean, x_hat.detach().to(batch.clean.dtype)])
        return adversarial, lambda: discriminator_loss(*self.parallel_d(images)[1].chunk(2))

    def shared_pass(self, batch: Batch, x_hat: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """The same from one pass, as the trainer does it."""
        seen = x_hat.detach().requires_grad_()
        real, fake = self.discriminator(batch.clean), self.discriminator(seen)
        value = adversarial_loss(self.config.objective.adversarial.form, fake, real)
        (gradient,) = torch.autograd.grad(value, seen, retain_graph=True)
        loss = discriminator_loss(real[1], fake[1])
        return WithGradient.apply(x_hat, value.detach(), gradient, 1.0), lambda: loss


class Ours:
    """The trainer, its networks compiled if a mode of torch.compile is given, or its step a CUDA graph (``graph``)."""

    def __init__(self, config: Config, ranks: Ranks, mode: str | None = None) -> None:
        if mode == "graph":
            config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"cuda_graph": True})})
        stage = zero_stage(None, ranks.world_size)
        self.trainer = Trainer(config, ranks, RandomImages(config, ranks.device), stage=stage)  # type: ignore[arg-type]
        self.position = 0
        for engine in self.trainer.both:
            engine.train()
        if mode == "graph":
            if self.trainer.why_no_graph:
                raise ConfigError([self.trainer.why_no_graph])
        elif mode:
            compile_networks(self.trainer.both, mode)
            self.trainer.warm_up()

    def step(self) -> None:
        self.trainer.step(self.position)
        self.position += self.trainer.config.trainer.global_batch_size


def prepared(config: Config, ranks: Ranks, mode: str) -> Callable[[], None] | str:
    """The step with compiled networks, or as a graph, once it is so; or why there is none."""
    started = time.perf_counter()
    try:
        ours = Ours(config, ranks, mode)
        for _ in range(3):
            ours.step()
        synchronise(ranks.device)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(f"{mode}: {time.perf_counter() - started:.0f} s until the third step was done", flush=True)
    return ours.step


def seconds(steps: dict[str, Callable[[], None]], ranks: Ranks, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each, over ``rounds`` rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            synchronise(ranks.device)
            ranks.barrier()
            started = time.perf_counter()
            step()
            synchronise(ranks.device)
            if i:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(config: Config, ranks: Ranks, rounds: int, modes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is known of each: of all that is eager first, then with a mode more each time, which takes turns with ours."""
    ours = Ours(config, ranks)
    steps: dict[str, Callable[[], None]] = {
        "eager NCHW fp32": PlainLoop(config, ranks, tuned=False).step,
        f"eager channels_last {ours.trainer.precision}": PlainLoop(config, ranks, tuned=True).step,
        "the same, DDP": PlainLoop(config, ranks, tuned=True, ddp=True).step,
        "our step, no DeepSpeed": PlainLoop(config, ranks, tuned=True, synthesis=True, shared=True).step,
        "ours": ours.step,
    }
    batch = config.trainer.global_batch_size
    measured = seconds(steps, ranks, rounds)
    result: dict[str, Any] = {
        "backbone": config.model.backbone,
        "width": config.model.width,
        "image_size": config.data.image_size,
        "batch": batch,
        "precision": ours.trainer.precision,
        "images_per_second": {name: batch / value for name, value in measured.items()},
        "ours_is_times": {name: value / measured["ours"] for name, value in measured.items()},
    }
    del steps  # their memory
    yield result
    for mode in modes:
        step = prepared(config, ranks, mode)
        if isinstance(step, str):
            print(f"{mode}: failed; {step}", flush=True)
            continue
        name = f"ours, {mode}"
        measured = seconds({"ours": ours.step, name: step}, ranks, rounds)
        result["images_per_second"][name] = batch / measured[name]
        result["ours_is_times"][name] = measured[name] / measured["ours"]
        yield result


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile", nargs="+", default=[], metavar="MODE", help="also with torch.compile in these modes"
    )
    parser.add_argument("--json", type=local_path, help="also write the numbers there")
    given, settings = parser.parse_known_args()
    unless_launched()
    device = measure_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")).name
    results: list[dict[str, Any]] = []
    ranks: Ranks | None = None
    for backbone in given.backbones:
        # The sizes of configs/hazelnut.toml and of configs/mvtec.toml.
        sizes = ["--model.width", "32", "--model.fpn_width", "64"] if backbone == "resnet18" else []
        base = ["--model.backbone", backbone, *sizes, "--trainer.global_batch_size", str(given.batch)]
        config = load_config([*base, "--trainer.deepspeed", "configs/deepspeed/zero0.json", *settings])
        ranks = ranks or initialise(config, threads_of(config))
        of_backbone = len(results)
        for result in compare(config, ranks, given.rounds, given.compile):
            results[of_backbone:] = [result]
            if given.json and ranks.is_first:  # as far as it is known: the next mode may take too long
                content = {"device": device, "versions": code_version(), "results": results}
                given.json.write_text(json.dumps(content, indent=1))
        if ranks.is_first:
            Console().print(table_of(results[-1], ranks))


def table_of(result: dict[str, Any], ranks: Ranks) -> Table:
    title = f"{result['backbone']}, {result['image_size']}², batch {result['batch']}, {ranks.world_size} ranks"
    table = Table("", "images/s", "ours is", title=title, title_justify="left")
    for name, rate in result["images_per_second"].items():
        table.add_row(name, f"{rate:.2f}", f"{result['ours_is_times'][name]:.2f}×")
    return table


if __name__ == "__main__":
    main()
