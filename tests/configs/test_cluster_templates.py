"""The templates in ``configs/cluster``, read as their readers do: DeepSpeed, bash, sbatch, Kubeflow Trainer, our settings."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY, environment
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config

CLUSTER = REPOSITORY / "configs" / "cluster"
HOSTFILE, DEEPSPEED_ENV, SBATCH = CLUSTER / "hostfile", CLUSTER / "deepspeed_env", CLUSTER / "train.sbatch"
TRAINJOB, DOCKERFILE, GUIDE = CLUSTER / "trainjob.yaml", CLUSTER / "Dockerfile", REPOSITORY / "docs" / "cluster.md"
RUNTIME, JOB = list(yaml.safe_load_all(TRAINJOB.read_text()))


def commands(path: Path, program: str) -> list[list[str]]:
    """The command lines in a file, in its comments too, that start with ``program``: each as a shell splits it."""
    lines = [re.sub(r"^\s*#\s?", "", line) for line in path.read_text().splitlines()]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in whole if line.split()[:1] == [program]]


def settings(words: list[str]) -> Config:
    """What ``launch/train.py`` makes of a command line that names it."""
    config = load_config(words[words.index("launch/train.py") + 1 :])
    config.require_data()
    return config


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands run from the checkout."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("path", [*sorted(CLUSTER.iterdir()), GUIDE], ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"\b(?:configs|docs|launch|shards|tests|wads_dist)/[\w./-]*\w\.\w+", path.read_text())
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("path", [HOSTFILE, GUIDE], ids=lambda path: path.name)
def test_settings_in_command_lines_exist(path: Path) -> None:
    lines = [words for words in commands(path, "deepspeed") if "launch/train.py" in words]
    assert lines
    for words in lines:
        settings(words)


def test_the_sweep_of_the_guide_is_one() -> None:
    from wads_dist.launch.sweep import parse

    (words,) = (words for words in commands(GUIDE, "wads") if words[1:2] == ["sweep"])
    given, rest = parse(words[2:])
    assert given.slurm and load_config(rest).data.shards == "/shared/mvtec-shards"


# --- hostfile ----------------------------------------------------------------------------------------------------


def test_deepspeed_reads_the_hostfile() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(HOSTFILE)) == {"node-1": 8, "node-2": 8}


def test_deepspeed_env_has_no_comments() -> None:
    """DeepSpeed would export them too, and a comment sign would hide the rest of the command from the node's shell."""
    lines = DEEPSPEED_ENV.read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", line)] == []


def test_deepspeed_starts_the_command_on_every_node(tmp_path: Path) -> None:
    """The hostfile's command, but for ``pdsh``, which writes down what it would run."""
    pdsh = tmp_path / "pdsh"
    pdsh.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/said\n')
    pdsh.chmod(0o755)
    (command,) = commands(HOSTFILE, "deepspeed")
    command[1:1] = ["--no_ssh_check", "--master_addr", "10.0.0.1"]
    env = environment(DS_ENV_FILE=str(DEEPSPEED_ENV))
    subprocess.run(command, env=env | {"PATH": f"{tmp_path}:{env['PATH']}"}, check=True, capture_output=True)
    said = (tmp_path / "said").read_text().split("\0")[:-1]
    assert said[said.index("-w") + 1] == "node-1,node-2"
    remote = " ".join(said[said.index("-w") + 2 :])
    # The node's shell has all variables by the time it starts the launcher, and PATH grows by ours.
    exports, _, launch = remote.partition("cd ")
    shown = subprocess.run(["bash", "-c", f"PATH=/bin; {exports} /usr/bin/env"], capture_output=True, text=True).stdout
    wanted = dict(line.split("=", 1) for line in DEEPSPEED_ENV.read_text().splitlines())
    got = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert {name: got[name] for name in wanted} == wanted | {"PATH": wanted["PATH"].replace("$PATH", "/bin")}
    words = shlex.split(launch)
    assert words[0] == f"{REPOSITORY};" and "deepspeed.launcher.launch" in words
    world = next(word.removeprefix("--world_info=") for word in words if word.startswith("--world_info="))
    ranks = list(range(8))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"node-1": ranks, "node-2": ranks}
    assert str(settings(words).run.dir) == "/shared/runs/mvtec"


# --- Slurm -------------------------------------------------------------------------------------------------------

# For machines without sbatch, which knows its own options.
OPTIONS = """account constraint cpus-per-task exclusive gpus-per-node job-name mem nodes ntasks-per-node open-mode output
partition qos requeue signal time""".split()


