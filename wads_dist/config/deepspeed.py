"""DeepSpeed's JSON file, completed from our configuration and checked against it.

The JSON file is the place for what is DeepSpeed's own: ZeRO stage, bucket sizes, communication. Batch sizes, precision
and clipping are ours, and are filled in; a file that says otherwise is refused, because DeepSpeed would follow the file
and the run would silently not be the one that was asked for.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from wads_dist.common.errors import ConfigError
from wads_dist.common.files import PACKAGE, shipped
from wads_dist.config.schema import Precision, TrainerConfig, resolve_batches

MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")


def resolve_precision(setting: Literal["auto", "bf16", "fp16", "fp32"], device_type: str) -> Precision:
    """The precision that ``trainer.precision`` means on a device ("cpu" or "cuda").

    Raises:
        ConfigError: fp16 on a CPU, which has no speed to gain from it.
    """
    if setting == "fp16" and device_type == "cpu":
        raise ConfigError(["trainer.precision: fp16 needs a GPU; on a CPU use bf16, fp32 or auto"])
    if setting != "auto":
        return setting
    if device_type == "cpu":
        # Without these instructions bf16 works, but is emulated, and slower than fp32.
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def deepspeed_config(trainer: TrainerConfig, world_size: int, stage: int | None = None) -> dict[str, Any]:
    """The dictionary to give to ``deepspeed.initialize`` for either engine; a new one at each call.

    No precision block is written, and none is accepted: weights, gradients and optimisers are fp32 to DeepSpeed, the
    networks open autocast themselves, and for fp16 the trainer scales the loss. DeepSpeed's ``bf16`` block breaks
    BatchNorm, whose buffers stay fp32; its ``torch_autocast`` with float16 never lowers its scale after an overflow at
    ZeRO 1 to 3 (step() returns before GradScaler.update()) and clips gradients that are still scaled.

    Args:
        trainer: the run's section of that name.
        world_size: ranks that train this model together.
        stage: the ZeRO stage to use in the place of the file's.

    Raises:
        ConfigError: the file is missing, is not JSON, or contradicts the configuration; names the file and the key.
    """
    path, settings = read_settings(trainer)
    micro, accumulation = resolve_batches(trainer, world_size)
    problems: list[str] = []

    def fill(key: str, value: float, ours: str) -> None:
        if key in settings and settings[key] != value:
            problems.append(
                f"{path}: {key} is {settings[key]!r}, but {ours} makes it {value!r}; remove it from the file"
            )
        settings[key] = value

    fill("train_batch_size", trainer.global_batch_size, "trainer.global_batch_size")
    fill("train_micro_batch_size_per_gpu", micro, f"trainer.micro_batch_size on {world_size} ranks")
    fill("gradient_accumulation_steps", accumulation, "trainer.global_batch_size / (micro batch x ranks)")
    # Always filled: DeepSpeed's own default is 1.0, not off.
    fill("gradient_clipping", trainer.gradient_clipping, "trainer.gradient_clipping")

    problems += _misplaced(path, settings)
    zero, of_file, wrong = _zero_block(path, settings, trainer)
    problems += wrong
    if problems:
        raise ConfigError(problems)
    # By default the throughput timer waits for the device at every forward pass and in every step of either engine: five
    # times a step.
    timers = settings.get("timers", {})
    settings["timers"] = timers | {"throughput": {"enabled": False} | timers.get("throughput", {})}
    if stage is None:
        stage = of_file
    elif stage != of_file:
        zero = {name: value for name, value in zero.items() if name != "compute_grad_norm"} | {"stage": stage}
        settings["zero_optimization"] = zero
    if stage in (1, 2) and not trainer.gradient_clipping:
        # The trainer has looked at all gradients before it lets an engine step; DeepSpeed would take their norm again, and
        # wait for the device to read it. (At ZeRO-3 it always does.)
        settings["zero_optimization"] = {"compute_grad_norm": False} | zero
    return settings


def _misplaced(path: Path, settings: dict[str, Any]) -> Iterator[str]:
    """What is in the file and is decided elsewhere, or needs what is not installed."""
    owners = {
        "optimizer": "Adam with trainer.learning_rate and trainer.betas is built by the trainer",
        "scheduler": "use trainer.schedule and trainer.warmup",
        "elasticity": "DeepSpeed removed elastic training",
    }
    yield from (f"{path}: {key} does not belong here: {why}" for key, why in owners.items() if key in settings)
    for block in ("fp16", "bf16", "bfloat16", "amp", "torch_autocast"):
        if _enabled(settings.get(block)):
            yield f"{path}: {block}.enabled does not belong here: use trainer.precision"
    if _enabled(settings.get("tensorboard")) and importlib.util.find_spec("tensorboard") is None:
        yield f"{path}: tensorboard is enabled but not installed: pip install tensorboard"


def _zero_block(path: Path, settings: dict[str, Any], trainer: TrainerConfig) -> tuple[dict[str, Any], int, list[str]]:
    """The file's ``zero_optimization``, its stage, and what is wrong with them."""
    problems = []
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f'{path}: zero_optimization is {zero!r}; must be an object, such as {{"stage": 1}}')
        zero = {}
    of_file = zero.get("stage", 0)
    if type(of_file) is not int or of_file not in (0, 1, 2, 3):
        problems.append(f"{path}: zero_optimization.stage is {of_file!r}; allowed: 0, 1, 2, 3")
    if zero.get("compute_grad_norm") is False and (trainer.gradient_clipping or of_file not in (1, 2)):
        problems.append(
            f"{path}: zero_optimization.compute_grad_norm is false: DeepSpeed takes that at the stages 1 and 2 without "
            "trainer.gradient_clipping only; remove it from the file (it is filled in where it pays)"
        )
    for block in ("offload_optimizer", "offload_param"):
        if (zero.get(block) or {}).get("device", "none") != "none":
            problems.append(
                f"{path}: zero_optimization.{block} is not supported: gradients would be out of reach of the check that "
                "decides whether a step is taken"
            )
    return zero, of_file, problems


def with_monitors(settings: dict[str, Any], folder: Path, category: str) -> dict[str, Any]:
    """``settings`` with ``tensorboard`` and ``csv_monitor``, where it enables them, writing to ``folder/CATEGORY``: by
    DeepSpeed's defaults all categories would write to one place. A path given in the file is kept; the category is added."""
    result = dict(settings)
    for name in ("tensorboard", "csv_monitor"):
        if _enabled(result.get(name)):
            result[name] = {"output_path": str(folder)} | result[name] | {"job_name": category}
    return result


def without_monitors(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` for the second engine: every engine builds its own monitors, and one is enough."""
    return {key: value for key, value in settings.items() if key not in MONITORS}


def read_settings(trainer: TrainerConfig) -> tuple[Path, dict[str, Any]]:
    """DeepSpeed's file as it stands, and where it was found.

    Raises:
        ConfigError: there is none, or it is not a JSON object.
    """
    path = shipped(trainer.deepspeed.expanduser())
    return path, _read(path)


def _enabled(block: Any) -> bool:
    return bool(block.get("enabled", False)) if isinstance(block, dict) else bool(block)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError([f"trainer.deepspeed: {path} line {error.lineno}: {error.msg}"]) from None
    except FileNotFoundError:
        raise ConfigError([f"trainer.deepspeed: no file {path}, nor one of that name in {PACKAGE}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"trainer.deepspeed: cannot read {path}: {error}"]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"trainer.deepspeed: {path} must hold a JSON object"])
    return settings
