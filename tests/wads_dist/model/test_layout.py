"""On a GPU no convolution sees NCHW and nothing that normalises or upsamples is widened to fp32 (fake CUDA tensors: no GPU)."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.fake_gpu import DEVICE, Layouts, backward, fake_gpu, to_gpu
from wads_dist.config.load import load_config
from wads_dist.model.layers import kept_interpolation
from wads_dist.model.networks import Discriminator, Wads

SETTINGS = {
    "wads": "--preset wads",
    "paper_literal": "--preset paper_literal",
    "difference, replicated edges": "--model.difference true --model.padding replicate",
}


@pytest.fixture(autouse=True)
def no_fake_matrix_stays() -> Iterator[None]:
    yield
    kept_interpolation.cache_clear()


def images() -> torch.Tensor:
    return torch.empty(8, 3, 128, 128, device=DEVICE).to(memory_format=torch.channels_last)


def layouts(*settings: str, train: bool) -> Layouts:
    config = load_config(["--config", "configs/mvtec.toml", "--data.shards", "none", *settings])
    precision = "bf16" if train else "fp32"
    with fake_gpu():
        wads = to_gpu(Wads(config.model, 128, precision))
        discriminator = to_gpu(Discriminator(128, config.model.width, precision))
        with Layouts() as seen:
            if train:
                outputs = [o for o in wads(images(), images(), True) if o.requires_grad]
                seen.count["forward"] = seen.count["convolutions"]
                backward(outputs)
                backward(discriminator(images().requires_grad_()))
            else:
                wads.eval()
                wads.predict(images())  # type: ignore[operator]
    return seen


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_training_step_keeps_layout_and_type(settings: str, backbone: str) -> None:
    seen = layouts(*settings.split(), "--model.backbone", backbone, train=True).count
    # 6 and 6 encodings of X and X_a, 6 of the decoder; 20 or 53 of the ResNet, 8 of the pyramid, 5 behind it; and backward.
    assert seen["forward"] == {"resnet18": 51, "resnet50": 84}[backbone], seen
    assert seen["convolutions"] > 1.8 * seen["forward"] and seen["norms"] > 60 and seen["upsamplings"] > 10, seen
    wrong = {
        what: n for what, n in seen.items() if n and what.endswith(("NCHW", "norms in fp32", "upsamplings in fp32"))
    }
    assert not wrong, wrong


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_inference_keeps_the_layout(settings: str) -> None:
    seen = layouts(*settings.split(), train=False).count
    assert seen["convolutions"] > 60 and not seen["convolutions in NCHW"], seen


def test_skip_connections_keep_it() -> None:
    assert not layouts("--model.skips", "true", "--model.backbone", "resnet18", train=True).count[
        "convolutions in NCHW"
    ]


def test_the_count_sees_a_layout_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own padding: what these networks had."""
    monkeypatch.setattr(
        "wads_dist.model.layers.replicate", lambda x, n: torch.nn.functional.pad(x, (n,) * 4, mode="replicate")
    )
    seen = layouts("--model.padding", "replicate", "--model.backbone", "resnet18", train=True).count
    assert seen["convolutions in NCHW"] > 30, seen
