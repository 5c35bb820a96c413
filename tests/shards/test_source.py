"""Reading over a real HTTP server that misbehaves, from object storage, and from damaged folders."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from wads_dist.shards import source as reading
from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError
from wads_dist.shards.manifest import CategoryManifest, CategorySummary, SampleEntry, ShardEntry, dataset_fingerprint
from wads_dist.shards.source import Dataset

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="WebDataset's opener needs curl")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; answers about tars are spoilt `spoilt` times first (-1: always), in the way `how` says."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.how = "cut"
        self.spoilt = 0
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        spoil = path.suffix == ".tar" and self.server.spoilt != 0
        if spoil:
            self.server.spoilt -= 1
        if spoil and self.server.how == "wrong":
            data = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if spoil and self.server.how == "cut":
            self.wfile.write(data[: len(data) // 2])
            return  # the connection closes with half of the promised bytes missing
        if spoil and self.server.how == "stall":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.released.wait(20)
            return
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(reading, "BACKOFF_SECONDS", 0.01)
    build(root, tmp_path / "out", workers=1, progress=False)
    with Server(tmp_path / "out") as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def first(dataset: Dataset) -> tuple[str, ShardEntry, SampleEntry]:
    return ("nut", *dataset.manifest("nut").samples()[0])


def test_remote_equals_local_and_is_fetched_once(server: Server, tmp_path: Path) -> None:
    local = Dataset.open(tmp_path / "out")
    for _ in range(2):  # the second time from the cache, in what might be another process
        remote = Dataset.open(server.url, cache=tmp_path / "cache")
        assert remote.categories == local.categories
        for category in remote.categories:
            for shard, sample in remote.manifest(category).samples():
                assert remote.read(category, shard, sample.image) == local.read(category, shard, sample.image)
    fetched = [path for path in server.requests if path.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) == 4


@pytest.mark.parametrize("how", ["cut", "wrong"])
def test_a_bad_transfer_is_tried_again(server: Server, tmp_path: Path, how: str) -> None:
    server.how, server.spoilt = how, 3
    dataset = Dataset.open(server.url, cache=tmp_path / "cache", retries=3)
    category, shard, sample = first(dataset)
    assert dataset.read(category, shard, sample.image) == Dataset.open(tmp_path / "out").read(
        category, shard, sample.image
    )
    assert len([path for path in server.requests if path.endswith(".tar")]) == 4


@pytest.mark.parametrize("how", ["cut", "wrong"])
def test_retries_are_bounded_and_the_error_is_named(server: Server, tmp_path: Path, how: str) -> None:
    server.how, server.spoilt = how, -1
    dataset = Dataset.open(server.url, cache=tmp_path / "cache", retries=2)
    category, shard, _ = first(dataset)
    with pytest.raises(DataError) as caught:
        dataset.shard(category, shard)
    message = str(caught.value)
    assert f"{server.url}/nut/{shard.name}" in message and "gave up after 3 tries" in message
    if how == "cut":
        assert f"after {shard.bytes // 2} bytes" in message
    else:
        assert "received SHA-256" in message and f"expected {shard.sha256}" in message
    assert len([path for path in server.requests if path.endswith(".tar")]) == 3
    assert [path for path in (tmp_path / "cache/nut").iterdir() if path.suffix != ".lock"] == []


def test_a_stalled_connection_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STALL_SECONDS", 0.5)
    server.how, server.spoilt = "stall", 1
    dataset = Dataset.open(server.url, cache=tmp_path / "cache", retries=1)
    category, shard, _ = first(dataset)
    assert dataset.shard(category, shard).stat().st_size == shard.bytes


def test_a_damaged_cached_shard_is_fetched_again(server: Server, tmp_path: Path) -> None:
    dataset = Dataset.open(server.url, cache=tmp_path / "cache")
    category, shard, _ = first(dataset)
    path = dataset.shard(category, shard)
    good = path.read_bytes()
    path.write_bytes(good[:700] + b"?" + good[701:])
    again = Dataset.open(server.url, cache=tmp_path / "cache")
    assert again.shard(category, shard).read_bytes() == good


def test_a_missing_file_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/manifest.json: the server answered with an HTTP error"):
        Dataset.open(server.url + "/nowhere", cache=tmp_path / "cache")
    assert len(server.requests) == 1


def test_missing_curl_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match="needs the program curl; install it"):
        Dataset.open(server.url)


def test_object_storage_through_fsspec(root: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    build(root, tmp_path / "out", ["nut"], workers=1, progress=False)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "out"), "/bucket", recursive=True)
    dataset = Dataset.open("memory://bucket", cache=tmp_path / "cache")
    category, shard, sample = first(dataset)
    local = Dataset.open(tmp_path / "out")
    assert dataset.read(category, shard, sample.image) == local.read(category, shard, sample.image)
    with pytest.raises(DataError, match="check the address"):
        Dataset.open("memory://elsewhere", retries=0)


def test_s3_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(DataError, match="pip install fsspec s3fs"):
        Dataset.open("s3://bucket/shards")


def test_a_folder_without_manifest_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json there.*wads shards build"):
        Dataset.open(tmp_path)


def test_a_local_shard_that_differs_is_refused(root: Path, tmp_path: Path) -> None:
    build(root, tmp_path / "out", ["nut"], workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    category, shard, sample = first(dataset)
    path = tmp_path / "out/nut" / shard.name
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=rf"{shard.name}: {shard.bytes - 512} bytes, the manifest says {shard.bytes}"):
        dataset.read(category, shard, sample.image)


def test_a_short_read_names_shard_and_member(root: Path, tmp_path: Path) -> None:
    build(root, tmp_path / "out", ["nut"], workers=1, progress=False)
    dataset = Dataset.open(tmp_path / "out")
    category, shard, sample = first(dataset)
    path = dataset.shard(category, shard)
    with open(path, "r+b") as stream:  # truncated after it was verified
        stream.truncate(sample.image.offset + 10)
    with pytest.raises(DataError, match=rf"{shard.name}: {sample.image.name} is cut, 10 of {sample.image.size} bytes"):
        dataset.read(category, shard, sample.image)


def test_an_edited_manifest_is_refused(root: Path, tmp_path: Path) -> None:
    build(root, tmp_path / "out", ["nut"], workers=1, progress=False)
    path = tmp_path / "out/nut/manifest.json"
    path.write_text(path.read_text().replace('"defect": "scratch"', '"defect": "good"'))
    with pytest.raises(DataError, match=r"fingerprint .* does not match its content"):
        Dataset.open(tmp_path / "out").manifest("nut")


def test_the_fingerprint_of_shards_already_built_stays_what_it_is() -> None:
    """Runs and checkpoints name it: a field more in a manifest, or another order, would make other data of the same."""
    shards_of = {
        "train-000000.tar": [{"key": "train/good/000", "split": "train", "defect": "good", "mask": None}],
        "test-000000.tar": [{"key": "test/Kratzer ü/000", "split": "test", "defect": "Kratzer ü"}],
    }
    for samples in shards_of.values():
        for sample in samples:
            key = sample["key"]
            sample |= {"width": 640, "height": 480, "image": {"name": f"{key}.png", "offset": 512, "size": 1000}}
            sample.setdefault("mask", {"name": f"{key}.mask.png", "offset": 2048, "size": 90})
    sums = zip(shards_of.items(), ("a", "b"), (10240, 20480), strict=True)
    entries = [
        ShardEntry.model_validate({"name": name, "sha256": 64 * digit, "bytes": size, "samples": samples})
        for (name, samples), digit, size in sums
    ]
    manifest = CategoryManifest.of("nut", "images", entries, "c" * 64)
    assert manifest.fingerprint == "0460bc9a96b08f248cbaf290bf51dfc159bdf42bc3cd3ef4ffe3fe0243a25b59"
    whole = dataset_fingerprint({"nut": CategorySummary.of(manifest)})
    assert whole == "109f4c6bde9f34ce717e8c1c65beebaf32b2089680427561d26d60ad19ae812d"
