"""The command line that needs no extra: ``python -m xr_anysat``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xr_anysat import __version__
from xr_anysat.errors import AnySatError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m xr_anysat",
        description="AnySat embeddings of any Sentinel-2 cube: an xarray extension.",
    )
    parser.add_argument("--version", action="version", version=f"xr_anysat {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="make a small scene, embed it and draw a picture, without data, account or network",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="demo", metavar="DIR", help="folder of the results")
    demo.add_argument(
        "--size", type=int, default=240, metavar="N", help="side of the scene in 10 m pixels, even"
    )
    demo.add_argument("--model", default="base", help="base, small or tiny")
    demo.add_argument(
        "--weights",
        metavar="PATH",
        help="a checkpoint, or 'random'; without it the official weights, else random ones",
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the scene")

    options = vars(parser.parse_args(arguments))
    if options.pop("command") is None:
        parser.print_help()
        return 0
    from xr_anysat.demo import run

    try:
        run(**options)
    except AnySatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
