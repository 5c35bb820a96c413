import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import REPOSITORY, environment
from tests.support.narrow import NARROW
from wads_dist.common.errors import ExitCode, WadsError
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.deploy import export as exporting
from wads_dist.deploy.export import (
    OUTPUTS,
    TOLERANCE,
    Deployed,
    export,
    export_command,
    export_onnx,
    export_torch,
)
from wads_dist.deploy.predict import Description, load
from wads_dist.evaluation.thresholds import Threshold
from wads_dist.launch.command import run_command
from wads_dist.launch.export import parse
from wads_dist.model.bank import PatchBank
from wads_dist.model.experts import Experts
from wads_dist.model.features import load_network
from wads_dist.model.networks import Wads
from wads_dist.model.weights import save_weights

pytestmark = pytest.mark.slow  # exporting takes seconds

SMALL = f"{NARROW} --data.store_size 128"
THRESHOLDS = Threshold(0.25, 0.5, "normal images held out of training", 9, 0.01, 0.05, {})


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra `export`)")


def trained(folder: Path, settings: str = SMALL) -> tuple[Wads, Config]:
    """Random weights whose probabilities are spread over 0 to 1, BatchNorm and code standardised, saved to ``folder``."""
    torch.manual_seed(0)
    config = load_config(f"--data.shards x {settings}".split())
    size = config.data.image_size
    model = Wads(config.model, size)
    x = torch.nn.functional.interpolate(torch.rand(8, 3, 8, 8), (size, size), mode="bilinear")
    with torch.no_grad():
        model.generator.standardise_code(x)
        model(x, x, True)
        model.eval()
        last = model.segmenter.head[-1]
        last.weight.div_(model.segmenter(x, model.generator.reconstruct(x)[0]).std())
        last.bias.zero_()
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder, config, "nut", THRESHOLDS.to_json()
    )
    return model, config


@pytest.fixture(scope="module")
def category(module_path: Path) -> Path:
    folder = module_path / "nut"
    trained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(category: Path) -> tuple[Path, dict]:
    """A category's folder with both formats exported into its ``export``, compared on pictures of which one is damaged."""
    needs_onnx()
    pictures = category.parent / "pictures"
    pictures.mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((150, 100), Image.Resampling.BICUBIC).save(pictures / f"{i}.jpg")
    (pictures / "damaged.png").write_text("no image")
    return category, export(category, category / "export", ["onnx", "torch"], pictures)


def test_both_formats_say_what_the_checkpoint_says(exported: tuple[Path, dict]) -> None:
    folder, content = exported
    assert (
        content["agrees"] and content["parity_images"]["count"] == 7
    )  # batches of 1, 5 and 1; the damaged one left out
    for name in ("onnx", "torch"):
        assert content["formats"][name]["parity"].keys() == set(OUTPUTS)
        assert all(0 <= difference <= TOLERANCE for difference in content["formats"][name]["parity"].values())
    assert sorted(path.name for path in (folder / "export").iterdir()) == ["model.json", "model.onnx", "model.pt2"]
    assert json.loads((folder / "export/model.json").read_text()) == content


def test_parts_that_are_off_by_default_are_exported_too(tmp_path: Path) -> None:
    needs_onnx()
    trained(
        tmp_path / "nut",
        f"{SMALL} --model.difference true --model.error_weight 1 --model.smoothing 1.5 --model.padding replicate --model.skips",
    )
    content = export(tmp_path / "nut", tmp_path / "export", ["onnx", "torch"], None)
    assert content["agrees"]
    for name in ("onnx", "torch"):
        assert max(content["formats"][name]["parity"].values()) <= TOLERANCE


def test_a_frozen_network_and_its_bank_are_inside_the_export(tmp_path: Path) -> None:
    """It takes stored images then; 128² here, which the frozen network reads at 96², antialiased."""
    needs_onnx()
    folder, settings = tmp_path / "nut", "--model.features efficientnet_lite0 --features.size 96"
    model, config = trained(folder, f"{SMALL} {settings}")
    network, _ = load_network("efficientnet_lite0")
    bank = PatchBank(network, config.features.size, torch.randn(500, 152))
    model.experts = Experts(config.experts, bank)
    stored = torch.rand(4, 3, 128, 128)
    image = torch.nn.functional.interpolate(stored, (64, 64), mode="bilinear")
    with torch.no_grad():
        model.experts.fit(model.raw_scores(image, model.generator.reconstruct(image)[0], stored, bank))
    save_weights(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder, config, "nut", THRESHOLDS.to_json()
    )
    content = export(folder, folder / "export", ["onnx", "torch"], None)
    assert content["agrees"] and "[N, 3, 128, 128]" in content["preprocessing"]["tensor"]
    assert max(max(content["formats"][name]["parity"].values()) for name in ("onnx", "torch")) <= TOLERANCE
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    of_run, of_onnx = (load(path, device="cpu").predict(picture) for path in (folder, folder / "export/model.onnx"))
    assert abs(of_run.score - of_onnx.score) < TOLERANCE
    assert np.abs(of_run.probability - of_onnx.probability).max() < TOLERANCE


