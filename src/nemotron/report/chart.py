"""Line charts as inline SVG: no script, no library, no network.

Colours come from the page's style sheet (classes ``run0``, ``run1``), so that they follow its light
and dark schemes. Points have titles, which browsers show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.report.markup import escape

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 34
_MOST_POINTS = 800  # of a line: more points than pixels show nothing more
_MOST_TITLES = 120

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve: its label, its points, which run it is of, and whether every point is marked."""

    label: str
    points: Points
    run: int = 0
    is_marked: bool = False


def line_chart(lines: Sequence[Line], *, x_label: str) -> str:
    """Return curves over a common x as one SVG element, or a sentence if there are no points."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return "<p>Nothing was recorded.</p>"
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(", ".join(line.label for line in drawn))}">',
        *(_grid_x(x_axis, tick) for tick in x_axis.ticks()),
        *(_grid_y(y_axis, tick) for tick in y_axis.ticks()),
        f'<text class="axis" x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 2}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        *(_curve(line, x_axis, y_axis) for line in drawn),
        "</svg>",
    ]
    return "\n".join(parts)


def number(value: float) -> str:
    """Return a number as people read it: 12.3k, 0.0412, 3e-05."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.4g}"


class _Axis:
    """Maps values to pixels, with some room around the lowest and the highest."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        room = (high - low) * 0.03 or abs(high) * 0.1 or 1.0
        self._low, self._high = low - room, high + room
        self._first, self._last = first, last

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        part = (value - self._low) / (self._high - self._low)
        return self._first + part * (self._last - self._first)

    def ticks(self) -> list[float]:
        """Return four to nine round values within the axis."""
        rough = (self._high - self._low) / 9
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough)
        first = math.ceil(self._low / step)
        return [n * step for n in range(first, math.floor(self._high / step) + 1)]


def _grid_x(axis: _Axis, value: float) -> str:
    x = f"{axis.at(value):.1f}"
    return (
        f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text class="axis" x="{x}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">'
        f"{number(value)}</text>"
    )


def _grid_y(axis: _Axis, value: float) -> str:
    y = f"{axis.at(value):.1f}"
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="axis" x="{_LEFT - 6}" y="{y}" text-anchor="end" '
        f'dominant-baseline="middle">{number(value)}</text>'
    )


def _curve(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    points = _thinned(line.points)
    places = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
    dashed = " marked" if line.is_marked else ""
    title = f"<title>{escape(line.label)}</title>"
    curve = f'<polyline class="run{line.run}{dashed}" points="{places}">{title}</polyline>'
    if not line.is_marked and len(points) > _MOST_TITLES:
        return curve
    kind = f"dot run{line.run}" if line.is_marked or len(points) == 1 else "spot"
    return curve + "".join(
        f'<circle class="{kind}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3">'
        f"<title>{escape(line.label)} at {number(x)}: {number(y)}</title></circle>"
        for x, y in points
    )


def _thinned(points: Points) -> Points:
    """Return the lowest and the highest point of every part of a curve that has too many points."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        lowest, highest = (choose(part, key=lambda point: point[1]) for choose in (min, max))
        kept += sorted({lowest, highest})
    return kept
