"""What a built data set says about itself: every shard's hash, every sample's place in it.

`OUT/<category>/manifest.json` is a `CategoryManifest`, `OUT/manifest.json` a `DatasetManifest`. Both are JSON with
sorted keys, so that equal content is equal bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shards.errors import DataError
from shards.files import locked, write_atomically

MANIFEST = "manifest.json"
VERSION = 1
Split = Literal["train", "test"]
Kind = Literal["images", "textures"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_json(self) -> str:
        """JSON text with sorted keys and a final newline."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False) + "\n"


class Member(_Model):
    """One file inside a tar."""

    name: str
    offset: int = Field(ge=0, description="byte offset of the payload (not of its header) inside the tar")
    size: int = Field(ge=0)


class SampleEntry(_Model):
    """One image with its label and, where there is one, its mask."""

    key: str
    split: Split
    defect: str = Field(description='name of the defect kind; "good" is normal')
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    image: Member
    mask: Member | None = None

    @property
    def is_normal(self) -> bool:
        return self.defect == "good"


class ShardEntry(_Model):
    """One tar."""

    name: str
    sha256: str
    bytes: int = Field(ge=0)
    samples: list[SampleEntry]


class CategoryManifest(_Model):
    """Everything about one category, or about one texture bank."""

    category: str
    kind: Kind
    shards: list[ShardEntry]
    counts: dict[str, int] = Field(description='samples per split and defect, as {"train/good": 28}')
    mean_size: tuple[float, float] = Field(description="mean (width, height) of the stored images in pixels")
    plan: str = Field(description="hash of the inputs and options that the build was started with")
    fingerprint: str = Field(description="hash of category, kind and shards: equal for equal content")

    @classmethod
    def of(cls, category: str, kind: Kind, shards: list[ShardEntry], plan: str) -> "CategoryManifest":
        """Assemble a manifest; counts, mean size and fingerprint follow from the shards (at least one sample)."""
        samples = [sample for shard in shards for sample in shard.samples]
        counts: dict[str, int] = {}
        for sample in samples:
            name = f"{sample.split}/{sample.defect}"
            counts[name] = counts.get(name, 0) + 1
        mean_size = (
            round(sum(sample.width for sample in samples) / len(samples), 2),
            round(sum(sample.height for sample in samples) / len(samples), 2),
        )
        fingerprint = category_fingerprint(category, kind, shards)
        return cls(
            category=category,
            kind=kind,
            shards=shards,
            counts=counts,
            mean_size=mean_size,
            plan=plan,
            fingerprint=fingerprint,
        )

    def samples(self, split: str | None = None) -> list[tuple[ShardEntry, SampleEntry]]:
        """Samples in manifest order, which is the order that sample ids count in; of one split where given."""
        return [
            (shard, sample)
            for shard in self.shards
            for sample in shard.samples
            if split is None or sample.split == split
        ]


class CategorySummary(_Model):
    """A category's line in the data set's manifest."""

    fingerprint: str
    kind: Kind
    train: int
    test: int


class DatasetManifest(_Model):
    """The categories that a folder holds."""

    version: int
    categories: dict[str, CategorySummary]
    fingerprint: str


def category_fingerprint(category: str, kind: str, shards: list[ShardEntry]) -> str:
    """SHA-256 over the category, its kind and its shard entries.

    The entries hold the shards' hashes, and the labels and offsets too: a manifest that was edited must not pass.
    """
    content = [category, kind, [shard.model_dump(mode="json") for shard in shards]]
    return _digest(content)


def dataset_fingerprint(categories: dict[str, CategorySummary]) -> str:
    """SHA-256 over the names and fingerprints of the categories."""
    return _digest({name: summary.fingerprint for name, summary in categories.items()})


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


_M = TypeVar("_M", DatasetManifest, CategoryManifest)


def parse_manifest(model: type[_M], text: str | bytes, where: str) -> _M:
    """Parse and check a manifest read from `where`.

    Raises:
        DataError: it is not JSON of this shape, is of another version, or its fingerprint is not that of its content.
    """
    try:
        manifest = model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "document"
        raise DataError(f"{where}: not a usable manifest ({field}: {first['msg']}); build the shards again") from error
    if isinstance(manifest, CategoryManifest):
        expected = category_fingerprint(manifest.category, manifest.kind, manifest.shards)
    else:
        if manifest.version != VERSION:
            raise DataError(
                f"{where}: version {manifest.version}, this program reads {VERSION}; build the shards again"
            )
        expected = dataset_fingerprint(manifest.categories)
    if manifest.fingerprint != expected:
        raise DataError(
            f"{where}: fingerprint {manifest.fingerprint[:12]}… does not match its content ({expected[:12]}…); "
            "the file was changed after the build: build the shards again"
        )
    return manifest


def write_dataset_manifest(out: Path) -> DatasetManifest:
    """Rebuild `OUT/manifest.json` from the category folders that lie in OUT, and return it.

    It is derived, never edited: builds into the same folder, even at the same time, add up.
    """
    with locked(out, wait=True):
        categories: dict[str, CategorySummary] = {}
        for path in sorted(out.glob(f"*/{MANIFEST}")):
            if path.parent.name.startswith("."):
                continue
            manifest = parse_manifest(CategoryManifest, path.read_bytes(), str(path))
            per_split = {split: len(manifest.samples(split)) for split in ("train", "test")}
            categories[manifest.category] = CategorySummary(
                fingerprint=manifest.fingerprint, kind=manifest.kind, train=per_split["train"], test=per_split["test"]
            )
        dataset = DatasetManifest(version=VERSION, categories=categories, fingerprint=dataset_fingerprint(categories))
        write_atomically(out / MANIFEST, dataset.to_json())
    return dataset
