"""A trained category as ONNX and as a ``torch.export`` program, with all that is needed to use it elsewhere.

Both take images float32 [N, 3, H, H] in [0, 1], N free, and give reconstruction, probability map and image score. How an
image becomes such a tensor, the thresholds and the versions are inside each file and beside them in ``model.json``. An
artefact is run before it is published, and refused if it does not say what the checkpoint says.
"""

import copy
import importlib.util
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wads_dist import __version__
from wads_dist.common.errors import ExitCode, ModelFileError, WadsError
from wads_dist.deploy.defaults import FILES, MAX_IMAGES, TOLERANCE
from wads_dist.deploy.predict import DESCRIPTION, Description, load_weights, network_input, read_image, stored_image
from wads_dist.deploy.predict_files import find_images
from wads_dist.evaluation.metrics import image_score
from wads_dist.model.networks import Wads
from wads_dist.runs.folder import WEIGHTS
from wads_dist.shards.addresses import public
from wads_dist.shards.errors import DataError
from wads_dist.shards.files import sha256_file, write_atomically
from wads_dist.shards.names import within

OPSET = 18
OUTPUTS = ("reconstruction", "probability", "score")
MODEL_JSON = "model.json"

Run = Callable[[Tensor], Sequence[Tensor]]


class Deployed(nn.Module):
    """What is exported: images float32 [N, 3, H, H] in [0, 1] -> reconstruction [N, 3, H, H], anomaly probability [N, H, H],
    image score [N]. A model with a frozen network takes the stored images, [N, 3, S, S]."""

    def __init__(self, model: Wads, description: Description) -> None:
        super().__init__()
        self.model, self.score_window = model, description.score_window
        self.image_size = description.image_size
        self.side = description.store_size if model.reads_stored else description.image_size

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stored, size = image, (self.image_size, self.image_size)
        if self.model.reads_stored:
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)  # as ``whole_images``
        reconstruction, probability, *_ = self.model.predict(image, stored)
        return reconstruction, probability, image_score(probability, self.score_window)


