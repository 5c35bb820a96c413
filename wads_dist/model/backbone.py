"""torchvision's ResNets as the segmenter's backbone, with weights and more input channels."""

from pathlib import Path

import torch
import torchvision
from torch import nn

from wads_dist.common.errors import ModelWeightsError
from wads_dist.model.features import IMAGENET


def load_backbone(name: str, weights: str) -> torchvision.models.ResNet:
    """torchvision's ResNet with random weights, its ImageNet weights, or those of a local file.

    Raises:
        ModelWeightsError: the weights cannot be had or do not fit; says which file or download and what to do.
    """
    build = getattr(torchvision.models, name)
    if weights == "random":
        return build(weights=None)
    if weights == "imagenet":
        try:
            return build(weights="IMAGENET1K_V1")
        except Exception as error:
            raise ModelWeightsError(
                f"model.weights = 'imagenet': torchvision could not download {name}'s weights ({error}). Give a local file "
                f"(--model.weights FILE.pth), or choose to go on without (--model.weights random)."
            ) from error
    path = Path(weights)
    if not path.is_file():
        raise ModelWeightsError(
            f"model.weights = {weights!r}: no such file. Allowed: 'random', 'imagenet', or a .pth/.safetensors file of "
            f"torchvision's {name}."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        resnet = build(weights=None)
        resnet.load_state_dict(state)
    except Exception as error:
        raise ModelWeightsError(f"model.weights = {weights!r} does not hold torchvision's {name}: {error}") from error
    return resnet


def widen(resnet: torchvision.models.ResNet, channels: int, loaded: bool) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """The ResNet's first convolution, for the channels of (X_a, X̂) and perhaps their difference, and its normalisation.

    Loaded weights are halved and used for both images, so that an image beside a perfect reconstruction excites the stem as the
    image alone did. They were trained on (x − mean) / deviation, and are shown 2x − 1: the difference of scale goes into the
    weights, that of the mean into the statistics of the normalisation.
    """
    conv, norm = resnet.conv1, resnet.bn1
    wide = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    if not loaded:
        nn.init.kaiming_normal_(wide.weight, mode="fan_out", nonlinearity="relu")
        return wide, norm
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    with torch.no_grad():
        scaled = conv.weight * (0.5 / deviation)
        wide.weight[:, :6].copy_(torch.cat([scaled, scaled], 1) / 2)
        wide.weight[:, 6:].zero_()
        assert norm.running_mean is not None
        norm.running_mean.sub_((conv.weight * (0.5 - mean) / deviation).sum((1, 2, 3)))
    return wide, norm
