import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, environment
from tests.shards.host import serving
from tests.support.narrow import NARROW
from tests.wads_dist.runs.test_folder import documented
from wads_dist.common.errors import ExitCode, ResumeError, WadsError
from wads_dist.common.processes import free_port
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.launch.command import run_command
from wads_dist.runs.leases import Owner, Queue
from wads_dist.runs.record import Outcome, mean_of, open_run, record_summary, summarise
from wads_dist.scheduler.categories import Plan
from wads_dist.scheduler.plan import RankInfo
from wads_dist.scheduler.rendezvous import Launch
from wads_dist.scheduler.rescore import evaluate_run
from wads_dist.scheduler.run import conclude, died, train_run
from wads_dist.scheduler.supervisor import first_cause

SMALL = f"{NARROW} --trainer.global_batch_size 8 --trainer.samples 48 --trainer.log_every 1".split()


def command(shards: Path, run: Path, *more: str) -> list[str]:
    return ["--data.shards", str(shards), "--run.dir", str(run), *SMALL, *more]


def launch(arguments: list[str], ranks: int | None = None, timeout: float = 400) -> "subprocess.CompletedProcess[str]":
    """``launch/train.py``, under DeepSpeed's launcher when ``ranks`` is given."""
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    program = [sys.executable] if ranks is None else launcher
    return subprocess.run(
        [*program, "launch/train.py", *arguments],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def events(run: Path, category: str) -> list[dict[str, object]]:
    path = run / category / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.slow
def test_two_ranks_train_all_categories_under_the_launcher(demo_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    frozen = ["--model.features", "efficientnet_lite0", "--features.size", "96"]
    together = ["--parallel.ranks_per_category", "2", *frozen]
    first = launch(command(demo_shards, run, *together), ranks=2)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["categories"]) == 2 and summary["failed"] == {}
    for name, metrics in summary["categories"].items():
        assert metrics["samples"] == 48 and metrics["world_size"] == 2
        for key in ("pixel_auroc", "pixel_ap", "image_auroc", "image_ap", "image_f1_max"):
            assert 0 <= metrics[key] <= 1
        assert metrics["images_per_second"] > 0 and metrics["seconds"] > 0
        assert {"pixel_auroc", "pixel_ap"} <= metrics["trivial"].keys()
        assert metrics["experts"].keys() == {"segmenter", "error", "bank"} and metrics["features"]["licence"]
        assert {"ssim", "mean_image_ssim", "follows_input", "code_spread"} <= metrics["reconstruction"].keys()
        assert (run / name / "samples.png").read_bytes()[:4] == b"\x89PNG"
        assert json.loads((run / name / "metrics.json").read_text()) == metrics
        assert [e["samples"] for e in events(run, name) if e["event"] == "step"] == [8, 16, 24, 32, 40, 48]
    mean = summary["mean"]["pixel_auroc"]
    assert mean == pytest.approx(sum(m["pixel_auroc"] for m in summary["categories"].values()) / 2)
    assert load_config(["--config", str(run / "config.toml")]).trainer.samples == 48
    assert "commit" in json.loads((run / "code.json").read_text())
    written_files = {
        path.name for path in [*run.iterdir(), *(f for n in summary["categories"] for f in (run / n).iterdir())]
    }
    assert written_files - documented() == set(summary["categories"])
    assert "pixel" in first.stdout and str(run) in first.stdout.replace("\n", "")

    again = launch(command(demo_shards, run, *together), ranks=2)
    assert again.returncode == 0 and again.stdout.count("done already") == 2
    assert json.loads((run / "summary.json").read_text()) == summary

    written = ["curves.json", "samples.png", "examples/examples.json"]
    for name in summary["categories"]:
        for file in written:
            (run / name / file).unlink()
    assert run_command(evaluate_run, ["--config", str(run / "config.toml")]) == 0
    again_mean = json.loads((run / "summary.json").read_text())["mean"]["pixel_auroc"]
    assert again_mean == pytest.approx(mean, abs=1e-6)
    name = next(iter(summary["categories"]))
    again_metrics = json.loads((run / name / "metrics.json").read_text())
    assert (
        again_metrics["experts"]["bank"]["pixel_auroc"] == summary["categories"][name]["experts"]["bank"]["pixel_auroc"]
    )
    assert all((run / name / file).is_file() for name in summary["categories"] for file in written)


def started(run: Path, event: str, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """A run of one rank in a session of its own, once it has written ``event``."""
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", *arguments],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not any(e["event"] == event for e in events(run, "demo_biscuit")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(demo_shards: Path, tmp_path: Path) -> None:
    """Weights, BatchNorm buffers, moving average and held-out scores of a run killed between checkpoints, against the unbroken
    run's. The killed one is of a server that asks for a password, which it was given and has written nowhere."""
    options = ["--data.categories", "demo_biscuit", "--checkpoint.every_steps", "2", "--trainer.ema", "0.9"]
    options += ["--stopping.every", "8"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch(command(demo_shards, whole, *options)).returncode == 0
    with serving(demo_shards) as host:
        host.user = "alice:s3cr3t"
        remote = ["--data.shards", host.address("alice:s3cr3t@"), "--data.cache", str(tmp_path / "cache")]
        process = started(broken, "checkpoint", command(demo_shards, broken, *options, *remote))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (broken / "demo_biscuit" / "metrics.json").exists()
        resumed = launch(command(demo_shards, broken, *options, *remote))
    assert resumed.returncode == 0 and "resumed at sample" in resumed.stdout
    written = [path for folder in (broken, tmp_path / "cache") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20 and (broken / "report.html") in written
    assert [path for path in written if b"s3cr3t" in path.read_bytes() or b"alice" in path.read_bytes()] == []
    assert "s3cr3t" not in resumed.stdout + resumed.stderr
    a, b = (load_file(run / "demo_biscuit" / "weights.safetensors") for run in (whole, broken))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    of_whole, of_broken = (json.loads((run / "demo_biscuit" / "metrics.json").read_text()) for run in (whole, broken))
    assert of_whole["stopping"] == of_broken["stopping"] and of_whole["stopping"]["scores"] == 6
    best = torch.load(broken / "demo_biscuit" / "checkpoints" / "step-00000006" / "stopping.pt", weights_only=True)
    assert best.keys() == b.keys() and all(best[name].equal(b[name]) for name in b)
    ids = [e["samples"] for e in events(broken, "demo_biscuit") if e["event"] in ("start", "resume")]
    assert ids[0] == 0 and len(ids) == 2 and 0 < int(str(ids[1])) < 48  # it did go on, and not from the start


def workers_of(run: Path) -> list[int]:
    """Process ids of this run's living workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"wads_dist.training.worker\0--run\0{run}\0" in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_ended_supervisor_leaves_no_worker(
    demo_shards: Path, tmp_path: Path, how: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    process = started(run, "step", command(demo_shards, run, "--trainer.samples", "100000"))
    assert len(workers_of(run)) == 1
    process.send_signal(how)
    assert process.wait(60) == code
    deadline = time.monotonic() + 30
    while workers_of(run):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--trainer.sample", "4"], ExitCode.BAD_CONFIG, "did you mean trainer.samples?"),
        ([], ExitCode.BAD_CONFIG, "nothing to train on"),
        (["--data.shards", "no/such/folder"], ExitCode.BAD_DATA, "no/such/folder"),
        (["--data.root", "no/such/folder"], ExitCode.BAD_DATA, "data.root no/such/folder: no such folder"),
        # Both wrong: settings are looked at first, not after shards were built for hours.
        (["--data.root", "no/such/folder", "--trainer.deepspeed", "no.json"], ExitCode.BAD_CONFIG, "no.json"),
    ],
)
def test_wrong_input_is_explained(
    arguments: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(train_run, [*arguments, "--run.dir", str(tmp_path / "run")]) == code
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_category_is_refused_with_the_known_ones(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data.shards", str(demo_shards), "--run.dir", str(tmp_path), "--data.categories", "bottle"]
    assert run_command(train_run, arguments) == ExitCode.BAD_DATA
    assert "bottle" in (text := capsys.readouterr().err) and "demo_biscuit, demo_leafplate" in text


def test_a_run_with_other_settings_is_refused_with_the_difference(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(*more: str) -> Config:
        return load_config(command(demo_shards, tmp_path, *more))

    open_run(config(), {})
    open_run(config("--checkpoint.keep", "5"), {})  # changes nothing that is learnt
    assert run_command(train_run, command(demo_shards, tmp_path, "--trainer.seed", "1")) == ExitCode.REFUSED_RESUME
    assert "trainer.seed: 0 → 1" in capsys.readouterr().err


def test_a_run_from_before_eq_3_6_had_a_direction_goes_on_as_it_was_or_not_at_all(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run(load_config(command(demo_shards, tmp_path)), {})
    record = tmp_path / "config.toml"
    newer = ("direction", "mask_rule")  # which a record of then has not
    record.write_text("".join(line for line in record.read_text().splitlines(True) if not line.startswith(newer)))
    assert run_command(train_run, command(demo_shards, tmp_path)) == ExitCode.REFUSED_RESUME
    said = capsys.readouterr().err
    assert "objective.kl.direction: reverse → printed" in said and "mask_rule" not in said
    open_run(load_config(command(demo_shards, tmp_path, "--objective.kl.direction", "reverse")), {})


def test_a_damaged_record_is_named(demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_run(load_config(command(demo_shards, tmp_path)), {})
    for damage in (b"\xff", b"[[", b"[trainer]\nbatch = 1\n"):
        (tmp_path / "config.toml").write_bytes(damage)
        assert run_command(train_run, command(demo_shards, tmp_path)) == ExitCode.REFUSED_RESUME
        assert "config.toml" in (text := capsys.readouterr().err) and "--run.dir" in text


def test_another_deepspeed_file_or_other_data_is_refused(demo_shards: Path, tmp_path: Path) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text('{"zero_optimization": {"stage": 1}}')
    config = load_config(command(demo_shards, tmp_path / "run", "--trainer.deepspeed", str(settings)))
    open_run(config, {})
    settings.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ResumeError, match=r"ds\.json is not what this run was started with"):
        open_run(config, {})
    settings.write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "run/nut").mkdir()
    (tmp_path / "run/nut/metrics.json").write_text('{"fingerprint": "aaaa"}')
    with pytest.raises(ResumeError, match="fingerprint aaaa"):
        open_run(config, {"nut": "bbbb"})


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (("--trainer.global_batch_size", "9", "--trainer.micro_batch_size", "2"), "micro_batch_size"),
        (("--trainer.precision", "fp16"), "fp16 needs a GPU"),
        (("--data.textures", "no/bank"), "no/bank"),
    ],
)
def test_what_every_worker_would_fail_on_is_refused_before_the_first(
    demo_shards: Path, tmp_path: Path, setting: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(train_run, command(demo_shards, tmp_path / "run", *setting)) in (
        ExitCode.BAD_CONFIG,
        ExitCode.BAD_DATA,
    )
    assert text in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "run").exists()


def test_the_summary_says_whether_all_is_done(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.json").write_text(json.dumps({"pixel_auroc": 0.5}))
    begun = record_summary(tmp_path, Outcome(), ["a", "b"], over=False)
    assert (begun["complete"], begun["missing"], begun["exit_code"]) == (False, ["b"], None)
    assert json.loads((tmp_path / "summary.json").read_text()) == begun
    assert not record_summary(tmp_path, Outcome(), ["a"], over=False)["complete"]  # still running
    assert record_summary(tmp_path, Outcome(["a"]), ["a"], over=True)["complete"]
    stopped = record_summary(tmp_path, Outcome(["a"], preempted=True), ["a", "b"], over=True)
    assert (stopped["complete"], stopped["exit_code"]) == (False, ExitCode.PREEMPTED)


def test_the_summary_keeps_what_other_commands_have_finished(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"pixel_auroc": value}))
    summary = summarise(tmp_path, {"c": 3})
    assert list(summary["categories"]) == ["a", "b"] and summary["mean"] == {"pixel_auroc": 0.75}
    assert summary["failed"] == {"c": 3}


def test_what_died_and_was_not_tried_again_has_failed(tmp_path: Path) -> None:
    """Groups in which too much has died take no more; what they leave is no success, and no stop either."""
    plan = Plan("this", "none", ["a", "b", "c", "d"], [(0,)], [RankInfo("node")])
    for name, launch, code in (("a", "this", 137), ("b", "this", 7), ("c", "another", 1), ("d", "this", 1)):
        lease = Queue(tmp_path, [name], Owner(launch, "g0", (0,), "h"), attempts=3, lease_seconds=60).take()
        assert lease
        lease.end(code)
    assert died(plan, tmp_path, done=["d"]) == {"a": 137}


def test_slurm_tasks_without_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(WadsError, match="RANK and WORLD_SIZE are not set"):
        Launch.from_environment()


def test_a_supervisor_loads_neither_networks_nor_kernels() -> None:
    """Every rank starts one before its worker."""
    heavy = ("torchvision", "torch._dynamo", "matplotlib", "wads_dist.kernels.synthesis")
    code = f"import sys, wads_dist.scheduler.run; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_run_in_which_nothing_was_finished_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(["--data.shards", "x", "--run.dir", str(tmp_path)])
    conclude(config.run.dir, Outcome(failed={"nut": 6}), ["nut"], Console())
    assert (tmp_path / "report.html").is_file() and "report.html" in capsys.readouterr().out


def test_the_first_cause_explains_a_failure() -> None:
    assert first_cause(["0", "0"]) == ExitCode.OK
    assert first_cause(["stopped", "3", "1"]) == ExitCode.BAD_DATA
    assert first_cause(["1", "-9", "stopped"]) == 137  # a worker whose peer was killed crashes
    assert first_cause(["-6", "1"]) == ExitCode.CRASHED  # and may abort
    assert first_cause(["0", "stopped"]) == ExitCode.CRASHED


def test_mean_of_nested_numbers_leaves_out_what_is_missing() -> None:
    trees = [{"a": 1.0, "b": {"c": 2, "name": "x"}, "d": None}, {"a": 3.0, "b": {"c": 4, "name": "y"}, "d": 5.0}]
    assert mean_of(trees) == {"a": 2.0, "b": {"c": 3.0}, "d": 5.0}
    assert mean_of([]) == {}


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    launch = Launch.from_environment()
    group = launch.everybody()
    assert group.is_first and group.broadcast("key", "value") == "value" and group.all_gather("k", "1") == ["1"]
    assert launch.all_finished() and launch.leave(4) == 4
