"""Names and addresses from outside, as runs, models and sweeps read and write them."""

import ast
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.wads_dist.scheduler.test_run import SMALL, command
from wads_dist.common.errors import ConfigError, ExitCode, ModelFileError
from wads_dist.config.deepspeed import with_monitors
from wads_dist.config.load import ADDRESSES, config_difference, load_config
from wads_dist.config.schema import all_settings
from wads_dist.data.locate import locate_shards
from wads_dist.deploy.export import export_command
from wads_dist.deploy.predict import load_weights
from wads_dist.launch.command import run_command
from wads_dist.model.networks import Wads
from wads_dist.model.weights import save_weights
from wads_dist.reporting import report
from wads_dist.runs import leases, record
from wads_dist.runs.record import Outcome, open_run, record_summary, refuse_links
from wads_dist.scheduler import categories, run
from wads_dist.scheduler.rendezvous import launch_identity
from wads_dist.scheduler.run import train_run
from wads_dist.shards.addresses import VARIABLE, with_credentials
from wads_dist.shards.arguments import Parser, local_path
from wads_dist.shards.errors import DataError
from wads_dist.shards.names import RESERVED
from wads_dist.sweep.plan import RECORD, TAKEN, load, parse_grid, plan_runs, read_variants
from wads_dist.sweep.run import command_line
from wads_dist.training.checkpoint_files import problems

WITH, WITHOUT = "https://alice:s3cr3t@host.example/mvtec?sig=t0ken", "https://host.example/mvtec"
BANK = "https://alice:s3cr3t@host.example/banks/textures?sig=t0ken&v=2"
SECRETS = ("alice", "s3cr3t", "t0ken")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


# --- names ---------------------------------------------------------------------------------------------------------


def test_what_a_run_writes_beside_its_categories_is_reserved() -> None:
    written = {
        record.CONFIG,
        record.DEEPSPEED,
        record.SUMMARY,
        record.CODE,
        leases.QUEUE,
        categories.LOG,
        report.REPORT,
    }
    monitors = with_monitors({"csv_monitor": {"enabled": True}}, Path("run/monitor"), "nut")
    assert written | {Path(monitors["csv_monitor"]["output_path"]).name} <= RESERVED


@pytest.mark.parametrize(
    "name", ["../nut", "queue", "Log", "nut/..", ".nut", "nut\x1b[2J", "n\u202eut", "-nut", "n" * 201]
)
def test_a_category_that_cannot_be_one_is_refused_on_the_command_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.categories: got .*no category is called") as caught:
        load_config(["--data.categories", name])
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)


def test_every_name_that_cannot_be_one_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\.\./x.*a/b") as caught:
        load_config(["--data.categories", "../x,nut,a/b"])
    assert "'nut'" not in str(caught.value).partition(";")[2]


def test_a_category_from_a_manifest_that_leads_out_of_the_run_ends_it(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F2: exit code 3, and nothing is made."""
    out = tmp_path / "shards"
    out.mkdir()
    text = (demo_shards / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace("demo_biscuit", "../evilcat"))
    assert run_command(train_run, command(out, tmp_path / "run")) == ExitCode.BAD_DATA
    assert "'../evilcat' holds a separator" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_an_index_that_says_something_else_than_its_category_ends_the_run(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F27, before anything is started: a category hidden as a texture bank would be left out, for one."""
    out = tmp_path / "shards"
    out.mkdir()
    for folder in (path for path in demo_shards.iterdir() if path.is_dir()):
        (out / folder.name).symlink_to(folder)
    index = json.loads((demo_shards / "manifest.json").read_text())
    index["categories"]["demo_leafplate"]["kind"] = "textures"
    (out / "manifest.json").write_text(json.dumps(index))
    assert run_command(train_run, command(out, tmp_path / "run")) == ExitCode.BAD_DATA
    assert "demo_leafplate/manifest.json: not the category that" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_data_set_without_a_category_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = {"version": 1, "categories": {}, "fingerprint": hashlib.sha256(b"{}").hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(empty))
    assert run_command(train_run, command(tmp_path, tmp_path / "run")) == ExitCode.BAD_DATA
    assert "holds no category of images" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["nut", "queue", "nut/checkpoints", "nut/events.jsonl", "monitor"])
