import itertools
import math
from pathlib import Path

import pytest
import scipy.ndimage
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from wads_dist.common.errors import ModelWeightsError
from wads_dist.config.schema import ModelConfig
from wads_dist.model.backbone import load_backbone
from wads_dist.model.layers import Up, bilinear_init_
from wads_dist.model.networks import Discriminator, Generator, Segmenter, Wads, encoder_stack

SMALL = ModelConfig(backbone="resnet18", width=8, fpn_width=32, latent=200)
SKIPS = SMALL.model_copy(update={"skips": True})


@pytest.mark.parametrize("config", [SMALL, SKIPS], ids=["plain", "skips"])
@pytest.mark.parametrize("size", [64, 128])
def test_shapes_and_ranges(size: int, config: ModelConfig) -> None:
    x = torch.rand(2, 3, size, size)
    reconstruction, logits, code, anomalous_code = Wads(config, size)(x, x, True)
    assert reconstruction.shape == x.shape and reconstruction.min() >= 0 and reconstruction.max() <= 1
    assert logits.shape == (2, 1, size, size)
    assert code.shape == anomalous_code.shape == (2, 200)
    feature, logit = Discriminator(size, 8)(x)
    assert feature.shape[-2:] == (4, 4) and logit.shape == (2,)


def test_the_discriminator_and_the_generator_have_no_batch_statistics() -> None:
    wads = Wads(SMALL, 64)
    for net in (wads.generator, Discriminator(64, 8)):
        assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())
    x = torch.rand(4, 3, 64, 64)
    assert torch.allclose(wads.generator.encode(x)[:2], wads.generator.encode(x[:2]), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "precision", "detach"),
    [*itertools.product([SMALL], ["fp32", "bf16"], [True, False]), (SKIPS, "bf16", True)],
)
def test_every_parameter_gets_a_gradient(config: ModelConfig, precision: str, detach: bool) -> None:
    """Under autocast too: half-precision weights cached under no_grad would cut the encoder off."""
    torch.manual_seed(0)
    wads = Wads(config, 64, precision)
    x = torch.rand(2, 3, 64, 64)
    reconstruction, logits, code, anomalous_code = wads(x, x.flip(0), detach)
    assert code.requires_grad == (not detach)
    (reconstruction.float().mean() + logits.float().mean() + anomalous_code.float().pow(2).mean()).backward()
    without = [n for n, p in wads.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_untrained_decoder_is_smooth() -> None:
    """Checkerboards and noise at initialisation cost the reconstructor thousands of samples."""
    torch.manual_seed(0)
    image = Wads(SMALL, 64).generator.decode(torch.randn(4, 200)).detach()
    neighbours = (image[..., 1:] - image[..., :-1]).square().mean()
    assert neighbours < 0.1 * image.var((-2, -1)).mean()


@pytest.mark.parametrize("config", [SMALL, SKIPS], ids=["plain", "skips"])
def test_standardised_codes_have_unit_spread(config: ModelConfig) -> None:
    torch.manual_seed(0)
    generator = Wads(config, 64).generator
    x = 0.5 + 0.05 * torch.rand(64, 3, 64, 64)
    assert generator.encode(x).std(0).mean() < 0.5
    generator.standardise_code(x)
    code = generator.encode(x)
    assert torch.allclose(code.std(0), torch.ones(200), atol=1e-3) and code.mean(0).abs().max() < 1e-3


def test_without_skip_connections_the_generator_is_what_it_was_before_they_could_be_had() -> None:
    """Bitwise: parameters, what the random generator is left at, code and reconstruction; so runs made before can go on."""
    torch.manual_seed(0)
    stack, channels = encoder_stack(3, 8, 64)
    code, first = nn.Conv2d(channels, 16, 4), nn.ConvTranspose2d(16, channels, 4, bias=False)
    ups = [Up(a, b, bias=b == 3, padding="zeros") for a, b in ((64, 32), (32, 16), (16, 8), (8, 3))]
    norms = [nn.GroupNorm(math.gcd(32, up.in_channels // 4), up.in_channels) for up in ups]
    decoder = nn.Sequential(first, *(m for norm, up in zip(norms, ups, strict=True) for m in (norm, nn.ReLU(), up)))
    for up in ups:
        bilinear_init_(up)
    follows = torch.rand(1)
    torch.manual_seed(0)
    generator = Generator(64, 8, 16)
    assert torch.equal(torch.rand(1), follows)
    expected = nn.ModuleDict({"stack": stack, "code": code, "decoder": decoder}).state_dict()
    state = generator.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    x = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    z = code(stack(x * 2 - 1)).flatten(1)
    x_hat = decoder[1:](first(z[:, :, None, None]).contiguous(memory_format=torch.channels_last))
    assert torch.equal(generator.encode(x), z)
    assert torch.equal(generator.reconstruct(x)[0], (torch.tanh(x_hat) + 1) / 2)
    assert generator.encode_with_maps(x)[1] == []


def test_with_skip_connections_every_stage_of_the_encoder_reaches_the_decoder_by_itself() -> None:
    torch.manual_seed(0)
    generator = Wads(SKIPS, 64).generator
    code, maps = generator.encode_with_maps(torch.rand(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    plain = generator.decode(code, maps)
    for i in range(4):
        changed = [torch.zeros_like(m) if j == i else m for j, m in enumerate(maps)]
        assert not torch.allclose(generator.decode(code, changed), plain, atol=1e-4)
    assert not torch.allclose(generator.decode(code + 1, maps), plain, atol=1e-4)


def test_skip_connections_keep_the_decoder_in_channels_last() -> None:
    """Of an image in torch's own layout too, whose maps have that layout."""
    generator = Wads(SKIPS, 64).generator
    layouts: list[bool] = []
    for up in (layer for layer in generator.decoder if isinstance(layer, Up)):
        up.register_forward_pre_hook(
            lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    for layout in (torch.contiguous_format, torch.channels_last):
        generator.reconstruct(torch.rand(2, 3, 64, 64).contiguous(memory_format=layout))
    assert layouts == [True] * 8


def test_training_and_prediction_reconstruct_alike_through_skip_connections() -> None:
    wads, x = Wads(SKIPS, 64).eval(), torch.rand(2, 3, 64, 64)
    reconstruction, _, code, _ = wads.predict(x)
    trained, _, _, trained_code = wads(x.flip(0), x, True)
    assert torch.equal(reconstruction, trained) and torch.equal(code, trained_code)


def test_segmentation_gradients_stop_at_the_generator_when_told_to() -> None:
    x = torch.rand(2, 3, 64, 64)
    for reach in (True, False):
        wads = Wads(SMALL.model_copy(update={"segmenter_gradient": reach}), 64)
        wads(x, x, True)[1].mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in wads.generator.decoder.parameters()) == reach


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    # The weights are no question here.
    segmenter = Segmenter(SMALL.model_copy(update={"freeze_batchnorm": True})).train()
    before = {n: b.clone() for n, b in segmenter.named_buffers()}
    segmenter(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))
    assert all(torch.equal(b, before[n]) for n, b in segmenter.named_buffers())


def test_the_segmenter_is_told_where_image_and_reconstruction_differ() -> None:
    seen: list[torch.Tensor] = []
    segmenter = Segmenter(SMALL.model_copy(update={"difference": True})).eval()
    segmenter.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image, reconstruction = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    assert segmenter(image, reconstruction).shape == (1, 1, 64, 64)
    assert torch.equal(seen[0][:, 6:], (image - reconstruction).abs()) and seen[0].shape[1] == 9


def test_a_replicated_edge_is_no_edge() -> None:
    """To the decoders: with a constant map beyond it, a constant map has a constant result; zeros leave a frame."""
    flat = torch.full((1, 3, 64, 64), 0.3)
    spread = {}
    for padding in ("zeros", "replicate"):
        torch.manual_seed(0)
        segmenter = Segmenter(SMALL.model_copy(update={"padding": padding})).eval()
        ones = torch.ones(1, segmenter.head[0].in_channels, 16, 16)
        spread[padding] = segmenter.head(ones).std().item()
        assert segmenter(flat, flat).shape == (1, 1, 64, 64)
    assert spread["replicate"] < 1e-6 < spread["zeros"]
    for padding in ("zeros", "replicate"):
        up = Up(8, 4, bias=True, padding=padding)
        bilinear_init_(up)
        plane = up(torch.ones(1, 8, 6, 6))
        assert plane.shape == (1, 4, 12, 12)
        spread[padding] = plane.std((2, 3)).max().item()
    assert spread["replicate"] < 1e-6 < spread["zeros"]


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_padding_is_that_of_every_decoder_and_of_no_encoder(padding: str) -> None:
    wads = Wads(SMALL.model_copy(update={"padding": padding}), 64)
    ups = [layer for layer in wads.generator.decoder if isinstance(layer, Up)]
    assert len(ups) == 4 and all(up.replicate == (padding == "replicate") for up in ups)
    for part in ("stem", "stages", "pyramid", "reduce", "refine", "head"):
        convolutions = [m for m in getattr(wads.segmenter, part).modules() if isinstance(m, nn.Conv2d)]
        modes = {m.padding_mode for m in convolutions if m.padding != (0, 0)}
        assert modes == {"zeros" if part in ("stem", "stages") else padding}, part


def test_within_the_edge_a_replicated_map_is_enlarged_as_any_other() -> None:
    torch.manual_seed(0)
    zeros, replicate = (Up(8, 4, bias=True, padding=padding) for padding in ("zeros", "replicate"))
    replicate.load_state_dict(zeros.state_dict())
    x = torch.randn(2, 8, 6, 6)
    assert torch.allclose(zeros(x)[..., 1:-1, 1:-1], replicate(x)[..., 1:-1, 1:-1], atol=1e-6)


def test_predictions_are_smoothed_by_a_gaussian() -> None:
    torch.manual_seed(0)
    rough = Wads(SMALL, 64).eval()
    smooth = Wads(SMALL.model_copy(update={"smoothing": 2.0}), 64).eval()
    smooth.load_state_dict(rough.state_dict())
    x = torch.rand(1, 3, 64, 64)
    a, b = rough.predict(x)[1], smooth.predict(x)[1]
    assert a.shape == b.shape and b.std() < a.std()
    assert torch.allclose(b[0, 20, 30], gaussian_filter(a, 2)[0, 20, 30], rtol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
def test_the_reconstructions_error_changes_the_odds_by_its_power(smoothing: float) -> None:
    torch.manual_seed(0)
    settings = SMALL.model_copy(update={"smoothing": smoothing})
    alone = Wads(settings, 64).eval()
    both = Wads(settings.model_copy(update={"error_weight": 0.5}), 64).eval()
    both.load_state_dict(alone.state_dict())
    x, x_hat = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    x_hat[1] = x[1]
    p, q = alone.segment(x, x_hat), both.segment(x, x_hat)
    error = (x - x_hat).abs().mean(1)
    error = gaussian_filter(error, 2) if smoothing else error
    expected = p / (1 - p) * ((error + 0.02) / 0.1) ** 0.5
    torch.testing.assert_close((q / (1 - q))[:, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], rtol=2e-3, atol=0)
    assert (q[1] < p[1]).all(), "nothing is missing from the reconstruction"
    assert torch.equal(both.predict(x)[1], both.segment(x, both.predict(x)[0]))


@pytest.mark.parametrize("error_weight", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_a_segmenter_that_is_certain_stays_so_whatever_the_error(
    bias: float, smoothing: float, error_weight: float
) -> None:
    """At 128² torchvision's Gaussian of σ = 2 pixels sums to more than one."""
    wads = Wads(SMALL.model_copy(update={"error_weight": error_weight, "smoothing": smoothing}), 128).eval()
    torch.nn.init.constant_(wads.segmenter.head[-1].bias, bias)
    probability = wads.segment(torch.ones(1, 3, 128, 128), torch.zeros(1, 3, 128, 128))
    assert probability.min() >= 0 and probability.max() <= 1
    torch.testing.assert_close(probability, torch.full_like(probability, float(bias > 0)), rtol=0, atol=1e-5)


def gaussian_filter(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), (0, sigma, sigma), mode="mirror", truncate=3))


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pretrained_weights_of_a_local_file(tmp_path: Path, suffix: str, difference: bool) -> None:
    torch.manual_seed(3)
    source = torchvision.models.resnet18(weights=None)
    torch.nn.init.uniform_(source.bn1.running_mean)
    path = tmp_path / f"resnet18{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    segmenter = Segmenter(SMALL.model_copy(update={"weights": str(path), "difference": difference}))
    assert torch.equal(segmenter.stages[0][0].conv1.weight, source.layer1[0].conv1.weight)
    # Beside a perfect reconstruction its stem says what the ResNet's says of the image, normalised as that was trained.
    image = torch.rand(1, 3, 64, 64)
    seen = torch.cat([2 * image - 1] * 2 + [image * 0] * difference, 1)
    normalised = torchvision.transforms.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = source.eval().bn1(source.conv1(normalised)).relu()
    inside = (..., slice(2, -2), slice(2, -2))  # beyond the edge there is grey for one, the mean colour for the other
    assert torch.allclose(segmenter.eval().stem(seen)[inside], expected[inside], atol=1e-4)


def test_weights_that_cannot_be_had_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelWeightsError, match="no such file"):
        load_backbone("resnet18", str(tmp_path / "none.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelWeightsError, match="does not hold torchvision's resnet18"):
        load_backbone("resnet18", str(tmp_path / "other.pth"))

    def offline(weights: str | None) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "resnet18", offline)
    with pytest.raises(ModelWeightsError, match=r"could not download.*--model.weights random"):
        load_backbone("resnet18", "imagenet")
