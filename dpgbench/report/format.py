"""File names and numbers in words: one format per quantity, everywhere on the page and in the tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

DASH = "–"  # what a cell without a number shows; never an empty cell, which reads as an oversight


def file_names(labels: Iterable[str]) -> dict[str, str]:
    """A distinct, portable file name (no suffix) for every label, in order; `summary` and `pooled` are taken."""
    taken, names = {"summary", "pooled"}, {}
    for label in labels:
        stem = re.sub(r"[^A-Za-z0-9._=+-]+", "_", label).strip("._")[:80] or "task"
        name, count = stem, 2
        while name.lower() in taken:  # lower case: macOS and Windows do not tell A.md from a.md
            name, count = f"{stem}-{count}", count + 1
        taken.add(name.lower())
        names[label] = name
    return names


def decimals_for(values: Iterable[float]) -> int | None:
    """Decimals that show differences among `values` to three digits; None where only exponents would do (huge or tiny numbers).

    One number of decimals for a whole table keeps its columns comparable at a glance.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    largest = max((abs(value) for value in finite), default=0.0)
    spread = (max(finite) - min(finite)) if finite else 0.0
    scale = spread if spread > 1e-9 * largest else largest
    if scale == 0:
        return 2
    decimals = max(2 - math.floor(math.log10(scale)), 0)
    return None if decimals > 8 or largest >= 1e7 else decimals


def number(value: float, decimals: int | None, *, sign: bool = False) -> str:
    """`value` with a fixed number of decimals (None: 4 significant digits, with an exponent); a dash for NaN."""
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    text = f"{value:{'+' if sign else ''}.{decimals}f}" if decimals is not None else f"{value:{'+' if sign else ''}.3e}"
    return text.lstrip("+-") if not text.strip("+-0.") else text  # a zero has no sign


def interval(low: float, high: float, decimals: int | None, *, sign: bool = False) -> str:
    """`[low, high]`, or a dash where there is none."""
    if math.isnan(low) or math.isnan(high):
        return DASH
    return f"[{number(low, decimals, sign=sign)}, {number(high, decimals, sign=sign)}]"


def amount(value: float) -> str:
    """FLOPs and tokens, three significant digits: 0, 512, 12.3k, 4.56M, then 1.23e+12."""
    if math.isnan(value):
        return DASH
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.3g}")  # round first: 999,600 is 1.00M, not 1000k
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if abs(value) < limit:
            scaled = value / divisor
            return f"{scaled:.{max(2 - math.floor(math.log10(abs(scaled))), 0)}f}{unit}" if unit else f"{scaled:g}"
    return f"{value:.2e}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 73 s, 12 min, 3.4 h."""
    if math.isnan(seconds):
        return DASH
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def probability(p: float) -> str:
    """A p value with two significant digits, never rounded down to 0."""
    return DASH if math.isnan(p) else f"{p:.2g}" if p >= 0.001 else f"{p:.1e}"


def and_more(items: Iterable[object], limit: int = 12) -> str:
    """`a, b, c` or, beyond `limit`, `a, b, ... and 7 more`."""
    items = [str(item) for item in items]
    shown = items if len(items) <= limit else [*items[:limit], f"… and {len(items) - limit} more"]
    return ", ".join(shown)


def plural(count: int, noun: str, many: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"
