"""The demo data set: procedural stand-ins for photographs of products, since MVTec AD may not be redistributed.

Ten objects are polygons in a frame of their own, posed, lit and shaded; five textures are functions of a turned plane.
Every image is drawn at twice its size and reduced. A defect is a process applied to the *scene* (a bite cut out, a part
recoloured, displaced, bent or left out; a scratch, crack, stain, hole or stray thread drawn), never noise filled with
another texture, so that a model trained on synthetic Perlin anomalies has not seen its like. The mask is what the
defect visibly changed: the same scene is drawn with and without it and compared.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from shards.build import CategoryPlan, build_plans
from shards.errors import DataError
from shards.images import encode_png
from shards.manifest import DatasetManifest, Split
from shards.samples import EncodedSample

DEMO_VERSION = 1  # part of every sample's identity: raise it when the pictures change
SUPERSAMPLING = 2
VISIBLE = 10  # a change of this many grey levels in some channel counts as visible
SURFACE_FLAWS = ("scratch", "crack", "thread", "stain", "hole")
AREA = (0.002, 0.06)  # admissible part of the image that a defect covers

Float = NDArray[np.floating]  # float32 [n, n] or [n, n, 3] throughout
Points = NDArray[np.float64]
Colour = tuple[float, float, float]


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
        for defect in sorted(_CATEGORIES[name].defects):
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

    def payload(self, resize: int | None) -> int:
        return 4 * self.size**2

    def read(self, resize: int | None = None) -> EncodedSample:
        """Draw and encode; `resize` is for files and not used."""
        image, mask = self.draw()
        mask_data = None if mask is None else encode_png(mask.astype(np.uint8) * 255)
        return EncodedSample(encode_png(image), "png", self.size, self.size, mask_data)

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
        category = _CATEGORIES[self.category]
        rng = self._rng("scene")
        scene = Scene.draw(rng, self.size * SUPERSAMPLING, category.turn)
        flaw = None
        if flaw_rng is not None:
            defect = category.defects[self.defect]
            flaw = Flaw(defect.kind, defect.part, defect.colour, rng=flaw_rng)
        if isinstance(category, ObjectCategory):
            rgb = _render_object(category, scene, rng, flaw)
        else:
            rgb = _render_texture(category, scene, rng, flaw)
        rgb = (rgb[::2, ::2] + rgb[1::2, ::2] + rgb[::2, 1::2] + rgb[1::2, 1::2]) / SUPERSAMPLING**2
        rgb *= replace(scene, n=self.size).illumination()[:, :, None] * scene.tint
        rgb += 1.5 * rng.standard_normal(
            rgb.shape, dtype=np.float32
        )  # sensor noise, the same with and without the flaw
        return np.clip(rgb + 0.5, 0, 255).astype(np.uint8)


# ---- scenes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Pose and light of one picture. Coordinates run from -1 to 1 across the image."""

    n: int
    angle: float
    scale: float
    shift: tuple[float, float]
    gain: float
    slope: tuple[float, float]
    light_angle: float
    tint: Float

    @classmethod
    def draw(cls, rng: Generator, n: int, turn: float) -> "Scene":
        return cls(
            n=n,
            angle=float(np.deg2rad(rng.uniform(-turn, turn))),
            scale=float(rng.uniform(0.9, 1.1)),
            shift=(float(rng.uniform(-0.2, 0.2)), float(rng.uniform(-0.2, 0.2))),  # ±10 % of the width of 2
            gain=float(rng.uniform(0.8, 1.05)),
            slope=(float(rng.uniform(-0.08, 0.08)), float(rng.uniform(-0.08, 0.08))),
            light_angle=float(rng.uniform(-2.6, -2.0)),
            tint=rng.normal(1, 0.015, 3).astype(np.float32),
        )

    def grid(self) -> tuple[Float, Float]:
        """x and y of every pixel, float32 [n, n] each."""
        line = (np.arange(self.n, dtype=np.float32) + 0.5) * (2 / self.n) - 1
        return np.broadcast_to(line, (self.n, self.n)), np.broadcast_to(line[:, None], (self.n, self.n))

    def illumination(self) -> Float:
        x, y = self.grid()
        return np.asarray(self.gain * (1 + self.slope[0] * x + self.slope[1] * y), dtype=np.float32)

    def place(self, points: Points) -> Points:
        """From the object's frame to the image's."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return points @ np.array([[cos, sin], [-sin, cos]]) * self.scale + self.shift

    def unplace(self, x: Float, y: Float) -> tuple[Float, Float]:
        """From the image's frame to the object's."""
        cos, sin = np.float32(np.cos(self.angle) / self.scale), np.float32(np.sin(self.angle) / self.scale)
        x, y = x - np.float32(self.shift[0]), y - np.float32(self.shift[1])
        return cos * x + sin * y, cos * y - sin * x

    def pixels(self, points: Points) -> list[tuple[float, float]]:
        return [(x, y) for x, y in ((points + 1) * (self.n / 2)).tolist()]

    def fill(self, outlines: list[Points], holes: list[Points] | None = None) -> Float:
        """Coverage of polygons given in the image's frame, float32 [n, n] in [0, 1]."""
        canvas = Image.new("L", (self.n, self.n))
        pen = ImageDraw.Draw(canvas)
        for points, value in [(outline, 255) for outline in outlines] + [(hole, 0) for hole in holes or []]:
            pen.polygon(self.pixels(points), fill=value)
        return np.asarray(canvas, dtype=np.float32) / 255

    def line(self, points: Points, width: float) -> Float:
        """Coverage of a polyline in the image's frame; `width` in the same units."""
        canvas = Image.new("L", (self.n, self.n))
        pixels = max(2, round(width * self.n / 2))
        ImageDraw.Draw(canvas).line(self.pixels(points), fill=255, width=pixels, joint="curve")
        return np.asarray(canvas, dtype=np.float32) / 255

    def blur(self, coverage: Float, radius: float) -> Float:
        image = Image.fromarray((coverage * 255).astype(np.uint8))
        return np.asarray(image.filter(ImageFilter.GaussianBlur(radius * self.n / 2)), dtype=np.float32) / 255


