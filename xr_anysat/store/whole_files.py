"""A store of zarr for folders, for zarr before 3.1.3.

The LocalStore of these versions writes in place, so an incomplete block of a killed run would look finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zarr.storage import LocalStore


class WholeFileStore(LocalStore):
    """Write each file under another name first, as zarr does since 3.1.3."""

    async def set(self, key: str, value: Any) -> None:
        """Write a file, or replace it."""
        await self._put(key, value, lambda draft, path: draft.replace(path))

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        """Write a file that does not exist."""
        with contextlib.suppress(FileExistsError):
            await self._put(key, value, lambda draft, path: path.hardlink_to(draft))

    async def _put(self, key: str, value: Any, move: Callable[[Path, Path], object]) -> None:
        path = self.root / key
        draft = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            await super().set(draft.relative_to(self.root).as_posix(), value)
            await asyncio.to_thread(move, draft, path)
        finally:
            draft.unlink(missing_ok=True)
