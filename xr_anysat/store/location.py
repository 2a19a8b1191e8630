"""Locations of stores: a folder, a URL of any file system of fsspec, or a store object of zarr.

This module lists files, and reads and writes the few that are not chunks of an array; zarr reads and writes chunks.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xr_anysat.errors import OptionError, StoreError, WriteError
from xr_anysat.shared.text import format_bytes

DRAFT = ".partial"
"""End of the name that zarr's LocalStore gives to an incomplete file."""


@dataclass(frozen=True)
class StoreLocation:
    """The location of a store; small and picklable, because it is part of every task.

    Attributes
    ----------
    address : str or zarr Store
        Absolute path, URL, or a store object.
    storage_options : tuple of (str, object)
        Options for the file system of a URL.
    """

    address: Any
    storage_options: tuple[tuple[str, Any], ...] = field(
        default=(), repr=False
    )  # no keys and secrets in logs

    def __str__(self) -> str:
        return repr(self.address) if isinstance(self.address, str) else str(self.address)

    @property
    def is_folder(self) -> bool:
        """Whether the location is a folder of this machine."""
        return isinstance(self.address, str) and "://" not in self.address

    @property
    def name(self) -> str:
        """The last part of the path; empty for a store object."""
        return self.address.rpartition("/")[2] if isinstance(self.address, str) else ""

    def root(self, *, read_only: bool = False) -> Any:
        """Return the store of zarr.

        Raises
        ------
        StoreError
            If no installed package opens the URL.
        """
        from zarr.storage import FsspecStore, LocalStore

        if self.is_folder:
            return _whole_files(LocalStore(self.address, read_only=read_only))
        if not isinstance(self.address, str):
            return _whole_files(self.address)
        try:
            # a cached listing lacks the blocks that other threads and workers wrote since, which would be missing
            options = {**dict(self.storage_options), "use_listings_cache": False}
            return FsspecStore.from_url(self.address, storage_options=options, read_only=read_only)
        except (ImportError, ValueError) as error:  # the package is missing, or the protocol is unknown
            raise StoreError(
                f"{self} cannot be opened: {error}. Install what fsspec needs for it (s3fs for s3://, gcsfs for "
                "gs://, adlfs for abfs://), or pass zarr.storage.ObjectStore(obstore.store.from_url(...))"
            ) from error

    def sibling(self) -> tuple[Any, str]:
        """Return the store for files next to this one, and the beginning of their names.

        A store object, or a bucket that is a store as a whole, contains these files itself.

        Examples
        --------
        >>> StoreLocation("/data/area.zarr").sibling(), StoreLocation("memory://area.zarr").sibling()[1]
        ((LocalStore('file:///data'), 'area.'), '')
        """
        parent = self.address.removesuffix(self.name).rstrip("/") if isinstance(self.address, str) else ":"
        if parent.endswith(":"):
            return self.root(), ""
        return StoreLocation(
            parent or "/", self.storage_options
        ).root(), f"{self.name.removesuffix('.zarr')}."


def _whole_files(store: Any) -> Any:
    """Return a store whose files appear only when complete; zarr's LocalStore does this since 3.1.3."""
    from zarr.storage import LocalStore, _local

    if type(store) is not LocalStore or hasattr(_local, "_atomic_write"):
        return store
    from xr_anysat.store.whole_files import WholeFileStore

    return WholeFileStore(store.root, read_only=store.read_only)


def parse_location(store: Any, storage_options: dict[str, Any] | None = None) -> StoreLocation:
    """Return the location that a user passed.

    Raises
    ------
    OptionError
        If `store` is no location.

    Examples
    --------
    >>> parse_location("s3://bucket/area.zarr/", {"anon": False})
    StoreLocation(address='s3://bucket/area.zarr')
    """
    from zarr.abc.store import Store

    options = tuple((storage_options or {}).items())
    if isinstance(store, Store):
        address: Any = store
    elif isinstance(store, str | os.PathLike) and os.fspath(store):
        address = os.fspath(store).removeprefix("file://").removeprefix("local://")
        address = address.rstrip("/") if "://" in address else str(Path(address).expanduser().absolute())
    else:
        raise OptionError(f"{store=}: expected a path, a URL or a store of zarr")
    target = StoreLocation(address, options)
    if options and (target.is_folder or not isinstance(address, str)):
        raise OptionError(
            f"storage_options={sorted(storage_options or {})} and {target}: these options are only for URLs"
        )
    return target


def read(root: Any, key: str) -> bytes | None:
    """Return the content of a file of a store; None if it does not exist.

    Raises
    ------
    StoreError
        If the store cannot be read.
    """
    from zarr.core.buffer import default_buffer_prototype

    try:
        value = _sync(root.get(key, default_buffer_prototype()))
    except (FileNotFoundError, NotADirectoryError):  # no folder, or no bucket
        return None
    except Exception as error:  # of the file system, or of the library that speaks to the server
        raise _read_error(root, error) from error
    return None if value is None else bytes(value.to_bytes())


