"""All benchmarks, each in a process of its own: tables, and the same as JSON.

    python benchmarks/bench.py [--upstream PATH] [--quick] [--only forward,pipeline,...] [--json FILE]

Each figure is a ratio of medians of runs that alternate, or stands beside one, since absolute times drift.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from measure import Row, fresh, parser, settled, show, write

SECTIONS = ("forward", "precision", "pipeline", "overlap", "scaling")


def section(name: str, options: argparse.Namespace) -> dict[str, list[Row]]:
    """Tables of a benchmark, by their names."""
    return show(importlib.import_module(name).TABLES, options)


def sections(names: str) -> list[str]:
    """The sections that `--only` names."""
    unknown = set(asked := names.split(",")) - set(SECTIONS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: wanted some of {','.join(SECTIONS)}")
    return asked


def main() -> None:
    """Print and write all that is asked for."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", type=sections, default=SECTIONS, metavar=",".join(SECTIONS))
    arguments.set_defaults(json=Path("bench.json"))
    options = settled(arguments.parse_args())
    tables: dict[str, list[Row]] = {}
    for name in options.only:
        tables |= fresh(section, name, options)
        write(options, tables)  # what there is, should the rest be interrupted


if __name__ == "__main__":
    main()
