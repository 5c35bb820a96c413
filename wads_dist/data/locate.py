"""Where a run's shards are, and which of their categories it takes."""

import hashlib
import os
import sys
from pathlib import Path

from wads_dist.config.schema import DataConfig
from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError, DataProblems
from wads_dist.shards.names import text_problem, within
from wads_dist.shards.source import Dataset


def locate_shards(data: DataConfig) -> str:
    """The location of the shards; those of ``data.root`` are built into the cache first (or found up to date)."""
    if data.shards is not None:
        return data.shards
    root = data.root
    assert root is not None
    if not root.is_dir():
        raise DataError(f"data.root {root}: no such folder; give the folder that holds the images")
    out = within(data.cache, *built_location(data).relative_to(data.cache).parts)
    wanted = None if data.categories == ["all"] else data.categories
    build(root, out, wanted, overwrite="outdated", progress=sys.stderr.isatty())
    return str(out)


def built_location(data: DataConfig) -> Path:
    """Where the shards of ``data.root`` are, or will be."""
    assert data.root is not None
    root = data.root.resolve()
    name = "images" if text_problem(root.name) else root.name
    return data.cache / "built" / f"{name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"


def chosen_categories(data: DataConfig, dataset: Dataset) -> list[str]:
    """The categories to train, in the order given (``all``: in the data set's)."""
    everything = data.categories == ["all"]
    problems = []
    # What the index says of a category (its kind, its numbers of images) is checked with that one's own manifest.
    for name in dataset.index.categories if everything else data.categories:
        try:
            if name in dataset.index.categories:
                dataset.manifest(name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataProblems(problems)
    names = list(dataset.categories if everything else data.categories)
    if not names:
        raise DataError(f"{dataset.location}: holds no category of images; build some into it")
    missing = [c for c in names if c not in dataset.categories]
    if missing:
        raise DataError(
            f"data.categories: {', '.join(missing)} not in {dataset.location}; it has {', '.join(dataset.categories)}"
        )
    untested = [c for c in names if not dataset.index.categories[c].test]
    if untested:
        raise DataError(
            f"{dataset.location}: no test images of {', '.join(untested)}; there would be nothing to score after training. "
            f"Add test/good and test/<defect>, or leave the category out of data.categories"
        )
    return names
