"""Format numbers as text: bytes, counts and durations."""

from __future__ import annotations

import os
from itertools import pairwise


def physical_memory() -> int | None:
    """Return the bytes of memory of this machine; None if the system does not report them (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def format_bytes(size: float) -> str:
    """Format a number of bytes.

    Examples
    --------
    >>> format_bytes(3 << 30), format_bytes(370_293_350_400)
    ('3 GiB', '345 GiB')
    """
    return format_si(size, "B", 1024)


def format_si(value: float, unit: str, step: int = 1000) -> str:
    """Format `value` with three digits, and `unit` with a prefix for powers of 1000 or 1024.

    Examples
    --------
    >>> format_si(12_345_678_901, "FLOP"), format_si(999.6, "FLOP")
    ('12.3 GFLOP', '1 kFLOP')
    """
    prefixes = iter(
        ["", "k", "M", "G", "T", "P", "E"] if step == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    )
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / step, next(prefixes)
    return f"{value:.3g} {prefix}{unit}"


def format_counts(counts: tuple[int, int]) -> str:
    """Format the numbers of rows and columns.

    Examples
    --------
    >>> format_counts((1200, 3))
    '1,200 × 3'
    """
    return " × ".join(f"{n:,}" for n in counts)


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, in two units.

    Examples
    --------
    >>> format_duration(0.4), format_duration(75), format_duration(19_300), format_duration(400_000)
    ('0.4 s', '1 min 15 s', '5 h 22 min', '4 d 15 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    (big, unit), (small, part) = next(pair for pair in pairwise(units) if seconds >= pair[0][0])
    count, rest = divmod(round(seconds / small), big // small)
    return f"{count} {unit} {rest} {part}"
