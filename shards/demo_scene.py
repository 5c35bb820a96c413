"""Scenes of the demo data set: pose and light, objects made of parts, surfaces, and the defects that befall them.

Coordinates run from -1 to 1 across the image; an object has a frame of its own, which the scene's pose places.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SURFACE_FLAWS = ("scratch", "crack", "thread", "stain", "hole")

Float = NDArray[np.floating]  # float32 [n, n] or [n, n, 3] throughout
Points = NDArray[np.float64]  # [points, 2], x and y
Colour = tuple[float, float, float]


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


def as_rgb(colour: Colour) -> Float:
    return np.asarray(colour, dtype=np.float32)


def mix(rgb: Float, colour: Colour | Float, alpha: Float) -> Float:
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


def draw_surface_flaw(scene: Scene, rgb: Float, region: Float, flaw: Flaw) -> Float:
    """Scratches, cracks, stray threads, stains and holes, on the part of the image that `region` covers."""
    rng = flaw.rng
    spot = _spot(region, rng)
    if flaw.kind == "scratch":
        path = _walk(rng, spot, rng.uniform(0.5, 1.0), 12, 0.06)
        alpha = scene.blur(scene.line(path, rng.uniform(0.016, 0.03)), 0.003) * region
        shade = rng.choice([0.45, 0.6, 1.35, 1.5])  # dark where it is deep, bright where it shines
        return mix(rgb, np.minimum(rgb * np.float32(shade) + (40 if shade > 1 else 0), 255), alpha)
    if flaw.kind == "crack":
        path = _walk(rng, spot, rng.uniform(0.5, 0.9), 14, 0.55)
        branch = _walk(rng, path[4:5], rng.uniform(0.2, 0.35), 8, 0.5)
        alpha = np.maximum(scene.line(path, 0.02), scene.line(branch, 0.014)) * region
        return mix(rgb, rgb * np.float32(0.3), alpha * np.float32(rng.uniform(0.6, 1.0)))
    if flaw.kind == "thread":
        path = _walk(rng, spot, rng.uniform(0.8, 1.3), 40, 0.22)
        return mix(rgb, flaw.colour, scene.line(path, rng.uniform(0.018, 0.026)))
    if flaw.kind == "stain":
        blots = [_blob(rng, spot + rng.normal(0, 0.06, 2), rng.uniform(0.06, 0.13), 0.12) for _ in range(4)]
        alpha = scene.blur(scene.fill(blots), 0.03) * region
        return mix(
            rgb, rgb * (np.asarray(flaw.colour, dtype=np.float32) / 255), alpha * np.float32(rng.uniform(0.5, 0.9))
        )
    if flaw.kind == "hole":
        radius = rng.uniform(0.06, 0.12)
        rim = scene.fill([_blob(rng, spot, radius * 1.2, 0.05)]) * region
        core = scene.fill([_blob(rng, spot, radius, 0.05)]) * region
        return mix(mix(rgb, np.minimum(rgb * 1.2, 255), rim), flaw.colour, core)
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


def render_object(category: ObjectCategory, scene: Scene, rng: Generator, flaw: Flaw | None) -> Float:
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
        rgb = mix(rgb, colour, alpha)
    if flaw is not None and flaw.kind in SURFACE_FLAWS:
        chosen = [part for part in parts if part.name == flaw.part]
        region = _coverage(scene, chosen[0]) if chosen else whole
        rgb = draw_surface_flaw(scene, rgb, region, flaw)
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


def render_texture(category: TextureCategory, scene: Scene, rng: Generator, flaw: Flaw | None) -> Float:
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
        rgb = draw_surface_flaw(scene, rgb, np.ones_like(x), flaw)
    return np.clip(rgb, 0, 255)
