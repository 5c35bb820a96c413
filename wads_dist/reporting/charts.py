"""Line charts as inline SVG, a few KB each, for the report.

Not matplotlib's SVG: that has fixed colours, which a page that follows the reader's light or dark theme cannot use, is five
times as large, and takes seconds for the 60 charts of 15 categories. Colours, strokes and fonts are classes of the page.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TypeGuard

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 34
# Of one chart on a logarithmic scale: smaller values lie on its lower edge.
DECADES = 5


@dataclass(frozen=True)
class Series:
    """A line; a value that is None or not finite interrupts it."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """Lines over the same axes, which start at 0; y ends at 1, or is logarithmic."""

    title: str
    x_label: str
    series: Sequence[Series]
    x_max: float = 1.0
    log: bool = False
    marks: Sequence[float] = field(default=())
    """Positions on the x axis of dashed vertical lines."""

    def svg(self) -> str:
        """An ``<svg>`` element; every text in it is escaped."""
        low, high = self._decades() if self.log else (0.0, 1.0)
        name = escape(f"{self.title} over {self.x_label}: {', '.join(s.name for s in self.series)}")
        parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">']
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value, label in self._y_ticks(low, high):
            y = _between(value, low, high, bottom, TOP)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for fraction, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
            x = _between(fraction, 0, 1, LEFT, right)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
            label = compact(fraction * self.x_max)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{label}</text>')
        parts.append(
            f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        for mark in self.marks:
            x = _between(mark, 0, self.x_max, LEFT, right)
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        for number, series in enumerate(self.series):
            for run in filter(None, self._pieces(series)):
                points = " ".join(
                    f"{_between(x, 0, self.x_max, LEFT, right):.1f},{_between(y, low, high, bottom, TOP):.1f}"
                    for x, y in run
                )
                parts.append(f'<polyline class="line s{number}" points="{points}"/>')
        return "".join([*parts, "</svg>"])

    def _decades(self) -> tuple[float, float]:
        """Exponents of the lowest and the highest tick."""
        values = [y for s in self.series for y in s.y if _usable(y) and y > 0]
        high = math.ceil(math.log10(max(values, default=1.0)) + 1e-9)
        low = math.floor(math.log10(min(values, default=0.1)))
        return float(max(low, high - DECADES)), float(max(high, low + 1))

    def _y_ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        if self.log:
            return [(float(k), f"{10.0**k:g}") for k in range(int(low), int(high) + 1)]
        return [(v, f"{v:g}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def _pieces(self, series: Series) -> Iterator[list[tuple[float, float]]]:
        """Points that are joined, clipped to the x axis; the y of a logarithmic axis is an exponent."""
        piece: list[tuple[float, float]] = []
        for x, y in zip(series.x, series.y, strict=False):
            if not _usable(x) or not _usable(y):
                yield piece
                piece = []
            elif x > self.x_max:
                if piece and piece[-1][0] < self.x_max:
                    (x0, y0), y1 = piece[-1], self._scaled(y)
                    piece.append((self.x_max, y0 + (y1 - y0) * (self.x_max - x0) / (x - x0)))
            else:
                piece.append((x, self._scaled(y)))
        yield piece

    def _scaled(self, y: float) -> float:
        return math.log10(max(y, 10.0**-99)) if self.log else y


def compact(value: float) -> str:
    """``1,500``, ``20k``, ``14M``, ``0.15``."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _usable(value: float | None) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _between(value: float, low: float, high: float, start: float, end: float) -> float:
    """``value`` of [low, high] on [start, end]; nothing lies outside."""
    return start + (end - start) * min(1.0, max(0.0, (value - low) / (high - low or 1.0)))
