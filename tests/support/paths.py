"""Folders that tests read."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PARITY = TESTS / "parity"
SHARED = ROOT.parent / "shared" / "data"
"""Real Sentinel-2 data; tests that need it are skipped where it is missing."""


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a folder, by their names in it."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
