"""All benchmarks, each in a separate process: tables, and the same as JSON.

    python benchmarks/bench.py [--upstream PATH] [--quick] [--only forward,pipeline,...] [--json FILE]

Each figure is a ratio of medians of alternating runs, or is shown beside one, because absolute times drift.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from measure import Row, fresh, parser, resolve, show, write

SECTIONS = ("forward", "precision", "pipeline", "overlap", "scaling")


def section(name: str, options: argparse.Namespace) -> dict[str, list[Row]]:
    """Run a benchmark; return its tables by name."""
    return show(importlib.import_module(name).TABLES, options)


def sections(names: str) -> list[str]:
    """Parse the value of `--only`."""
    unknown = set(requested := names.split(",")) - set(SECTIONS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: expected some of {','.join(SECTIONS)}"
        )
    return requested


def main() -> None:
    """Print and write all requested tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", type=sections, default=SECTIONS, metavar=",".join(SECTIONS))
    arguments.set_defaults(json=Path("bench.json"))
    options = resolve(arguments.parse_args())
    tables: dict[str, list[Row]] = {}
    for name in options.only:
        tables |= fresh(section, name, options)
        write(options, tables)  # after each section, in case the next is interrupted


if __name__ == "__main__":
    main()
