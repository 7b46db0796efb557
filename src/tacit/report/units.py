"""Numbers as a reader wants to see them: bytes, times, percentages, powers of ten; all return HTML text."""

from __future__ import annotations

import math

SPACE = "\N{NO-BREAK SPACE}"


def count(value: int) -> str:
    """Write a whole number with thousands separators: ``12,345``."""
    return f"{value:,}"


def plural(value: int, noun: str) -> str:
    """Write a count with its noun: ``1 round``, ``20 rounds``, ``2 batches``."""
    ending = "" if value == 1 else "es" if noun.endswith(("ch", "s")) else "s"
    return f"{count(value)}{SPACE}{noun}{ending}"


def percent(fraction: float, digits: int = 2) -> str:
    """Write a fraction as a percentage; only exactly 1 reads as 100%, for "all" and "nearly all" differ."""
    text = f"{100 * fraction:.{digits}f}"
    if fraction < 1 and float(text) >= 100:
        text = f"{100 - 10**-digits:.{digits}f}"
    return ("100" if fraction == 1 else text) + "%"


def size(octets: float) -> str:
    """Write a number of bytes to three significant figures in decimal units: ``1.53 MB``."""
    return _scaled(octets, 1, (("B", 1), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)))


def duration(seconds: float) -> str:
    """Write a time to three significant figures: ``3.2 ms``, ``12.5 s``, ``2 min 05 s``."""
    if round(seconds) >= 120:
        minutes, rest = divmod(round(seconds), 60)
        return f"{count(minutes)}{SPACE}min{SPACE}{rest:02d}{SPACE}s"
    return _scaled(seconds, 1e-6, (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)))


def scientific(value: float) -> str:
    """Write a small error in powers of ten: ``2.1 × 10⁻⁴``; numbers of ordinary size stay as they are."""
    if value == 0 or not math.isfinite(value) or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}{SPACE}×{SPACE}10<sup>{int(exponent)}</sup>".replace("-", "\N{MINUS SIGN}")


def _scaled(value: float, smallest: float, units: tuple[tuple[str, float], ...]) -> str:
    if value == 0:
        return f"0{SPACE}{units[0][0]}"
    # 0.9995 of the next unit already rounds to 1.00 of it.
    name, unit = next((u for u in reversed(units) if value >= 0.9995 * u[1]), units[0])
    scaled = value / unit
    digits = 0 if scaled >= 99.95 or (unit == smallest and scaled == int(scaled)) else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f}{SPACE}{name}"
