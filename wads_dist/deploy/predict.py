"""Anomaly maps, scores and decisions for images, from a trained or an exported model. In Python, three lines::

    from wads_dist.deploy.predict import load
    detector = load("runs/mvtec/hazelnut")  # or an exported model.onnx
    detector.predict("image.png").plot("out.png")

A trained model comes from ``weights.safetensors`` alone: its header holds the configuration, and nothing is unpickled. An
image is treated as test images are (``shards/images.py``, ``data.store_size``, ``data.image_size``), so that scores here
are those of the evaluation. Imports no DeepSpeed, which may print to standard output.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import Tensor

from wads_dist.common.errors import ConfigError, ModelFileError, WadsError, is_out_of_memory
from wads_dist.deploy.defaults import OVERLAP
from wads_dist.deploy.tiles import Floats, score_in_tiles
from wads_dist.evaluation.metrics import image_score
from wads_dist.kernels.synthesis import whole_images
from wads_dist.reporting.colours import heat_colours, levels
from wads_dist.runs.folder import THRESHOLD, WEIGHTS
from wads_dist.shards.errors import DataError
from wads_dist.shards.images import load_image, to_rgb, upright
from wads_dist.shards.names import printable, require_category

if TYPE_CHECKING:
    from wads_dist.model.networks import Wads

DESCRIPTION = "wads"  # key of the description in the metadata of an exported model
OUTLINE = (0, 255, 255)
TOO_LARGE = "make it smaller, or allow it with --max-pixels (in Python: PIL.Image.MAX_IMAGE_PIXELS)"

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Stored images uint8 [N, 3, S, S] -> anomaly probability [N, H, H], image score [N], float32; all on the CPU."""


@dataclass(frozen=True)
class Description:
    """What must be known beside the weights. ``threshold``: what ``threshold.json`` holds, if the model has one."""

    category: str
    image_size: int
    store_size: int
    score_window: int
    threshold: dict[str, Any] | None = None


@dataclass(frozen=True)
class Thresholds:
    """An image with at least this score, a pixel with at least this probability is anomalous; None: no decision."""

    image: float | None
    pixel: float | None
    source: str


