"""How composed frames show in Jupyter."""

from __future__ import annotations

import sys
from typing import Any


def shell() -> Any:
    """The IPython that this process is the inside of, or None; imports nothing."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
