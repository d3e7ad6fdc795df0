"""Line charts and bars as inline SVG, whose colours come from the page's style sheet, so that they suit light and dark.

matplotlib would bring fixed colours, 60 kB a chart and an extra package; a chart here is a path per line.
"""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 460, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 8, 22
_BINS = 300
"""Points drawn of a line: the least and the largest of each bin, so that no spike is lost."""


def thinned(points: Points, bins: int = _BINS) -> list[tuple[float, float]]:
    """At most two points a bin, in order, and the first and the last."""
    if len(points) <= 2 * bins:
        return list(points)
    kept, inner = [points[0]], points[1:-1]
    for number in range(bins):
        part = inner[number * len(inner) // bins : (number + 1) * len(inner) // bins]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += [low, high] if low[0] <= high[0] else [high, low]
    return [*kept, points[-1]]


def line_chart(lines: dict[str, Points], others: dict[str, Points], *, unit: str, log: bool = False) -> str:
    """Values against steps; `others` are the same names of the run it is compared with, drawn thin and dashed."""
    drawn = [(i, name, thinned(points), kind) for kind, group in (("", lines), ("other", others))
             for i, (name, points) in enumerate(group.items()) if points]  # fmt: skip
    values = [value for _, _, points, _ in drawn for _, value in points]
    log = log and min(values) > 0 and max(values) / min(values) > 50
    x0, x1 = min(p[0] for *_, points, _ in drawn for p in points), max(p[0] for *_, points, _ in drawn for p in points)
    ticks = _log_ticks(min(values), max(values)) if log else _ticks(min(values), max(values))
    scale = math.log10 if log else float
    y0, y1 = scale(min(*ticks, *values)), scale(max(*ticks, *values))

    def x_of(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((step - x0) / (x1 - x0) if x1 > x0 else 0.5)

    def y_of(value: float) -> float:
        share = (scale(value) - y0) / (y1 - y0) if y1 > y0 else 0.5
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(lines))}">']
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for step, anchor in ((x0, "start"), (x1, "end")) if x1 > x0 else ((x0, "middle"),):
        parts.append(f'<text x="{x_of(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,.0f}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" class="muted">step</text>')
    for i, name, points, kind in drawn:
        path = " ".join(f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in points)
        shape = f'<polyline points="{path}"/>'
        if len(points) < 40 and not kind:  # few points are seen better
            shape += "".join(f'<circle cx="{x_of(s):.1f}" cy="{y_of(v):.1f}" r="2"/>' for s, v in points)
        last = points[-1]
        title = f"{name}{' (other run)' if kind else ''}: {number(last[1])} {unit} at step {last[0]:,.0f}"
        parts.append(f'<g class="line c{i % 6} {kind}"><title>{escape(title)}</title>{shape}</g>')
    return "".join(parts) + "</svg>"


def bar(parts: dict[str, float], classes: dict[str, str]) -> str:
    """One bar whose pieces are shares of their sum; pieces below a thousandth are not drawn."""
    total, at, drawn = sum(parts.values()), 0.0, []
    for name, value in parts.items():
        width = 940 * value / total if total else 0.0
        if width > 0.94:
            title = f"<title>{escape(name)}: {value / total:.1%}</title>"
            drawn.append(f'<rect class="{classes[name]}" x="{at:.1f}" width="{width:.1f}" height="26">{title}</rect>')
        at += width
    return f'<svg class="bar" viewBox="0 0 940 26" preserveAspectRatio="none" role="img">{"".join(drawn)}</svg>'


def number(value: float) -> str:
    """With four digits, as short as it goes."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around the values."""
    if low == high:
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 5)
    return [10.0**exponent for exponent in range(first, last + 1, every)]
