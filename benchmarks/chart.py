"""Results as a picture: a bar for each candidate, and a mark where its bound is; SVG, drawn without a library."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Final

from benchmarks.harness import Row

_WIDTH: Final = 1000
_BARS: Final = range(360, 700)
_LINE: Final = 22
_HEAD: Final = 88
_BAR: Final = 14
_COLOURS: Final = {None: "#8ba3bf", True: "#3d9a6a", False: "#c8484f"}
_SECONDS: Final = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
_LEGEND: Final = ((None, "nothing promised"), (True, "bound held"), (False, "bound missed"))


def value(number: float, unit: str) -> str:
    """A number with its unit; seconds as milliseconds or microseconds where they are fewer than one."""
    if unit == "s":
        factor, unit = next((factor, name) for factor, name in _SECONDS if number * factor >= 1 or name == "µs")
        number *= factor
    digits = 0 if float(number).is_integer() else max(3 - len(f"{number:.0f}"), 0)
    return f"{number:,.{digits}f} {unit}".rstrip()


def bound(row: Row) -> str:
    """What the row must reach: of ratios a number, of others a value."""
    if row.bound is None:
        return ""
    return f"{'≥' if row.at_least else '≤'} {value(row.bound, row.unit) if row.ratio is None else f'{row.bound:.2f}'}"


def verdict(row: Row) -> str:
    """Held or missed; nothing where nothing is promised."""
    return {None: "", True: "held", False: "missed"}[row.held]


def svg(rows: Sequence[Row], *, subtitle: str) -> str:
    """The whole picture.

    Args:
        rows: Those of the same `what` are drawn together, to one scale.
        subtitle: Where it was measured.
    """
    body: list[str] = []
    top = _HEAD
    for what, group in groupby(rows, key=lambda row: row.what):
        found = list(group)
        body.append(_text(20, top + 14, what, "font-weight='bold'"))
        top += _LINE
        scale = len(_BARS) / (max(max(row.median, _limit(row) or 0) for row in found) or 1)
        for row in found:
            body += _bar(row, top, scale)
            top += _LINE
        top += 12
    size = f"width='{_WIDTH}' height='{top}'"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-family='sans-serif' font-size='13'>",
        f"<rect {size} fill='#ffffff'/>",
        _text(20, 30, "kestra: what was measured, and what was promised", "font-size='18' font-weight='bold'"),
        _text(20, 50, subtitle, "fill='#5f6b7a'"),
        *_legend(),
        *body,
        "</svg>\n",
    ]
    return "\n".join(parts)


def _legend() -> Iterator[str]:
    for place, (held, meaning) in enumerate(_LEGEND):
        left = 20 + place * 160
        yield f"<rect x='{left}' y='62' width='12' height='12' fill='{_COLOURS[held]}'/>"
        yield _text(left + 18, 73, meaning)
    left = 20 + len(_LEGEND) * 160
    yield f"<rect x='{left}' y='60' width='2' height='16' fill='#1f2933'/>"
    yield _text(left + 8, 73, "the bound (bars reach it where it is a minimum)")


def _bar(row: Row, top: int, scale: float) -> Iterator[str]:
    yield _text(_BARS.start - 10, top + 12, row.candidate, "text-anchor='end'")
    width = max(row.median * scale, 1)
    yield f"<rect x='{_BARS.start}' y='{top}' width='{width:.1f}' height='{_BAR}' fill='{_COLOURS[row.held]}'/>"
    limit = _limit(row)
    if limit is not None:
        left = _BARS.start + limit * scale
        yield f"<rect x='{left:.1f}' y='{top - 3}' width='2' height='{_BAR + 6}' fill='#1f2933'/>"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} : 1"
    said = " · ".join(filter(None, [value(row.median, row.unit), ratio, f"{bound(row)} {verdict(row)}".strip()]))
    yield _text(_BARS.stop + 12, top + 12, said)


def _limit(row: Row) -> float | None:
    """Where the bound is, in the unit of the row."""
    if row.bound is None or row.ratio is None:
        return row.bound
    return row.median / row.ratio * row.bound


def _text(left: int, base: int, text: str, style: str = "") -> str:
    return f"<text x='{left}' y='{base}' {style}>{escape(text)}</text>"