def test_a_link_out_of_the_runs_folder_is_refused(tmp_path: Path, link: str) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    config = load_config(["--run.dir", str(folder)])
    open_run(config, {"nut": "0" * 64})
    path = folder / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside if "." not in link else outside / "events.jsonl")
    with pytest.raises(ConfigError, match=rf"run\.dir: .*{path.name}: leads out of"):
        open_run(config, {"nut": "0" * 64})
    assert list(outside.iterdir()) == []


def test_links_within_the_runs_folder_and_to_it_are_none_of_these(tmp_path: Path) -> None:
    (tmp_path / "disk/nut/checkpoints").mkdir(parents=True)
    (tmp_path / "disk/nut/last").symlink_to("checkpoints")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    refuse_links(tmp_path / "run", [*RESERVED, "nut"])


def test_a_link_out_of_the_cache_or_of_a_models_folder_is_not_followed(tmp_path: Path) -> None:
    """Where ``data.root`` is built, and where a model is exported to unless a folder is named."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    config = load_config(["--data.root", str(tmp_path / "root"), "--data.cache", str(tmp_path / "cache")])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/built").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"built.*leads out of"):
        locate_shards(config.data)
    (tmp_path / "nut").mkdir()
    (tmp_path / "nut/export").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="export: leads out of"):
        export_command(tmp_path / "nut", None, ["torch"], None, 1e-4, False)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_summary_knows_only_what_can_be_a_name(tmp_path: Path) -> None:
    for name in ("nut", "nut\x1b[2J", "two words", "queue"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "metrics.json").write_text("{}")
        (tmp_path / "queue" / name).mkdir(parents=True, exist_ok=True)
    assert record_summary(tmp_path, Outcome(), [], over=True)["categories"] == {"nut": {}}


@pytest.mark.parametrize("name", ["../nut", "queue", "nut\x1b]0;x\x07"])
def test_a_models_category_is_a_name_too(tmp_path: Path, name: str) -> None:
    config = load_config(SMALL)
    save_weights(Wads(config.model, 64).state_dict(), tmp_path, config, name)
    with pytest.raises(ModelFileError, match="the category '") as caught:
        load_weights(tmp_path)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        {"../../etc/passwd": {"bytes": 1, "sha256": "0"}},
        {"/etc/passwd": {"bytes": 1, "sha256": "0"}},
        {"a\0b": {"bytes": 1, "sha256": "0"}},
        {"progress.json": {"bytes": "123", "sha256": "0"}},
    ],
    ids=["dots", "absolute", "zero byte", "type"],
)
def test_a_checkpoint_that_names_what_is_not_in_it_is_damaged(tmp_path: Path, files: dict[str, object]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert len(problems(tmp_path)) == 1


def test_a_checkpoint_manifest_without_an_end_to_its_brackets_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert "cannot be read" in problems(tmp_path)[0]


@pytest.mark.parametrize("name", [*sorted(TAKEN), "..", ".x", "Logs"])
def test_a_variant_of_a_sweep_has_no_name_of_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "variants.toml").write_text(f'["{name}"]\n"trainer.seed" = 1')
    with pytest.raises(ConfigError, match="cannot name a folder"):
        read_variants(tmp_path / "variants.toml")


@pytest.mark.parametrize("where", ["run", "category", "task"])
def test_a_sweeps_record_is_read_as_input(tmp_path: Path, where: str) -> None:
    names = {"run": "run", "category": "nut", "task": "nut"} | {where: "../x"}
    entry = {"name": names["run"], "point": "run", "settings": {}, "categories": [names["category"]]}
    values = {"starts": [{"ranks": 1}], "jobs": [], "runs": [entry], "tasks": [["run", names["task"]]]}
    (tmp_path / RECORD).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="a name in it holds a separator"):
        load(tmp_path)


# --- addresses -----------------------------------------------------------------------------------------------------


def shown(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def clean(*texts: object) -> bool:
    joined = "\n".join(text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in texts)
    return not any(secret in joined for secret in SECRETS)


def test_credentials_of_an_address_are_used_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4: configuration, weights, report, a sweep's record; and what children get on their command lines."""
    folder = tmp_path / "run"
    config = load_config(["--run.dir", str(folder), "--data.shards", WITH, "--data.textures", BANK, *SMALL])
    assert config.data.shards == WITHOUT and clean(config, repr(config), config.to_toml())
    open_run(config, {})
    (folder / "nut").mkdir()
    save_weights({"a": torch.zeros(1)}, folder / "nut", config, "nut")
    report.write_report(folder)
    monkeypatch.setattr(sys, "argv", ["launch/sweep.py", "--data.shards", WITH])
    assert clean(shown(folder), command_line()) and WITHOUT.encode() in shown(folder)
    assert with_credentials(f"{WITHOUT}/nut/x.tar") == "https://alice:s3cr3t@host.example/mvtec/nut/x.tar?sig=t0ken"


