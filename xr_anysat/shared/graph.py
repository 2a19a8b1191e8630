"""How often and in which order a lazy cube is read, so that little of it is in memory at a time.

Statistics of a whole cube come before its first embedding. Were both made of the same tasks, dask
would hold every frame in between: `read_again` gives the cube once more, under other keys.

Chunks seldom end where blocks do. What has been read for blocks that lack their other part is held until
that is read: little, if chunks are read as they lie side by side, and most of the cube in the order that
dask finds, which takes blocks within a chunk first, wherever they are. `in_turn` sets the order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import dask.array as da
import xarray as xr
from dask.base import clone_key
from dask.callbacks import Callback
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph, Layer

_SEED = "xr_anysat"  # the same names every time: a cube has one second reading


class _Renamed(Layer):
    """The tasks of a graph under other names, made only when they are wanted.

    ``dask.graph_manipulation.clone`` is for that, but at once, and it breaks whatever was sliced or
    rechunked (https://github.com/dask/dask/issues/12455).
    """

    def __init__(self, graph: Mapping[Any, Any], outputs: list[Any]) -> None:
        super().__init__()
        self._graph, self._outputs = graph, outputs
        self._tasks: dict[Any, Any] | None = None

    def _made(self) -> dict[Any, Any]:
        if self._tasks is None:
            from dask._task_spec import convert_legacy_graph

            graph = convert_legacy_graph(dict(self._graph))
            names = {key: clone_key(key, _SEED) for key in graph}
            self._tasks = {names[k]: task.substitute(names, key=names[k]) for k, task in graph.items()}
        return self._tasks

    def __getitem__(self, key: Any) -> Any:
        return self._made()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())

    def is_materialized(self) -> bool:
        """Whether the tasks were made already."""
        return self._tasks is not None

    def get_dependencies(self, key: Any, all_hlg_keys: Collection[Any]) -> set[Any]:
        """Return what a task needs, which is all in this layer: dask looks only among the outputs of layers."""
        return set(self[key].dependencies)

    def get_output_keys(self) -> set[Any]:
        """Keys of the array's chunks."""
        return set(self._outputs)


def read_again(cube: xr.DataArray | xr.Dataset) -> xr.DataArray | xr.Dataset:
    """The same cube under other keys; what is in memory stays there.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> lazy = xr.DataArray(np.arange(4), dims="x").chunk(x=2)
    >>> again = read_again(lazy)
    >>> again.data.name != lazy.data.name, again.equals(lazy)
    (True, True)
    """
    if isinstance(cube, xr.DataArray):
        return cube.copy(data=_renamed(cube.data))
    return cube.copy(
        data={k: v.data if v.chunks is None else _renamed(v.data) for k, v in cube.data_vars.items()}
    )


def _renamed(data: Any) -> Any:
    name = clone_key(data.name, _SEED)
    keys = [(name, *key[1:]) for key in flatten(data.__dask_keys__())]
    layer = _Renamed(data.__dask_graph__(), keys)
    graph = HighLevelGraph({name: layer}, {name: set()})
    return da.Array(graph, name, chunks=data.chunks, meta=data._meta)


def in_turn(graph: HighLevelGraph, keys: Iterable[Any]) -> Callback:
    """Have a scheduler of this process read what `keys` of `graph` need in the order of `keys`.

    Within, hand the graph to the scheduler as it is. On a cluster the order goes with the tasks:
    ``dask.annotate(priority=turns(graph, keys))``.

    Examples
    --------
    >>> from dask.threaded import get
    >>> array = da.ones((2, 2), chunks=1) + 1
    >>> keys = list(flatten(array.__dask_keys__()))
    >>> with in_turn(array.dask, keys):
    ...     len(get(array.dask, keys))
    4
    """
    priority = turns(graph, keys)
    # dask takes the last one that is ready
    return Callback(start_state=lambda _, state: state["ready"].sort(key=priority))


def turns(graph: HighLevelGraph, keys: Iterable[Any]) -> Callable[[Any], int]:
    """Priority of a task, by its key: see `reading_priority`; whatever is not reading comes first, with 0."""
    # a plain dict's own method: the scheduler of a cluster needs no xr_anysat to call it
    return defaultdict(int, reading_priority(graph, keys)).__getitem__


def reading_priority(graph: HighLevelGraph, keys: Iterable[Any]) -> dict[Any, int]:
    """Priority of each task that frames are made from: minus the number, from 1, of the first key that needs it."""
    needs = graph.get_all_dependencies()
    priority: dict[Any, int] = {}
    seen = set()
    for turn, key in enumerate(keys, 1):
        tasks = [(key, False)]
        while tasks:
            task, reads = tasks.pop()
            if task in seen:
                continue
            seen.add(task)
            if reads:
                priority[task] = -turn
            reads = reads or (isinstance(task, tuple) and str(task[0]).startswith(FRAMES_LAYER))
            tasks.extend((need, reads) for need in needs[task])
    return priority


FRAMES_LAYER = "anysat-frames-"
"""How the names of lazy frames begin in a graph: what comes before them reads, what comes after works on that."""

TASK_BYTES = 256 << 20
"""Bytes that the input of a composing task may have."""

RECHUNK = "tasks"
"""How dask cuts arrays anew: chunk by chunk. Left alone, it moves the whole array over the workers' disks when a
cluster is there and the chunks are many ("p2p"), and nothing is embedded before all has been read."""


def even_chunks(chunks: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Chunks cut into equal pieces of at most `side`, so that no piece needs two of them.

    Examples
    --------
    >>> even_chunks((2048, 2048, 10), 1500)
    (1024, 1024, 1024, 1024, 10)
    """
    steps = [max(1, -(-c // -(-c // side))) if c else 1 for c in chunks]
    return tuple(min(step, c - at) for c, step in zip(chunks, steps, strict=True) for at in range(0, c, step))