def _rgb(colour: Colour) -> Float:
    return np.asarray(colour, dtype=np.float32)


def _mix(rgb: Float, colour: Colour | Float, alpha: Float) -> Float:
    """Lay a colour over rgb [n, n, 3] where alpha [n, n] says so."""
    return rgb + (np.asarray(colour, dtype=np.float32) - rgb) * alpha[:, :, None]


# ---- flaws --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    """A kind of defect: how it is drawn, on which part (a name; anywhere if empty), in which colour."""

    kind: str
    part: str = ""
    colour: Colour = (60, 45, 35)


@dataclass(frozen=True, kw_only=True)
class Flaw(Defect):
    """One occurrence of a defect, with the generator that decides on its place and shape."""

    rng: Generator


def _spot(region: Float, rng: Generator) -> Points:
    """A random point of a region, in the image's frame, [1, 2]."""
    rows, columns = np.nonzero(region > 0.9)
    index = int(rng.integers(len(rows)))
    return (np.array([[columns[index], rows[index]]]) + 0.5) * (2 / len(region)) - 1


def _walk(rng: Generator, start: Points, length: float, steps: int, wobble: float) -> Points:
    """A polyline of given length through `start` that changes its heading by N(0, wobble) at each step."""
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, wobble, steps))
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1) * (length / steps), axis=0)
    return start + path - path[steps // 2]


def _blob(rng: Generator, centre: Points, radius: float, rough: float) -> Points:
    """A closed outline about `centre` whose radius varies by a few low harmonics."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    wave = np.zeros_like(angle)
    for k in range(2, 6):
        wave += rng.normal(0, rough / k) * np.cos(k * angle + rng.uniform(0, 7))
    return centre + radius * (1 + wave)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _draw_surface_flaw(scene: Scene, rgb: Float, region: Float, flaw: Flaw) -> Float:
    """Scratches, cracks, stray threads, stains and holes, on the part of the image that `region` covers."""
    rng = flaw.rng
    spot = _spot(region, rng)
    if flaw.kind == "scratch":
        path = _walk(rng, spot, rng.uniform(0.5, 1.0), 12, 0.06)
        alpha = scene.blur(scene.line(path, rng.uniform(0.016, 0.03)), 0.003) * region
        shade = rng.choice([0.45, 0.6, 1.35, 1.5])  # dark where it is deep, bright where it shines
        return _mix(rgb, np.minimum(rgb * np.float32(shade) + (40 if shade > 1 else 0), 255), alpha)
    if flaw.kind == "crack":
        path = _walk(rng, spot, rng.uniform(0.5, 0.9), 14, 0.55)
        branch = _walk(rng, path[4:5], rng.uniform(0.2, 0.35), 8, 0.5)
        alpha = np.maximum(scene.line(path, 0.02), scene.line(branch, 0.014)) * region
        return _mix(rgb, rgb * np.float32(0.3), alpha * np.float32(rng.uniform(0.6, 1.0)))
    if flaw.kind == "thread":
        path = _walk(rng, spot, rng.uniform(0.8, 1.3), 40, 0.22)
        return _mix(rgb, flaw.colour, scene.line(path, rng.uniform(0.018, 0.026)))
    if flaw.kind == "stain":
        blots = [_blob(rng, spot + rng.normal(0, 0.06, 2), rng.uniform(0.06, 0.13), 0.12) for _ in range(4)]
        alpha = scene.blur(scene.fill(blots), 0.03) * region
        return _mix(
            rgb, rgb * (np.asarray(flaw.colour, dtype=np.float32) / 255), alpha * np.float32(rng.uniform(0.5, 0.9))
        )
    if flaw.kind == "hole":
        radius = rng.uniform(0.06, 0.12)
        rim = scene.fill([_blob(rng, spot, radius * 1.2, 0.05)]) * region
        core = scene.fill([_blob(rng, spot, radius, 0.05)]) * region
        return _mix(_mix(rgb, np.minimum(rgb * 1.2, 255), rim), flaw.colour, core)
    raise ValueError(flaw.kind)


# ---- objects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Polygons of one colour in the object's frame; `bevel` is how strongly their edges catch the light."""

    name: str
    colour: Colour
    outlines: list[Points]
    holes: list[Points] = field(default_factory=list)
    bevel: float = 0.0


@dataclass(frozen=True)
class ObjectCategory:
    """An object, how far it turns (degrees either way), its background, and its defects (kind, part, colour)."""

    parts: Callable[[Generator], list[Part]]
    turn: float
    background: Colour
    defects: dict[str, Defect]


def _render_object(category: ObjectCategory, scene: Scene, rng: Generator, flaw: Flaw | None) -> Float:
    parts = category.parts(rng)
    rgb = np.empty((scene.n, scene.n, 3), dtype=np.float32)
    rgb[:] = np.asarray(category.background) * rng.uniform(0.93, 1.07)

    whole = np.zeros((scene.n, scene.n), dtype=np.float32)
    for part in parts:
        whole = np.maximum(whole, _coverage(scene, part))
    shadow = np.roll(scene.blur(whole, 0.05), (scene.n // 50, scene.n // 70), axis=(0, 1))
    rgb *= 1 - 0.3 * shadow[:, :, None]

    keep: Float | None = None
    if flaw is not None and flaw.kind == "bite":
        # Centred on the rim: the difference of a blurred silhouette's half level.
        rim = np.abs(scene.blur(whole, 0.02) - 0.5) < 0.1
        bite = _blob(flaw.rng, _spot(rim.astype(np.float32), flaw.rng), flaw.rng.uniform(0.11, 0.2), 0.1)
        keep = 1 - scene.fill([bite])
    elif flaw is not None and flaw.kind not in SURFACE_FLAWS:
        parts = _change_parts(parts, flaw)

    for part in parts:
        alpha = _coverage(scene, part)
        if keep is not None:
            alpha = alpha * keep
        colour: Colour | Float = part.colour
        if part.bevel:
            soft = scene.blur(alpha, 0.025)
            slope_y, slope_x = np.gradient(soft)
            relief = -(slope_x * np.cos(scene.light_angle) + slope_y * np.sin(scene.light_angle))
            relief *= part.bevel * 0.02 * scene.n
            colour = np.asarray(part.colour, dtype=np.float32) * np.clip(1 + relief, 0.4, 1.45)[:, :, None]
        rgb = _mix(rgb, colour, alpha)
    if flaw is not None and flaw.kind in SURFACE_FLAWS:
        chosen = [part for part in parts if part.name == flaw.part]
        region = _coverage(scene, chosen[0]) if chosen else whole
        rgb = _draw_surface_flaw(scene, rgb, region, flaw)
    return np.clip(rgb, 0, 255)


def _coverage(scene: Scene, part: Part) -> Float:
    return scene.fill([scene.place(p) for p in part.outlines], [scene.place(p) for p in part.holes])


def _change_parts(parts: list[Part], flaw: Flaw) -> list[Part]:
    """Defects of shape: one polygon of the named part is left out, recoloured or displaced; or the whole is bent."""
    if flaw.kind == "bent":
        angle = flaw.rng.choice([-1, 1]) * np.deg2rad(flaw.rng.uniform(9, 20))
        at = flaw.rng.uniform(0.0, 0.25)

        def bend(points: Points) -> Points:
            turn = angle * np.clip((points[:, 0] - at) / 0.2, 0, 1)
            x, y = points[:, 0] - at, points[:, 1]
            bent = np.stack([at + x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1)
            return np.where(points[:, :1] > at, bent, points)

        return [
            replace(part, outlines=[bend(p) for p in part.outlines], holes=[bend(p) for p in part.holes])
            for part in parts
        ]
    changed: list[Part] = []
    for part in parts:
        changed.append(part)
        if part.name != flaw.part:
            continue
        index = int(flaw.rng.integers(len(part.outlines)))
        others = part.outlines[:index] + part.outlines[index + 1 :]
        odd = part.outlines[index]
        changed[-1] = replace(part, outlines=others)
        if flaw.kind == "recoloured":
            changed.append(replace(part, outlines=[odd], colour=flaw.colour))
        elif flaw.kind == "displaced":
            angle = flaw.rng.choice([-1, 1]) * flaw.rng.uniform(0.25, 0.6)
            cos, sin = np.cos(angle), np.sin(angle)
            anchor = odd.mean(axis=0)
            moved = (odd - anchor) @ np.array([[cos, sin], [-sin, cos]]) + anchor + flaw.rng.uniform(-0.04, 0.04, 2)
            changed.append(replace(part, outlines=[moved]))
    return changed


def _disc(radius: float, x: float = 0.0, y: float = 0.0, stretch: float = 1.0) -> Points:
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return np.stack([x + radius * stretch * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _polygon(*corners: tuple[float, float]) -> Points:
    """A polygon with points along its edges too, so that it can be bent."""
    ends = np.array(corners, dtype=np.float64)
    steps = np.linspace(0, 1, 12, endpoint=False)[None, :, None]
    return (ends[:, None] + (np.roll(ends, -1, axis=0) - ends)[:, None] * steps).reshape(-1, 2)


def _rect(x0: float, y0: float, x1: float, y1: float) -> Points:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _around(shape: Points, count: int, start: float = 0.0) -> list[Points]:
    """Copies of a shape, turned about the origin."""
    angles = start + np.arange(count) * (2 * np.pi / count)
    return [shape @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in angles]


def _shade(rng: Generator, colour: Colour, spread: float = 0.06) -> Colour:
    """The colour as this specimen has it: lighter or darker, and a little off."""
    red, green, blue = np.clip(np.asarray(colour) * rng.uniform(1 - spread, 1 + spread) + rng.normal(0, 2, 3), 0, 255)
    return float(red), float(green), float(blue)


def _washer(rng: Generator) -> list[Part]:
    steel = _shade(rng, (168, 172, 178))
    tab = _polygon((-0.09, -0.66), (0.09, -0.66), (0.06, -0.5), (-0.06, -0.5))
    return [
        Part("tab", steel, _around(tab, 3), bevel=1.0),
        Part("ring", steel, [_disc(0.56)], [_disc(0.25)], bevel=1.0),
        Part("groove", _shade(rng, (128, 132, 140)), [_disc(0.44)], [_disc(0.37)]),
    ]


def _gear(rng: Generator) -> list[Part]:
    brass = _shade(rng, (196, 160, 84))
    tooth = _polygon((-0.11, -0.48), (-0.06, -0.68), (0.06, -0.68), (0.11, -0.48))
    return [
        Part("tooth", brass, _around(tooth, 14), bevel=0.9),
        Part("wheel", brass, [_disc(0.54)], [*_around(_disc(0.1, 0.31), 5), _disc(0.1)], bevel=0.9),
        Part(
            "hub", _shade(rng, (150, 116, 60)), [_disc(0.17)], [_disc(0.1), _rect(-0.035, -0.15, 0.035, 0)], bevel=0.6
        ),
    ]


def _button(rng: Generator) -> list[Part]:
    blue = _shade(rng, (60, 96, 150), 0.1)
    dark = (blue[0] * 0.75, blue[1] * 0.75, blue[2] * 0.75)
    return [
        Part("body", blue, [_disc(0.62)], bevel=1.3),
        Part("rim", dark, [_disc(0.48)], [_disc(0.44)]),
        Part("hole", (28, 26, 30), _around(_disc(0.07, 0.17), 4, 0.785)),
        Part(
            "thread", _shade(rng, (214, 206, 188)), [_polygon((-0.15, -0.15), (-0.1, -0.19), (0.15, 0.1), (0.11, 0.15))]
        ),
    ]


def _key(rng: Generator) -> list[Part]:
    metal = _shade(rng, (176, 166, 142))
    teeth = [
        _rect(x, 0.05, x + 0.07, 0.05 + depth) for x, depth in ((0.3, 0.17), (0.42, 0.11), (0.54, 0.2), (0.66, 0.14))
    ]
    return [
        Part("bow", metal, [_disc(0.3, -0.5)], [_disc(0.16, -0.54)], bevel=1.0),
        Part("tooth", metal, teeth, bevel=0.5),
        Part("shaft", metal, [_rect(-0.25, -0.08, 0.78, 0.08)], bevel=1.0),
        Part("collar", _shade(rng, (140, 130, 108)), [_rect(-0.2, -0.13, -0.12, 0.13)], bevel=0.7),
    ]


def _dial(rng: Generator) -> list[Part]:
    needle = _polygon((0.42, -0.28), (0.035, 0.06), (-0.1, 0.09), (-0.035, -0.04))
    return [
        Part("case", _shade(rng, (70, 74, 80)), [_disc(0.7)], bevel=1.0),
        Part("face", _shade(rng, (226, 222, 208)), [_disc(0.6)]),
        Part("tick", (46, 46, 50), _around(_rect(-0.04, -0.56, 0.04, -0.4), 12)),
        Part("needle", _shade(rng, (188, 48, 40)), [needle], bevel=0.4),
        Part("pivot", (60, 60, 66), [_disc(0.07)], bevel=0.6),
    ]


def _biscuit(rng: Generator) -> list[Part]:
    dough = _shade(rng, (206, 160, 98), 0.1)
    crust = (dough[0] * 0.85, dough[1] * 0.8, dough[2] * 0.72)
    holes = [*_around(_disc(0.032, 0.2), 5), *_around(_disc(0.032, 0.4), 10, 0.3), _disc(0.032)]
    return [
        Part("scallop", crust, _around(_disc(0.12, 0.54), 18), bevel=0.7),
        Part("crust", crust, [_disc(0.57)], bevel=0.5),
        Part("body", dough, [_disc(0.51)], bevel=0.5),
        Part("hole", (116, 78, 42), holes),
    ]


def _bolt(rng: Generator) -> list[Part]:
    zinc = _shade(rng, (158, 164, 170))
    threads = [
        _polygon((x, -0.15), (x + 0.05, -0.15), (x + 0.07, 0.15), (x + 0.02, 0.15)) for x in np.arange(0.06, 0.64, 0.1)
    ]
    return [
        Part("shank", zinc, [_rect(-0.35, -0.14, 0.72, 0.14)], bevel=1.3),
        Part("threads", (100, 106, 114), threads),
        Part(
            "head",
            zinc,
            [_polygon((-0.7, -0.24), (-0.64, -0.3), (-0.34, -0.3), (-0.34, 0.3), (-0.64, 0.3), (-0.7, 0.24))],
            bevel=1.0,
        ),
        Part("facet", (124, 130, 138), [_rect(-0.68, -0.12, -0.34, -0.105), _rect(-0.68, 0.105, -0.34, 0.12)]),
    ]


def _chip(rng: Generator) -> list[Part]:
    tin = _shade(rng, (196, 198, 200))
    pins = [_rect(x, y, x + 0.1, y + 0.2) for x in np.arange(-0.53, 0.5, 0.16) for y in (-0.52, 0.32)]
    marks = [_rect(-0.3, -0.08, 0.3, -0.03), _rect(-0.3, 0.04, 0.12, 0.09)]
    return [
        Part("pin", tin, pins, bevel=0.5),
        Part("body", _shade(rng, (52, 54, 58), 0.12), [_rect(-0.62, -0.35, 0.62, 0.35)], bevel=1.0),
        Part("marking", _shade(rng, (170, 172, 168)), marks),
        Part("dot", _shade(rng, (206, 200, 180)), [_disc(0.08, -0.48, 0.2)]),
    ]


def _leafplate(rng: Generator) -> list[Part]:
    green = _shade(rng, (74, 138, 90), 0.1)
    vein = (green[0] * 0.68, green[1] * 0.72, green[2] * 0.68)
    t = np.linspace(0, np.pi, 40)
    upper = np.stack([-0.72 * np.cos(t), -0.4 * np.sin(t) ** 1.3], axis=1)
    veins = [
        _polygon((x, 0), (x + 0.03, 0), (x + 0.2, side * 0.24), (x + 0.185, side * 0.25))
        for x in (-0.45, -0.25, -0.05, 0.15, 0.33)
        for side in (-1, 1)
    ]
    return [
        Part("leaf", green, [np.concatenate([upper, upper[::-1] * [1, -1]])], bevel=1.0),
        Part("vein", vein, veins),
        Part("midrib", vein, [_polygon((-0.7, -0.02), (0.72, -0.006), (0.72, 0.006), (-0.7, 0.02))]),
    ]


def _spool(rng: Generator) -> list[Part]:
    wood = _shade(rng, (190, 148, 100))
    yarn = _shade(rng, (176, 60, 70), 0.1)
    dark = (yarn[0] * 0.72, yarn[1] * 0.72, yarn[2] * 0.72)
    windings = [
        _polygon((x, -0.3), (x + 0.022, -0.3), (x + 0.05, 0.3), (x + 0.028, 0.3)) for x in np.arange(-0.38, 0.34, 0.075)
    ]
    return [
        Part("yarn", yarn, [_rect(-0.42, -0.32, 0.42, 0.32)], bevel=1.3),
        Part("winding", dark, windings),
        Part("flange", wood, [_rect(-0.6, -0.46, -0.4, 0.46), _rect(0.4, -0.46, 0.6, 0.46)], bevel=1.0),
        Part("pin", (110, 84, 56), [_rect(-0.7, -0.07, -0.6, 0.07), _rect(0.6, -0.07, 0.7, 0.07)], bevel=0.5),
    ]


# ---- textures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """A place of the plane where one element (tile, stone, yarn, board) is `missing` or of another `colour`."""

    kind: str
    u: float
    v: float
    colour: Colour


@dataclass(frozen=True)
class TextureCategory:
    """A surface: its pattern over coordinates (u, v) of the turned plane, its turn, and its defects."""

    pattern: Callable[[Generator, Float, Float, Odd | None], Float]
    turn: float
    defects: dict[str, Defect]


def _render_texture(category: TextureCategory, scene: Scene, rng: Generator, flaw: Flaw | None) -> Float:
    x, y = scene.grid()
    odd = None
    if flaw is not None and flaw.kind == "pulled":
        # Lines near the place are drawn aside, as by a snagged yarn or a slipped tile.
        at_x, at_y = flaw.rng.uniform(-0.7, 0.7, 2)
        near = np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / (2 * flaw.rng.uniform(0.1, 0.15) ** 2))
        amount = flaw.rng.choice([-1, 1]) * flaw.rng.uniform(0.05, 0.09)
        x, y = (x + amount * near).astype(np.float32), (y - 0.6 * amount * near).astype(np.float32)
    u, v = scene.unplace(x, y)
    if flaw is not None and flaw.kind in ("missing", "recoloured"):
        row, column = flaw.rng.integers(scene.n // 8, scene.n * 7 // 8, 2)
        odd = Odd(flaw.kind, float(u[row, column]), float(v[row, column]), flaw.colour)
    rgb = category.pattern(rng, u, v, odd)
    if flaw is not None and flaw.kind in SURFACE_FLAWS:
        rgb = _draw_surface_flaw(scene, rgb, np.ones_like(x), flaw)
    return np.clip(rgb, 0, 255)


def _lookup(rng: Generator, first: NDArray[np.int32], second: NDArray[np.int32], spread: float) -> Float:
    """A random brightness factor for each cell of a plane, about 1, float32 as the indices' shape."""
    table = rng.normal(1, spread, (64, 64)).astype(np.float32)
    return table[first % 64, second % 64]


def _weave(rng: Generator, u: Float, v: Float, odd: Odd | None) -> Float:
    density = 10.0
    a, b = u * density, v * density
    column, row = np.floor(a).astype(np.int32), np.floor(b).astype(np.int32)
    over = (column + row) % 2 == 0
    across_warp, across_weft = np.sin(np.pi * (a % 1)), np.sin(np.pi * (b % 1))
    height = np.where(over, across_warp * (0.65 + 0.35 * across_weft), across_weft * (0.65 + 0.35 * across_warp))
    warp, weft = _shade(rng, (186, 172, 148)), _shade(rng, (128, 112, 96))
    rgb = np.where(over[:, :, None], _rgb(warp), _rgb(weft))
    if odd is not None:
        yarn = over & (column == np.floor(odd.u * density)) & (np.abs(v - odd.v) < 0.45)
        rgb = np.where(yarn[:, :, None], _rgb(odd.colour), rgb)
    strand = np.where(over, _lookup(rng, column, column, 0.04), _lookup(rng, row, row, 0.04))
    return np.asarray(rgb * (strand * (0.4 + 0.6 * height))[:, :, None], dtype=np.float32)


def _planks(rng: Generator, u: Float, v: Float, odd: Odd | None) -> Float:
    density = 2.6
    a = u * density + rng.uniform(0, 1)
    board = np.floor(a).astype(np.int32)
    across = a % 1
    phase = rng.uniform(0, 7, 64).astype(np.float32)[board % 64]
    bend = rng.uniform(0.15, 0.3, 64).astype(np.float32)[board % 64]
    rings = 6 * across + bend * 4 * np.sin(1.3 * v + phase) + phase
    grain = (
        0.9 + 0.1 * np.sin(2 * np.pi * rings) + 0.04 * np.sin(2 * np.pi * (17 * across + 0.4 * np.sin(3 * v + phase)))
    )
    gap = np.clip(np.minimum(across, 1 - across) / 0.02, 0.25, 1)
    shade = _lookup(rng, board, board, 0.07)
    return np.asarray(_rgb(_shade(rng, (186, 138, 92))) * (grain * gap * shade)[:, :, None], dtype=np.float32)


def _mosaic(rng: Generator, u: Float, v: Float, odd: Odd | None) -> Float:
    density = 4.0
    a, b = u * density, v * density
    column, row = np.floor(a).astype(np.int32), np.floor(b).astype(np.int32)
    inside = np.minimum(np.minimum(a % 1, 1 - a % 1), np.minimum(b % 1, 1 - b % 1))
    tile = np.clip((inside - 0.06) / 0.02, 0, 1)
    dark, light, grout = _shade(rng, (70, 112, 128)), _shade(rng, (204, 198, 180)), _shade(rng, (120, 116, 110))
    colour = np.where(((column + 2 * row) % 3 == 0)[:, :, None], _rgb(dark), _rgb(light))
    gloss = (0.92 + 0.16 * (a % 1) * (b % 1)) * _lookup(rng, column, row, 0.04)
    if odd is not None:
        here = (column == np.floor(odd.u * density)) & (row == np.floor(odd.v * density))
        if odd.kind == "missing":
            tile = np.where(here, 0, tile)
        colour = np.where(here[:, :, None], _rgb(odd.colour), colour)
    return _mix(_rgb(grout) * np.ones_like(colour), colour * gloss[:, :, None], tile.astype(np.float32))


def _brushed(rng: Generator, u: Float, v: Float, odd: Odd | None) -> Float:
    streaks = np.zeros_like(u)
    for lines, strength in ((12, 0.06), (50, 0.05), (160, 0.04)):
        table = rng.normal(0, strength, 4 * lines).astype(np.float32)
        position = (v + 0.01 * np.sin(2 * u) + 2) * lines / 1.5
        low = position.astype(np.int32)
        part = position - low
        streaks += table[low % len(table)] * (1 - part) + table[(low + 1) % len(table)] * part
    sheen = 1 + 0.12 * np.cos(2.2 * v + rng.uniform(0, 7))
    return np.asarray(_rgb(_shade(rng, (160, 164, 170))) * (sheen * (1 + streaks))[:, :, None], dtype=np.float32)


def _gravel(rng: Generator, u: Float, v: Float, odd: Odd | None) -> Float:
    """Round stones on a jittered brick grid: the nearest of the stones around each pixel."""
    density = 5.0
    b = v * density
    jitter = rng.uniform(-0.1, 0.1, (2, 64, 64)).astype(np.float32)
    radius = rng.uniform(0.4, 0.5, (64, 64)).astype(np.float32)
    best = np.full_like(u, -9)
    stone = (np.zeros_like(u, dtype=np.int32), np.zeros_like(u, dtype=np.int32))
    for dy in (-1, 0, 1):
        row = np.floor(b).astype(np.int32) + dy
        a = u * density + 0.5 * (row % 2)
        for dx in (-1, 0, 1):
            column = np.floor(a).astype(np.int32) + dx
            cell = (row % 64, column % 64)
            distance = np.hypot(column + 0.5 + jitter[0][cell] - a, row + 0.5 + jitter[1][cell] - b)
            height = 1 - distance / radius[cell]
            nearer = height > best
            best = np.where(nearer, height, best)
            stone = (np.where(nearer, row, stone[0]), np.where(nearer, column, stone[1]))
    dome = np.sqrt(np.clip(best, 0, 1))
    rgb = _rgb(_shade(rng, (150, 144, 136))) * _lookup(rng, *stone, 0.12)[:, :, None]
    if odd is not None:
        row_at = int(np.floor(odd.v * density))
        here = (stone[0] == row_at) & (stone[1] == int(np.floor(odd.u * density + 0.5 * (row_at % 2))))
        rgb = np.where(here[:, :, None], _rgb(odd.colour), rgb)
        dome = np.where(here & (odd.kind == "missing"), 0, dome)
    return np.asarray(rgb * (0.3 + 0.75 * dome)[:, :, None], dtype=np.float32)


# ---- the fifteen --------------------------------------------------------------------------------------------------

_RUST, _OIL, _DARK = (150, 92, 56), (120, 104, 70), (26, 24, 24)
_PALE, _GREY = (214, 214, 210), (92, 96, 100)

_CATEGORIES: dict[str, ObjectCategory | TextureCategory] = {
    "demo_washer": ObjectCategory(
        _washer,
        180,
        (74, 84, 96),
        {
            "bite": Defect("bite"),
            "rust": Defect("stain", "ring", _RUST),
            "scratch": Defect("scratch", "ring"),
            "missing_tab": Defect("missing", "tab"),
        },
    ),
    "demo_weave": TextureCategory(
        _weave,
        20,
        {
            "cut": Defect("scratch"),
            "odd_yarn": Defect("recoloured", "", (70, 84, 130)),
            "pulled": Defect("pulled"),
            "stain": Defect("stain", "", (150, 110, 90)),
        },
    ),
    "demo_gear": ObjectCategory(
        _gear,
        180,
        (58, 62, 66),
        {
            "missing_tooth": Defect("missing", "tooth"),
            "oil": Defect("stain", "wheel", _OIL),
            "scratch": Defect("scratch", "wheel"),
            "hole": Defect("hole", "wheel", (40, 38, 36)),
        },
    ),
    "demo_planks": TextureCategory(
        _planks,
        15,
        {
            "crack": Defect("crack"),
            "hole": Defect("hole", "", (48, 32, 22)),
            "scratch": Defect("scratch"),
            "stain": Defect("stain", "", (120, 110, 100)),
        },
    ),
    "demo_button": ObjectCategory(
        _button,
        180,
        _PALE,
        {
            "chip": Defect("bite"),
            "closed_hole": Defect("missing", "hole"),
            "scratch": Defect("scratch", "body"),
            "wrong_thread": Defect("recoloured", "thread", (196, 60, 52)),
        },
    ),
    "demo_mosaic": TextureCategory(
        _mosaic,
        20,
        {
            "crack": Defect("crack"),
            "missing_tile": Defect("missing"),
            "slipped": Defect("pulled"),
            "wrong_tile": Defect("recoloured", "", (168, 98, 70)),
        },
    ),
    "demo_key": ObjectCategory(
        _key,
        20,
        (86, 60, 52),
        {
            "bent": Defect("bent"),
            "missing_tooth": Defect("missing", "tooth"),
            "scratch": Defect("scratch"),
            "stain": Defect("stain", "", (110, 120, 100)),
        },
    ),
    "demo_brushed": TextureCategory(
        _brushed,
        10,
        {
            "dent": Defect("hole", "", (104, 108, 114)),
            "scratch": Defect("scratch"),
            "hair": Defect("thread", "", (62, 54, 50)),
            "rust": Defect("stain", "", _RUST),
        },
    ),
    "demo_dial": ObjectCategory(
        _dial,
        20,
        (150, 160, 164),
        {
            "crack": Defect("crack", "face"),
            "displaced_needle": Defect("displaced", "needle"),
            "missing_tick": Defect("missing", "tick"),
            "stain": Defect("stain", "face", (180, 160, 110)),
        },
    ),
    "demo_gravel": TextureCategory(
        _gravel,
        20,
        {
            "missing_stone": Defect("missing", "", _DARK),
            "odd_stone": Defect("recoloured", "", (150, 84, 62)),
            "oil": Defect("stain", "", _OIL),
            "wire": Defect("thread", "", (190, 120, 70)),
        },
    ),
    "demo_biscuit": ObjectCategory(
        _biscuit,
        180,
        (108, 122, 134),
        {
            "bite": Defect("bite"),
            "burnt": Defect("stain", "body", (110, 84, 60)),
            "crack": Defect("crack", "body"),
            "hole": Defect("hole", "body", (84, 60, 40)),
        },
    ),
    "demo_bolt": ObjectCategory(
        _bolt,
        180,
        (52, 66, 62),
        {
            "bent": Defect("bent"),
            "chip": Defect("bite"),
            "missing_thread": Defect("missing", "threads"),
            "rust": Defect("stain", "", _RUST),
        },
    ),
    "demo_chip": ObjectCategory(
        _chip,
        20,
        (52, 96, 70),
        {
            "bent_pin": Defect("displaced", "pin"),
            "missing_pin": Defect("missing", "pin"),
            "scratch": Defect("scratch", "body"),
            "wrong_dot": Defect("recoloured", "dot", (190, 60, 50)),
        },
    ),
    "demo_leafplate": ObjectCategory(
        _leafplate,
        180,
        (222, 214, 200),
        {
            "bite": Defect("bite"),
            "crack": Defect("crack", "leaf"),
            "hole": Defect("hole", "leaf", (200, 192, 178)),
            "stain": Defect("stain", "leaf", (190, 140, 60)),
        },
    ),
    "demo_spool": ObjectCategory(
        _spool,
        20,
        _GREY,
        {
            "chip": Defect("bite"),
            "loose_thread": Defect("thread", "yarn", (196, 84, 92)),
            "missing_winding": Defect("missing", "winding"),
            "stain": Defect("stain", "yarn", (120, 110, 130)),
        },
    ),
}

DEMO_CATEGORIES: tuple[str, ...] = tuple(_CATEGORIES)