def test_other_credentials_are_no_other_settings(tmp_path: Path) -> None:
    textures = "https://{}host.example/bank/textures"
    config = load_config(["--run.dir", str(tmp_path), "--data.textures", textures.format("alice:s3cr3t@")])
    open_run(config, {})
    again = load_config(["--run.dir", str(tmp_path), "--data.textures", textures.format("bob:n3w@")])
    open_run(again, {})
    assert config_difference(config, again) == []
    assert with_credentials(textures.format("")) == textures.format("bob:n3w@")


def test_what_an_earlier_version_has_written_is_shown_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(["--run.dir", str(tmp_path), *SMALL])
    old = config.to_toml().replace("[data]", f'[data]\nshards = "{WITH}"')
    (tmp_path / "config.toml").write_text(old)
    report.write_report(tmp_path)
    assert clean((tmp_path / "report.html").read_bytes())
    capsys.readouterr()
    for _ in range(2):
        assert load_config(["--config", str(tmp_path / "config.toml")]).data.shards == WITHOUT
    said = capsys.readouterr().err
    assert said.count("config.toml: data.shards holds credentials") == said.count(f"set {VARIABLE}") == 1 and clean(
        said
    )
    assert os.environ[VARIABLE] == ""  # a run's record of a password that has changed since
    (other := tmp_path / "other.toml").write_text(old)
    monkeypatch.setenv(VARIABLE, WITH)
    load_config(["--config", str(other)])
    assert capsys.readouterr().err == ""  # there are others to use


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.shards", WITH, "--trainer.seed", "x"],
        ["--data.shards", "http://alice:s3cr3t t0ken@host"],
        ["--data.shards", "http://alice:s3cr3t@host/\n"],
        ["--data.root", WITH],
        ["--data.root", "simplecache::" + WITH],
        ["--data.shards", "simplecache::" + WITH],
        ["--data.textures", WITH.replace("//", "/")],
        ["--data.shards", WITH.replace("https", "s3")],
        ["--data.shards", 'http://host/x?sig="s3cr3t"'],
        ["--model.weights", "https://alice:s3cr3t@host/resnet50.pth"],
        ["--model.weights", "s3://alice:s3cr3t@host/resnet50.pth"],
        ["--model.weights", "https:/alice:s3cr3t@host/resnet50.pth"],
        ["--data.shards", WITH, "--data.root", "x"],
        ["--data.shard", WITH],
        [WITH],
        ["--data", WITH],
        ["--data", "http://alice:a s3cr3t@host"],
        ["--data.shards http://alice:a s3cr3t@host"],
        ["--data.shards", "http://alice:a", "b", "s3cr3t@host"],  # without quotation marks in a shell
        ["--config", "http://alice:a s3cr3t@host/x.toml"],
        ["--data.categories", "http://alice:a,s3cr3t,s3cr3t@host"],
        ["--data.categories", "nut,all,x http://alice:a s3cr3t@host"],
        ["http://alice:a s3cr3t@host"],
    ],
)
def test_no_error_shows_credentials(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda config: 0, arguments) == ExitCode.BAD_CONFIG
    assert clean(capsys.readouterr().err)


HOSTILE = [
    address.format(character)
    for character in " \"'"
    for address in (" http://alice:a{}s3cr3t@host/x", "http://alice:s3cr3t{}a@host/x", "http://host/x?sig=a{}t0ken")
]


