"""``xr-anysat`` and ``python -m xr_anysat``: the command line, if the extra ``cli`` is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print("the command line needs typer and rich: pip install 'xr_anysat[cli]'", file=sys.stderr)
        return 1
    from xr_anysat import cli

    return cli.main(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
