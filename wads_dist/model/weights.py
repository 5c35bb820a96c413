"""Trained weights as files: ``weights.safetensors`` with the configuration in its header."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from wads_dist.common.errors import ModelFileError
from wads_dist.config.load import recorded_config, written_sections
from wads_dist.config.schema import Config, DataConfig, EvaluationConfig, ExpertsConfig, FeaturesConfig, ModelConfig
from wads_dist.model.layers import use_kernels
from wads_dist.model.networks import Wads
from wads_dist.runs.folder import WEIGHTS
from wads_dist.shards.names import require_category

RANDOM = {"weights": "random", "freeze_batchnorm": False}


@dataclass(frozen=True)
class TrainedModel:
    """A trained category as its weights alone tell it."""

    network: Wads
    """In evaluation mode, fp32, on the CPU; without Triton, which asks for a compiler that there need not be here."""
    category: str
    data: DataConfig
    evaluation: EvaluationConfig
    header: dict[str, str]


def read_model(path: Path) -> TrainedModel:
    """A category's folder, or its weights. Only those sections of its configuration are read that a network needs, so that
    settings of another version elsewhere do no harm.

    Raises:
        ModelFileError: no such file, or one without what this version needs.
    """
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ModelFileError(
            f"{path}: no such file; give RUN/CATEGORY of a category that has finished training, or an exported model.onnx"
        )
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        sections = written_sections(header["config"])
        data, evaluation = DataConfig(**sections["data"]), EvaluationConfig(**sections["evaluation"])
        settings = Config(
            model=ModelConfig(**sections["model"] | RANDOM),
            features=FeaturesConfig(**sections.get("features", {}) | {"weights": None}),
            experts=ExpertsConfig(**sections.get("experts", {})),
        )
        network = _built(settings, data.image_size, state)
        use_kernels(network, "torch")
        require_category(header["category"])
    except Exception as error:
        raise ModelFileError(
            f"{path}: not weights that this version of WADS-dist has written ({type(error).__name__}: {error})"
        ) from error
    return TrainedModel(network, header["category"], data, evaluation, header)


def separate_model(config: Config, state: dict[str, Tensor]) -> Wads:
    """The network of ``state``, without experts, in evaluation mode, fp32, on the CPU."""
    without = config.model_copy(
        update={"model": config.model.model_copy(update={"features": "none"}), "experts": ExpertsConfig()}
    )
    return _built(without, config.data.image_size, state)


def _built(config: Config, image_size: int, state: dict[str, Tensor]) -> Wads:
    """Without drawing initial weights, and without downloading any, since they are about to be replaced."""
    with torch.device("meta"):
        model = Wads(config.model.model_copy(update=RANDOM), image_size)
        model.make_room(config, state)
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
        raise ModelFileError(f"{path}: no such file; the category has not finished training (run the training again)")
    return path


def load_model(folder: Path, config: Config, device: torch.device) -> Wads:
    """The trained network of a category's folder, in evaluation mode.

    Raises:
        ModelFileError: the folder holds no weights, or weights of another architecture.
    """
    path = _weights(folder)
    try:
        # Copies: the file may be replaced while its tensors are in use, and need not begin where vectors like to.
        state = {name: value.clone() for name, value in load_file(path).items()}
        model = _built(config, config.data.image_size, state)
    except Exception as error:
        raise ModelFileError(f"{path} does not fit the model of {folder.parent / 'config.toml'}: {error}") from error
    use_kernels(model, config.trainer.kernels)
    return model.to(device)
