"""Building, verifying and reading WebDataset shards; needs no torch for the first two.

build, build_textures, demo ─► OUT/<category>/{train,test}-000000.tar + manifest.json ─► verify, Dataset
"""

from shards.build import build, build_textures
from shards.demo import demo
from shards.demo_catalogue import DEMO_CATEGORIES
from shards.errors import DataError, DataProblems
from shards.images import decode_image, decode_mask
from shards.manifest import CategoryManifest, DatasetManifest, Member, SampleEntry, ShardEntry
from shards.source import Dataset
from shards.textures import procedural_textures
from shards.verify import verify

__all__ = [
    "DEMO_CATEGORIES",
    "CategoryManifest",
    "DataError",
    "DataProblems",
    "Dataset",
    "DatasetManifest",
    "Member",
    "SampleEntry",
    "ShardEntry",
    "build",
    "build_textures",
    "decode_image",
    "decode_mask",
    "demo",
    "procedural_textures",
    "verify",
]
