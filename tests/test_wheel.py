"""The wheel, installed outside of the checkout: the command, the data, training under DeepSpeed's launcher, prediction."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from wads_dist.common.errors import ExitCode
from wads_dist.launch.wads import COMMANDS
from wads_dist.launch.wads import main as wads

pytestmark = pytest.mark.slow
TINY = (
    "--config configs/demo.toml --data.shards demo --data.categories demo_biscuit --run.dir run --trainer.samples 16 "
    "--model.width 8 --model.fpn_width 32 --model.latent 16"
).split()  # fmt: skip

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of a fresh environment with the wheel in it, in an empty folder. The dependencies are this environment's,
    without its link to the checkout: a path within a path file is not read for others."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a build leaves its folders where it is done
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines():
        if os.path.lexists(REPOSITORY / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("wads_dist-*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "--python", environment / "bin/python", "install", "--no-deps", wheel], check=True)
    work = folder / "work"
    work.mkdir()
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(environment / "bin"), str(Path(sys.executable).parent), bare["PATH"]])

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=work, env=bare | {"PATH": path, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def test_a_wheel_builds_data_trains_and_predicts_from_any_folder(installed: Run) -> None:
    where = installed("python", "-c", "import wads_dist; print(wads_dist.__file__)").stdout
    assert "environment" in where and str(REPOSITORY) not in where
    installed("wads", "shards", "demo", "--out", "demo", "--categories", "1")
    program = ("python", "-m", "deepspeed.launcher.runner", "--num_accelerators", "2")
    installed(*program, "--module", "wads_dist.launch.train", *TINY)
    assert "demo_biscuit" in installed("wads", "status", "run").stdout
    picture = REPOSITORY / "docs" / "images" / "hazelnut.jpg"
    installed("wads", "predict", "--model", "run/demo_biscuit", str(picture), "--out", "out")
    assert "hazelnut.jpg,800,885" in installed("python", "-c", "print(open('out/results.csv').read())").stdout


def test_the_package_of_another_that_is_called_kernels_stays_its_own(installed: Run) -> None:
    """Nothing of the wheel lies beside ``wads_dist``, so that the order in which both are installed cannot matter."""
    listed = "import importlib.metadata as m; print(*(f.parts[0] for f in m.files('wads-dist')))"
    tops = set(installed("python", "-c", listed).stdout.split())
    assert tops - {"wads_dist", ".."} == {top for top in tops if top.endswith(".dist-info")}  # ..: bin/wads
    both = "import pathlib, sysconfig\nfolder = pathlib.Path(sysconfig.get_path('purelib')) / 'kernels'\n"
    both += "folder.mkdir()\n(folder / '__init__.py').write_text('whose = \"theirs\"')\n"
    both += "import kernels, wads_dist.kernels.objective\nprint(kernels.whose, wads_dist.kernels.__doc__[:18])"
    assert installed("python", "-c", both).stdout.startswith("theirs The two operations")


def test_every_command_says_how_it_is_used_before_anything_heavy_is_imported() -> None:
    program = f"""
import contextlib, io, sys
from wads_dist.launch.wads import main
for name in {list(COMMANDS)}:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([name, "--help"])
    assert said.getvalue().startswith("usage: "), name
    heavy = {{"torch", "deepspeed", "triton", "scipy", "sklearn", "matplotlib"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize(("typed", "says"), [("trian", "did you mean train?"), ("\x1b[2J", "wads --help lists them")])
def test_a_command_that_there_is_not(typed: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wads([typed]) == ExitCode.BAD_CONFIG
    assert capsys.readouterr().err == f"wads: no command {typed!r}; {says}\n"


def test_the_api_imports_torch_and_nothing_that_takes_as_long() -> None:
    heavy = "{'torch._dynamo', 'torchvision', 'deepspeed', 'sklearn', 'matplotlib'}"
    program = f"import sys, wads_dist.deploy.predict; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)
