"""The fifteen demo categories: ten objects as lists of parts, five surfaces as patterns, and the defects of each.

A category's function draws what differs between specimens (shade, jitter) from the scene's generator; pose and light
are the scene's own.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .demo_scene import Colour, Defect, Float, ObjectCategory, Odd, Part, Points, TextureCategory, as_rgb, mix

# ---- shapes, in an object's frame ---------------------------------------------------------------------------------


def disc(radius: float, x: float = 0.0, y: float = 0.0, stretch: float = 1.0) -> Points:
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return np.stack([x + radius * stretch * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def polygon(*corners: tuple[float, float]) -> Points:
    """A polygon with points along its edges too, so that it can be bent."""
    ends = np.array(corners, dtype=np.float64)
    steps = np.linspace(0, 1, 12, endpoint=False)[None, :, None]
    return (ends[:, None] + (np.roll(ends, -1, axis=0) - ends)[:, None] * steps).reshape(-1, 2)


def rect(x0: float, y0: float, x1: float, y1: float) -> Points:
    return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def around(shape: Points, count: int, start: float = 0.0) -> list[Points]:
    """Copies of a shape, turned about the origin."""
    angles = start + np.arange(count) * (2 * np.pi / count)
    return [shape @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in angles]


def specimen(rng: Generator, colour: Colour, spread: float = 0.06) -> Colour:
    """The colour as this specimen has it: lighter or darker, and a little off."""
    red, green, blue = np.clip(np.asarray(colour) * rng.uniform(1 - spread, 1 + spread) + rng.normal(0, 2, 3), 0, 255)
    return float(red), float(green), float(blue)


# ---- objects ------------------------------------------------------------------------------------------------------


def _washer(rng: Generator) -> list[Part]:
    steel = specimen(rng, (168, 172, 178))
    tab = polygon((-0.09, -0.66), (0.09, -0.66), (0.06, -0.5), (-0.06, -0.5))
    return [
        Part("tab", steel, around(tab, 3), bevel=1.0),
        Part("ring", steel, [disc(0.56)], [disc(0.25)], bevel=1.0),
        Part("groove", specimen(rng, (128, 132, 140)), [disc(0.44)], [disc(0.37)]),
    ]


def _gear(rng: Generator) -> list[Part]:
    brass = specimen(rng, (196, 160, 84))
    tooth = polygon((-0.11, -0.48), (-0.06, -0.68), (0.06, -0.68), (0.11, -0.48))
    return [
        Part("tooth", brass, around(tooth, 14), bevel=0.9),
        Part("wheel", brass, [disc(0.54)], [*around(disc(0.1, 0.31), 5), disc(0.1)], bevel=0.9),
        Part("hub", specimen(rng, (150, 116, 60)), [disc(0.17)], [disc(0.1), rect(-0.035, -0.15, 0.035, 0)], bevel=0.6),
    ]


def _button(rng: Generator) -> list[Part]:
    blue = specimen(rng, (60, 96, 150), 0.1)
    dark = (blue[0] * 0.75, blue[1] * 0.75, blue[2] * 0.75)
    return [
        Part("body", blue, [disc(0.62)], bevel=1.3),
        Part("rim", dark, [disc(0.48)], [disc(0.44)]),
        Part("hole", (28, 26, 30), around(disc(0.07, 0.17), 4, 0.785)),
        Part(
            "thread",
            specimen(rng, (214, 206, 188)),
            [polygon((-0.15, -0.15), (-0.1, -0.19), (0.15, 0.1), (0.11, 0.15))],
        ),
    ]


def _key(rng: Generator) -> list[Part]:
    metal = specimen(rng, (176, 166, 142))
    teeth = [
        rect(x, 0.05, x + 0.07, 0.05 + depth) for x, depth in ((0.3, 0.17), (0.42, 0.11), (0.54, 0.2), (0.66, 0.14))
    ]
    return [
        Part("bow", metal, [disc(0.3, -0.5)], [disc(0.16, -0.54)], bevel=1.0),
        Part("tooth", metal, teeth, bevel=0.5),
        Part("shaft", metal, [rect(-0.25, -0.08, 0.78, 0.08)], bevel=1.0),
        Part("collar", specimen(rng, (140, 130, 108)), [rect(-0.2, -0.13, -0.12, 0.13)], bevel=0.7),
    ]


def _dial(rng: Generator) -> list[Part]:
    needle = polygon((0.42, -0.28), (0.035, 0.06), (-0.1, 0.09), (-0.035, -0.04))
    return [
        Part("case", specimen(rng, (70, 74, 80)), [disc(0.7)], bevel=1.0),
        Part("face", specimen(rng, (226, 222, 208)), [disc(0.6)]),
        Part("tick", (46, 46, 50), around(rect(-0.04, -0.56, 0.04, -0.4), 12)),
        Part("needle", specimen(rng, (188, 48, 40)), [needle], bevel=0.4),
        Part("pivot", (60, 60, 66), [disc(0.07)], bevel=0.6),
    ]


def _biscuit(rng: Generator) -> list[Part]:
    dough = specimen(rng, (206, 160, 98), 0.1)
    crust = (dough[0] * 0.85, dough[1] * 0.8, dough[2] * 0.72)
    holes = [*around(disc(0.032, 0.2), 5), *around(disc(0.032, 0.4), 10, 0.3), disc(0.032)]
    return [
        Part("scallop", crust, around(disc(0.12, 0.54), 18), bevel=0.7),
        Part("crust", crust, [disc(0.57)], bevel=0.5),
        Part("body", dough, [disc(0.51)], bevel=0.5),
        Part("hole", (116, 78, 42), holes),
    ]


def _bolt(rng: Generator) -> list[Part]:
    zinc = specimen(rng, (158, 164, 170))
    threads = [
        polygon((x, -0.15), (x + 0.05, -0.15), (x + 0.07, 0.15), (x + 0.02, 0.15)) for x in np.arange(0.06, 0.64, 0.1)
    ]
    return [
        Part("shank", zinc, [rect(-0.35, -0.14, 0.72, 0.14)], bevel=1.3),
        Part("threads", (100, 106, 114), threads),
        Part(
            "head",
            zinc,
            [polygon((-0.7, -0.24), (-0.64, -0.3), (-0.34, -0.3), (-0.34, 0.3), (-0.64, 0.3), (-0.7, 0.24))],
            bevel=1.0,
        ),
        Part("facet", (124, 130, 138), [rect(-0.68, -0.12, -0.34, -0.105), rect(-0.68, 0.105, -0.34, 0.12)]),
    ]


def _chip(rng: Generator) -> list[Part]:
    tin = specimen(rng, (196, 198, 200))
    pins = [rect(x, y, x + 0.1, y + 0.2) for x in np.arange(-0.53, 0.5, 0.16) for y in (-0.52, 0.32)]
    marks = [rect(-0.3, -0.08, 0.3, -0.03), rect(-0.3, 0.04, 0.12, 0.09)]
    return [
        Part("pin", tin, pins, bevel=0.5),
        Part("body", specimen(rng, (52, 54, 58), 0.12), [rect(-0.62, -0.35, 0.62, 0.35)], bevel=1.0),
        Part("marking", specimen(rng, (170, 172, 168)), marks),
        Part("dot", specimen(rng, (206, 200, 180)), [disc(0.08, -0.48, 0.2)]),
    ]


def _leafplate(rng: Generator) -> list[Part]:
    green = specimen(rng, (74, 138, 90), 0.1)
    vein = (green[0] * 0.68, green[1] * 0.72, green[2] * 0.68)
    t = np.linspace(0, np.pi, 40)
    upper = np.stack([-0.72 * np.cos(t), -0.4 * np.sin(t) ** 1.3], axis=1)
    veins = [
        polygon((x, 0), (x + 0.03, 0), (x + 0.2, side * 0.24), (x + 0.185, side * 0.25))
        for x in (-0.45, -0.25, -0.05, 0.15, 0.33)
        for side in (-1, 1)
    ]
    return [
        Part("leaf", green, [np.concatenate([upper, upper[::-1] * [1, -1]])], bevel=1.0),
        Part("vein", vein, veins),
        Part("midrib", vein, [polygon((-0.7, -0.02), (0.72, -0.006), (0.72, 0.006), (-0.7, 0.02))]),
    ]


def _spool(rng: Generator) -> list[Part]:
    wood = specimen(rng, (190, 148, 100))
    yarn = specimen(rng, (176, 60, 70), 0.1)
    dark = (yarn[0] * 0.72, yarn[1] * 0.72, yarn[2] * 0.72)
    windings = [
        polygon((x, -0.3), (x + 0.022, -0.3), (x + 0.05, 0.3), (x + 0.028, 0.3)) for x in np.arange(-0.38, 0.34, 0.075)
    ]
    return [
        Part("yarn", yarn, [rect(-0.42, -0.32, 0.42, 0.32)], bevel=1.3),
        Part("winding", dark, windings),
        Part("flange", wood, [rect(-0.6, -0.46, -0.4, 0.46), rect(0.4, -0.46, 0.6, 0.46)], bevel=1.0),
        Part("pin", (110, 84, 56), [rect(-0.7, -0.07, -0.6, 0.07), rect(0.6, -0.07, 0.7, 0.07)], bevel=0.5),
    ]


# ---- surfaces -----------------------------------------------------------------------------------------------------


def per_cell(rng: Generator, first: NDArray[np.int32], second: NDArray[np.int32], spread: float) -> Float:
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
    warp, weft = specimen(rng, (186, 172, 148)), specimen(rng, (128, 112, 96))
    rgb = np.where(over[:, :, None], as_rgb(warp), as_rgb(weft))
    if odd is not None:
        yarn = over & (column == np.floor(odd.u * density)) & (np.abs(v - odd.v) < 0.45)
        rgb = np.where(yarn[:, :, None], as_rgb(odd.colour), rgb)
    strand = np.where(over, per_cell(rng, column, column, 0.04), per_cell(rng, row, row, 0.04))
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
    shade = per_cell(rng, board, board, 0.07)
    return np.asarray(as_rgb(specimen(rng, (186, 138, 92))) * (grain * gap * shade)[:, :, None], dtype=np.float32)


def _mosaic(rng: Generator, u: Float, v: Float, odd: Odd | None) -> Float:
    density = 4.0
    a, b = u * density, v * density
    column, row = np.floor(a).astype(np.int32), np.floor(b).astype(np.int32)
    inside = np.minimum(np.minimum(a % 1, 1 - a % 1), np.minimum(b % 1, 1 - b % 1))
    tile = np.clip((inside - 0.06) / 0.02, 0, 1)
    dark, light, grout = specimen(rng, (70, 112, 128)), specimen(rng, (204, 198, 180)), specimen(rng, (120, 116, 110))
    colour = np.where(((column + 2 * row) % 3 == 0)[:, :, None], as_rgb(dark), as_rgb(light))
    gloss = (0.92 + 0.16 * (a % 1) * (b % 1)) * per_cell(rng, column, row, 0.04)
    if odd is not None:
        here = (column == np.floor(odd.u * density)) & (row == np.floor(odd.v * density))
        if odd.kind == "missing":
            tile = np.where(here, 0, tile)
        colour = np.where(here[:, :, None], as_rgb(odd.colour), colour)
    return mix(as_rgb(grout) * np.ones_like(colour), colour * gloss[:, :, None], tile.astype(np.float32))


def _brushed(rng: Generator, u: Float, v: Float, odd: Odd | None) -> Float:
    streaks = np.zeros_like(u)
    for lines, strength in ((12, 0.06), (50, 0.05), (160, 0.04)):
        table = rng.normal(0, strength, 4 * lines).astype(np.float32)
        position = (v + 0.01 * np.sin(2 * u) + 2) * lines / 1.5
        low = position.astype(np.int32)
        part = position - low
        streaks += table[low % len(table)] * (1 - part) + table[(low + 1) % len(table)] * part
    sheen = 1 + 0.12 * np.cos(2.2 * v + rng.uniform(0, 7))
    return np.asarray(as_rgb(specimen(rng, (160, 164, 170))) * (sheen * (1 + streaks))[:, :, None], dtype=np.float32)


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
    rgb = as_rgb(specimen(rng, (150, 144, 136))) * per_cell(rng, *stone, 0.12)[:, :, None]
    if odd is not None:
        row_at = int(np.floor(odd.v * density))
        here = (stone[0] == row_at) & (stone[1] == int(np.floor(odd.u * density + 0.5 * (row_at % 2))))
        rgb = np.where(here[:, :, None], as_rgb(odd.colour), rgb)
        dome = np.where(here & (odd.kind == "missing"), 0, dome)
    return np.asarray(rgb * (0.3 + 0.75 * dome)[:, :, None], dtype=np.float32)


# ---- the fifteen --------------------------------------------------------------------------------------------------

_RUST, _OIL, _DARK = (150, 92, 56), (120, 104, 70), (26, 24, 24)
_PALE, _GREY = (214, 214, 210), (92, 96, 100)

CATALOGUE: dict[str, ObjectCategory | TextureCategory] = {
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

# The two that `make demo` trains come first.
DEMO_CATEGORIES: tuple[str, ...] = tuple(
    sorted(CATALOGUE, key=lambda name: name not in ("demo_biscuit", "demo_leafplate"))
)
