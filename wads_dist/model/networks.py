"""The networks: a bottleneck generator, a discriminator of the same stack, and a ResNet-FPN segmenter (paper §3.3 and §3.4)."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from wads_dist.config.schema import Config, ModelConfig
from wads_dist.model.backbone import load_backbone, widen
from wads_dist.model.bank import PatchBank
from wads_dist.model.experts import PREFIX, Experts
from wads_dist.model.features import FrozenNetwork
from wads_dist.model.layers import GroupNorm, Pyramid, Up, bilinear_init_, set_padding, upsample

BOTTLENECK = 4  # side of the last feature map before the latent code
LEAK = 0.2
ACTIVATED = nn.Identity
"""Holds the place of an activation that the norm before it applies, so that parameters keep their names."""


ERROR_FLOOR, ERROR_NEUTRAL = 0.02, 0.1
"""Of ``Wads.segment``: what is added to every error, so that a perfect reconstruction is no proof of a normal image, and the
sum that leaves the segmenter's odds as they are."""

AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of ``precision`` (bf16, fp16; fp32: disabled).

    The networks open it themselves, inside ``forward``: DeepSpeed closes a context opened around its engine, its own is
    not active when the frozen discriminator is called through its module, and with float16 its scale never falls.
    """
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPE.get(precision), enabled=precision in AUTOCAST_DTYPE)


def encoder_stack(in_channels: int, width: int, image_size: int) -> tuple[nn.Sequential, int]:
    """Stride-2 4×4 convolutions from ``image_size`` down to 4×4; returns the stack and its output channels (≤ 8·width)."""
    layers: list[nn.Module] = []
    channels, stages = in_channels, int(math.log2(image_size // BOTTLENECK))
    for stage in range(stages):
        out = width * min(2**stage, 8)
        layers += [nn.Conv2d(channels, out, 4, 2, 1, bias=stage == 0)]
        layers += [GroupNorm(out, LEAK), ACTIVATED()] if stage else [nn.LeakyReLU(LEAK, inplace=True)]
        channels = out
    return nn.Sequential(*layers), channels


class Generator(nn.Module):
    """Encoder to a latent code Z of ``latent`` numbers, decoder back to an image.

    With ``skips``, the map that each stage of the encoder has made goes beside the decoder's map of the same side, as in
    Skip-GANomaly (Akçay et al. 2019). Without, as in the paper, the image has to pass through Z.
    """

    def __init__(self, image_size: int, width: int, latent: int, padding: str = "zeros", skips: bool = False) -> None:
        super().__init__()
        self.skips = skips
        self.stack, channels = encoder_stack(3, width, image_size)
        self.code = nn.Conv2d(channels, latent, BOTTLENECK)
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, channels, BOTTLENECK, bias=False)]
        for stage in reversed(range(int(math.log2(image_size // BOTTLENECK)))):
            layers += [GroupNorm(channels, 0.0), ACTIVATED()]
            out = width * min(2 ** (stage - 1), 8) if stage else 3
            layers += [Up(2 * channels if skips else channels, out, bias=stage == 0, padding=padding)]
            channels = out
        self.decoder = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, Up):
                bilinear_init_(layer)

    def encode(self, x: Tensor) -> Tensor:
        """[N, 3, H, H] -> Z [N, latent]."""
        return self.encode_with_maps(x)[0]

    def encode_with_maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[N, 3, H, H] -> Z [N, latent], and with skip connections the maps that ``decode`` needs, the largest first."""
        x, maps = x * 2 - 1, []
        for layer in self.stack:
            x = layer(x)
            if self.skips and isinstance(layer, nn.LeakyReLU | ACTIVATED):
                maps.append(x)
        return self.code(x).flatten(1), maps

    @torch.no_grad()
    def standardise_code(self, images: Tensor) -> None:
        """Rescales the code's layer so that over ``images`` [N, 3, H, H] every element has mean 0 and deviation 1 (a
        data-dependent initialisation, as LSUV, Mishkin & Matas 2016).

        As initialised, codes of similar images differ by a fraction of what they share; the decoder first learns the mean
        image, the encoder meanwhile to suppress that difference, and it stays suppressed for thousands of samples.
        """
        z = torch.cat([self.encode(part) for part in images.split(32)])
        deviation, mean = torch.std_mean(z, 0)
        deviation = deviation.clamp_min(1e-4)
        assert self.code.bias is not None
        self.code.weight.div_(deviation[:, None, None, None])
        self.code.bias.sub_(mean).div_(deviation)

    def decode(self, z: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """Z [N, latent] and the encoder's ``maps`` (without skip connections, none) -> X̂ = (tanh + 1)/2, [N, 3, H, H] in
        [0, 1]."""
        first, *rest = self.decoder
        # A 1×1 map has no memory format to hand on, so the first real map is given one.
        x = first(z[:, :, None, None]).contiguous(memory_format=torch.channels_last)
        remaining = list(maps)
        for layer in rest:
            if remaining and isinstance(layer, Up):
                x = torch.cat([x, remaining.pop()], 1).contiguous(memory_format=torch.channels_last)
            x = layer(x)
        return (torch.tanh(x) + 1) / 2

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, H] in [0, 1] -> X̂ of that shape, Z [N, latent]."""
        code, maps = self.encode_with_maps(x)
        return self.decode(code, maps), code


class Discriminator(nn.Module):
    """The generator's encoder stack to a feature map f and one logit."""

    def __init__(self, image_size: int, width: int, precision: str = "fp32") -> None:
        super().__init__()
        self.precision = precision
        self.stack, channels = encoder_stack(3, width, image_size)
        self.logit = nn.Conv2d(channels, 1, BOTTLENECK)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, H] -> feature f [N, C, 4, 4], logit [N]."""
        with autocast(x.device, self.precision):
            feature = self.stack(x * 2 - 1)
            return feature, self.logit(feature).flatten()


class Segmenter(nn.Module):
    """ResNet over (X_a, X̂), an FPN over its four stages, and a decoder back to one logit map at input size.

    The last two decoder stages are narrow on purpose: at full resolution a wide 3×3 convolution costs more than the ResNet.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        resnet, fpn_width = load_backbone(config.backbone, config.weights), config.fpn_width
        self.difference, self.freeze_batchnorm = config.difference, config.freeze_batchnorm
        seen = 9 if config.difference else 6
        self.stem = nn.Sequential(*widen(resnet, seen, loaded=config.weights != "random"), resnet.relu)
        self.pool = resnet.maxpool
        self.stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])
        widths = [resnet.fc.in_features // 2**i for i in (3, 2, 1, 0)]
        self.pyramid = Pyramid(widths, fpn_width, norm_layer=GroupNorm)
        half, quarter = fpn_width // 2, fpn_width // 4
        self.reduce = _conv(fpn_width, half)
        self.lateral = nn.Conv2d(64, half, 1)
        self.refine = _conv(half, quarter)
        # At full resolution a normalisation costs as much as the convolution (on a CPU, more): there is none.
        self.head = nn.Sequential(
            nn.Conv2d(quarter + seen, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 1, 3, padding=1)
        )
        for part in (self.pyramid, self.reduce, self.refine, self.head):
            set_padding(part, config.padding)
        if config.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        # Defects are rare: starting at p = 0.02 keeps the first steps from spending themselves on the background.
        nn.init.constant_(self.head[-1].bias, -math.log(1 / 0.02 - 1))  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """X_a, X̂ [N, 3, H, H] in [0, 1] -> logits [N, 1, H, H]."""
        seen = torch.cat([image, reconstruction], 1) * 2 - 1
        if self.difference:
            seen = torch.cat([seen, (image - reconstruction).abs()], 1)
        stem = self.stem(seen)
        maps, x = [], self.pool(stem)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x, *smaller = self.pyramid.levels(maps)
        for level in smaller:
            x = x + upsample(level, x)
        x = self.refine(upsample(self.reduce(x), stem) + self.lateral(stem))
        return self.head(torch.cat([upsample(x, seen), seen], 1))


class Scored(NamedTuple):
    """X̂ [N, 3, H, H], anomaly probability [N, H, H] float32, code Ẑ [N, latent]; with experts, how surprised each of
    ``experts.EXPERTS`` is, [N, E, H, H]."""

    reconstruction: Tensor
    probability: Tensor
    code: Tensor
    surprises: Tensor | None = None


class Wads(nn.Module):
    """Generator and segmenter, trained by one optimiser; segmentation gradients reach the generator unless told otherwise."""

    def __init__(self, config: ModelConfig, image_size: int, precision: str = "fp32") -> None:
        super().__init__()
        self.generator = Generator(image_size, config.width, config.latent, config.padding, config.skips)
        self.segmenter = Segmenter(config)
        self.segmenter_gradient = config.segmenter_gradient
        self.sigma, self.error_weight = config.smoothing, config.error_weight
        self.precision = precision
        self.experts: Experts | None = None
        """Made after training, and for inference alone."""

    def forward(self, clean: Tensor, anomalous: Tensor, detach_code: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One pass of everything the objective needs, from X and X_a [N, 3, H, H] in [0, 1].

        Returns:
            X̂ [N, 3, H, H], logits [N, 1, H, H], Z = E(X) and Ẑ = E(X_a) [N, latent]; Z without gradient if asked for.
        """
        with autocast(clean.device, self.precision):
            # X_a first: autocast keeps the half-precision weights of the first call, and ones made under no_grad would
            # cut the encoder's gradient.
            anomalous_code, maps = self.generator.encode_with_maps(anomalous)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_code):
                code = self.generator.encode(clean)
            reconstruction = self.generator.decode(anomalous_code, maps)
            seen = reconstruction if self.segmenter_gradient else reconstruction.detach()
            return reconstruction, self.segmenter(anomalous, seen), code, anomalous_code

    @torch.no_grad()
    def segment(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Anomaly probability [N, H, H] float32 of an image beside a reconstruction [N, 3, H, H] in [0, 1], by the segmenter
        and the error.

        With an ``error_weight`` w the odds of p are multiplied by ((e + floor) / neutral)^w, a product of two experts: the
        segmenter knows the anomalies that were synthesised, the error e of the reconstruction those that were not.
        """
        probability = torch.sigmoid(self.segmenter(image, reconstruction).float())
        if not self.error_weight:
            return self._smooth(probability).squeeze(1)
        error = (image.float() - reconstruction.float()).abs().mean(1, keepdim=True)
        probability, error = self._smooth(torch.cat([probability, error], 1)).unbind(1)
        favour = probability * ((error + ERROR_FLOOR) / ERROR_NEUTRAL) ** self.error_weight
        return favour / (favour + (1 - probability))

    @torch.no_grad()
    def raw_scores(
        self,
        image: Tensor,
        reconstruction: Tensor,
        stored: Tensor | None,
        bank: PatchBank | None,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """[N, E, H, H] float32, as each of ``experts.EXPERTS`` has them: the segmenter's log odds, the error and, with a
        ``bank``, the distance from it.

        Args:
            image, reconstruction: [N, 3, H, H] in [0, 1].
            stored: the same images as they are stored, [N, 3, S, S] in [0, 1]; needed with a bank.
            left_out: bool [N, K], rows of the bank that do not count for an image.
        """
        odds = self.segmenter(image, reconstruction).float()
        # The largest of the three channels: a stain is often of one colour.
        error = (image.float() - reconstruction.float()).abs().amax(1, keepdim=True)
        # The segmenter's map is as sharp as it should be: smoothed, it loses thin defects.
        scores = torch.cat([odds, self._blurred(error)], 1)
        if bank is None:
            return scores
        assert stored is not None, "the frozen network reads the stored image"
        return torch.cat([scores, bank(stored, image.shape[-1], left_out)[:, None]], 1)

    def _smooth(self, maps: Tensor) -> Tensor:
        # torchvision's Gaussian sums to one but for rounding, and may leave [0, 1].
        return self._blurred(maps).clamp(0, 1)

    def _blurred(self, maps: Tensor) -> Tensor:
        return gaussian_blur(maps, 2 * math.ceil(3 * self.sigma) + 1, self.sigma) if self.sigma else maps

    @torch.no_grad()
    def predict(self, image: Tensor, stored: Tensor | None = None) -> Scored:
        """Of images [N, 3, H, H] in [0, 1]; with a bank, ``stored`` are the same images as they are stored, [N, 3, S, S] in
        [0, 1]."""
        reconstruction, code = self.generator.reconstruct(image)
        if self.experts is None:
            return Scored(reconstruction, self.segment(image, reconstruction), code)
        scores = self.raw_scores(image, reconstruction, stored, self.experts.bank)
        surprises = self.experts.surprised(scores)
        return Scored(reconstruction, self.experts.probability(surprises), code, surprises)

    @property
    def reads_stored(self) -> bool:
        """Whether ``predict`` needs the images as they are stored."""
        return self.experts is not None and self.experts.bank is not None

    def make_room(self, config: Config, state: Mapping[str, Tensor]) -> None:
        """Adds the experts that ``config`` asks for, with room for those in a trained model's ``state``.

        Raises:
            ValueError: ``state`` has others.
        """
        rows = state.get(f"{PREFIX}bank.rows")
        if (rows is None) != (config.model.features == "none") or (f"{PREFIX}weight" in state) != config.has_experts:
            raise ValueError(
                f"model.features is {config.model.features} and experts.error {config.experts.error:g}, and these weights have "
                f"{'no' if rows is None else 'a'} bank and {'' if f'{PREFIX}weight' in state else 'no '}experts"
            )
        if config.has_experts:
            bank = None
            if rows is not None:
                bank = PatchBank(FrozenNetwork(config.model.features), config.features.size, torch.empty_like(rows))
            self.experts = Experts(config.experts, bank)


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), GroupNorm(out_channels, 0.0), ACTIVATED()
    )
