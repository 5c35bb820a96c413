"""Where a run's shards are, and which of their categories it takes."""

import hashlib
import os
import sys
from pathlib import Path

from wads_dist.config.schema import Config
from wads_dist.shards.build import build
from wads_dist.shards.errors import DataError, DataProblems
from wads_dist.shards.names import text_problem, within
from wads_dist.shards.source import Dataset


def locate_shards(config: Config) -> str:
    """The location of the shards; those of ``data.root`` are built into the cache first (or found up to date)."""
    if config.data.shards is not None:
        return config.data.shards
    root = config.data.root
    assert root is not None
    if not root.is_dir():
        raise DataError(f"data.root {root}: no such folder; give the folder that holds the images")
    out = within(config.data.cache, *built_location(config).relative_to(config.data.cache).parts)
    wanted = None if config.data.categories == ["all"] else config.data.categories
    build(root, out, wanted, overwrite="outdated", progress=sys.stderr.isatty())
    return str(out)


def built_location(config: Config) -> Path:
    """Where the shards of ``data.root`` are, or will be."""
    assert config.data.root is not None
    root = config.data.root.resolve()
    name = "images" if text_problem(root.name) else root.name
    return config.data.cache / "built" / f"{name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"


def chosen_categories(config: Config, dataset: Dataset) -> list[str]:
    """The categories to train, in the order given (``all``: in the data set's)."""
    everything = config.data.categories == ["all"]
    problems = []
    # What the index says of a category (its kind, its numbers of images) is checked with that one's own manifest.
    for name in dataset.index.categories if everything else config.data.categories:
        try:
            if name in dataset.index.categories:
                dataset.manifest(name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataProblems(problems)
    names = list(dataset.categories if everything else config.data.categories)
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
