"""Whole steps of the trainer where a GPU could go wrong; each case is run by its name, and prints what it saw.

All but ``layout``, ``graph`` and ``compile`` run on a CPU as well, to show that the program itself is right.
"""

import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import Samples, join, leave, small_config, small_trainer
from exact_resume import assert_same, everything
from lives import DATA
from torch import Tensor

from tests.support.fake_gpu import Layouts
from wads_dist.common.ranks import Ranks
from wads_dist.kernels.synthesis import Batch
from wads_dist.runs.record import code_version
from wads_dist.training import checkpoint, engines
from wads_dist.training.trainer import Trainer

IDS = 8
GOLDEN_STEPS = 5
SETTINGS = {
    "wads": ("--preset", "wads"),
    "difference, replicated edges": ("--model.difference", "true", "--model.padding", "replicate"),
}


def on_cpu(trainer: Trainer) -> Trainer:
    """``trainer``'s networks and its only batch on a CPU, for ``micro_batch`` alone."""
    twin = copy.copy(trainer)
    twin.generator_engine, twin.discriminator_engine = (
        SimpleNamespace(module=copy.deepcopy(e.module).cpu()) for e in trainer.both
    )  # type: ignore[assignment]
    batch = Batch(*(value.cpu() for value in vars(trainer.data.batch(torch.arange(IDS))).values()))
    twin.data = Mock(batch=lambda *_: batch)
    return twin


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The norm of the difference of all gradients, relative to theirs."""
    difference = sum((x.double().cpu() - y.double().cpu()).square().sum() for x, y in zip(a, b, strict=True))
    return float((difference / sum(y.double().cpu().square().sum() for y in b)) ** 0.5)


def kernels(ranks: Ranks) -> None:
    """Losses and gradients with our kernels are those of torch's own operators, on this device and on a CPU, in fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    ids = torch.arange(IDS, device=ranks.device)
    for what, settings in SETTINGS.items():
        losses, gradients = {}, {}
        for name in ("auto", "torch"):
            trainer = small_trainer(ranks, *settings, "--trainer.kernels", name)
            # The same samples for all: of those that are made twice, a pixel on the threshold may be another.
            samples = Samples(small_config(*settings, "--trainer.kernels", "torch"))
            batch = samples.batch(torch.arange(IDS, device=ranks.device))
            trainer.data = Mock(batch=lambda *_, batch=batch: batch)
            losses[name], gradients[name] = trainer.micro_batch(ids)
        losses["cpu"], gradients["cpu"] = on_cpu(trainer).micro_batch(ids.cpu())
        for other in ("torch", "cpu"):
            for name, loss in losses["auto"].items():
                assert abs(loss.item() - losses[other][name].item()) < 1e-4 * (1 + abs(loss.item())), (
                    what,
                    other,
                    name,
                )
            difference = apart(gradients["auto"], gradients[other])
            # fp32 itself is up to 1e-3 from fp64 here.
            assert difference < 1e-2, (what, other, difference)
            print(f"{what}: gradients differ from {other}'s by {difference:.1e}", flush=True)


def overflow(ranks: Ranks) -> None:
    """In fp16: a step that overflows is skipped, and a run that is saved then goes on as if it had not been stopped."""
    precision = "fp16" if ranks.device.type == "cuda" else "fp32"
    torch.use_deterministic_algorithms(True, warn_only=True)
    trainers = []
    with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder:
        for resumed in (False, True):
            trainer = small_trainer(ranks, "--trainer.precision", precision, "--trainer.ema", "0.9")
            if precision == "fp32":
                trainer.loss_scale.dynamic = True
            if resumed:
                assert checkpoint.resume(trainer, Path(folder), DATA)
            else:
                trainer.loss_scale.scale = 2.0**125  # over every type's limit
                trainer.step(0)
                assert trainer.progress.rejected == 1 and trainer.loss_scale.scale == 2.0**124
                trainer.loss_scale.scale = 2.0**10
                trainer.step(8)
                assert trainer.progress.rejected == 1
                assert checkpoint.save(trainer, Path(folder), DATA).path
            for _ in range(2):
                trainer.step(trainer.progress.next_sample)
            trainers.append(everything(trainer))
    print(f"overflow: {assert_same(*trainers, 'after the resume'):,} numbers are the same", flush=True)


