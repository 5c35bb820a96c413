"""The demo data set: procedural stand-ins for photographs of products, since MVTec AD may not be redistributed.

Ten objects are polygons in a frame of their own, posed, lit and shaded; five textures are functions of a turned plane.
Every image is drawn at twice its size and reduced. A defect is a process applied to the *scene* (a bite cut out, a part
recoloured, displaced, bent or left out; a scratch, crack, stain, hole or stray thread drawn), never noise filled with
another texture, so that a model trained on synthetic Perlin anomalies has not seen its like. The mask is what the
defect visibly changed: the same scene is drawn with and without it and compared.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from .build import CategoryPlan, build_plans
from .demo_catalogue import CATALOGUE, DEMO_CATEGORIES
from .demo_scene import Flaw, ObjectCategory, Scene, render_object, render_texture
from .errors import DataError
from .images import encode_png
from .manifest import DatasetManifest, Split
from .masks import fit_mask
from .samples import USUAL_SIZE, EncodedSample

DEMO_VERSION = 1  # part of every sample's identity: raise it when the pictures change
SUPERSAMPLING = 2
VISIBLE = 10  # a change of this many grey levels in some channel counts as visible
AREA = (0.002, 0.06)  # admissible part of the image that a defect covers


def demo(
    out: Path,
    categories: int = 15,
    *,
    size: int = 256,
    train: int = 60,
    good: int = 12,
    per_defect: int = 4,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> DatasetManifest:
    """Build the first `categories` demo categories into `out`; four defect kinds each.

    Args:
        size: side of the square RGB images in pixels.
        train: normal training images per category.
        good: normal test images per category.
        per_defect: test images per defect kind.
        seed: another seed gives other images of the same categories.

    Raises:
        DataProblems: `out` holds demo categories of other options and `overwrite` is false.
    """
    if not 1 <= categories <= len(DEMO_CATEGORIES):
        raise DataError(f"demo has 1 to {len(DEMO_CATEGORIES)} categories, not {categories}; choose another number")
    plans = []
    for name in DEMO_CATEGORIES[:categories]:
        samples = [DemoSample(name, "train", "good", index, size, seed) for index in range(train)]
        samples += [DemoSample(name, "test", "good", index, size, seed) for index in range(good)]
        for defect in sorted(CATALOGUE[name].defects):
            samples += [DemoSample(name, "test", defect, index, size, seed) for index in range(per_defect)]
        plans.append(CategoryPlan(name, "images", samples))
    return build_plans(plans, out, workers=workers, overwrite=overwrite, progress=progress)


@dataclass(frozen=True)
class DemoSample:
    """A sample that is drawn where a file would be read."""

    category: str
    split: Split
    defect: str
    index: int
    size: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.split}/{self.defect}/{self.index:03d}"

    @property
    def source(self) -> str:
        return f"{self.category}/{self.key} of seed {self.seed}"

    def identity(self) -> list[object]:
        return [DEMO_VERSION, self.category, self.key, self.size, self.seed]

    def stored_turned(self) -> bool:
        return False

    def payload(self, resize: int | None) -> int:
        return 4 * self.size**2

    def read(self, resize: int | None = None) -> EncodedSample:
        """Draw and encode; `resize` is for files and not used."""
        image, mask = self.draw()
        if mask is None:
            return EncodedSample(encode_png(image), "png", self.size, self.size, None)
        small = fit_mask(mask, USUAL_SIZE).small
        return EncodedSample(
            encode_png(image), "png", self.size, self.size, encode_png(mask.astype(np.uint8) * 255), small
        )

    def draw(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Image uint8 [size, size, 3] and, for a defect, its mask bool [size, size]."""
        clean = self._render(None)
        if self.defect == "good":
            return clean, None
        # Some draws land where they barely show or cover too much; take the first that is of an honest size.
        for attempt in range(100):
            image = self._render(self._rng(f"flaw {attempt}"))
            mask = np.abs(image.astype(np.int16) - clean).max(axis=2) > VISIBLE
            if AREA[0] <= mask.mean() <= AREA[1]:
                return image, mask
        raise DataError(f"{self.source}: no visible defect in 100 draws; use a larger size")

    def clean(self) -> NDArray[np.uint8]:
        """The same scene without its defect, uint8 [size, size, 3]."""
        return self._render(None)

    def _rng(self, purpose: str) -> Generator:
        text = f"{self.category}/{self.key}/{purpose}"
        return Generator(Philox(key=[self.seed, int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")]))

    def _render(self, flaw_rng: Generator | None) -> NDArray[np.uint8]:
        category = CATALOGUE[self.category]
        rng = self._rng("scene")
        scene = Scene.draw(rng, self.size * SUPERSAMPLING, category.turn)
        flaw = None
        if flaw_rng is not None:
            defect = category.defects[self.defect]
            flaw = Flaw(defect.kind, defect.part, defect.colour, rng=flaw_rng)
        if isinstance(category, ObjectCategory):
            rgb = render_object(category, scene, rng, flaw)
        else:
            rgb = render_texture(category, scene, rng, flaw)
        rgb = (rgb[::2, ::2] + rgb[1::2, ::2] + rgb[::2, 1::2] + rgb[1::2, 1::2]) / SUPERSAMPLING**2
        rgb *= replace(scene, n=self.size).illumination()[:, :, None] * scene.tint
        rgb += 1.5 * rng.standard_normal(
            rgb.shape, dtype=np.float32
        )  # sensor noise, the same with and without the flaw
        return np.clip(rgb + 0.5, 0, 255).astype(np.uint8)