@torch.no_grad()
def export(
    folder: Path, out: Path, formats: Sequence[str], images: Path | None = None, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Exports RUN/CATEGORY to ``out``; returns what ``model.json`` holds. Nothing is published if a format does not agree.
    A format that an earlier export left there is removed: it may be of other weights.

    Args:
        formats: of "onnx" and "torch".
        images: folder of images (or one) on which parity is measured; None: random ones.
        tolerance: largest difference allowed in any element of any output.

    Raises:
        WadsError: no usable model, or the packages for ONNX are missing.
        DataError: ``images`` holds no image that can be read.
    """
    if "onnx" in formats:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ModelFileError(f"--format onnx needs more packages: pip install {' '.join(missing)}")
    model, description, header = load_weights(folder)
    weights = folder / WEIGHTS if folder.is_dir() else folder
    module = Deployed(model, description).eval()
    side = module.side
    content = described(description, header, weights, side)
    tensors = parity_images(images, description, side)
    batches = [part for part in (tensors[:1], *tensors[1:].split(5)) if len(part)]  # of 1, of 5, and of what is left
    expected = [module(batch) for batch in batches]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as temporary:
        report: dict[str, Any] = {}
        for name in formats:
            path = Path(temporary) / FILES[name]
            run = (export_onnx if name == "onnx" else export_torch)(module, side, path, json.dumps(content))
            differences = largest_differences(expected, run, batches)
            report[name] = {"file": path.name, "sha256": sha256_file(path), "parity": differences}
            report[name] |= {"opset": OPSET} if name == "onnx" else {}
        agrees = all(difference <= tolerance for r in report.values() for difference in r["parity"].values())
        content |= {
            "formats": report,
            "parity_images": {"source": str(images or "random"), "count": len(tensors), "tolerance": tolerance},
            "agrees": agrees,
        }
        if agrees:
            publish(content, Path(temporary), out)
        else:
            # Tells a network that rounding alone moves so much from an export that is wrong.
            content["checkpoint_rounding"] = largest_differences(expected, in_fp64(module), batches)
    return content


def publish(content: dict[str, Any], made: Path, out: Path) -> None:
    """Moves the formats to where they belong, and ``model.json`` last."""
    for name, file in FILES.items():
        if name in content["formats"]:
            os.replace(made / file, out / file)
        else:
            (out / file).unlink(missing_ok=True)
    write_atomically(out / MODEL_JSON, json.dumps(content, indent=1) + "\n")


def described(description: Description, header: dict[str, str], weights: Path, side: int) -> dict[str, Any]:
    """What ``model.json`` says before anything is exported; ``side``: of the images that the model takes."""
    size, store = description.image_size, description.store_size
    return {
        "wads_dist": __version__,
        "torch": version("torch"),
        "weights_sha256": sha256_file(weights),
        **asdict(description),
        "preprocessing": {
            "colour": "RGB; transparency over white; 16 bits divided by 257; turned upright by EXIF orientation",
            "resize": f"to {store}x{store}, aspect not kept, Pillow's BILINEAR (antialiased), 8 bits"
            + ("" if side == store else f"; then to {size}x{size}, bilinear, half-pixel centres, not antialiased"),
            "scale": "divided by 255",
            "tensor": f"image: float32 [N, 3, {side}, {side}] in [0, 1]",
        },
        "outputs": list(OUTPUTS),
        "config": public(header["config"]),  # an earlier version may have written credentials there
        "features": json.loads(header.get("features", "null")),
    }


def parity_images(source: Path | None, description: Description, side: int) -> Tensor:
    """float32 [N, 3, side, side], as stored or as the networks see them: at most MAX_IMAGES of the images in ``source`` that
    can be read, or 6 random ones.

    Raises:
        DataError: there are none.
    """
    if source is None:
        return torch.rand(6, 3, side, side, generator=torch.Generator().manual_seed(0))
    stored: list[Tensor] = []
    for item in find_images([str(source)]):
        if len(stored) < MAX_IMAGES and item.problem is None:
            try:
                stored.append(stored_image(read_image(item.path), description.store_size))
            except DataError:
                continue  # launch/predict.py is where files are judged
    if not stored:
        raise DataError(f"--images {source}: holds no image that can be read; give a folder of images, or leave it out")
    return network_input(torch.stack(stored), side)


def largest_differences(expected: Sequence[Sequence[Tensor]], run: Run, batches: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute difference of each output over all batches; infinity if one is not finite."""
    worst = dict.fromkeys(OUTPUTS, 0.0)
    for outputs, batch in zip(expected, batches, strict=True):
        for name, mine, other in zip(OUTPUTS, outputs, run(batch), strict=True):
            difference = (mine - other).abs().max().item()
            worst[name] = max(worst[name], difference if math.isfinite(difference) else math.inf)
    return worst


def in_fp64(module: Deployed) -> Run:
    double = copy.deepcopy(module).double()
    return lambda batch: double(batch.double())


def export_torch(module: Deployed, size: int, path: Path, description: str) -> Run:
    """Writes a ``.pt2``; returns it as loaded again."""
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.export.export(module, (torch.rand(2, 3, size, size),), dynamic_shapes={"image": {0: batch}})
        torch.export.save(program, path, extra_files={f"{DESCRIPTION}.json": description})
        return torch.export.load(path).module()


def export_onnx(module: Deployed, size: int, path: Path, description: str) -> Run:
    """Writes an ``.onnx`` in one file; returns it as onnxruntime runs it on the CPU."""
    import onnxruntime

    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            module,
            (torch.rand(2, 3, size, size),),
            dynamo=True,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_shapes={"image": {0: batch}},
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[DESCRIPTION] = description
        program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(list(OUTPUTS), {"image": x.numpy()})]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and log lines about their own inside."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export_command(
    folder: Path, out: Path | None, formats: Sequence[str], images: Path | None, tolerance: float, as_json: bool
) -> int:
    """Exports, prints the parity, and returns the exit code."""
    # Of a run's own folder a link must not lead out; one that a person names may be where they like.
    out = out or within(folder if folder.is_dir() else folder.parent, "export")
    try:
        content = export(folder, out, formats, images, tolerance)
    except OSError as error:
        raise WadsError(f"{error.filename or out}: cannot be written ({error.strerror}); give another --out") from error
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        source = content["parity_images"]
        title = f"largest difference from the checkpoint, {source['count']} images ({source['source']})"
        table = Table(f"file in {out}", *OUTPUTS, title=title)
        for report in content["formats"].values():
            table.add_row(report["file"], *(f"{report['parity'][name]:.1e}" for name in OUTPUTS))
        Console().print(table)
    if content["agrees"]:
        return ExitCode.OK
    own = max(content["checkpoint_rounding"].values())
    text = (
        f"Refused: an export differs from the checkpoint by more than {tolerance:g}; nothing was written to {out}. "
        f"The checkpoint's own fp32 differs from its fp64 by {own:.1e}: if that is as much, the network is so steep that "
        "rounding shows, and --tolerance can be raised; if it is much less, the export is wrong."
    )
    Console(stderr=True).print(text, style="red", soft_wrap=True)
    return ExitCode.EXPORT_DIFFERS
