"""Manifests that somebody has written on purpose: no name leads out of the cache, no field is believed, no size is trusted.

Seconds by default; `pytest -m long` goes on for minutes with other seeds.
"""

import copy
import hashlib
import json
import random
import shutil
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.shards.conftest import make_category
from tests.shards.host import Host, serving
from wads_dist.shards import source as reading
from wads_dist.shards.__main__ import main
from wads_dist.shards.addresses import VARIABLE
from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset
from wads_dist.shards.verify import open_category, verify

curl = pytest.mark.skipif(shutil.which("curl") is None, reason="http needs curl")
Tree = Any


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    monkeypatch.setattr(reading, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(VARIABLE, "")
    with serving() as host:
        yield host


@pytest.fixture(scope="module")
def good(module_path: Path) -> Path:
    """A data set of one category and one shard for each split."""
    make_category(module_path / "data/nut", train=3)
    build(module_path / "data", module_path / "good", workers=1, progress=False)
    return module_path / "good"


class Forgery:
    """The two manifests of a data set as trees, to be changed and sealed again: fingerprints are no secret."""

    def __init__(self, good: Path) -> None:
        self.good = good
        self.index: Tree = json.loads((good / "manifest.json").read_text())
        self.category: Tree = json.loads((good / "nut/manifest.json").read_text())

    def seal(self) -> "Forgery":
        try:
            content = [self.category["category"], self.category["kind"], self.category["shards"]]
            self.category["fingerprint"] = digest(content)
            for line in self.index["categories"].values():
                line["fingerprint"] = self.category["fingerprint"]
        except (KeyError, TypeError, AttributeError):
            pass  # changed beyond that
        return self.seal_index()

    def seal_index(self) -> "Forgery":
        try:
            lines = self.index["categories"].items()
            self.index["fingerprint"] = digest({name: line["fingerprint"] for name, line in lines})
        except (KeyError, TypeError, AttributeError):
            pass
        return self

    def texts(self) -> tuple[bytes, bytes]:
        return text(self.index), text(self.category)

    def write(self, out: Path) -> Path:
        shutil.copytree(self.good, out)
        for path, content in zip((out / "manifest.json", out / "nut/manifest.json"), self.texts(), strict=True):
            path.write_bytes(content)
        return out

    def serve(self, host: Host) -> str:
        index, category = self.texts()
        names = self.index.get("categories") if isinstance(self.index, dict) else None
        host.files = {f"/{name}/manifest.json": category for name in (names if isinstance(names, dict) else ())}
        host.files |= {"/manifest.json": index, "/nut/manifest.json": category}
        host.files |= {f"/nut/{tar.name}": tar.read_bytes() for tar in (self.good / "nut").glob("*.tar")}
        host.shard = (self.good / "nut/train-000000.tar").read_bytes()
        return host.address()


def digest(content: Tree) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode(errors="replace")).hexdigest()


def text(tree: Tree) -> bytes:
    return json.dumps(tree).encode()  # lone surrogates too, as escapes