def write(root: Any, key: str, value: bytes, target: StoreLocation, *, replace: bool = True) -> None:
    """Write a file of a store, completely or not at all; without `replace`, only if it does not exist.

    Raises
    ------
    WriteError
        If it cannot be written.
    """
    from zarr.core.buffer import default_buffer_prototype

    buffer = default_buffer_prototype().buffer.from_bytes(value)
    try:
        try:
            _sync(root.set(key, buffer) if replace else _create(root, key, buffer))
        except FileNotFoundError:  # another run may just have finished and deleted this draft
            _sync(root.set(key, buffer))
    except Exception as error:  # as above
        raise write_error(target, error) from error


def exists(root: Any, key: str) -> bool:
    """Return whether a store has a file.

    Raises
    ------
    StoreError
        If the store cannot be read.
    """
    try:
        return bool(_sync(root.exists(key)))
    except Exception as error:  # of the file system, or of the library that speaks to the server
        raise _read_error(root, error) from error


def delete(root: Any, key: str, target: StoreLocation) -> None:
    """Delete a file of a store.

    Raises
    ------
    WriteError
        If it cannot be deleted.
    """
    try:
        _sync(root.delete(key))
    except Exception as error:  # of the file system, or of the library that speaks to the server
        raise write_error(target, error) from error


def delete_drafts(target: StoreLocation) -> None:
    """Delete what killed writers left of files of a folder."""
    if target.is_folder:
        for draft in Path(target.address).rglob(f"*{DRAFT}"):
            draft.unlink(missing_ok=True)


async def _create(root: Any, key: str, buffer: Any) -> None:
    """Write a file that does not exist; one of two writers is first, if the file system can distinguish them."""
    from zarr.storage import FsspecStore

    if await root.exists(key):
        return
    try:
        if isinstance(root, FsspecStore):  # its own method checks first and then writes
            await root.fs._pipe_file(f"{root.path}/{key}", buffer.to_bytes(), mode="create")
        else:
            await root.set_if_not_exists(key, buffer)
    except Exception:  # the file exists now, or the file system has no conditional writes
        if not await root.exists(key):
            await root.set(key, buffer)


def keys(root: Any, prefix: str) -> list[str]:
    """Return the names of the files of a store that begin with `prefix`.

    Raises
    ------
    StoreError
        If they cannot be listed.
    """

    async def collect() -> list[str]:
        return [key async for key in root.list_prefix(prefix)]

    return _listed(root, collect)


def names(root: Any, folder: str = "") -> list[str]:
    """Return the names of the files and folders in a folder of a store, by default at its top.

    Raises
    ------
    StoreError
        If they cannot be listed.
    """

    async def collect() -> list[str]:
        return [name.rstrip("/") async for name in root.list_dir(folder)]

    return _listed(root, collect)


def is_empty(root: Any) -> bool:
    """Return whether a store has no files except drafts of killed writers; lists only the first other file."""

    async def first() -> list[str]:
        async for key in root.list_prefix(""):
            if not key.endswith(DRAFT):
                return [key]
        return []

    return not _listed(root, first)


def _listed(root: Any, found: Callable[[], Coroutine[Any, Any, list[str]]]) -> list[str]:
    try:
        names: list[str] = _sync(found())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception as error:  # as above
        raise _read_error(root, error) from error
    return names


def _read_error(root: Any, error: Exception) -> StoreError:
    return StoreError(
        f"{root} cannot be read: {_summary(error)}. Check the address, rights and credentials (storage_options= "
        "for a URL)"
    )


def _summary(error: Exception) -> str:
    """Return type and first line of an error, without what obstore adds for debugging."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def write_error(target: StoreLocation, error: Exception) -> WriteError:
    """Return the exception to raise where a write failed."""
    reason = folder_problem(Path(target.address), error) if target.is_folder else None
    remedy = (
        "Make it writable (space, rights, credentials)"
        if reason is None
        else "Correct that, or give another path"
    )
    return WriteError(
        f"{target} could not be written: {reason or _summary(error)}. Finished blocks are kept. {remedy} and repeat "
        "the call to resume"
    )


def folder_problem(path: Path, error: Exception) -> str | None:
    """Return which folder prevents writing to `path`, and why; None if the folders are in order."""
    missing = None
    for last in (path, *path.parents):
        if os.path.exists(last):  # Path.exists raises where a folder may not be entered
            break
        missing = last
    if not last.is_dir():
        return f"{str(last)!r} is a file, expected a folder"
    if not os.access(last, os.W_OK | os.X_OK):
        return f"no permission to write into the folder {str(last)!r}, or its file system is read-only"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(shutil.disk_usage(last).free)
        return f"the disk or the quota of the folder {str(last)!r} is full ({free} free on the disk)"
    if missing is not None:
        return f"{str(missing)!r} cannot be created in the folder {str(last)!r} ({_summary(error)})"
    return None


def _sync(awaited: Any) -> Any:
    # the stores of zarr are asynchronous and need the event loop of zarr
    from zarr.core.sync import sync

    return sync(awaited)
