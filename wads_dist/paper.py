"""The paper's published numbers, as data: Wang, Zhang, Cao, Yang, *Electronic Research Archive* 2024, 32(6), 3728-3741.

Only numbers that were read in the paper belong here. What nobody has read yet is None, and the report says that it is not
known; the mean is the one that the paper is quoted with.
"""

from collections.abc import Collection

DOI = "10.3934/era.2024169"
CITATION = (
    "Kaixuan Wang, Shixiong Zhang, Yang Cao, Lu Yang: Weakly supervised anomaly detection based on sparsity prior. "
    "Electronic Research Archive 32(6), 3728–3741, 2024"
)
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
OBJECTS = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper",
)  # fmt: skip
MVTEC = (*TEXTURES, *OBJECTS)
IMAGE_SIZE = 128
MEAN_PIXEL_AUROC = 0.930
PIXEL_AUROC: dict[str, float | None] = dict.fromkeys(MVTEC)
"""The paper's own column of Tables 2 and 3 by category, 0 to 1."""
WARNING = (
    "The baseline columns of the paper's Tables 2 and 3 mix image-level AUROC, pixel-level AUROC and PRO scores, so they "
    "cannot be compared with one another or with this run. Only the paper's own column, pixel AUROC at 128², is shown here."
)


def pixel_auroc(categories: Collection[str]) -> float | None:
    """The mean of the paper's own column over exactly these categories; None where that is not known."""
    known = [value for name in categories if (value := PIXEL_AUROC.get(name)) is not None]
    if known and len(known) == len(categories):
        return sum(known) / len(known)
    return MEAN_PIXEL_AUROC if set(categories) == set(MVTEC) else None
