"""The files of a checkpoint: what is complete, what is chosen, what stays. No ranks, no torch state."""

import json
import os
from pathlib import Path

import pytest

from wads_dist.common.errors import ResumeError
from wads_dist.common.files import hashed_file
from wads_dist.config.load import load_config
from wads_dist.config.schema import RunConfig
from wads_dist.training import checkpoint_files as files
from wads_dist.training.checkpoint import DataHashes, check_objective
from wads_dist.training.checkpoint import files as used_by_checkpoint
from wads_dist.training.checkpoint_files import main, name_of


def publish(folder: Path, step: int, loss: float | None = None) -> Path:
    """A checkpoint of two files, written as ``checkpoint.save`` does."""
    name = name_of(step)
    files.start(folder, name)
    partial = files.partial_of(folder, name)
    progress = {
        "progress": {"step": step, "next_sample": 8 * step},
        "loss": loss,
        "world_size": 2,
        "zero_stage": 1,
        "saved": "2025-01-01T00:00:00Z",
        "versions": {"torch": "2"},
        "data": {"fingerprint": "f" * 64},
    }
    entries = {}
    (partial / "engine").mkdir()
    for path, text in (("engine/shard.pt", f"shard of step {step} " * 100), ("progress.json", json.dumps(progress))):
        with hashed_file(partial / path) as out:
            out.write(text.encode())
        entries[path] = out.entry()
    files.write_manifest(partial, entries)
    return files.publish(folder, name)


def test_a_published_checkpoint_is_whole_and_pointed_to(tmp_path: Path) -> None:
    path = publish(tmp_path, 3)
    assert path == tmp_path / "step-00000003" and files.problems(path) == []
    assert files.pointed_to(tmp_path) == files.candidate(tmp_path) == path.name
    assert {p.name for p in tmp_path.iterdir()} == {"latest", path.name}
    assert used_by_checkpoint is files


def test_every_damage_is_named(tmp_path: Path) -> None:
    def damaged() -> Path:
        path = publish(tmp_path, 1)
        assert files.problems(path) == []
        return path

    shard = damaged() / "engine/shard.pt"
    shard.write_bytes(b"X" + shard.read_bytes()[1:])
    assert files.problems(tmp_path / name_of(1)) == ["engine/shard.pt has other bytes than were written (SHA-256)"]
    os.truncate(damaged() / "engine/shard.pt", 7)
    assert files.problems(tmp_path / name_of(1)) == ["engine/shard.pt has 7 bytes, the manifest says 1600"]
    (damaged() / "engine/shard.pt").unlink()
    assert files.problems(tmp_path / name_of(1)) == ["engine/shard.pt is missing"]
    (damaged() / "engine/extra_optim_states.pt").write_text("")
    assert files.problems(tmp_path / name_of(1)) == ["engine/extra_optim_states.pt does not belong here"]
    (damaged() / "manifest.json").unlink()
    assert "manifest.json is missing" in files.problems(tmp_path / name_of(1))[0]
    for text in ("{", "[]", '{"files": {"a": {}}, "format": 1}', '{"format": 1}'):
        (damaged() / "manifest.json").write_text(text)
        assert "cannot be read" in files.problems(tmp_path / name_of(1))[0]
    (damaged() / "manifest.json").write_text('{"format": 2, "files": {}}')
    assert files.problems(tmp_path / name_of(1)) == ["manifest.json has format 2; this version reads 1"]


