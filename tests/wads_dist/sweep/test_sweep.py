import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import REPOSITORY, environment
from tests.support.launching import events, processes
from tests.support.narrow import NARROW
from wads_dist.common.errors import ConfigError, ExitCode, ResumeError
from wads_dist.launch.sweep import parse
from wads_dist.runs.folder import METRICS
from wads_dist.runs.leases import Owner, Queue
from wads_dist.runs.reader import CategoryStatus
from wads_dist.shards.addresses import VARIABLE
from wads_dist.sweep import slurm
from wads_dist.sweep.plan import Run, load, open_sweep, parse_grid, plan_runs, read_record, read_variants, record
from wads_dist.sweep.run import sweep
from wads_dist.sweep.slurm import JobOptions, Queued, array_of, job_script
from wads_dist.sweep.summary import exit_code_of, spread, summarise
from wads_dist.sweep.watch import Watch, in_queue

RHO = "objective.kl.rho"


@pytest.fixture
def settings(demo_shards: Path) -> list[str]:
    return ["--data.shards", str(demo_shards)]


def finish(run: Run, *categories: str, auroc: float = 0.5) -> None:
    for category in categories or run.categories:
        (run.folder / category).mkdir(parents=True)
        scores = {"pixel_auroc": auroc, "pixel_ap": None, "image_auroc": 0.75}
        (run.folder / category / METRICS).write_text(json.dumps(scores))


# --- the plan ----------------------------------------------------------------------------------------------------


def test_a_run_for_every_point_of_the_grid_and_seed(settings: list[str], tmp_path: Path) -> None:
    grid = parse_grid([f"{RHO}=0.03,0.1", "trainer.betas=0.5,0.999;0.9,0.999"])
    runs = plan_runs(tmp_path, [*settings, "--trainer.seed", "5"], grid, 2, build=True)
    assert [run.name for run in runs][:3] == [
        "kl.rho=0.03,betas=0.5-0.999,seed=5",
        "kl.rho=0.03,betas=0.5-0.999,seed=6",
        "kl.rho=0.03,betas=0.9-0.999,seed=5",
    ]
    assert len(runs) == 8 and len({run.name for run in runs}) == 8 and len({run.point for run in runs}) == 4
    last = runs[-1].config
    assert (last.objective.kl.rho, last.trainer.betas, last.trainer.seed) == (0.1, (0.9, 0.999), 6)
    assert last.run.dir == tmp_path / runs[-1].name
    assert runs[0].categories == ["demo_biscuit", "demo_leafplate"]


def test_a_lone_run_is_called_run(settings: list[str], tmp_path: Path) -> None:
    assert [run.name for run in plan_runs(tmp_path, settings, {}, None, build=True)] == ["run"]


def test_all_problems_of_all_runs_are_said_at_once(tmp_path: Path) -> None:
    grid = parse_grid(["objective.kl.roh=0.1,0.2", f"{RHO}=0.1,7"])
    with pytest.raises(ConfigError) as error:
        plan_runs(tmp_path, ["--run.dir", "elsewhere", "--trainer.threads", "0"], grid, None, build=True)
    text = str(error.value)
    for part in ("objective.kl.roh: unknown setting; did you mean objective.kl.rho?", "objective.kl.rho: got '7'",
                 "run.dir: --out", "trainer.threads: got '0'"):  # fmt: skip
        assert text.count(part) == 1, text


def test_variants_are_tables_of_settings(settings: list[str], tmp_path: Path) -> None:
    """Dotted keys are nested tables to TOML, quoted ones are not: both are settings."""
    file = tmp_path / "variants.toml"
    sparse = 'objective.kl.rho = 0.03\n"trainer.betas" = "0.9,0.999"\nmodel.segmenter_gradient = false'
    file.write_text(f"[base]\n[sparse]\n{sparse}")
    variants = read_variants(file)
    assert variants["base"] == {}
    runs = {run.name: run for run in plan_runs(tmp_path, settings, {}, None, build=True, variants=variants)}
    assert list(runs) == ["base", "sparse"]
    config = runs["sparse"].config
    assert (config.objective.kl.rho, config.trainer.betas, config.model.segmenter_gradient) == (
        0.03,
        (0.9, 0.999),
        False,
    )
    assert runs["base"].settings["objective.kl.rho"] == 0.1


