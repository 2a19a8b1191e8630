"""Code that tests run in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from support.paths import TESTS


def without_torch(code: str) -> str:
    """The output of `code`, which has `tile_of_sentinel2`, in a process where importing torch fails."""
    prepare = """
        import sys
        from support.cubes import tile_of_sentinel2
        for name in [m for m in sys.modules if m == "torch" or m.startswith("torch.")]:
            del sys.modules[name]
        sys.modules["torch"] = None
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prepare) + textwrap.dedent(code)],
        cwd=TESTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