def test_sbatch_accepts_every_directive(tmp_path: Path) -> None:
    """sbatch reads them before it looks for a controller, of which there is none at this address."""
    if shutil.which("sbatch") is None:
        directives = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?(?: +#.*)?$", SBATCH.read_text(), re.MULTILINE)
        assert len(directives) == SBATCH.read_text().count("#SBATCH ") and set(directives) <= set(OPTIONS)
        return
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=none\nSlurmctldHost=none(127.0.0.1)\nSlurmctldPort=1\nAuthType=auth/none\nGresTypes=gpu\nMessageTimeout=1\n"
    )
    env = environment(SLURM_CONF=str(conf))
    result = subprocess.run(["sbatch", "--test-only", SBATCH], env=env, capture_output=True, text=True, timeout=60)
    # Another message if an option or its value is wrong.
    assert "Unable to contact slurm controller" in result.stderr, result.stderr


def test_sbatch_script_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SBATCH], check=True)


STUBS = {
    "scontrol": """case $1 in show) printf '%s\\n' node-1 node-2 ;; requeue) echo "$2" > "$HERE/requeued" ;; esac""",
    # Two nodes with two tasks each, one task after the other.
    "srun": """while [[ $1 == --* ]]; do shift; done
        for task in 0 1 2 3; do
          SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NODEID=$((task / 2)) "$@"
          this=$?
          code=$((this > ${code:-0} ? this : ${code:-0}))
        done
        exit "$code" """,
    # The program itself is replaced; what else the script computes, it computes.
    "python": f"""[ "$1" = launch/train.py ] || exec {sys.executable} "$@"
        show='import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))'
        {sys.executable} -c "$show" "$@" > "$HERE/task-$RANK"
        [ "$RANK" = 0 ] && [ -n "$CONCLUDED" ] && {{ echo "$CONCLUDED" > "$HERE/new"; mv "$HERE/new" "$HERE/summary.json"; }}
        codes=($CODES)
        exit "${{codes[$RANK]}}" """,
}


@dataclass
class Job:
    """The batch script under a Slurm of stubs; ``folder`` is the run's."""

    folder: Path

    def run(self, codes: str, concluded: str = "", seconds: int = 0, *arguments: str) -> int:
        """Exit code of the script if the ranks exit with ``codes`` after ``seconds``, and rank 0 has written ``concluded``."""
        script = self.folder / "script"
        script.write_text(SBATCH.read_text().replace("/shared/runs/mvtec", str(self.folder)))
        slurm = {"SUBMIT_DIR": str(self.folder), "JOB_ID": "4711", "JOB_NODELIST": "node-[1-2]", "NTASKS": "4",
                 "NTASKS_PER_NODE": "2", "CPUS_PER_TASK": "3"}  # fmt: skip
        env = {f"SLURM_{name}": value for name, value in slurm.items()}
        env |= {"HERE": str(self.folder), "CODES": codes, "CONCLUDED": concluded, "SECONDS": str(seconds), "USER": "me"}
        env["PATH"] = f"{self.folder}/bin:{os.environ['PATH']}"
        return subprocess.run(["bash", script, *arguments], env=env, capture_output=True).returncode

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").is_file()

    def task(self, rank: int) -> tuple[dict[str, str], list[str]]:
        """Environment and command line of a rank."""
        env, words = json.loads((self.folder / f"task-{rank}").read_text())
        return env, words


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)
    return Job(tmp_path)


def summary(complete: bool, exit_code: int | None) -> str:
    return json.dumps({"complete": complete, "exit_code": exit_code})


