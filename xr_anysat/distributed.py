"""Load the encoder on the workers of a dask cluster, which may have no internet and no shared disk.

`prepare` sends the weights as a file of the checked tensors that an encoder needs: once from the client to a temporary
file of the scheduler, and from there to each worker that lacks them, now or when it joins. Both transfers are in
pieces. A worker plugin that contains the weights would be shorter, but the scheduler serializes a plugin once per
worker, all at the same time: 380 MB of weights took 0.7 GB of its memory and 0.36 GB more per worker. In pieces, they
take 20 MB.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import xarray as xr
from distributed.diagnostics.plugin import WorkerPlugin

from xr_anysat.errors import AnySatError, CubeTypeError, WeightsError
from xr_anysat.model.checkpoint import cache_dir
from xr_anysat.model.state_dict import cached_file, new_file, write_cached
from xr_anysat.model.weights import (
    ENCODED,
    EncoderSpec,
    device_of,
    is_available_offline,
    is_cached,
    load_state,
    with_known_hash,
)
from xr_anysat.record import encoder_spec_of

if TYPE_CHECKING:
    from distributed import Client, Scheduler, Worker

PIECE = 4 << 20
"""Size of a message in bytes, which is what the scheduler keeps in memory per worker."""


def prepare(client: Client, spec: EncoderSpec | xr.DataArray) -> dict[str, str]:
    """Load the encoder on every worker of a cluster, also on workers that join or restart later.

    Workers that have the weights, on a shared disk or in their cache folder from an earlier call, use them. The others
    receive them from the scheduler. Workers download nothing.

    Parameters
    ----------
    client : distributed.Client
        A client of the cluster. Scheduler and workers need the same packages as the client.
    spec : EncoderSpec or DataArray
        The embedding to compute, or the result of `xr_anysat.model.weights.encoder_spec`.

    Returns
    -------
    dict of str to str
        The device of the encoder, by address of the worker.

    Raises
    ------
    CubeTypeError
        If `spec` is neither.
    WeightsError
        If the weights are not on this machine, are a module object, or do not reach a worker. Nothing
        is registered then.
    DeviceError
        If a worker lacks the device.

    Examples
    --------
    >>> from distributed import Client
    >>> from xr_anysat.model.weights import encoder_spec
    >>> spec = encoder_spec("tiny", weights="random", device="cpu")
    >>> with Client(processes=False, n_workers=1, dashboard_address=":0", set_as_default=False) as client:
    ...     list(prepare(client, spec).values())
    ['cpu']
    """
    if isinstance(spec, xr.DataArray):
        spec = encoder_spec_of(spec)
    if not isinstance(spec, EncoderSpec):
        raise CubeTypeError(
            f"prepare(client, {type(spec).__name__}): expected the embedding to compute, the result of embed(), "
            "or an EncoderSpec"
        )
    if spec.source.kind == "module":
        raise WeightsError(
            "a module that is passed as model exists in one process only and cannot be sent to workers. Save its "
            f"weights, torch.save(model.state_dict(), PATH), and pass model={spec.size!r}, weights=PATH"
        )
    return cast(dict[str, str], client.sync(_prepare, client, spec))


async def _prepare(client: Client, spec: EncoderSpec) -> dict[str, str]:
    spec = await asyncio.to_thread(with_known_hash, spec)
    if spec.source.kind != "random" and not await client.run_on_scheduler(_open, spec.sha256):
        await _send(client, spec)
    devices = await client.run(_ready, spec, on_error="return")
    failed = {worker: error for worker, error in devices.items() if isinstance(error, BaseException)}
    if failed:
        worker, error = next(iter(failed.items()))
        kind = type(error) if isinstance(error, AnySatError) else WeightsError
        raise kind(
            f"{len(failed)} of {len(devices)} workers cannot be prepared. {worker}: {error or repr(error)}"
        ) from error
    await client.register_plugin(_Encoder(spec))
    return cast(dict[str, str], devices)


async def _send(client: Client, spec: EncoderSpec) -> None:
    """Send the weights to the scheduler, through a file, so that they are not in memory twice."""
    with tempfile.TemporaryDirectory() as folder:
        path, token = Path(folder) / "weights.safetensors", uuid.uuid4().hex

        def write() -> None:
            assert spec.sha256 is not None
            write_cached(load_state(spec, ENCODED), path, spec.sha256)

        await asyncio.to_thread(write)
        scheduler: Any = client.scheduler
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                await scheduler.xr_anysat_put(token=token, piece=piece)
        await scheduler.xr_anysat_hold(token=token, sha256=spec.sha256)


# ---------------------------------------------------------------------------- on the scheduler

_arriving: dict[str, IO[bytes]] = {}

_held: dict[str, IO[bytes]] = {}
"""The weights that this process serves, by sha256: unnamed files, which end with the process."""


def _open(sha256: str, dask_scheduler: Scheduler) -> bool:
    """Let the scheduler receive and serve weights, and return whether it has those of `sha256`."""
    dask_scheduler.handlers.update(xr_anysat_put=_put, xr_anysat_hold=_hold, xr_anysat_get=_get)
    return sha256 in _held


# These run on the event loop of the scheduler; a piece takes one or two milliseconds.


def _put(token: str, piece: bytes) -> None:
    try:
        if token not in _arriving:
            _arriving[token] = tempfile.TemporaryFile()  # noqa: SIM115 (it stays open)
        _arriving[token].write(piece)
    except OSError as error:
        raise WeightsError(
            f"the scheduler cannot store the weights in its temporary folder {tempfile.gettempdir()!r} ({error}). "
            "Set TMPDIR to a folder with 500 MB free where the scheduler starts"
        ) from error


def _hold(token: str, sha256: str) -> None:
    _held.setdefault(sha256, _arriving.pop(token))


def _get(sha256: str, start: int) -> bytes:
    _held[sha256].seek(start)
    return _held[sha256].read(PIECE)


# ---------------------------------------------------------------------------- on the workers


class _Encoder(WorkerPlugin):
    """Loads an encoder on each worker that joins, before its first task."""

    idempotent = True

    def __init__(self, spec: EncoderSpec) -> None:
        self.name = f"xr-anysat-{spec.size}-{spec.sha256}-{spec.device}"
        self.spec = spec

    async def setup(self, worker: Worker) -> None:
        await _ready(self.spec, worker)


async def _ready(spec: EncoderSpec, dask_worker: Worker) -> str:
    """Load an encoder on a worker, outside of its event loop, and return its device."""
    if not await asyncio.to_thread(is_available_offline, spec):
        await _fetch(spec, dask_worker)
    return await asyncio.to_thread(device_of, spec)


async def _fetch(spec: EncoderSpec, worker: Worker) -> None:
    """Copy the weights from the scheduler into the cache folder of this machine."""
    assert spec.sha256 is not None
    try:
        with new_file(cached_file(spec.sha256)) as draft:
            with draft.open("wb") as file:
                while piece := await worker.scheduler.xr_anysat_get(sha256=spec.sha256, start=file.tell()):
                    await asyncio.to_thread(file.write, piece)
            if not await asyncio.to_thread(is_cached, spec, draft):
                raise WeightsError(
                    "the weights arrived damaged, or from another version of xr_anysat: install the same version "
                    "on client, scheduler and workers, and restart the scheduler"
                )
    except OSError as error:
        raise WeightsError(
            f"the weights cannot be written into the cache folder {str(cache_dir())!r} ({error}). Set "
            "XR_ANYSAT_CACHE_DIR to a folder with 500 MB free where the worker starts"
        ) from error
