"""Format numbers as text (bytes, counts, durations), and reduce text to names of files."""

from __future__ import annotations

import hashlib
import os
import re
from itertools import pairwise


def physical_memory() -> int | None:
    """Return the bytes of memory of this machine; None if the system does not report them (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


MAX_NAME_CHARS = 120
"""Longest name of a file that `safe_name` returns; file systems allow 255 bytes."""


def safe_name(text: str) -> str:
    """Reduce text to a name that is safe as one part of a path or URL.

    Every value that was read and becomes part of the name of a file passes through here. A safe name
    is returned unchanged. In any other text, characters except ASCII letters, digits, ``.``, ``_`` and
    ``-`` are replaced, and a hash of the text is appended, so that different texts have different names.

    Examples
    --------
    >>> safe_name("anysat-tiny-random-0"), safe_name("../../.config/important")
    ('anysat-tiny-random-0', 'config-important-4b7afba8')
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-")
    if name == text and len(name) <= MAX_NAME_CHARS and name:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return "-".join(part for part in (name[: MAX_NAME_CHARS - 9].rstrip("-"), digest) if part)


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