def places(tree: Tree, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def at(tree: Tree, path: tuple[Any, ...]) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def use(location: str, cache: Path) -> None:
    """What training does with a data set: all of it fetched, checked and read. Raises DataError."""
    dataset = Dataset.open(location, cache=cache, retries=0)
    for category in dataset.index.categories:
        for shard, sample in dataset.manifest(category).samples():
            for member in filter(None, (sample.image, sample.mask)):
                dataset.read(category, shard, member)


def tree_of(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# --- every field, changed by itself --------------------------------------------------------------------------------


def other(value: Tree) -> Tree:
    if isinstance(value, bool | None):
        return 1
    if isinstance(value, int | float):
        return value + 1
    return ("0" if value[:1] != "0" else "1") + value[1:] if len(value) == 64 else value + "x"


def leaves(good: Path) -> list[tuple[str, tuple[Any, ...]]]:
    forgery = Forgery(good)
    trees = {"index": forgery.index, "category": forgery.category}
    return [
        (which, path)
        for which, tree in trees.items()
        for path in places(tree)
        if path and not isinstance(at(tree, path), dict | list)
    ]


@pytest.mark.parametrize("server", [False, pytest.param(True, marks=curl)], ids=["folder", "server"])
def test_no_field_is_believed(host: Host, good: Path, tmp_path: Path, server: bool) -> None:
    """F27: what the fingerprint does not cover follows from what it covers. (`plan` says what the builder was asked for: it
    is compared with nothing but another build's, and no reader uses it.)"""
    believed = []
    out = Forgery(good).write(tmp_path / "out")
    places = leaves(good)
    if server:  # one of a kind: a download each takes its time
        places = list(
            {(which, *(isinstance(p, int) or p for p in path)): (which, path) for which, path in places}.values()
        )
    for which, path in places:
        forgery = Forgery(good)
        tree = forgery.index if which == "index" else forgery.category
        at(tree, path[:-1])[path[-1]] = other(at(tree, path))
        for file, content in zip(("manifest.json", "nut/manifest.json"), forgery.texts(), strict=True):
            (out / file).write_bytes(content)
        try:
            use(forgery.serve(host) if server else str(out), tmp_path / "cache")
            believed.append((which, path))
        except DataError:
            pass
    assert believed == [("category", ("plan",))]


@pytest.mark.parametrize("field", ["train", "test", "kind"])
def test_what_the_index_says_is_what_the_category_holds(good: Path, tmp_path: Path, field: str) -> None:
    forgery = Forgery(good)
    line = forgery.index["categories"]["nut"]
    line[field] = "textures" if field == "kind" else line[field] + 10
    out = forgery.seal_index().write(tmp_path / "out")
    assert len(verify(out)) == 1 and f"({field} differs)" in verify(out)[0]


# --- names that lead elsewhere -------------------------------------------------------------------------------------


def escapes(target: Path) -> list[str]:
    up = "/".join([".."] * 30)
    return [
        f"{up}{target}",
        str(target),
        f"x/{up}{target}",
        f"{up}{target}.tar",
        f"x/{up}{target}.tar",
        f"{target}.tar",
    ]


@curl
@pytest.mark.parametrize("where", ["shard", "sha256", "category", "key", "member", "defect"])
def test_no_name_from_a_server_becomes_a_path(host: Host, good: Path, tmp_path: Path, where: str) -> None:
    """F1: a hash that is right for the bytes that come, under a name that leads anywhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for number, name in enumerate(escapes(outside / "OWNED")):
        forgery = Forgery(good)
        shard = forgery.category["shards"][0]
        forgery.category["shards"] = [shard]
        if where == "shard":
            shard["name"] = name
        elif where == "sha256":
            shard["sha256"] = name
        elif where == "category":
            forgery.category["category"] = name
            forgery.index["categories"] = {name: forgery.index["categories"]["nut"]}
        elif where == "key":
            shard["samples"][0]["key"] = name
        elif where == "member":
            shard["samples"][0]["image"]["name"] = name
        else:
            shard["samples"][0]["defect"] = name
        address = forgery.seal().serve(host)
        problems = verify(address)
        assert len(problems) == 1 and ("not a usable manifest" in problems[0] or "the member" in problems[0]), number
        with pytest.raises(DataError):
            open_category(address, name if where == "category" else "nut", tmp_path / "cache")
    assert tree_of(outside) == {}
    assert {path.name for path in tmp_path.iterdir()} <= {"outside", "cache"}


@pytest.mark.parametrize("name", ["../evilcat", "queue", "LOG", "a/b", "..", "x\x1b[2J"])
def test_no_category_of_a_folder_leads_out_of_a_run(good: Path, tmp_path: Path, name: str) -> None:
    """F2: fingerprints right, the category beside the data set."""
    forgery = Forgery(good)
    forgery.category["category"] = name
    forgery.index["categories"] = {name: forgery.index["categories"]["nut"]}
    out = forgery.seal().write(tmp_path / "out")
    with pytest.raises(DataError, match="not a usable manifest") as caught:
        Dataset.open(out)
    assert "\x1b" not in str(caught.value)


@curl
def test_a_link_in_the_cache_leads_nowhere(host: Host, good: Path, tmp_path: Path) -> None:
    address, outside = Forgery(good).serve(host), tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c/nut").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of"):
        use(address, tmp_path / "c")
    entry = Dataset.open(address).manifest("nut").shards[0]
    (tmp_path / "c/nut").unlink()
    (tmp_path / "c/nut").mkdir()
    (tmp_path / f"c/nut/{entry.sha256[:16]}-train-000000.lock").symlink_to(outside / "OWNED")
    with pytest.raises(DataError, match="leads out of"):
        use(address, tmp_path / "c")
    assert tree_of(outside) == {}


@curl
def test_a_category_may_be_called_as_the_folder_of_built_shards(host: Host, good: Path, tmp_path: Path) -> None:
    forgery = Forgery(good)
    forgery.category["category"] = "built"
    forgery.category["shards"] = forgery.category["shards"][:1]
    forgery.category["counts"] = {"train/good": 3}
    forgery.index["categories"] = {"built": forgery.index["categories"]["nut"] | {"test": 0}}
    (tmp_path / "cache/built/data-0123abcd").mkdir(parents=True)
    use(forgery.seal().serve(host), tmp_path / "cache")
    assert len(tree_of(tmp_path / "cache/built")) == 3  # the other's folder, the shard, its lock


# --- at random -----------------------------------------------------------------------------------------------------

VALUES: list[Tree] = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf"), -0.0),
    *(
        "",
        "x",
        "good",
        "train",
        "nut",
        ".",
        "..",
        "/",
        "~",
        "-rf",
        "a\0b",
        "\ud800",
        "\udcfc",
        "\x1b[2J",
        "\u202e",
        "🥜",
    ),
    *("a" * 300, "x" * 100_000, "../" * 50, "queue", "all", "manifest.json", ".building-nut", "0" * 64, "NaN", "1"),
    *([], {}, [[]], {"": {}}, [None], {"nut": None}, ["x"] * 1000, {"a": {"b": {"c": {}}}}),
]


def spoil(tree: Tree, rng: random.Random, strings: list[str]) -> Tree:
    """The tree with one thing in it changed, left out, doubled or renamed."""
    path = rng.choice(list(places(tree)))
    if not path:
        return copy.deepcopy(rng.choice(VALUES))
    parent, key = at(tree, path[:-1]), path[-1]
    value = parent[key]
    kind = rng.randrange(6)
    if kind == 0 and isinstance(value, str) and value:
        cut = rng.randrange(len(value))
        value = value[:cut] + rng.choice([chr(rng.randrange(0x3000)), "/", "..", "\0", "\u202e"]) + value[cut + 1 :]
    elif kind == 1 and isinstance(value, int | float):
        value = value * rng.choice([-1, 10, 2**20, 2**70]) + rng.choice([-1, 0, 1])
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice([*strings, "extra"])] = parent.pop(key)
        return tree
    elif kind == 3:
        parent.pop(key)
        return tree
    elif kind == 4 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(value))
        return tree
    else:
        value = copy.deepcopy(rng.choice([*VALUES, *strings]))
    parent[key] = value
    return tree


def forgeries(good: Path, seed: int, count: int, target: Path) -> Iterator[Forgery]:
    rng, strings = random.Random(seed), [*escapes(target), *(v for v in VALUES if isinstance(v, str))]
    for _ in range(count):
        forgery = Forgery(good)
        for _ in range(rng.choice([1, 1, 2, 4])):
            if rng.random() < 0.35:
                forgery.index = spoil(forgery.index, rng, strings)
            else:
                forgery.category = spoil(forgery.category, rng, strings)
        if rng.random() < 0.25 and isinstance(forgery.index, dict) and isinstance(forgery.category, dict):
            # One name in both, as a whole data set of that name would have it.
            name = forgery.category["category"] = rng.choice(strings)
            lines = forgery.index.get("categories")
            forgery.index["categories"] = {name: next(iter(lines.values()), {}) if isinstance(lines, dict) else {}}
        yield forgery.seal() if rng.random() < 0.8 else forgery


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The test must never ask for 64 MiB, whether or not it would use them; what the process held before does not count."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


CASES = [
    pytest.param(0, id="seconds"),
    pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(3600)], id="long"),
]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("long", CASES)
def test_any_manifest_in_a_folder_is_used_or_refused(good: Path, tmp_path: Path, long: int) -> None:
    outside, out = tmp_path / "outside", tmp_path / "data/out"
    outside.mkdir()
    Forgery(good).write(out)
    before = tree_of(out.parent)
    refused = 0
    for forgery in forgeries(good, seed=long, count=30_000 if long else 400, target=outside / "OWNED"):
        for file, content in zip(("manifest.json", "nut/manifest.json"), forgery.texts(), strict=True):
            (out / file).write_bytes(content)
        refused += bool(verify(out))
    assert refused > 300
    for file, content in zip(("manifest.json", "nut/manifest.json"), Forgery(good).texts(), strict=True):
        (out / file).write_bytes(content)
    assert tree_of(out.parent).keys() == before.keys() and tree_of(outside) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "data"}


@curl
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("long", CASES)
def test_any_manifest_from_a_server_is_used_or_refused(host: Host, good: Path, tmp_path: Path, long: int) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    outside.mkdir()
    refused = 0
    for forgery in forgeries(good, seed=10 + long, count=3000 if long else 60, target=outside / "OWNED"):
        try:
            use(forgery.serve(host), cache)
        except DataError:
            refused += 1
    assert refused > 40
    assert tree_of(outside) == {} and {path.name for path in tmp_path.iterdir()} <= {"outside", "cache"}
    for path in cache.rglob("*"):
        assert path.is_dir() or path.suffix in (".tar", ".lock")
        assert len(path.relative_to(cache).parts) == 1 + path.is_file()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"version": ' + b"9" * 6000 + b"}", b"nan", b"\0" * 1000],
    ids=["empty", "not UTF-8", "deep list", "deep object", "long number", "nan", "zeros"],
)
def test_what_is_no_json_is_refused(good: Path, tmp_path: Path, content: bytes) -> None:
    for number, file in enumerate(("manifest.json", "nut/manifest.json")):
        out = Forgery(good).write(tmp_path / f"out{number}")
        (out / file).write_bytes(content)
        problems = verify(out)
        assert len(problems) == 1 and "not a usable manifest" in problems[0]


# --- sizes ---------------------------------------------------------------------------------------------------------


@curl
def test_a_manifest_without_an_end_is_refused(host: Host, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MANIFEST_BYTES", 1 << 20)
    host.endless = True
    with pytest.raises(DataError, match="no manifest has more than 1 MiB"):
        Dataset.open(Forgery(good).serve(host))
    assert len(host.requests) == 1


@curl
def test_a_shard_without_an_end_is_fetched_no_further_than_it_may_go(host: Host, good: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(Forgery(good).serve(host), cache=tmp_path / "cache", retries=0)
    shard = dataset.manifest("nut").shards[0]
    host.endless = True
    with pytest.raises(DataError, match=f"received {shard.bytes + 1} bytes, expected {shard.bytes}"):
        dataset.shard("nut", shard)
    assert [path.suffix for path in (tmp_path / "cache/nut").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["device", "pipe", "long"])
def test_a_manifest_in_a_folder_is_a_file_of_a_possible_size(
    good: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Forgery(good).write(tmp_path / "out")
    path = out / "nut/manifest.json"
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        subprocess.run(["mkfifo", path], check=True)
    else:
        path.write_bytes(bytes(2000))
        monkeypatch.setattr(reading, "MANIFEST_BYTES", 1999)
    with pytest.raises(DataError, match=r"cannot be read \((no regular file|more than)"):
        Dataset.open(out).manifest("nut")


@curl
def test_a_cache_that_cannot_be_written_is_one_sentence(host: Host, good: Path, tmp_path: Path) -> None:
    address = Forgery(good).serve(host)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"train-000000.tar of [\d,]+ bytes cannot be written there .*data\.cache"):
        use(address, tmp_path / "file")


@curl
@pytest.mark.parametrize(("status", "tries"), [(500, 2), (503, 2), (429, 2), (403, 1), (404, 1)])
def test_a_server_in_trouble_is_asked_again_and_a_refusal_is_one(
    host: Host, good: Path, status: int, tries: int
) -> None:
    address = Forgery(good).serve(host)
    host.status = [status]
    if tries == 1:
        with pytest.raises(DataError, match=str(status)):
            Dataset.open(address, retries=1)
    else:
        assert Dataset.open(address, retries=1).categories == ["nut"]
    assert len(host.requests) == tries


# --- credentials ---------------------------------------------------------------------------------------------------


@curl
@pytest.mark.parametrize("way", ["address", "environment", "netrc"])
def test_credentials_reach_the_server_and_nothing_else(
    host: Host, good: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.user = "alice:s3cr3t"
    address = Forgery(good).serve(host)
    commands: list[str] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: (commands.extend(command), popen(command, **kw))[1])
    with pytest.raises(DataError, match=r"HTTP error \(401\)"):
        Dataset.open(address)
    if way == "address":
        address = host.address("alice:s3cr3t@")
    elif way == "environment":
        monkeypatch.setenv(VARIABLE, host.address("alice:s3cr3t@"))
    else:
        (tmp_path / "home").mkdir()
        (tmp_path / "home/.netrc").write_text("machine 127.0.0.1 login alice password s3cr3t\n")
    host.files = {path: content for path, content in host.files.items() if not path.endswith(".tar")}
    host.shard = None
    dataset = Dataset.open(address, cache=tmp_path / "cache", retries=0)
    with pytest.raises(DataError) as caught:
        dataset.shard("nut", dataset.manifest("nut").shards[0])
    shown = str(caught.value) + repr(vars(dataset)) + " ".join(commands) + " ".join(tree_of(tmp_path / "cache"))
    assert "404" in shown and "s3cr3t" not in shown and "alice" not in shown


@curl
def test_a_token_goes_behind_the_path_and_is_not_shown(host: Host, good: Path) -> None:
    """R14: a signed address of a folder is signed for what is in it; schemes know no case."""
    Forgery(good).serve(host)
    dataset = Dataset.open(host.address().replace("http", "HTTP") + "/?sig=s3cr3t")
    assert host.requests == ["/manifest.json?sig=s3cr3t"] and dataset.location == host.address()


def test_a_driver_gets_no_credentials_that_its_errors_could_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs takes KEY:SECRET@bucket for the name of a bucket, and an error repeats it without the rest of the address."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv(VARIABLE, "s3://key:s3cr3t@bucket/x")

    def fail(url: str, mode: str) -> None:
        raise ValueError(f"cannot open {url.removeprefix('s3://')}")

    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(DataError, match=r"cannot open bucket/x/manifest\.json"):
        Dataset.open("s3://bucket/x")
    with pytest.raises(DataError, match=r"^s3://…: the address holds a password; give .* AWS's") as caught:
        Dataset.open("s3://key:s3cr3t@bucket/x")
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://alice:{}@h", "http://alice:a{}s3cr3t@h/x", "http://h/x?sig=a{}s3cr3t"])
@pytest.mark.parametrize("character", [" ", '"', "'"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "--out", "x", "--root"],
        ["build", "--root", "x", "--out"],
        ["build", "--out", "x", "--textures"],
        ["build", "--root", "x", "--out", "x", "--category"],
        ["build", "--root", "x", "--out", "x", "--workers"],
        ["demo", "--out"],
        ["demo", "--out", "x", "--seed"],
        ["describe", "x"],
        [],
    ],
)
def test_no_command_takes_an_address_for_something_else(
    arguments: list[str],
    character: str,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*arguments, address.format(character)])
    said = "".join(capsys.readouterr())
    assert "http://… (an address)" in said and "s3cr3t" not in said and "alice" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["describe", "https:/alice:s3cr3t@h"],
        ["verify", "https:/alice:s3cr3t@h"],
        ["verify", "--json", "simplecache::https://alice:s3cr3t@h"],
        ["describe", "x", "http://alice:s3cr3t@h"],
        ["http://alice:s3cr3t@h"],
        ["build", "--root", "http://alice:s3cr3t@h", "--out", "x"],
        ["demo", "--out", "x", "--seed", "http://alice:s3cr3t@h"],
    ],
)
def test_no_command_shows_credentials(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(arguments))
    said = "".join(capsys.readouterr())
    assert ended.value.code in (2, 3) and said and "s3cr3t" not in said and "alice" not in said
