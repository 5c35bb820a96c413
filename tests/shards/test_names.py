"""What may be a name, and what a path to write to must not do."""

from pathlib import Path

import pytest

from wads_dist.shards.errors import DataError
from wads_dist.shards.names import (
    RESERVED,
    category_problem,
    defect_problem,
    file_problem,
    key_problem,
    member_problem,
    printable,
    quoted,
    shard_problem,
    within,
)

# No name of anything: separators, dot names, what steers a terminal or turns text around, what is not UTF-8, too long.
NEVER = [
    *(
        "",
        ".",
        "..",
        ".hidden",
        "../evil",
        "/etc",
        "a/../../b",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[31mred",
        "a\x7f",
        "a\x9b1m",
    ),
    *("a\u202eb", "\u2066a", "a\u200db", "\ufeffa", "a\u2028b", "Pr\udcfcf", "a" * 256, "ä" * 150),
]


@pytest.mark.parametrize("name", NEVER, ids=ascii)
@pytest.mark.parametrize("problem", [category_problem, shard_problem, defect_problem, key_problem, file_problem])
def test_what_can_name_nothing(problem, name: str) -> None:
    if name == "ä" * 150 and problem not in (category_problem, shard_problem):
        name *= 2
    path_like = problem in (key_problem, file_problem)
    assert problem(f"{name}.tar" if problem is shard_problem and name else name)
    assert not path_like or (problem(f"train/{name}") and problem(f"{name}/x"))


@pytest.mark.parametrize("name", ["nut", "Schraube_Größe-2", "3.5mm", "ナット", "built", "a" * 200, "test", "good"])
def test_what_can_name_a_category(name: str) -> None:
    assert category_problem(name) is None


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_category_has_no_name_of_something_else_also_where_case_does_not_count(name: str) -> None:
    assert category_problem(name) and category_problem(name.upper()) and category_problem(f"{name}.")


@pytest.mark.parametrize("name", ["-rf", "+x", "a b", "a,b", "a*", "$(x)", "a:b", "%41"])
def test_a_category_is_a_plain_word(name: str) -> None:
    assert category_problem(name)


def test_a_shard_is_a_tar() -> None:
    assert shard_problem("train-000000.tar") is None
    assert all(map(shard_problem, ["train-000000", "manifest.json", "-x.tar", "x.tar.lock", "a b.tar"]))


@pytest.mark.parametrize("key", ["train/good/000", "train/good/deep/er/a+b-c", "x", "test/large dent/3", "v1.2/7"])
def test_what_can_be_a_sample_key(key: str) -> None:
    assert key_problem(key) is None


@pytest.mark.parametrize(
    "key", ["/train/a", "train//a", "train/a/", "train/./a", "train/../a", "train/a.b", "a/" * 2050 + "a"]
)
def test_what_can_be_no_sample_key(key: str) -> None:
    assert key_problem(key)


@pytest.mark.parametrize("problem", [key_problem, file_problem])
def test_a_long_name_is_measured_in_bytes(problem) -> None:
    assert problem("ä/" * 1365) == "is empty" and problem("ä/" * 1365 + "a") is None  # 4,095 and 4,096 bytes
    assert "more than 4096 bytes" in problem("ä/" * 1365 + "aa")
    assert "more than 4096 bytes" in problem("\udcff/" * 1100)


def test_a_member_is_its_samples_key_and_a_suffix() -> None:
    assert member_problem("train/good/0.mask.png", "train/good/0") is None
    for name in (
        "train/good/1.png",
        "train/good/0",
        "train/good/0.",
        "train/good/0./../x",
        "train/good/00.png",
        "0.png",
    ):
        assert member_problem(name, "train/good/0")


def test_what_is_shown_steers_no_terminal() -> None:
    assert printable("a\x1b[2Jb\u202ec\n\tä 数") == "a\\x1b[2Jb\\u202ec\n\tä 数"
    assert printable("a\r\x85\u2028") == "a\\r\\x85\\u2028"
    assert "\x1b" not in quoted("\x1b]0;x\x07") and len(quoted("x" * 10**6)) < 100


def test_a_path_to_write_to_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "away").mkdir()
    (tmp_path / "cache/link").symlink_to(tmp_path / "away")
    (tmp_path / "cache/loop").symlink_to(tmp_path / "cache/loop")
    (tmp_path / "alias").symlink_to(tmp_path / "cache")
    assert within(tmp_path / "alias", "nut", "a.tar") == tmp_path / "alias/nut/a.tar"
    for parts in (("link", "x"), ("link",), ("..", "away"), ("/etc/x",), ("nut", "..", "..", "x")):
        with pytest.raises(DataError, match="leads out of"):
            within(tmp_path / "cache", *parts)
    with pytest.raises(DataError):
        within(tmp_path / "cache", "a\0b")
