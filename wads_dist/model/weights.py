"""Trained weights as files: ``weights.safetensors`` with the configuration in its header."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from wads_dist.common.errors import ModelFileError
from wads_dist.config.load import recorded_config
from wads_dist.config.schema import Config
from wads_dist.model.layers import use_kernels
from wads_dist.model.networks import Wads
from wads_dist.runs.folder import WEIGHTS


def separate_model(config: Config, state: dict[str, Tensor]) -> Wads:
    """The network of ``state`` in evaluation mode, fp32, on the CPU; made without drawing initial weights."""
    architecture = config.model.model_copy(update={"weights": "random", "freeze_batchnorm": False})
    with torch.device("meta"):
        model = Wads(architecture, config.data.image_size)
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_weights(
    state: dict[str, Tensor],
    folder: Path,
    config: Config,
    category: str,
    threshold: str | None = None,
    features: dict[str, str] | None = None,
) -> None:
    """Generator, segmenter and experts as safetensors; in the header the configuration they need, the threshold (as
    ``threshold.json`` has it), and where the frozen network came from, with its licence
    (``features``, as ``load_network`` returns it)."""
    metadata = {"category": category, "config": config.to_toml()}
    if features:
        metadata["features"] = json.dumps(features)
    write_weights(folder, state, metadata | ({"threshold": threshold} if threshold else {}))


def write_weights(folder: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = folder / f".{WEIGHTS}"
    # Not save_file, whose files only their owner may read.
    temporary.write_bytes(save(state, metadata=metadata))
    temporary.replace(folder / WEIGHTS)


def trained_config(folder: Path) -> Config:
    """The configuration in the header of a category's weights.

    Raises:
        ModelFileError: the folder holds no weights, or those of a version with other settings.
    """
    path = _weights(folder)
    try:
        with safe_open(path, "pt") as weights:
            return recorded_config(weights.metadata()["config"])
    except Exception as error:
        raise ModelFileError(
            f"{path}: its header has no settings that this version of WADS-dist reads ({error}); score it with the version "
            "that trained it, or, if the file is damaged, train the category again"
        ) from error


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelFileError(
            f"{path}: no such file; the category has not finished training (run launch/train.py again)"
        )
    return path


def load_model(folder: Path, config: Config, device: torch.device) -> Wads:
    """The trained network of a category's folder, in evaluation mode.

    Raises:
        ModelFileError: the folder holds no weights, or weights of another architecture.
    """
    path = _weights(folder)
    # The weights are about to be replaced: building with random ones needs no download.
    architecture = config.model.model_copy(update={"weights": "random", "freeze_batchnorm": False})
    model = Wads(architecture, config.data.image_size)
    try:
        state = load_file(path)
        model.make_room(config, state)
        model.load_state_dict(state)
    except Exception as error:
        raise ModelFileError(f"{path} does not fit the model of {folder.parent / 'config.toml'}: {error}") from error
    use_kernels(model, config.trainer.kernels)
    return model.to(device).eval()