def test_every_task_of_slurm_is_a_rank(job: Job) -> None:
    assert job.run("0 0 0 0", summary(True, 0)) == 0
    for rank in range(4):
        env, _ = job.task(rank)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        want = (str(rank), str(rank % 2), "4", "2", str(rank // 2), "node-1", "24711")
        assert tuple(env[name] for name in names) == want


def test_tasks_of_slurm_train_what_was_asked(job: Job) -> None:
    job.run(
        "0 0 0 0", summary(True, 0), 0, "--data.categories", "bottle,metal_nut", "--parallel.ranks_per_category", "1"
    )
    config = settings([*job.task(3)[1]])
    assert config.run.dir == job.folder and config.data.categories == ["bottle", "metal_nut"]


@pytest.mark.parametrize(
    ("codes", "concluded", "seconds", "code", "again"),
    [
        pytest.param("0 0 0 0", summary(True, 0), 5, 0, False, id="done"),
        pytest.param("0 0 0 137", summary(True, 0), 700, 0, False, id="done though a rank was killed"),
        pytest.param("0 0 0 0", summary(False, None), 5, 1, False, id="no success without a conclusion"),
        pytest.param("7 7 7 7", summary(False, 7), 5, 7, True, id="saved before the time limit"),
        pytest.param("138 138 138 138", "", 5, 138, True, id="asked to stop before it could listen"),
        pytest.param("4 4 4 137", summary(False, 4), 700, 4, False, id="some categories failed"),
        pytest.param("2 2 2 2", "", 700, 2, False, id="wrong settings"),
        pytest.param("137 8 8 8", summary(False, None), 700, 137, True, id="rank 0 was killed"),
        pytest.param("8 8 8 8", summary(False, None), 700, 8, True, id="a rank was lost"),
        pytest.param("8 8 8 8", summary(False, None), 5, 8, False, id="a rank was lost at once"),
        pytest.param("130 130 130 130", summary(False, None), 700, 130, False, id="interrupted"),
    ],
)
def test_what_the_job_does_at_its_end(
    job: Job, codes: str, concluded: str, seconds: int, code: int, again: bool
) -> None:
    (job.folder / "summary.json").write_text(summary(True, 0))  # of an earlier job, with fewer categories
    assert job.run(codes, concluded, seconds) == code
    assert job.requeued == again


# --- Kubernetes --------------------------------------------------------------------------------------------------


def node_job() -> dict[str, Any]:
    """The runtime's Job, whose pods are the nodes."""
    (job,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    return job["template"]


def test_the_objects_are_those_of_kubeflow_trainer() -> None:
    for document, kind in ((RUNTIME, "TrainingRuntime"), (JOB, "TrainJob")):
        assert (document["apiVersion"], document["kind"]) == ("trainer.kubeflow.org/v1alpha1", kind)
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": RUNTIME["kind"], "name": RUNTIME["metadata"]["name"]}
    assert JOB["spec"]["runtimeRef"] == reference


def test_every_field_is_one_of_kubeflow_trainers() -> None:
    """Its own models: what they do not know, they drop."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs: pip install kubeflow-trainer-api")
    for document, model in ((RUNTIME, models.TrainerV1alpha1TrainingRuntime), (JOB, models.TrainerV1alpha1TrainJob)):
        assert model.from_dict(document).to_dict() == document


def test_the_runtime_trains_in_its_container_node() -> None:
    """Trainer looks for this label and this name, and gives that container the job's image, command and variables."""
    job = node_job()
    assert job["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["name"] == "node"


def test_what_is_mounted_is_a_volume() -> None:
    pod = node_job()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert sorted(m["name"] for m in container["volumeMounts"]) == sorted(v["name"] for v in pod["volumes"])


def test_what_the_job_reads_and_writes_is_mounted() -> None:
    (container,) = node_job()["spec"]["template"]["spec"]["containers"]
    mounts = {m["mountPath"]: not m.get("readOnly", False) for m in container["volumeMounts"]}
    config, env = (
        settings(JOB["spec"]["trainer"]["args"]),
        {e["name"]: e["value"] for e in JOB["spec"]["trainer"]["env"]},
    )
    assert any(Path(str(config.data.shards)).is_relative_to(mount) for mount in mounts)
    for path in (config.run.dir, config.data.cache, env["TORCH_EXTENSIONS_DIR"], env["TRITON_CACHE_DIR"]):
        assert any(writable and Path(path).is_relative_to(mount) for mount, writable in mounts.items()), path


def test_a_job_that_fails_starts_again_as_a_whole() -> None:
    """Only a Job whose pods are never restarted one by one fails at once, and may have rules about why."""
    job, policy = node_job()["spec"], RUNTIME["spec"]["template"]["spec"]["failurePolicy"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert [rule["action"] for rule in job["podFailurePolicy"]["rules"]] == ["FailJob"]
    # What such a rule has failed, fails for the reason that the policy names.
    (rule,) = policy["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and policy["maxRestarts"] > 0


def test_a_pod_is_given_longer_than_torchrun_gives_its_ranks() -> None:
    env = {e["name"]: e["value"] for e in JOB["spec"]["trainer"]["env"]}
    grace = node_job()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30


def test_there_is_a_rank_for_each_gpu() -> None:
    trainer = JOB["spec"]["trainer"]
    assert trainer["numProcPerNode"] == int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"])


def test_torchrun_is_told_nothing_that_trainer_tells_it() -> None:
    """Trainer refuses variables that it sets itself; an option would take precedence over them."""
    trainer = JOB["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"] and trainer["args"][0] == "launch/train.py"
    assert not [e["name"] for e in trainer["env"] if e["name"].startswith(("PET_", "MASTER_"))]


def test_the_image_has_what_the_job_runs() -> None:
    """The job's command is relative to the image's working folder, and everything that is copied into it exists."""
    lines = [line.split() for line in DOCKERFILE.read_text().splitlines()]
    copied = [path for words in lines if words[:1] == ["COPY"] for path in words[1:-1]]
    assert "." in copied and all((REPOSITORY / path).exists() for path in copied)
    assert [words for words in lines if words[:1] == ["WORKDIR"]] == [["WORKDIR", "/opt/wads-dist"]]
    assert "workingDir" not in node_job()["spec"]["template"]["spec"]["containers"][0]
    (user,) = (words[1] for words in lines if words[:1] == ["USER"])
    context = node_job()["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