def test_any_number_of_images_goes_in(exported: tuple[Path, dict]) -> None:
    import onnxruntime

    folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "export/model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(folder / "export/model.pt2").module()
    for count in (1, 5, 11):
        x = torch.rand(count, 3, 64, 64)
        of_onnx, of_torch = session.run(list(OUTPUTS), {"image": x.numpy()}), program(x)
        shapes = [(count, 3, 64, 64), (count, 64, 64), (count,)]
        assert [y.shape for y in of_onnx] == shapes and [tuple(y.shape) for y in of_torch] == shapes
        for a, b in zip(of_onnx, of_torch, strict=True):
            assert np.abs(a - b.detach().numpy()).max() < TOLERANCE


def test_the_onnx_file_is_whole_valid_and_of_the_opset_it_claims(exported: tuple[Path, dict]) -> None:
    import onnx

    folder, content = exported
    model = onnx.load(folder / "export/model.onnx", load_external_data=False)
    onnx.checker.check_model(model)
    assert [o.version for o in model.opset_import if o.domain == ""] == [content["formats"]["onnx"]["opset"]]
    (image,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 3, 64, 64]
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_what_must_be_known_is_inside_each_file(exported: tuple[Path, dict]) -> None:
    import onnx

    folder, content = exported
    extra = {"wads.json": ""}
    torch.export.load(folder / "export/model.pt2", extra_files=extra)
    model = onnx.load(folder / "export/model.onnx")
    of_onnx = json.loads({p.key: p.value for p in model.metadata_props}["wads"])
    assert json.loads(extra["wads.json"]) == of_onnx
    assert of_onnx.items() <= content.items()
    assert of_onnx["threshold"]["image"] == 0.5 and of_onnx["category"] == "nut" and of_onnx["wads_dist"]
    assert (of_onnx["image_size"], of_onnx["store_size"]) == (64, 128) and "BILINEAR" in of_onnx["preprocessing"][
        "resize"
    ]


def test_an_exported_model_predicts_as_the_trained_one(exported: tuple[Path, dict]) -> None:
    folder, _ = exported
    picture = folder.parent / "pictures/3.jpg"
    of_run, of_onnx = (load(path, device="cpu") for path in (folder, folder / "export/model.onnx"))
    assert of_onnx.description == of_run.description and of_onnx.thresholds == of_run.thresholds
    a, b = of_run.predict(picture), of_onnx.predict(picture)
    assert abs(a.score - b.score) < TOLERANCE and np.abs(a.probability - b.probability).max() < TOLERANCE
    assert a.decision == b.decision is not None


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_an_export_that_differs_is_refused_and_not_published(
    wrong: float,
    category: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def off(module: Deployed, size: int, path: Path, description: str) -> exporting.Run:
        path.touch()
        return lambda x: [y + wrong for y in module(x)]

    monkeypatch.setattr(exporting, "export_torch", off)
    out = tmp_path / "out"
    assert export_command(category, out, ["torch"], None, TOLERANCE, as_json=False) == ExitCode.EXPORT_DIFFERS
    assert "Refused" in capsys.readouterr().err and not list(out.iterdir())
    if wrong == wrong:
        assert export_command(category, out, ["torch"], None, 1e-2, as_json=False) == 0
        assert (out / "model.pt2").exists()


def test_a_format_of_an_earlier_export_does_not_stay_beside_the_new_one(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be of other weights, and model.json says nothing of it."""

    def quick(module: Deployed, size: int, path: Path, description: str) -> exporting.Run:
        path.touch()
        return module

    monkeypatch.setattr(exporting, "export_torch", quick)
    (tmp_path / "model.onnx").write_text("of other weights")
    (tmp_path / "notes.txt").touch()
    assert list(export(category, tmp_path, ["torch"])["formats"]) == ["torch"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pt2", "notes.txt"]


@pytest.mark.parametrize("tolerance", ["inf", "nan", "-1"])
def test_a_tolerance_that_would_allow_anything_is_refused(tolerance: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["runs/nut", "--tolerance", tolerance])
    assert ended.value.code == 2


def test_onnx_without_its_packages_says_how_to_get_them(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WadsError, match=r"pip install .*onnxruntime"):
        export(category, tmp_path / "out", ["onnx"])


def test_the_command_exports_into_the_categorys_folder_and_prints_json_alone(tmp_path: Path) -> None:
    trained(tmp_path / "nut")
    command = [sys.executable, "launch/export.py", str(tmp_path / "nut"), "--format", "torch", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment())
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads((tmp_path / "nut/export/model.json").read_text())


@pytest.mark.parametrize(("folder", "images", "code"), [("absent", None, 2), ("nut", Path("absent"), 3)])
def test_what_is_missing_is_named_and_has_its_exit_code(
    folder: str, images: Path | None, code: int, category: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run_command(
        lambda _: export_command(category.parent / folder, tmp_path / "out", ["torch"], images, TOLERANCE, False), []
    )
    assert ended == code and "absent" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_default_networks_agree_at_the_default_size(tmp_path: Path) -> None:
    """ResNet-50, width 64, 128²: with both, rounding goes through twice the layers of the small networks."""
    needs_onnx()
    model, config = trained(tmp_path / "nut", "")
    assert (config.model.backbone, config.data.image_size) == ("resnet50", 128)
    x = torch.rand(5, 3, 128, 128)
    module = Deployed(model.eval(), Description("nut", 128, 256, config.evaluation.score_window))
    with torch.no_grad():
        expected = module(x)
        for run, path in ((export_onnx, "a.onnx"), (export_torch, "a.pt2")):
            got = run(module, 128, tmp_path / path, "{}")(x)
            assert all((a - b).abs().max() < TOLERANCE for a, b in zip(expected, got, strict=True))
