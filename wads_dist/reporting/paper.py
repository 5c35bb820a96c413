"""The paper's published numbers, as data: Wang, Zhang, Cao, Yang, *Electronic Research Archive* 2024, 32(6), 3728-3741.

Only numbers that are printed in the paper belong here: its own column of Tables 1 to 3 and the ablations of Table 4, whose
first column is the same. They are pixel AUROC at 128², printed in per cent; here they are fractions.
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
METHOD, NO_SSIM, NO_KL, LBP = COLUMNS = ("Method", "noSSIM", "noKL", "LBP")
# In per cent, as printed, in the order of COLUMNS.
_TABLE_4 = {
    "bottle": (97.0, 82.2, 87.7, 94.3),
    "capsule": (80.1, 51.6, 78.6, 73.6),
    "grid": (94.3, 93.5, 97.2, 85.6),
    "leather": (96.4, 99.1, 94.2, 93.7),
    "pill": (94.6, 92.8, 86.8, 84.8),
    "tile": (95.6, 98.7, 97.1, 92.3),
    "transistor": (94.6, 67.7, 89.2, 90.2),
    "zipper": (73.8, 84.8, 78.5, 59.3),
    "cable": (95.6, 96.2, 94.1, 87.9),
    "carpet": (91.5, 88.9, 90.2, 86.4),
    "hazelnut": (99.2, 93.4, 97.9, 95.8),
    "metal_nut": (93.9, 74.9, 82.3, 87.9),
    "screw": (93.6, 59.9, 96.3, 86.8),
    "toothbrush": (99.1, 98.4, 96.4, 96.4),
    "wood": (94.5, 91.5, 90.6, 90.7),
}
_TABLE_4_MEANS = (93.0, 84.9, 90.7, 87.0)
ABLATIONS = {
    column: {category: round(values[i] / 100, 3) for category, values in _TABLE_4.items()}
    for i, column in enumerate(COLUMNS)
}
"""Column of Table 4 → category → pixel AUROC, 0 to 1."""
ABLATION_MEANS = {column: round(mean / 100, 3) for column, mean in zip(COLUMNS, _TABLE_4_MEANS, strict=True)}
"""Column of Table 4 → the mean as printed. Its values of noKL have 0.9047, printed as 90.7."""
PIXEL_AUROC = ABLATIONS[METHOD]
"""The paper's own column of Tables 2 and 3 by category, 0 to 1."""
PRINTED_MEANS = {"textures": 0.945, "objects": 0.922, "all": ABLATION_MEANS[METHOD]}
"""The means of that column as Tables 3, 2 and 1 print them. The values themselves have 0.9446, 0.9215 and 0.9292."""
WARNING = (
    "Only the paper's own column, pixel AUROC at 128², is shown here. The baseline columns of its Tables 2 and 3 mix "
    "image-level AUROC, pixel-level AUROC and PRO scores, so they cannot be compared with one another or with this run. Nor do "
    "they agree with themselves: Table 1 prints a mean of 90.7 for MKD, whose 15 values in Tables 2 and 3 have 87.8; in "
    "Table 3 the columns of MKD and P-Net are identical; and RevDistill has 46.2 on bottle, below chance."
)
MEANS = (
    "Its means are those of the values by category, and beside them what the paper prints: 93.0 over all 15 (the values have "
    "92.92), 94.5 over the textures (94.46), 92.2 over the objects (92.15)."
)


def mean(categories: Collection[str], column: str = METHOD) -> float | None:
    """The mean of a column of Table 4 over exactly these categories; None where one of them is not in it, or there are none."""
    values = [value for name in categories if (value := ABLATIONS.get(column, {}).get(name)) is not None]
    return sum(values) / len(values) if values and len(values) == len(categories) else None


def printed_mean(categories: Collection[str]) -> float | None:
    """The mean that the paper prints for its own column over exactly these categories; None where it prints none."""
    groups = {"textures": TEXTURES, "objects": OBJECTS, "all": MVTEC}
    return next((PRINTED_MEANS[group] for group, names in groups.items() if set(categories) == set(names)), None)
