"""What a built data set says about itself: every shard's hash, every sample's place in it.

`OUT/<category>/manifest.json` is a `CategoryManifest`, `OUT/manifest.json` a `DatasetManifest`. Both are JSON with
sorted keys, so that equal content is equal bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import DataError
from .files import locked, write_atomically
from .names import category_problem, defect_problem, key_problem, member_problem, printable, quoted, shard_problem

MANIFEST = "manifest.json"
VERSION = 1
Split = Literal["train", "test"]
Kind = Literal["images", "textures"]


def _name(problem: Callable[[str], str | None]) -> AfterValidator:
    def check(name: str) -> str:
        if found := problem(name):
            raise ValueError(f"{quoted(name)} {found}")
        return name

    return AfterValidator(check)


CategoryName = Annotated[str, _name(category_problem)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256, hexadecimal")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Pixels = Annotated[int, Field(gt=0, lt=2**31)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def to_json(self) -> str:
        """JSON text with sorted keys and a final newline."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False) + "\n"


class Member(_Model):
    """One file inside a tar."""

    name: str
    offset: Count = Field(description="byte offset of the payload (not of its header) inside the tar")
    size: Count


class SampleEntry(_Model):
    """One image with its label and, where there is one, its mask."""

    key: Annotated[str, _name(key_problem)]
    split: Split
    defect: Annotated[str, _name(defect_problem)] = Field(description='name of the defect kind; "good" is normal')
    width: Pixels
    height: Pixels
    image: Member
    mask: Member | None = None

    @property
    def is_normal(self) -> bool:
        return self.defect == "good"


class ShardEntry(_Model):
    """One tar."""

    name: Annotated[str, _name(shard_problem)]
    sha256: Digest
    bytes: Count
    samples: list[SampleEntry]


class CategoryManifest(_Model):
    """Everything about one category, or about one texture bank."""

    category: CategoryName
    kind: Kind
    shards: list[ShardEntry]
    counts: dict[str, Count] = Field(description='samples per split and defect, as {"train/good": 28}')
    mean_size: tuple[float, float] = Field(description="mean (width, height) of the stored images in pixels")
    plan: Digest = Field(description="hash of the inputs and options that the build was started with")
    fingerprint: Digest = Field(description="hash of category, kind and shards: equal for equal content")

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

    fingerprint: Digest
    kind: Kind
    train: Count
    test: Count

    @classmethod
    def of(cls, manifest: CategoryManifest) -> "CategorySummary":
        """The line that a category's manifest makes."""
        train, test = (len(manifest.samples(split)) for split in ("train", "test"))
        return cls(fingerprint=manifest.fingerprint, kind=manifest.kind, train=train, test=test)


class DatasetManifest(_Model):
    """The categories that a folder holds."""

    version: int = Field(ge=0, lt=2**31)
    categories: dict[CategoryName, CategorySummary]
    fingerprint: Digest


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
    """Parse and check a manifest read from `where`, of whose text nothing is taken for granted.

    Raises:
        DataError: it is not JSON of this shape, is of another version, holds a name that cannot be one (`shards.names`) or a
            place outside of its shard; or its fingerprint, counts or mean size are not those of its content.
    """
    try:
        manifest = model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = printable(".".join(map(str, first["loc"])))[:200] or "document"
        raise DataError(f"{where}: not a usable manifest ({field}: {first['msg']}); build the shards again") from None
    if isinstance(manifest, DatasetManifest) and manifest.version != VERSION:
        raise DataError(f"{where}: version {manifest.version}, this program reads {VERSION}; build the shards again")
    if problem := next(_contradictions(manifest), None):
        raise DataError(f"{where}: {problem}: build the shards again")
    return manifest


def _contradictions(manifest: CategoryManifest | DatasetManifest) -> Iterator[str]:
    """What a manifest says of itself that does not follow from the rest of it."""
    if isinstance(manifest, DatasetManifest):
        if len({name.casefold() for name in manifest.categories}) < len(manifest.categories):
            yield "names of categories differ in large and small letters only; rename one of the folders"
        yield from _fingerprint_problem(manifest.fingerprint, dataset_fingerprint(manifest.categories))
        return
    if len({shard.name.casefold() for shard in manifest.shards}) < len(manifest.shards):
        yield "two shards have one name"
    samples = manifest.samples()
    if not samples:
        yield "it holds no sample"
        return
    if len({sample.key for _, sample in samples}) < len(samples):
        yield "two samples have one key"
    for shard, sample in samples:
        for member in filter(None, (sample.image, sample.mask)):
            if problem := member_problem(member.name, sample.key):
                yield f"{shard.name}: the member {quoted(member.name)} {problem}"
            if member.offset + member.size > shard.bytes:
                yield f"{shard.name}: {member.name} would end after the {shard.bytes} bytes of its shard"
    expected = CategoryManifest.of(manifest.category, manifest.kind, manifest.shards, manifest.plan)
    yield from _fingerprint_problem(manifest.fingerprint, expected.fingerprint)
    for field in ("counts", "mean_size"):
        if getattr(manifest, field) != getattr(expected, field):
            yield f"{field} is not that of its samples; the file was changed after the build"


def _fingerprint_problem(said: str, expected: str) -> Iterator[str]:
    if said != expected:
        yield (
            f"fingerprint {said[:12]}… does not match its content ({expected[:12]}…); the file was changed after the build"
        )


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
            if manifest.category != path.parent.name:
                raise DataError(f"{path}: is of the category {manifest.category}; name its folder so, or move it away")
            categories[manifest.category] = CategorySummary.of(manifest)
        dataset = DatasetManifest(version=VERSION, categories=categories, fingerprint=dataset_fingerprint(categories))
        write_atomically(out / MANIFEST, dataset.to_json())
    return dataset