def resume(ranks: Ranks) -> None:
    """With the deterministic switch every bit is that of the run that was not stopped, at ZeRO 0 and 1."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    for stage in (0, 1):
        states = []
        options = ["--trainer.deepspeed", f"configs/deepspeed/zero{stage}.json", "--trainer.ema", "0.9"]
        with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder:
            for resumed in (False, True):
                torch.manual_seed(0)
                trainer = small_trainer(
                    ranks, *options, "--trainer.deterministic", "true", "--trainer.precision", "auto"
                )
                if resumed:
                    assert checkpoint.resume(trainer, Path(folder), DATA)
                else:
                    for first in (0, 8):
                        trainer.step(first)
                    assert checkpoint.save(trainer, Path(folder), DATA).path
                for first in (16, 24):
                    trainer.step(first)
                states.append(everything(trainer))
        print(f"resume at ZeRO-{stage}: {assert_same(*states, 'after the resume'):,} numbers are the same", flush=True)


def layout(ranks: Ranks) -> None:
    """What the fake tensors promise: no convolution sees NCHW, nothing that normalises or upsamples runs in fp32."""
    for what, settings in (SETTINGS | {"paper_literal": ("--preset", "paper_literal")}).items():
        trainer = small_trainer(ranks, *settings, "--trainer.precision", "bf16")
        with Layouts(real=True) as seen:
            trainer.step(0)
        count = seen.count
        wrong = {k: n for k, n in count.items() if n and k.endswith(("NCHW", "norms in fp32", "upsamplings in fp32"))}
        assert count["convolutions"] > 100 and not wrong, (what, dict(count))
        print(f"{what}: {count['convolutions']} convolutions, none in NCHW", flush=True)


def same_steps(ranks: Ranks, prepare: str, precision: str, tolerance: float) -> None:
    """Three steps of the trainer as ``prepare`` says beside the eager one's, of which the second is rejected: how far apart
    their weights and BatchNorm's statistics are, relative to the way that the weights have come."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    options = ["--trainer.precision", precision, "--trainer.deepspeed", "configs/deepspeed/zero0.json"]
    options += ["--trainer.micro_batch_size", "8" if prepare == "reduce-overhead" else "4"]
    # As in fewer_launches.py: Adam would make steps of rounding.
    engines.adam = lambda module, rate, betas: torch.optim.SGD(module.parameters(), 100 * rate)  # type: ignore[assignment]
    states = []
    for changed in (False, True):
        setting = ["--trainer.cuda_graph", "true"] if prepare == "graph" else ["--trainer.compile", prepare]
        trainer = small_trainer(ranks, *options, *(setting if changed else ()), bad=frozenset({9}))
        start = [p.detach().clone() for p in trainer.parameters()]
        if changed and prepare == "graph":
            assert trainer.graph, trainer.why_no_graph
        elif changed:
            trainer.warm_up()
        for step in range(3):
            trainer.step(8 * step)
        assert trainer.progress.rejected == 1
        buffers = [b.float() for b in trainer.buffers()]
        states.append(([p.detach() - s for p, s in zip(trainer.parameters(), start, strict=True)], buffers))
    difference = max(apart(*both) for both in zip(*states, strict=True))
    assert difference <= tolerance, difference
    print(f"{prepare}, {precision}: the steps differ by {difference:.1e}", flush=True)


def golden(ranks: Ranks) -> None:
    """The losses of five steps are those that this type of device had before; the first run of one writes them to argv[3]."""
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
    known = Path(__file__).parents[2] / "golden" / f"{device.replace(' ', '-')}.json"
    seen: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        trainer = small_trainer(ranks, "--trainer.precision", precision, "--trainer.learning_rate", "1e-3")
        seen[precision] = [trainer.step(8 * step).means()["total"] for step in range(GOLDEN_STEPS)]
    if not known.is_file():
        new = Path(sys.argv[3]) / known.name
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"device": device, "versions": code_version(), "losses": seen}, indent=1) + "\n")
        print(f"no losses of {device} are known; these are in {new}: look at them, and put them into tests/golden")
        return
    before = json.loads(known.read_text())["losses"]
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 2e-2)):
        for step, (a, b) in enumerate(zip(seen[precision], before[precision], strict=True)):
            assert abs(a - b) < tolerance * abs(b), (precision, step, a, b)
    print(f"the losses of {device} are as known", flush=True)


def main() -> None:
    ranks, case = join(), sys.argv[1]
    if case == "graph":
        same_steps(ranks, case, "bf16", 0.0)
    elif case in ("default", "reduce-overhead"):
        for precision, tolerance in (("fp32", 1e-2), ("bf16", 0.2)):
            same_steps(ranks, case, precision, tolerance)
    else:
        globals()[case](ranks)
    leave()


if __name__ == "__main__":
    main()
