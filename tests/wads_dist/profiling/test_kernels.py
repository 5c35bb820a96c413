import csv
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console
from torch import Tensor

from wads_dist.common.errors import ExitCode
from wads_dist.kernels.objective import objective
from wads_dist.launch.profile_kernels import main
from wads_dist.profiling import kernels, peers
from wads_dist.profiling.kernels import bytes_and_operations, candidates, cases
from wads_dist.profiling.peers import DTYPES, IMPLEMENTATIONS, PACKAGES, WEIGHTS, Case
from wads_dist.profiling.tables import MIX, compile_tables, result_tables, save_roofline
from wads_dist.profiling.timing import Device, cold_sets, take_turns

CPU = torch.device("cpu")
DEVICE = Device("a device", copy_gbps=3000.0, peak_gops=30_000.0, peak="by decree")
RESULT = {
    "kernel": str,
    "implementation": str,
    "shape": list,
    "dtype": str,
    "pass": str,
    "median_us": float,
    "bytes": int,
    "gbps": float,
    "copy_fraction": float,
}


def case(
    kernel: Any = "objective", batch: int = 2, size: int = 32, dtype: str = "fp32", backward: bool = False
) -> Case:
    return Case(kernel, batch, size, dtype, backward, CPU)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_device", lambda device: DEVICE)


TINY = "--device cpu --batch 2 --size 32 --seconds 0 --no-compiled".split()


@pytest.mark.parametrize(
    ("dtype", "backward", "per_pixel"),
    # x and X̂ of three channels, logits, mask; backward adds the gradient for X̂ three times, logits and mask again, and theirs
    [("fp32", False, 24 + 4 + 1), ("bf16", False, 12 + 2 + 1), ("fp32", True, 60 + 14), ("bf16", True, 30 + 8)],
)
def test_bytes_of_the_objective(dtype: str, backward: bool, per_pixel: int) -> None:
    moved, _ = bytes_and_operations(case(batch=4, size=64, dtype=dtype, backward=backward))
    assert moved == per_pixel * 4 * 64 * 64


def test_the_parts_of_the_objective_add_up() -> None:
    whole = bytes_and_operations(case(backward=True))
    parts = [bytes_and_operations(case(backward=True), terms) for terms in (("ssim", "mse"), ("focal", "kl"))]
    assert whole == tuple(map(sum, zip(*parts, strict=True)))


def test_synthesis_writes_two_images_and_a_mask_and_reads_what_its_crops_hold() -> None:
    moved, _ = bytes_and_operations(case("synthesis", batch=4, size=64, dtype="bf16"))
    outputs, crop = 2 * 3 * 2 + 1, 3 * 4 * 0.8133
    assert moved / (4 * 64 * 64) == pytest.approx(outputs + crop, rel=0.02)  # textures add a little