def test_some_of_the_variants_are_taken_in_the_order_given(tmp_path: Path) -> None:
    file = tmp_path / "variants.toml"
    file.write_text("[a]\n[b]\n[c]\ntrainer.seed = 3")
    assert read_variants(file, "c, a") == {"c": {"trainer.seed": "3"}, "a": {}}
    with pytest.raises(ConfigError, match=r"--only d: .*variants.toml has a, b, c"):
        read_variants(file, "a,d")
    with pytest.raises(ConfigError, match="names no variant"):
        read_variants(file, ",")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no variant"),
        ("rho = 0.1", "rho is no table of settings"),
        ('["a/b"]', "'a/b' cannot name a folder"),
        ("[a", "variants.toml: "),
        ("[a.run]\ndir = 'x'", "a: run.dir cannot be varied within a sweep"),
    ],
)
def test_variants_that_make_no_sense_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "variants.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_variants(tmp_path / "variants.toml")


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ([f"{RHO}"], "give SECTION.FIELD=VALUE"),
        ([f"{RHO}=0.1", f"{RHO}=0.2"], f"--grid {RHO}: given twice"),
        (["data.categories=a,b"], "data.categories: cannot be varied"),
        (["config=a.toml,b.toml"], "config: cannot be varied"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_grid(grid)


def test_what_is_wrong_in_a_variant_names_it(settings: list[str], tmp_path: Path) -> None:
    variants = {"fine": {}, "rough": {"model.smothing": "1", "model.width": "7"}}
    with pytest.raises(ConfigError) as caught:
        plan_runs(tmp_path, [*settings, "--trainer.smples", "1"], {}, None, build=True, variants=variants)
    problems = sorted(caught.value.problems)
    assert problems[0].startswith("trainer.smples: ") and len(problems) == 3
    assert [problem.split(": ")[1] for problem in problems[-2:]] == ["model.smothing", "model.width"]
    assert all(problem.startswith("variant rough: ") for problem in problems[-2:])


def test_two_runs_that_would_be_the_same_are_refused(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two runs would be kl.rho=0.1"):
        plan_runs(tmp_path, settings, {RHO: ["0.1", "0.10"]}, None, build=True)


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to train on"):
        plan_runs(tmp_path, [], {}, None, build=True)


# --- the record --------------------------------------------------------------------------------------------------


def planned(out: Path, settings: list[str], rhos: str, seeds: int | None = None) -> list[Run]:
    return plan_runs(out, settings, parse_grid([f"{RHO}={rhos}"]), seeds, build=True)


def test_tasks_keep_their_numbers_when_runs_are_added(settings: list[str], tmp_path: Path) -> None:
    record(open_sweep(tmp_path, planned(tmp_path, settings, "0.1"), 2), "first")
    plan = open_sweep(tmp_path, planned(tmp_path, settings, "0.05,0.1"), 2)
    record(plan, "second")
    assert plan.tasks == [
        ("kl.rho=0.1", "demo_biscuit"), ("kl.rho=0.1", "demo_leafplate"),
        ("kl.rho=0.05", "demo_biscuit"), ("kl.rho=0.05", "demo_leafplate"),
    ]  # fmt: skip
    assert [start["command"] for start in read_record(tmp_path)["starts"]] == ["first", "second"]
    assert "commit" in read_record(tmp_path)["starts"][0]["code"]
    assert load(tmp_path) == plan


def test_only_what_is_not_done_is_open(settings: list[str], tmp_path: Path) -> None:
    plan = open_sweep(tmp_path, planned(tmp_path, settings, "0.05,0.1"), None)
    finish(plan.runs[0])
    finish(plan.runs[1], "demo_biscuit")
    assert [plan.tasks[number] for number in plan.open_tasks] == [("kl.rho=0.1", "demo_leafplate")]


def test_another_sweep_is_refused_with_the_difference(settings: list[str], tmp_path: Path) -> None:
    record(open_sweep(tmp_path, planned(tmp_path, settings, "0.05,0.1"), None), "")
    changed = planned(tmp_path, [*settings, "--trainer.samples", "1000", "--data.categories", "demo_biscuit"], "0.1")
    with pytest.raises(ResumeError) as error:
        open_sweep(tmp_path, changed, None)
    for part in (
        "trainer.samples: 14000000 → 1000",
        "run kl.rho=0.05: → not among yours",
        "demo_leafplate → not among",
    ):
        assert part in str(error.value)


def test_settings_that_change_nothing_that_is_learnt_may_change(settings: list[str], tmp_path: Path) -> None:
    record(open_sweep(tmp_path, planned(tmp_path, settings, "0.1"), None), "")
    plan = open_sweep(tmp_path, planned(tmp_path, [*settings, "--checkpoint.every_steps", "7"], "0.1"), None)
    record(plan, "")
    assert load(tmp_path).runs[0].config.checkpoint.every_steps == 7


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    options = f"--out {out} --grid {RHO}=0.05,0.1 --seeds 2 --ranks 2 --slurm --time 01:00:00 --dry-run".split()
    assert sweep(*parse([*options, *settings])) == ExitCode.OK
    printed = capsys.readouterr().out
    for part in ("kl.rho=0.05,seed=1", "8 categories to train", "#SBATCH --array=0-7", "#SBATCH --time=01:00:00"):
        assert part in printed
    assert not out.exists()


def test_a_dry_run_builds_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bolt", "nut"):
        (tmp_path / "images" / name / "good").mkdir(parents=True)
    options = f"--out {tmp_path}/sweep --dry-run --json --data.root {tmp_path}/images --data.cache {tmp_path}/cache"
    assert sweep(*parse(options.split())) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["runs"][0]["categories"] == ["bolt", "nut"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("wrong", ["--time 1", "--slurm --gpus 2 --ranks 2", "--seeds 0"])
def test_options_that_do_not_go_together_are_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--out", str(tmp_path), *wrong.split()])
    assert ended.value.code == ExitCode.BAD_CONFIG


# --- Slurm -------------------------------------------------------------------------------------------------------


def test_an_array_is_spelled_in_ranges() -> None:
    assert array_of([7, 0, 1, 2, 4, 8]) == "0-2,4,7-8"


def test_the_job_script_hands_its_process_to_the_task(tmp_path: Path) -> None:
    """The signal before the time limit reaches the batch shell alone, so that must have become the task."""
    options = JobOptions(gpus=4, array_limit=3, signal_before=90, sbatch=["--account=vision"])
    lines = job_script(tmp_path / "a sweep", "wads-x", [0, 1, 5], options).splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--account=vision", "--gpus-per-node=4", "--array=0-1,5%3", "--requeue", "--open-mode=append"} <= asked
    assert "--signal=B:USR1@90" in asked and f"--output='{tmp_path}/a sweep/slurm/%A_%a.log'" in asked
    assert lines[-1].startswith("exec ") and lines[-1].endswith('--task "$SLURM_ARRAY_TASK_ID"')


@pytest.fixture
def pretend_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an ``sbatch`` and an ``squeue`` that print what they are told to first on the path."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def answer(**said: str) -> None:
        for name, text in said.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)

    return answer


def test_tasks_that_are_done_or_in_the_queue_are_not_submitted(
    settings: list[str], tmp_path: Path, pretend_slurm: Callable[..., None]
) -> None:
    out = tmp_path / "sweep"
    pretend_slurm(squeue="echo '1|PENDING||Resources'", sbatch="echo '99;cluster'")
    finish(planned(out, settings, "0.05,0.1")[1], "demo_biscuit")
    given = parse(["--out", str(out), "--grid", f"{RHO}=0.05,0.1", "--slurm", "--no-watch", *settings])
    assert sweep(*given) == ExitCode.OK
    jobs = read_record(out)["jobs"]
    assert [(job["job"], job["tasks"]) for job in jobs] == [("99", [0, 3])]
    assert "#SBATCH --array=0,3\n" in (out / "slurm" / "job.sh").read_text()


def test_what_sbatch_has_against_a_job_is_said(
    settings: list[str], tmp_path: Path, pretend_slurm: Callable[..., None]
) -> None:
    pretend_slurm(squeue="true", sbatch="echo 'invalid partition specified: x' >&2; exit 1")
    with pytest.raises(slurm.SlurmError, match="invalid partition specified: x"):
        sweep(*parse(["--out", str(tmp_path / "sweep"), "--slurm", "--no-watch", *settings]))


@pytest.mark.parametrize("call", ["submit", "queue", "requeue"])
def test_slurm_gets_no_credentials(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch exports its environment, and Slurm's controller stores it."""
    given: list[dict[str, str] | None] = []

    def run(command: list[str], env: dict[str, str] | None = None, **_: Any) -> "subprocess.CompletedProcess[str]":
        given.append(env)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr("subprocess.run", run)
    for name, value in ((VARIABLE, "https://alice:s3cr3t@host/x"), ("SLURM_ARRAY_JOB_ID", "1"), ("KEPT", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    calls: dict[str, Callable[[], object]] = {
        "submit": lambda: slurm.submit(tmp_path, "x", [0], JobOptions()),
        "queue": lambda: slurm.queue("x"),
        "requeue": slurm.requeue,
    }
    calls[call]()
    assert [(env is not None and VARIABLE not in env and env["KEPT"]) for env in given] == ["x"]


@pytest.mark.parametrize("field", ["data.shards", "data.textures"])
@pytest.mark.parametrize("way", ["address", "environment", "another host's"])
def test_an_array_whose_tasks_would_lack_credentials_is_not_submitted(
    field: str, way: str, settings: list[str], tmp_path: Path, pretend_slurm: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pretend_slurm(squeue="true", sbatch="echo 99")
    monkeypatch.setattr("wads_dist.sweep.plan._locate", lambda config, build: (config.data.shards, ["nut"]))
    host = "other" if way == "another host's" else "host"
    monkeypatch.setenv(VARIABLE, "" if way == "address" else f"https://alice:s3cr3t@{host}/x")
    address = "https://alice:s3cr3t@host/x" if way == "address" else "https://host/x"
    command = ["--out", str(tmp_path / "sweep"), "--slurm", "--no-watch", *settings, f"--{field}", address]
    if way == "another host's":
        assert sweep(*parse(command)) == ExitCode.OK
        return
    with pytest.raises(ConfigError, match=r"^https://host/x: .*~/\.netrc on the cluster") as caught:
        sweep(*parse(command))
    assert "s3cr3t" not in str(caught.value) and not (tmp_path / "sweep").exists()


def test_without_slurm_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.SlurmError, match="squeue: not found; submit where Slurm's commands are"):
        slurm.queue("x")


def test_what_waits_in_the_queue_is_shown_as_waiting_there() -> None:
    failed = CategoryStatus("nut", "failed", attempt=1, code=3, reason="damaged")
    assert in_queue(failed, Queued("PENDING", "", "Priority")).state == "waiting"
    assert in_queue(failed, Queued("PENDING", "", "Priority")).host == "queued (Priority)"
    assert in_queue(failed, Queued("RUNNING", "node-a", "None")).state == "running"
    done = CategoryStatus("nut", "done")
    assert in_queue(done, Queued("COMPLETING", "node-a", "None")) is done


# --- the summary -------------------------------------------------------------------------------------------------


def test_spread_is_the_deviation_of_a_sample() -> None:
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "n": 3, "values": [1.0, 2.0, 3.0]}
    assert spread([1.0])["std"] is None and spread([])["mean"] is None


def test_the_mean_over_categories_is_of_whole_runs(settings: list[str], tmp_path: Path) -> None:
    """A run that lacks its hardest category must not look better than the others."""
    plan = open_sweep(tmp_path, planned(tmp_path, settings, "0.1", seeds=3), None)
    finish(plan.runs[0], auroc=0.6)
    finish(plan.runs[1], auroc=0.8)
    finish(plan.runs[2], "demo_biscuit", auroc=1.0)
    summary = summarise(plan)
    point = summary["points"]["kl.rho=0.1"]
    assert point["mean"]["pixel_auroc"]["values"] == [0.6, 0.8]
    assert point["mean"]["pixel_ap"]["n"] == 0
    assert point["categories"]["demo_biscuit"]["pixel_auroc"]["values"] == [0.6, 0.8, 1.0]
    assert summary["missing"] == {"kl.rho=0.1,seed=2": ["demo_leafplate"]} and not summary["complete"]
    assert exit_code_of(summary) == ExitCode.PREEMPTED


@pytest.mark.parametrize(
    ("codes", "done", "code"),
    [((3, 3), 0, 3), ((3, 6), 0, 4), ((3,), 1, 4), ((137, 137), 0, 4), ((7, 130), 0, 7), ((), 2, 0)],
)
def test_the_exit_code_says_what_became_of_the_categories(
    codes: tuple[int, ...], done: int, code: int, settings: list[str], tmp_path: Path
) -> None:
    plan = open_sweep(tmp_path, planned(tmp_path, settings, "0.1"), None)
    (run,) = plan.runs
    if done:
        finish(run, *run.categories[:done])
    for category, failed in zip(run.missing, codes, strict=False):
        plan.ended_file(run, category).parent.mkdir(parents=True, exist_ok=True)
        plan.ended_file(run, category).write_text(str(failed))
    assert exit_code_of(summarise(plan)) == code


def test_a_rank_that_was_lost_has_failed_though_nobody_ended_its_attempt(settings: list[str], tmp_path: Path) -> None:
    plan = open_sweep(tmp_path, planned(tmp_path, settings, "0.1"), None)
    (run,) = plan.runs
    assert Queue(run.folder, run.categories, Owner("l", "g0", (0,), "h"), attempts=3, lease_seconds=60).take()
    path = plan.ended_file(run, run.categories[0])
    path.parent.mkdir(parents=True)
    path.write_text("8")
    assert exit_code_of(summarise(plan)) == ExitCode.RANK_LOST


def test_scores_of_pixels_alone_count_as_done(settings: list[str], tmp_path: Path) -> None:
    plan = open_sweep(tmp_path, planned(tmp_path, settings, "0.1"), None)
    (run,) = plan.runs
    finish(run, run.categories[0])
    path = run.folder / run.categories[0] / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_auroc": None}))
    ended = plan.ended_file(run, run.categories[1])
    ended.parent.mkdir(parents=True)
    ended.write_text("3")
    assert exit_code_of(summarise(plan)) == ExitCode.CATEGORY_FAILED


def test_a_terminal_that_nobody_reads_does_not_end_the_sweep(settings: list[str], tmp_path: Path) -> None:
    """Its launch has a session of its own: it would train on, and the same command would start another."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    plan = open_sweep(tmp_path, planned(tmp_path, settings, "0.1"), None)
    with Watch(plan, Console(file=Closed()), live=False) as watch:
        watch.say("to train")
        assert [c.state for c in watch.look().categories] == ["waiting"] * len(plan.runs[0].categories)


def test_what_was_asked_for_counts_more_than_the_sites_defaults(
    settings: list[str], tmp_path: Path, pretend_slurm: Callable[..., None]
) -> None:
    """sbatch takes SBATCH_PARTITION and the like before a script's own lines, but not before its command line."""
    pretend_slurm(squeue="true", sbatch=f'for word; do echo "$word"; done > {tmp_path}/asked; echo 99')
    options = ["--slurm", "--no-watch", "--partition", "gpu", "--time", "04:00:00", "--sbatch=--account=x"]
    sweep(*parse(["--out", str(tmp_path / "it's a sweep"), *options, *settings]))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {"--partition=gpu", "--time=04:00:00", "--array=0-1", "--requeue"} <= set(asked)
    assert f"--output={tmp_path}/it's a sweep/slurm/%A_%a.log" in asked


# --- a launch ----------------------------------------------------------------------------------------------------

RANK = """\
import os, pathlib, signal, sys, time
me = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
def end(signum, frame):
    time.sleep(1)  # saves
    me.with_suffix(".saved").write_text(signal.Signals(signum).name)
    os._exit(7)
for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, end)
me.with_suffix(".pid").write_text(str(os.getppid()))
time.sleep(120)
"""
LAUNCHER = """\
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[-2:]], env=os.environ | {"RANK": str(r)}) for r in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""
PARENT = """\
import sys, time
from wads_dist.sweep import launch as sweep_launch
sweep_launch.PROGRAM = sys.argv[2]
sweep_launch.shutil.which = lambda *_, **__: sys.argv[1]
launch = sweep_launch.TrainingLaunch([sys.argv[3]], 2, sweep_launch.Signals())
while launch.poll():
    time.sleep(0.05)
print("launcher", launch.process.returncode, "code", int(launch.code))
"""


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]", patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "launcher_dies", "ends_as"),
    [(signal.SIGUSR1, False, "launcher 7 code 7"), (signal.SIGINT, False, "launcher 7 code 130"),
     (signal.SIGTERM, True, "launcher -9 code 7")],
)  # fmt: skip
def test_signals_reach_the_ranks_and_all_of_them_are_waited_for(
    signum: signal.Signals, launcher_dies: bool, ends_as: str, tmp_path: Path
) -> None:
    """Also those whose launcher has died meanwhile; the launcher itself is not signalled, which would kill it."""
    program, launcher = tmp_path / "train.py", tmp_path / "deepspeed"
    program.write_text(RANK)
    launcher.write_text(f"#!{sys.executable}\n{LAUNCHER}")
    launcher.chmod(0o755)
    command = [sys.executable, "-c", PARENT, str(launcher), str(program), str(tmp_path)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        started = [tmp_path / f"{rank}.pid" for rank in range(2)]
        wait_for(lambda: all(path.is_file() and path.read_text() for path in started), process)
        if launcher_dies:
            os.kill(int(started[0].read_text()), signal.SIGKILL)
        process.send_signal(signum)
        printed = process.communicate(timeout=60)[0]
    assert ends_as in printed
    assert [(tmp_path / f"{rank}.saved").read_text() for rank in range(2)] == [signum.name] * 2


SMALL = (
    f"{NARROW} --trainer.global_batch_size 8 --trainer.samples 160 --trainer.log_every 1 --trainer.threads 1 "
    "--checkpoint.every_steps 4 --data.categories demo_biscuit"
).split()


@pytest.mark.slow
@pytest.mark.fault
def test_ctrl_c_ends_the_launch_and_the_same_command_goes_on(settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = [
        "python",
        "launch/sweep.py",
        "--out",
        str(out),
        "--seeds",
        "2",
        "--ranks",
        "1",
        "--json",
        *settings,
        *SMALL,
    ]
    options: dict[str, Any] = {"cwd": REPOSITORY, "env": environment(), "text": True}

    def steps(seed: int) -> list[dict[str, Any]]:
        return events(out / f"seed={seed}", "step")

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as first:
        wait_for(lambda: len(steps(0)) > 5, first, 300)
        first.send_signal(
            signal.SIGINT
        )  # to this process alone, as it is a launch in a session of its own that must end
        printed, said = first.communicate(timeout=60)
    assert first.returncode == ExitCode.INTERRUPTED and "the same command goes on" in said
    assert json.loads(printed)["missing"] == {"seed=0": ["demo_biscuit"], "seed=1": ["demo_biscuit"]}
    assert not processes(out / "seed=0") and not processes(out / "configs" / "seed=0.toml")

    again = subprocess.run(command, capture_output=True, timeout=500, **options)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert summary["complete"] and summary["points"]["run"]["mean"]["pixel_auroc"]["n"] == 2
    assert summary == json.loads((out / "summary.json").read_text())
    assert events(out / "seed=0", "resume")[-1]["step"] >= 4 and len(steps(1)) == 20
