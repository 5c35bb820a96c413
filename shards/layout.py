"""Finding the samples of a data set on disk.

Two layouts are read:
- MVTec AD: `<category>/{train/good, test/<defect>, ground_truth/<defect>}`; a mask is `<stem>_mask.<ext>` or
  `<stem>.<ext>`, and every defect image must have one.
- Plain: `<category>/{good, bad}` with optional `masks`. It has no split, so every fifth good image in sorted order goes
  to the test split. Without `masks` the bad images have none, and only image-level metrics can be had.

Problems are collected, so that one pass names them all.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from .errors import DataError
from .manifest import Split
from .names import category_problem, defect_problem, is_utf8, key_problem, printable, quoted
from .samples import FileSample

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
PLAIN_TEST_STRIDE = 5


def category_name_problem(name: str) -> str | None:
    """Why a folder cannot be a category by its name; None if it can."""
    problem = category_problem(name)
    return f"category {quoted(name)}: not usable as a file name, {problem}; rename the folder" if problem else None


def find_categories(root: Path) -> dict[str, Path]:
    """Category folders below `root`, or `root` itself where it is one; sorted by name.

    Raises:
        DataError: `root` is no folder, or nothing in it looks like a category.
    """
    root = root.resolve()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the data set's folder as --root")
    if _is_mvtec(root) or _is_plain(root):
        return {root.name: root}
    found = {path.name: path for path in _folders(root) if _is_mvtec(path) or _is_plain(path)}
    if not found:
        raise DataError(
            f"{root}: no category found; expected <category>/train/good and <category>/test/<defect> (MVTec AD), "
            "or <category>/good and <category>/bad"
        )
    return found


def scan_category(folder: Path) -> tuple[list[FileSample], list[str]]:
    """Samples of one category, sorted (train before test, then by key), and the problems of its structure.

    File names in both are relative to the folder above the category, so they begin with the category's name.
    """
    scan = _Scan(folder)
    if _is_mvtec(folder):
        scan.mvtec()
    else:
        scan.plain()
    if not any(sample.split == "train" for sample in scan.samples):
        where = "train/good" if _is_mvtec(folder) else "good"
        scan.problems.append(f"{folder.name}: empty category, no training image in {folder.name}/{where}; add some")
    return sorted(scan.samples, key=lambda sample: (sample.split != "train", sample.key)), scan.told()


def scan_textures(folder: Path) -> tuple[list[FileSample], list[str]]:
    """Every image below `folder`, recursively, as normal training samples of a texture bank."""
    scan = _Scan(folder.resolve(), prefix="")
    for directory in sorted({path.parent for path in scan.folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}):
        images = scan.images(directory)
        below = directory.relative_to(scan.folder).as_posix()
        scan.add(images, "train", "good", group="train/good" if below == "." else f"train/good/{below}")
    if not scan.samples:
        scan.problems.append(f"{folder}: no image below it; give a folder of textures such as DTD's images")
    return sorted(scan.samples, key=lambda sample: sample.key), scan.told()


def _is_mvtec(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _is_plain(folder: Path) -> bool:
    return (folder / "good").is_dir()


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


class _Scan:
    """Samples and problems of one folder while it is being read."""

    def __init__(self, folder: Path, prefix: str | None = None) -> None:
        self.folder = folder
        self.prefix = folder.name + "/" if prefix is None else prefix
        self.root = folder.parent if prefix is None else folder
        self.samples: list[FileSample] = []
        self.problems: list[str] = []
        self.keys: dict[str, str] = {}

    def mvtec(self) -> None:
        self.add(self.images(self.folder / "train" / "good"), "train", "good")
        tested = _folders(self.folder / "test")
        for defect_folder in tested:
            defect = defect_folder.name
            if problem := defect_problem(defect):
                self.problems.append(
                    f"{self.name(defect_folder)}: the name of this kind of defect {problem}; rename it"
                )
                continue
            images = self.images(defect_folder)
            masks = self.images(self.folder / "ground_truth" / defect) if defect != "good" else None
            self.add(images, "test", defect, masks)
        known = {path.name for path in tested} | {"good"}
        for mask_folder in _folders(self.folder / "ground_truth"):
            if mask_folder.name not in known:
                self.orphans(self.images(mask_folder).values())

    def plain(self) -> None:
        good = self.images(self.folder / "good")
        held_out = set(sorted(good)[PLAIN_TEST_STRIDE - 1 :: PLAIN_TEST_STRIDE])
        self.add({stem: path for stem, path in good.items() if stem not in held_out}, "train", "good")
        self.add({stem: path for stem, path in good.items() if stem in held_out}, "test", "good")
        masks = self.folder / "masks"
        self.add(self.images(self.folder / "bad"), "test", "bad", self.images(masks) if masks.is_dir() else None)

    def images(self, folder: Path) -> dict[str, Path]:
        """Image files of a folder by stem, sorted."""
        found: dict[str, Path] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if not is_utf8(self.name(path)):
                self.problems.append(f"{self.name(path)}: this name is not UTF-8; rename it")
            elif path.stem in found:
                other = found[path.stem].name
                self.problems.append(f"{self.name(path)}: name clash with {other} beside it; rename or remove one")
            else:
                found[path.stem] = path
        return found

    def add(
        self,
        images: dict[str, Path],
        split: Split,
        defect: str,
        masks: dict[str, Path] | None = None,
        group: str | None = None,
    ) -> None:
        """Take up the images of one folder; `masks` is None where none are expected."""
        unused = dict(masks or {})
        for stem, path in images.items():
            candidates = [unused.pop(name) for name in (f"{stem}_mask", stem) if name in unused]
            if len(candidates) > 1:
                names = " and ".join(self.name(candidate) for candidate in candidates)
                self.problems.append(f"{self.name(path)}: name clash, two masks ({names}); remove one")
            elif masks is not None and not candidates:
                self.problems.append(f"{self.name(path)}: defect without mask; add {stem}_mask.png or remove the image")
            key = "/".join(_sanitise(part) for part in [*(group or f"{split}/{defect}").split("/"), stem])
            if problem := key_problem(key):
                self.problems.append(f"{self.name(path)}: its key {problem}; give file and folders shorter names")
            if key in self.keys:
                self.problems.append(f"{self.name(path)}: name clash with {self.keys[key]} (both {key}); rename one")
            self.keys[key] = self.name(path)
            mask = self.name(candidates[0]) if candidates else None
            self.samples.append(FileSample(self.root, key, split, defect, self.name(path), mask))
        self.orphans(unused.values())

    def orphans(self, masks: Iterable[Path]) -> None:
        self.problems += [f"{self.name(path)}: mask with no image; add the image or remove it" for path in masks]

    def told(self) -> list[str]:
        """The problems for people: files may have any name."""
        return [printable(problem) for problem in self.problems]

    def name(self, path: Path) -> str:
        return self.prefix + path.relative_to(self.folder).as_posix()


def _sanitise(name: str) -> str:
    # WebDataset ends a key at the first dot of its last part.
    return re.sub(r"[^\w+-]+", "_", name)