@pytest.mark.parametrize("kernel", ["objective", "synthesis"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_case_makes_the_inputs_that_it_says(kernel: str, dtype: str) -> None:
    inputs = case(kernel, dtype=dtype).inputs(0)
    shapes = [list(t.shape) for t in inputs]
    if kernel == "synthesis":
        assert shapes == [[2, 3, 64, 64], [peers.TEXTURES, 3, 64, 64], [2]]
    else:
        assert shapes == [[2, 3, 32, 32]] * 2 + [[2, 1, 32, 32]] * 2
        assert [t.dtype for t in inputs] == [DTYPES[dtype]] * 3 + [torch.uint8]
        assert (
            0 < inputs[3].float().mean() < 0.5
        )  # some anomalous pixels, so that both branches of the focal loss count
    assert all(torch.equal(a, b) for a, b in zip(inputs, case(kernel, dtype=dtype).inputs(0), strict=True))


here = [i for i in IMPLEMENTATIONS if i in [*candidates(case()), *candidates(case("synthesis"))]]


@pytest.mark.parametrize("name", [i.name for i in here if i.kernel == "objective" and i.name != "torch.compile"])
def test_what_is_measured_computes_the_terms_that_it_is_listed_with(name: str) -> None:
    implementation = next(i for i in here if i.name == name and i.kernel == "objective")
    inputs = case().inputs(0)
    t = objective(*inputs, WEIGHTS, backend="torch")
    weighted = {
        "ssim": WEIGHTS.reconstruction * WEIGHTS.ssim * t.dissimilarity,
        "mse": WEIGHTS.reconstruction * WEIGHTS.l2 * t.mse,
        "focal": WEIGHTS.focal * t.focal,
        "kl": WEIGHTS.kl * t.kl,
    }
    expected = sum(weighted[term] for term in implementation.terms)
    # the five-blur SSIM of the peers loses some digits in fp32
    torch.testing.assert_close(implementation.prepare(case(), inputs)(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [i.name for i in here if i.kernel == "objective" and i.name != "torch.compile"])
def test_a_backward_pass_returns_the_gradients_of_what_the_terms_depend_on(name: str) -> None:
    implementation = next(i for i in here if i.name == name and i.kernel == "objective")
    inputs = case().inputs(0)
    gradients = implementation.prepare(replace(case(), backward=True), inputs)()
    wanted = [inputs[1]] * ("ssim" in implementation.terms) + [inputs[2]] * ("focal" in implementation.terms)
    assert [g.shape for g in gradients] == [t.shape for t in wanted]
    assert all(float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize("name", [i.name for i in here if i.kernel == "synthesis" and i.name != "torch.compile"])
def test_what_is_measured_makes_a_batch(name: str) -> None:
    implementation = next(i for i in here if i.name == name and i.kernel == "synthesis")
    made = implementation.prepare(case("synthesis", batch=8), case("synthesis", batch=8).inputs(0))()
    if name == "DRAEM":
        clean, anomalous, mask = (torch.stack([torch.from_numpy(sample[part]) for sample in made]) for part in range(3))
    else:
        clean, anomalous, mask = made.clean, made.anomalous, made.mask
    assert clean.numel() == anomalous.numel() == 3 * mask.numel() == 8 * 3 * 32 * 32
    assert set(mask.unique().tolist()) == {0, 1}
    assert bool((clean != anomalous).any())


def test_draem_changes_the_image_within_the_mask_only() -> None:
    images, textures = (t.permute(0, 2, 3, 1).numpy() for t in case("synthesis", batch=8).inputs(0)[:2])
    rng = np.random.default_rng(0)
    for _ in range(20):
        clean, anomalous, mask = peers.draem_sample(rng, images, textures, case().settings)
        assert clean.shape == anomalous.shape == (32, 32, 3) and clean.min() >= 0 and clean.max() <= 1
        assert not ((clean != anomalous).any(-1, keepdims=True) & (mask == 0)).any()


def test_clocks_take_turns_and_medians_are_kept() -> None:
    order: list[str] = []
    readings = {"a": iter([9.0, 1.0, 2.0, 3.0, 100.0]), "b": iter([5.0] * 5)}

    def clock(name: str) -> float:
        order.append(name)
        return next(readings[name])

    assert take_turns({n: lambda n=n: clock(n) for n in readings}, seconds=0) == {"a": 3.0, "b": 5.0}  # type: ignore[misc]
    assert order == ["a", "b"] * 5


def test_a_cpu_has_one_set_of_inputs() -> None:
    assert cold_sets(1.0, CPU) == 1


def test_the_json_file_has_the_schema_and_the_numbers_agree(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert main([*TINY, "--only", "native", "torch", "DRAEM", "--json", str(out)]) == 0
    report = json.loads(out.read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    assert list(report) == ["device", "versions", "copy_gbps", "results", "compiled"]
    assert (report["device"], report["copy_gbps"], report["compiled"]) == ("a device", 3000.0, [])
    for r in report["results"]:
        assert {name: type(r[name]) for name in RESULT} == RESULT
        assert r["gbps"] == pytest.approx(r["bytes"] / r["median_us"] / 1e3, rel=1e-3)
        assert r["copy_fraction"] == pytest.approx(r["gbps"] / 3000)
        assert r["roof_us"] == pytest.approx(max(r["bytes"] / 3000e3, r["operations"] / 30e6), rel=1e-3)
        assert r["roof"] == ("bytes" if r["bytes"] * 10 > r["operations"] else "operations")
    measured = {(r["kernel"], r["implementation"], r["pass"]) for r in report["results"]}
    assert {("objective", "torch", "forward"), ("objective", "torch", "forward+backward")} <= measured
    assert {("synthesis", "torch", "forward"), ("synthesis", "DRAEM", "forward")} <= measured
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_what_is_measured_is_written_at_once(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that is lent by the minute may be gone before the last; a line names its device."""
    measure, done = kernels.measure, []

    def cut_off(*arguments: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(arguments[0])
        return measure(*arguments)

    monkeypatch.setattr(kernels, "measure", cut_off)
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, "--kernel", "objective", "--layout", "channels_last", "contiguous", "--only", "torch", *files])
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    with (tmp_path / "a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [("channels_last", "forward"), ("channels_last", "forward+backward"), ("contiguous", "forward")]
    assert [(r["layout"], r["pass"]) for r in results] == [(line["layout"], line["pass"]) for line in lines] == expected
    assert {(line["device"], line["batch"], line["torch"]) for line in lines} == {("a device", "2", torch.__version__)}
    assert [float(line["median_us"]) for line in lines] == [r["median_us"] for r in results]


def test_json_on_standard_output_is_alone_there(quick: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--only", "torch", "--kernel", "synthesis", "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["results"][0]["implementation"] == "torch"
    assert "synthesis 2×3×32×32" in err


def test_every_peer_is_accounted_for(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    installed = {"torchvision": "0.29", "fussim": "0.3"}
    monkeypatch.setattr(peers, "version", installed.get)
    monkeypatch.setattr(kernels, "version", installed.get)
    assert main([*TINY, "--only", "torch", "torchvision", "DRAEM", "--json", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert {name: report["versions"][name] for name in PACKAGES} == {
        **dict.fromkeys(PACKAGES, "not installed"),
        "torchvision": "0.29",
        "fussim": "0.3, needs a GPU",
    }
    assert {r["implementation"] for r in report["results"]} == {"torch", "torchvision"}
    printed = " ".join(capsys.readouterr().out.split())
    absent = ", ".join(name for name in PACKAGES if name not in installed)
    assert f"not installed: {absent}; not measured: fussim (needs a GPU)" in printed


@pytest.mark.parametrize(("culprit", "code"), [("torchvision", 0), ("torch", 1)])
def test_a_failure_is_reported_and_hides_no_other_result(
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    culprit: str,
    code: int,
) -> None:
    def broken(case: Case, inputs: tuple[Tensor, ...]) -> Any:
        raise RuntimeError("no kernel image")

    spoilt = tuple(replace(i, prepare=broken) if i.name == culprit else i for i in IMPLEMENTATIONS)
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", spoilt)
    arguments = [*TINY, "--kernel", "objective", "--only", "torch", "torchvision", "--json", str(tmp_path / "a.json")]
    assert main([*arguments, "--plot", str(tmp_path / "a.png"), "--trace", str(tmp_path / "a.trace")]) == code
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert {(r["implementation"], r["median_us"] is None) for r in results} == {
        ("torch", culprit == "torch"),
        ("torchvision", culprit == "torchvision"),
    }
    assert f"failed: objective {culprit}: RuntimeError: no kernel image" in capsys.readouterr().err


def test_a_compile_report_that_fails_is_an_error(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 9, "", "Traceback\nOSError: no ptxas\n")

    monkeypatch.setattr(subprocess, "run", fails)
    arguments = [a for a in TINY if a != "--no-compiled"]
    assert main([*arguments, "--kernel", "synthesis", "--only", "torch"]) == 1
    out, err = capsys.readouterr()
    assert (
        "failed: wads_dist.kernels.compiled exited with 9 and said: OSError: no ptxas" in err and "fp32 forward" in out
    )


def test_the_trace_names_each_call(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    assert main([*TINY, "--kernel", "objective", "--only", "torch", "--trace", str(out)]) == 0
    names = {event.get("name") for event in json.loads(out.read_text())["traceEvents"]}
    assert {f"torch: objective 2x3x32x32 fp32 {passes}" for passes in ("forward", "forward+backward")} <= names


def gpu_like(batches: tuple[int, ...] = (64, 256)) -> list[dict[str, Any]]:
    """Every implementation in every type, with times from 8 µs to 75 ms, and one failure."""
    results = []
    options = kernels.Options(CPU, batches, dtypes=tuple(DTYPES))
    for c in cases(options):
        for k, i in enumerate(x for x in IMPLEMENTATIONS if x.kernel == c.kernel and c.dtype in x.dtypes):
            times = {"host": 9 * 2.5**k} if i.waits else {"warm": 8 * 2.5**k, "cold": 9 * 2.5**k}
            broken = i.name == "pytorch-msssim"
            results.append(kernels._result(c, i, DEVICE, {} if broken else times, "boom" if broken else None))
    return results


def test_tables_fit_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*result_tables(gpu_like(), DEVICE), sep="\n")
    mix = dict.fromkeys(MIX, 2345)
    names = [("objective_forward bf16 channels_last", target) for target in ("sm_100", "gfx942")]
    numbers = {"registers": 255, "spills": 1024, "shared_bytes": 232448, "instructions": mix}
    compiled = [{"kernel": kernel, "target": target, **numbers} for kernel, target in names]
    console.print(*compile_tables(compiled), sep="\n")
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert sum("fp32 forward+backward" in line for line in lines) == 2
    assert sum(line.split()[1:4] == ["255", "1024", "232448"] for line in lines) == 2


def test_the_roofline_is_a_picture_with_every_implementation(tmp_path: Path) -> None:
    path = tmp_path / "roof.png"
    save_roofline(path, gpu_like(), DEVICE)
    with Image.open(path) as image:
        image.load()
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height) or []}
        assert image.format == "PNG" and image.width > image.height > 500
    for i in range(9):  # the objective has ten implementations, one of which failed
        red_green_blue = tuple(round(255 * part) for part in to_rgb(f"C{i}"))
        assert red_green_blue in colours
    assert [p.name for p in tmp_path.iterdir()] == ["roof.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--batch 4 0", "argument --batch: 0 must be at least 1"),
        ("--batch 4 x", "argument --batch: invalid int value: 'x'"),
        ("--size 10", "argument --size: 10 must be at least 11"),
        ("--dtype fp32 fp64", "argument --dtype: invalid choice: 'fp64'"),
        ("--kernel conv", "argument --kernel: invalid choice: 'conv'"),
        ("--only nobody", "argument --only: invalid choice: 'nobody'"),
        ("--only fussim", "none of fussim can be measured here on cpu"),
        ("--seconds nan", "argument --seconds: nan must be from 0 to 3600"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--json /nowhere/a.json", "argument --json: '/nowhere/a.json' must be a file in a folder that exists"),
        ("--plot /tmp", "argument --plot: '/tmp' must be a file"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_measured(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *arguments.split()])
    assert stopped.value.code == ExitCode.BAD_CONFIG
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_bad_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cuda"])
    assert stopped.value.code == ExitCode.BAD_CONFIG and "torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures_this_machine_and_reports_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """This process interprets kernels, which must not mislead the report. Of one target: test_compiled.py has the others."""
    run = subprocess.run

    def for_one(command: list[str], **options: Any) -> Any:
        return run([*command, "gfx942"] if "wads_dist.kernels.compiled" in command else command, **options)

    monkeypatch.setattr(subprocess, "run", for_one)
    arguments = "--device cpu --batch 2 --size 32 --seconds 0 --only native torch DRAEM".split()
    assert main([*arguments, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert 0.1 < report["copy_gbps"] < 10_000
    compiled = report["compiled"]
    assert {k["target"] for k in compiled} == {"gfx942"}
    fields = {"kernel": str, "target": str, "registers": int, "spills": int, "shared_bytes": int}
    assert all({name: type(k[name]) for name in fields} == fields for k in compiled)
    printed = capsys.readouterr().out
    assert "regs" in printed and "gfx942" in printed
    with Image.open(tmp_path / "a.png") as image:
        image.verify()


@pytest.mark.gpu
def test_on_a_gpu_everything_of_ours_is_measured_cold_and_warm(tmp_path: Path) -> None:
    arguments = "--batch 16 --seconds 0 --no-compiled --only triton torch pytorch-msssim".split()
    assert main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    graphs = [r for r in report["results"] if r["clock"] == "graph"]
    assert {r["implementation"] for r in graphs} >= {"triton", "torch"}
    assert all(r["warm_us"] > 0 and 0 < r["cold_us"] == r["median_us"] for r in graphs)
    assert all(r["gbps"] > 0 and r["peak_mib"] > 0 for r in report["results"])
