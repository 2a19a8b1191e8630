"""Folders that tests read."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PARITY = TESTS / "parity"
SHARED = ROOT.parent / "shared" / "data"
"""Real Sentinel-2 data; tests that need it are skipped where it is missing."""