@pytest.mark.parametrize("path", list(all_settings()))
def test_no_setting_but_those_of_data_takes_an_address_and_no_error_shows_one(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where a space or a quotation mark hides the address's end either; a folder of that name would be recorded."""
    for address in HOSTILE:
        wrong = ["--trainer.seed", "x"] if path in ADDRESSES else []  # with an apostrophe, it is an address
        assert run_command(lambda config: 0, [f"--{path}={address}", *wrong]) == ExitCode.BAD_CONFIG
        said = capsys.readouterr().err
        assert clean(said)
        assert path in ADDRESSES or (said.startswith(path) and "http://… (an address)" in said)


@pytest.mark.parametrize("address", ["https://alice:a's3cr3t@host/x", "https://host/x?sig=a't0ken", WITH])
def test_a_sweep_records_its_command_without_credentials(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An apostrophe, which an address may hold, is three characters more in a shell's words."""
    monkeypatch.setattr(sys, "argv", ["it's.py", "--data.shards", address, f"--data.textures={address}", "--json"])
    assert clean(launch_identity())
    words = shlex.split(command_line())
    assert clean(*words) and len(words) == 6 and words[-2].startswith("--data.textures=https://host")


PATHS = {"--json", "--out", "--trace", "--csv", "--plot", "--model", "--folder", "--run", "--variants", "--lease"}
PATHS |= {"run", "path", "model", "input", "FILE", "DIR", "RUN", "SWEEP"}


def _typed(source: Path) -> Iterator[tuple[str, str]]:
    """Name and ``type`` of every argument that a program declares, if it has one or is, by name or metavar, a path."""
    for call in ast.walk(ast.parse(source.read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) in (
            "add_argument",
            "add",
        ):
            named = {word.arg: ast.unparse(word.value).strip("'") for word in call.keywords}
            if not call.args or "action" in named or not isinstance(call.args[0], ast.Constant):
                continue
            name = str(call.args[0].value)
            if "type" in named or {name, named.get("metavar")} & PATHS:
                yield name, named.get("type", "nothing")


def test_no_command_takes_an_address_for_a_path() -> None:
    """It would be a folder's name and stand in what is printed, password and all."""
    programs = [
        path
        for folder in ("launch", "wads_dist", "shards", "benchmarks", "kernels")
        for path in (ROOT / folder).glob("*.py")
    ]
    typed = [(path.name, *entry) for path in programs for entry in _typed(path)]
    assert {kind for *_, kind in typed} >= {"local_path", "local", "int"}
    assert not [entry for entry in typed if entry[2] in ("Path", "pathlib.Path", "str")]
    # What is described and verified may be at an address.
    paths = [entry for entry in typed if entry[1] in PATHS or entry[2] == "nothing"]
    wrong = [entry for entry in paths if entry[2] not in ("local", "local_path") and entry[1] != "location"]
    assert len(paths) > 20 and not wrong
    assert not [path.name for path in programs if "argparse.ArgumentParser(" in path.read_text()]


@pytest.mark.parametrize("address", HOSTILE)
def test_an_address_in_the_place_of_a_path_is_refused_and_not_shown(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser()
    parser.add_argument("run", type=local_path)
    with pytest.raises(SystemExit):
        parser.parse_args([address])
    said = capsys.readouterr().err
    assert clean(said) and "a folder or file is needed, not http" in said
    with pytest.raises(SystemExit):
        parser.parse_args(["folder", address])  # argparse itself shows what it does not know
    assert clean(capsys.readouterr().err)


def test_a_sweep_shows_no_address() -> None:
    for address in HOSTILE:
        with pytest.raises(ConfigError, match=r"give SECTION.FIELD=VALUE") as caught:
            parse_grid([address.replace("=", "")])
        assert clean(caught.value)


def test_a_sweep_over_an_address_plans_it_without_credentials(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wads_dist.sweep.plan._locate", lambda config, build: (config.data.shards, ["nut"]))
    runs = plan_runs(tmp_path, ["--data.shards", WITH, *SMALL], {}, None, build=True)
    assert [run.config.data.shards for run in runs] == [WITHOUT] and clean(runs)


def test_the_folder_of_built_shards_may_come_of_any_name(tmp_path: Path) -> None:
    for name in (os.fsdecode(b"Pr\xfcf"), "n" * 255, "plain"):
        config = load_config(["--data.cache", str(tmp_path)])
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": tmp_path / name})})
        built = run.built_location(config.data)
        built.mkdir(parents=True)
        assert (name == "plain") == built.name.startswith("plain-")


def test_an_error_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda config: 0, ["--\x1b[2J", "1"]) == ExitCode.BAD_CONFIG
    assert "\x1b[2J" not in capsys.readouterr().err