@dataclass(frozen=True)
class Result:
    """One image (RGB), with everything at its resolution: ``probability`` float32 [height, width] in [0, 1]."""

    image: Image.Image
    probability: Floats
    score: float
    thresholds: Thresholds

    @property
    def decision(self) -> str | None:
        """ "anomalous" or "normal"; None without a threshold."""
        if self.thresholds.image is None:
            return None
        return "anomalous" if self.score >= self.thresholds.image else "normal"

    @cached_property
    def mask(self) -> NDArray[np.bool_] | None:
        """bool [height, width]; None without a threshold for pixels."""
        return None if self.thresholds.pixel is None else self.probability >= np.float32(self.thresholds.pixel)

    @property
    def area(self) -> float | None:
        """Fraction of the pixels that are anomalous."""
        return None if self.mask is None else float(self.mask.mean())

    @property
    def box(self) -> list[int] | None:
        """[x, y, width, height] around all anomalous pixels; None where there are none."""
        if self.mask is None or not self.mask.any():
            return None
        x, y = (np.flatnonzero(self.mask.any(axis)) for axis in (0, 1))
        return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]

    @cached_property
    def heat_map(self) -> Image.Image:
        return Image.fromarray(heat_colours(self.probability))

    def overlay(self) -> Image.Image:
        """The image under its heat map, the more opaque the higher the probability, with the mask's outline."""
        blended = Image.composite(self.heat_map, self.image, Image.fromarray(levels(self.probability, 130)))
        if (mask := self.mask) is not None:
            inner = binary_erosion(mask, iterations=max(1, max(mask.shape) // 200), border_value=1)
            blended.paste(OUTLINE, mask=Image.fromarray(mask & ~inner))
        return blended

    def pictures(self) -> dict[str, Image.Image]:
        """What is written for an image; ``scores`` is 16-bit grey, probability 0 to 1 as 0 to 65535."""
        scores = Image.fromarray(np.rint(self.probability * 65535).astype(np.uint16))
        masks = {} if self.mask is None else {"mask": Image.fromarray(self.mask).convert("L")}
        return {"scores": scores, "heat": self.heat_map, "overlay": self.overlay()} | masks

    def plot(self, path: str | Path) -> None:
        """Writes image, heat map and overlay side by side, with score and decision; the suffix says which format."""
        from matplotlib.figure import Figure

        height, width = self.probability.shape
        figure = Figure(figsize=(12, min(12.0, 4 * height / width + 0.6)), layout="constrained")
        pictures = {"image": self.image, "heat map": self.heat_map, "overlay": self.overlay()}
        for axis, (name, picture) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
            axis.imshow(np.asarray(picture))
            axis.set_title(name)
            axis.set_axis_off()
        decision = f"{self.decision}, threshold {self.thresholds.image:.3f}" if self.decision else "no threshold"
        figure.suptitle(f"score {self.score:.3f} ({decision})")
        figure.savefig(path, dpi=100)


@dataclass
class Detector:
    """A model ready to score images. ``batch_size`` falls by half whenever a batch does not fit into memory."""

    network: Network
    description: Description
    thresholds: Thresholds
    batch_size: int

    def predict(self, image: str | Path | Image.Image, tile: int | None = None, overlap: float = OVERLAP) -> Result:
        """One image of any size and mode.

        Args:
            tile: None: the whole image is resized to the network's input, as in training. Else an image with a longer side
                is scored in tiles of so many pixels a side, each resized in the same way, and its score is that of its
                highest tile; right for models whose training images showed as much as such a tile. The image threshold
                saved with a model is one of whole images: of many tiles of a normal image, one reaches it far more often.
            overlap: fraction of a tile, 0 to below 1, that neighbouring tiles share at least.

        Raises:
            DataError: no image, or a damaged one.
        """
        rgb = read_image(image)
        if tile is not None and max(rgb.size) > tile:
            return self.predict_tiles(rgb, tile, overlap)
        probability, score = self.score(stored_image(rgb, self.description.store_size)[None])
        return self.result(rgb, probability[0], score[0])

    def predict_tiles(self, rgb: Image.Image, tile: int, overlap: float) -> Result:
        best = 0.0

        def score(tiles: NDArray[np.uint8]) -> Floats:
            nonlocal best
            stored = [stored_image(Image.fromarray(part), self.description.store_size) for part in tiles]
            probability, scores = self.score(torch.stack(stored))
            best = max(best, float(scores.max()))
            return resize_maps(probability, tile, tile)

        blended = score_in_tiles(np.asarray(rgb), tile, overlap, score, self.batch_size)
        return Result(rgb, blended.clip(0, 1), best, self.thresholds)

    def score(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, 3, S, S] -> anomaly probability [N, H, H], image score [N].

        Raises:
            WadsError: the model gives numbers that are not finite.
        """
        side = self.description.image_size
        maps, scores = torch.empty(len(stored), side, side), torch.empty(len(stored))
        start = 0
        while start < len(stored):
            part = slice(start, start + self.batch_size)
            try:
                maps[part], scores[part] = self.network(stored[part])
            except Exception as error:
                if self.batch_size == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size //= 2
                continue
            start = part.stop
        if not (maps.isfinite().all() and scores.isfinite().all()):
            raise WadsError("the model gives scores that are not finite: its weights are damaged; train it again")
        return maps, scores

    def result(self, rgb: Image.Image, probability: Tensor, score: Tensor) -> Result:
        """From a map [H, H] and its score to the image's resolution."""
        return Result(rgb, resize_maps(probability[None], rgb.height, rgb.width)[0], float(score), self.thresholds)


def read_image(source: str | Path | Image.Image) -> Image.Image:
    """RGB, upright as viewers show it, as in training: turned by its EXIF orientation, if it has one.

    Raises:
        DataError: no image, or a damaged one; names it.
    """
    try:
        if isinstance(source, Image.Image):
            source.load()
            return to_rgb(upright(source))
        return to_rgb(load_image(_read(Path(source)), TOO_LARGE))
    except DataError as error:
        raise DataError(f"{source} {error}") from error
    except Exception as error:  # Pillow's readers let many kinds out of a damaged file
        raise DataError(f"{source} cannot be decoded ({type(error).__name__}: {error}); replace the file") from error


def _read(path: Path) -> bytes:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise DataError(f"{kind}; give an image file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); check its permissions") from error
    if not data:
        raise DataError("is empty; replace the file")
    return data


def stored_image(rgb: Image.Image, size: int) -> Tensor:
    """An image as ``shards.images.decode_image`` has it: uint8 [3, size, size], size = data.store_size."""
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def resize_maps(maps: Tensor, height: int, width: int) -> Floats:
    """[N, H, H] -> [N, height, width], bilinear (antialiased where it shrinks), within [0, 1]."""
    resized = F.interpolate(maps[:, None], (height, width), mode="bilinear", antialias=True)
    return resized.squeeze(1).clamp(0, 1).numpy()


def load(
    model: str | Path,
    threshold: float | None = None,
    pixel_threshold: float | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> Detector:
    """The detector of RUN/CATEGORY (or its ``weights.safetensors``), or of an exported ``model.onnx``.

    Args:
        threshold: score from which an image is anomalous; None: the one saved with the model, if it has any.
        pixel_threshold: probability from which a pixel is; None: likewise, whatever ``threshold`` is.
        batch_size: images at a time; None: as many as usually fit, fewer if they do not.
        device: None: a GPU if there is one.

    Raises:
        ModelFileError: the file is absent or not such a model.
        ConfigError: there is no such device.
    """
    path, where = Path(model), usable_device(device)
    if path.suffix == ".onnx":
        network, description, side = load_onnx(path, where)
    else:
        wads, description, _ = load_weights(path)
        network = torch_network(wads, description, where)
        bank = wads.experts.bank if wads.experts else None
        side = max(description.image_size, bank.size if bank else 0)
    thresholds = resolve_thresholds(threshold, pixel_threshold, description.threshold)
    usual = (32 if where.type == "cpu" else 256) * 128**2 // side**2
    return Detector(network, description, thresholds, batch_size or max(1, usual))


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: a GPU if there is one.

    Raises:
        ConfigError: torch has no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return accelerator or torch.device("cpu")
    there = ["cpu"]
    if accelerator:
        there += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(device) not in there:
        raise ConfigError([f"device: torch has no {printable(str(device))} here; there is {', '.join(there)}"])
    return torch.device(device)


def resolve_thresholds(image: float | None, pixel: float | None, saved: dict[str, Any] | None) -> Thresholds:
    """Those given, and for each that is not (None), the saved one."""
    of_model = f"saved with the model: {saved.get('source')}" if saved else "none: the model has no threshold"
    sources = [of_model if given is None else "given" for given in (image, pixel)]
    source = sources[0] if sources[0] == sources[1] else f"image {sources[0]}; pixel {sources[1]}"
    saved = saved or {}
    return Thresholds(
        saved.get("image") if image is None else image, saved.get("pixel") if pixel is None else pixel, source
    )


def load_weights(path: Path) -> "tuple[Wads, Description, dict[str, str]]":
    """The network of a category's folder or weights (evaluation mode, CPU), its description, and the file's header.

    The threshold is that of ``threshold.json`` beside the weights, which a person may have edited, else the header's.

    Raises:
        ModelFileError: no such file, or one without what this version needs.
    """
    from wads_dist.model.weights import read_model  # imports torchvision, which takes as long as torch

    path = path / WEIGHTS if path.is_dir() else path
    model = read_model(path)
    try:
        threshold = json.loads(model.header.get("threshold", "null"))
    except ValueError as error:
        raise ModelFileError(f"{path}: its header's threshold is not JSON ({error})") from error
    if (beside := path.with_name(THRESHOLD)).is_file():
        threshold = _read_threshold(beside, threshold)
    sizes = model.data.image_size, model.data.store_size, model.evaluation.score_window
    return model.network, Description(model.category, *sizes, threshold), model.header


def _read_threshold(path: Path, of_training: dict[str, Any] | None) -> dict[str, Any]:
    try:
        threshold: dict[str, Any] = json.loads(path.read_text())
        if not all(math.isfinite(threshold[name]) for name in ("image", "pixel")):
            raise ValueError("not finite")
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "correct it, or remove it to have those of the training"
        raise ModelFileError(f"{path}: holds no thresholds ({type(error).__name__}: {error}); {advice}") from error
    return threshold if threshold == of_training else threshold | {"source": f"{path}, edited"}


def torch_network(model: "Wads", description: Description, device: torch.device) -> Network:
    """Runs in fp32 (no TF32): half precision ties scores."""
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.backends.cudnn.allow_tf32 = False

    @torch.inference_mode()
    def run(stored: Tensor) -> tuple[Tensor, Tensor]:
        images = whole_images(stored, description.image_size).to(device, memory_format=torch.channels_last)
        seen = stored.to(device).float() / 255 if model.reads_stored else None
        probability = model.predict(images, seen).probability
        return probability.cpu(), image_score(probability, description.score_window).cpu()

    return run


def network_input(stored: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, S, S] -> float32 [N, 3, side, side] in [0, 1]."""
    return stored.float() / 255 if stored.shape[-1] == side else whole_images(stored, side)


def load_onnx(path: Path, device: torch.device) -> tuple[Network, Description, int]:
    """Runs an exported model under onnxruntime, on its CUDA provider if that is installed and asked for; the side of the images
    that it takes.

    Raises:
        ModelFileError: no such file, not an exported model, or no onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelFileError(f"{path}: needs onnxruntime; pip install onnxruntime") from error
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(path, providers=providers)
        content = json.loads(session.get_modelmeta().custom_metadata_map[DESCRIPTION])
        description = Description(**{name: content[name] for name in Description.__dataclass_fields__})
        require_category(description.category)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}" if path.is_file() else "no such file"
        raise ModelFileError(f"{path}: not a model that wads export has written ({problem})") from error

    side = session.get_inputs()[0].shape[-1]

    def run(stored: Tensor) -> tuple[Tensor, Tensor]:
        images = network_input(stored, side)
        probability, score = session.run(["probability", "score"], {"image": images.numpy()})
        return torch.from_numpy(probability), torch.from_numpy(score)

    return run, description, side
