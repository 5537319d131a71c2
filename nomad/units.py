"""Quantities as people write them: `2Gi`, `20ms`, `100Mbit`. One table of units per dimension.

Used where people write by hand: topology files, the command line, operator options. Numbers pass
through in the dimension's own unit. Every error is a `ValueError` that shows what would have been right.
"""

from __future__ import annotations

import math
import re

_QUANTITY = re.compile(r"\s*([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ/]*)\s*", re.IGNORECASE)

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PREFIXES = {**_DECIMAL, **_BINARY}

_BYTES = {
    f"{prefix}{unit}": float(factor) for prefix, factor in _PREFIXES.items() for unit in ("", "b") if prefix + unit
}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES_PER_SECOND = {
    **{f"{prefix}bit{per}": factor / 8 for prefix, factor in _PREFIXES.items() for per in ("", "/s")},
    **{f"{prefix}bps": factor / 8 for prefix, factor in _DECIMAL.items()},
    **{f"{prefix}b/s": float(factor) for prefix, factor in _PREFIXES.items()},
}

# Bounds that no real link comes near; they keep a slip of the hand from stopping a pipeline for a year.
LONGEST_DELAY = 3600.0
"""Seconds of an emulated link."""
LEAST_BANDWIDTH, MOST_BANDWIDTH = 1.0, 1e15
"""Bytes per second of an emulated link."""


def memory_mb(value: object) -> float:
    """MiB: a number of them, or bytes with a unit like `256Mi`, `2GiB`, `500MB`."""
    return _parse(value, {unit: size / 2**20 for unit, size in _BYTES.items()}, "a number of MiB, or like 256Mi or 2Gi")


def seconds(value: object) -> float:
    """Seconds: a number of them, or like `20ms`, `1.5s`, `2m`."""
    return _parse(value, _SECONDS, "a number of seconds, or like 20ms or 1.5s")


def bytes_per_second(value: object) -> float:
    """Bytes per second: a number of them, or like `100Mbit`, `1Gbit/s` (bits), `12MB/s` (bytes)."""
    return _parse(value, _BYTES_PER_SECOND, "a number of bytes per second, or like 100Mbit or 12MB/s")


def milliseconds(seconds: float) -> str:
    """Seconds as reasons and messages show them: `24.46 ms`, and from ten seconds on `32.86 s`."""
    if seconds < 9.9995:
        return f"{seconds * 1e3:.4g} ms"
    return f"{seconds:.4g} s" if seconds < 9999.5 else f"{seconds:.0f} s"


def number(value: float, digits: int = 3) -> str:
    """A number as people read it: so many digits, all those before the point, and no exponent for a large one."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def _parse(value: object, units: dict[str, float], wanted: str) -> float:
    problem = f"{value!r} must be {wanted}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        text, unit = match[1], match[2].lower()
        if unit and unit not in units:
            raise ValueError(f"{problem} (unknown unit {match[2]!r})")
        try:
            number = float(text) * (units[unit] if unit else 1.0)
        except ValueError:
            raise ValueError(problem) from None
    else:
        raise ValueError(problem)
    if not math.isfinite(number):
        raise ValueError(problem)
    return number