def test_ranks_that_share_the_hashing_find_what_one_alone_finds(tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    (path / "engine/shard.pt").write_bytes(b"")
    (path / "progress.json").unlink()
    (path / "more").write_bytes(b"")
    alone = files.problems(path)
    assert len(alone) == 3
    for ranks in (2, 3, 8):
        assert sorted(p for rank in range(ranks) for p in files.problems(path, rank, ranks)) == sorted(alone)


def test_the_pointer_decides_and_the_newest_stands_in_for_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(tmp_path, step)
    (tmp_path / "latest").write_text(
        name_of(2) + "\n"
    )  # a later one was renamed but never pointed to, or a person went back
    assert files.candidate(tmp_path) == name_of(2)
    for pointer in (name_of(9), "", "../elsewhere", "\0\xff"):
        (tmp_path / "latest").write_text(pointer)
        assert files.candidate(tmp_path) == name_of(3)
    (tmp_path / "latest").unlink()
    assert files.candidate(tmp_path) == name_of(3)
    for step in (3, 2, 1):
        assert files.quarantine(tmp_path, name_of(step)) == tmp_path / "quarantine" / name_of(step)
    assert files.candidate(tmp_path) is None and files.had_checkpoints(tmp_path)
    publish(tmp_path, 3)
    assert files.quarantine(tmp_path, name_of(3)).name == name_of(3) + ".1"  # nothing there is replaced


def test_a_folder_without_history_has_no_checkpoints(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "never"):
        assert files.candidate(folder) is None and not files.had_checkpoints(folder)
    files.start(tmp_path, name_of(1))  # the first save died
    assert files.candidate(tmp_path) is None and not files.had_checkpoints(tmp_path)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in enumerate((9.0, 2.0, 3.0, None, 5.0), start=1):
        publish(tmp_path, step, loss)
        files.retain(tmp_path, name_of(step), keep=2, keep_best=True)
    assert files.steps(tmp_path) == [name_of(5), name_of(4), name_of(2)]
    publish(tmp_path, 6, 1.0)
    files.retain(tmp_path, name_of(6), keep=2, keep_best=True)
    assert files.steps(tmp_path) == [name_of(6), name_of(5)]
    files.retain(tmp_path, name_of(5), keep=1, keep_best=False)  # went back to 5: a later one does not push it out
    assert files.steps(tmp_path) == [name_of(5)]


def test_what_crashes_leave_behind_is_removed_by_the_next_save(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    files.start(tmp_path, name_of(2))
    (files.partial_of(tmp_path, name_of(2)) / "half").write_text("")
    os.rename(tmp_path / name_of(1), tmp_path / ".removed-step-00000001")
    publish(tmp_path, 3)
    assert {p.name for p in tmp_path.iterdir()} == {"latest", name_of(3)}


def test_a_file_that_another_node_cannot_see_stops_the_publication(tmp_path: Path) -> None:
    files.start(tmp_path, name_of(1))
    partial = files.partial_of(tmp_path, name_of(1))
    with pytest.raises(OSError, match="all nodes share"):
        files.write_manifest(partial, {"rank-00001.pt": files.FileEntry(4, "0" * 64)})
    assert not (partial / "manifest.json").exists()


def test_a_disk_that_is_full_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, hashed_file(Path("/dev/full")) as out:
        out.write(b"x")
    assert caught.value.filename == "/dev/full" and "No space left" in str(caught.value)


def test_the_hash_is_of_what_was_meant_to_be_written(tmp_path: Path) -> None:
    with hashed_file(tmp_path / "a") as out:
        assert out.write(b"one") == 3 and out.write(memoryview(b"two")) == 3
    assert (
        out.entry() == files.FileEntry(6, files.sha256_of(tmp_path / "a"))
        and (tmp_path / "a").read_bytes() == b"onetwo"
    )


def test_verify_and_inspect_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run/nut/checkpoints"
    for step, loss in ((1, 0.5), (2, 0.7)):
        publish(folder, step, loss)
    for path in (tmp_path / "run", folder, folder / name_of(1)):
        assert main(["verify", str(path)]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["marks"] == ["best"] and second["marks"] == ["latest"] and first["problems"] == []
    assert (second["step"], second["samples"], second["world_size"], second["zero_stage"], second["files"]) == (
        2,
        16,
        2,
        1,
        2,
    )
    os.truncate(folder / name_of(2) / "engine/shard.pt", 5)
    assert main(["inspect", str(folder)]) == 0  # reads no file's content
    assert main(["verify", str(folder)]) == 3
    assert "engine/shard.pt has 5 bytes, the manifest says 1600" in capsys.readouterr().err
    assert main(["verify", str(folder / name_of(1))]) == 0
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    with pytest.raises(SystemExit) as usage:
        main(["destroy", str(folder)])
    assert usage.value.code == 2


def test_a_difference_of_the_data_names_the_shards() -> None:
    before = DataHashes("a", {"0.tar": "x", "1.tar": "y", "2.tar": "z"})
    after = DataHashes("b", {"1.tar": "y", "2.tar": "other", "3.tar": "new"})
    assert before.difference(after) == ["0.tar: no longer there", "2.tar: other content", "3.tar: new"]
    assert before.difference(DataHashes("c", before.shards)) == ["labels or offsets of the samples"]


def test_a_checkpoint_for_another_objective_is_refused() -> None:
    config = load_config(["--data.shards", "x"])
    older = "".join(line for line in config.to_toml().splitlines(True) if not line.startswith("direction"))
    with pytest.raises(ResumeError, match=r"step-1 was trained with another objective[\s\S]*reverse → printed"):
        check_objective(older, config, Path("step-1"))
    check_objective(
        config.to_toml(), config.model_copy(update={"run": RunConfig(dir=Path("elsewhere"))}), Path("step-1")
    )
    with pytest.raises(ResumeError, match="step-1: its settings"):
        check_objective("[[", config, Path("step-1"))
