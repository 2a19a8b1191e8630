"""Dask graphs: a second reading of a cube, arrays that accompany it, and the order in which tasks read.

Statistics of a whole cube are computed before its first embedding. If both used the same tasks, dask would keep
every frame in memory in between: `read_again` returns the cube under other keys.

Chunks rarely end where blocks end. The part of a chunk that the next block needs stays in memory until that block
is computed. This is little if chunks are read in the order of the blocks. Dask's own order completes all blocks
within one chunk first, wherever they are, and then keeps most of the cube: `in_turn` sets the order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import DataNode, convert_legacy_graph
from dask.base import clone_key, tokenize
from dask.callbacks import Callback
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer

# ---------------------------------------------------------------------- a second reading

_SEED = "xr_anysat"  # always the same: a cube has one second reading


class _Renamed(Layer):
    """The tasks of a graph under other names, created when they are first needed.

    ``dask.graph_manipulation.clone`` does this at once, and breaks what was sliced or rechunked
    (https://github.com/dask/dask/issues/12455).
    """

    def __init__(self, graph: Mapping[Any, Any], outputs: list[Any]) -> None:
        super().__init__()
        self._graph, self._outputs = graph, outputs
        self._tasks: dict[Any, Any] | None = None

    def _materialize(self) -> dict[Any, Any]:
        if self._tasks is None:
            graph = convert_legacy_graph(dict(self._graph))
            names = {key: clone_key(key, _SEED) for key in graph}
            self._tasks = {names[k]: task.substitute(names, key=names[k]) for k, task in graph.items()}
        return self._tasks

    def __getitem__(self, key: Any) -> Any:
        return self._materialize()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._materialize())

    def __len__(self) -> int:
        return len(self._materialize())

    def is_materialized(self) -> bool:
        """Return whether the tasks exist already."""
        return self._tasks is not None

    def get_dependencies(self, key: Any, all_hlg_keys: Collection[Any]) -> set[Any]:
        """Return what a task needs, which is all in this layer: dask looks only among the outputs of layers."""
        return set(self[key].dependencies)

    def get_output_keys(self) -> set[Any]:
        """Return the keys of the array's chunks."""
        return set(self._outputs)


def read_again(cube: xr.DataArray | xr.Dataset) -> xr.DataArray | xr.Dataset:
    """Return the same cube under other keys; NumPy arrays are not copied.

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


# ---------------------------------------------------------------------- arrays that accompany a cube


class Companion:
    """A small array of one chunk that is computed with a cube, and accompanies it in its ``encoding``.

    The graph of a persisted cube has no task of that array anymore, but the cube still has its companion. As soon
    as this process has computed the array (see `settle`), the companion keeps its values and releases the graph.
    When pickled it keeps neither, because a graph may be large, and the cube brings its own.

    A companion has these limits. Operations that drop the ``encoding`` of a cube, such as arithmetic and concatenation,
    drop its companion, too. If a cluster computed the array, its values are not in this process, which then computes it
    again. A persisted cube that was unpickled in another process has no values, and `compute` returns None.

    Attributes
    ----------
    key : tuple
        Key of the chunk.
    array : dask array or None
        The array, until its values are known.
    values : ndarray or None
        The values, once they are known.

    Examples
    --------
    >>> ones = da.ones(3, chunks=3)
    >>> Companion.of(ones).compute(ones + 1)
    array([1., 1., 1.])
    """

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key
        self.array: Any = None
        self.values: np.ndarray | None = None

    @classmethod
    def of(cls, array: Any) -> Companion:
        """Return the companion of a dask array: this process has one per key."""
        (key,) = flatten(array.__dask_keys__())
        companion = _companion(key)
        if companion.values is None:
            companion.array = array
        return companion

    def compute(self, cube: Any) -> np.ndarray | None:
        """Return the values; None if neither the graph of the dask array `cube` nor this process has them."""
        lazy = self.array
        layer = _layer_of(cube.dask, self.key)
        if layer is not None:
            graph, axes = cube.dask.cull_layers({layer}), len(self.key) - 1
            lazy = da.Array(graph, self.key[0], ((np.nan,),) * axes, meta=np.empty((0,) * axes))
        elif self.values is not None:
            return self.values
        return None if lazy is None else np.asarray(lazy.compute())

    def __reduce__(self) -> tuple[Any, ...]:
        return _companion, (self.key,)

    def __deepcopy__(self, memo: Any) -> Companion:
        return self


_companions: WeakValueDictionary[tuple[Any, ...], Companion] = WeakValueDictionary()


def _companion(key: tuple[Any, ...]) -> Companion:
    return _companions.setdefault(key, Companion(key))


def settle(name: str, values: np.ndarray) -> np.ndarray:
    """Return the values of an array of one chunk, and keep them in its `Companion`, if this process has it."""
    companion = _companions.get((name, *(0,) * values.ndim))
    if companion is not None:
        companion.values, companion.array = values, None
    return values


def with_value(array: Any, key: tuple[Any, ...], values: np.ndarray) -> Any:
    """Return a dask array whose graph has `values` in place of the task `key`, if it has that task."""
    graph, name = array.dask, _layer_of(array.dask, key)
    if name is None:
        return array
    others = {k: task for k, task in graph.layers[name].items() if k != key}
    layers = {**graph.layers, name: MaterializedLayer({**others, key: values})}
    dependencies = {**graph.dependencies, name: graph.dependencies[name] if others else set()}
    return da.Array(HighLevelGraph(layers, dependencies), array.name, array.chunks, meta=array._meta)


def _layer_of(graph: HighLevelGraph, key: tuple[Any, ...]) -> str | None:
    """Return the name of the layer that has the task `key`: its own one, unless the graph was optimized."""
    if key[0] in graph.layers:
        return str(key[0])
    return next((name for name, layer in graph.layers.items() if key in layer), None)


# ---------------------------------------------------------------------- order of reading


def in_turn(graph: HighLevelGraph, keys: Iterable[Any]) -> Callback:
    """Make a scheduler of this process read what `keys` of `graph` need in the order of `keys`.

    Within this context, pass the graph to the scheduler as it is. On a cluster the order is an annotation of the
    tasks: ``dask.annotate(priority=turns(graph, keys))``.

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
    # at the start only tasks that read are ready; dask takes the last one
    return Callback(start_state=lambda _, state: state["ready"].sort(key=priority))


def turns(graph: HighLevelGraph, keys: Iterable[Any]) -> Callable[[Any], int]:
    """Return a function that returns the priority of a task by its key; see `reading_priority`."""
    # a plain dict's own method: the scheduler of a cluster needs no xr_anysat to call it
    return defaultdict(int, reading_priority(graph, keys)).__getitem__


def reading_priority(graph: HighLevelGraph, keys: Iterable[Any]) -> dict[Any, int]:
    """Return the priority of each task that `keys` need: in the order of the first key that needs it.

    A task that needs no other task reads. It has a lower priority than all tasks that do not read, so that
    what was read is processed before more is read.

    Examples
    --------
    >>> array = da.ones(2, chunks=1) + 1
    >>> priority = reading_priority(array.dask, list(flatten(array.__dask_keys__())))
    >>> [value for key, value in priority.items() if key[0] == array.name], sorted(priority.values())
    ([-1, -2], [-4, -3, -2, -1])
    """
    tasks = {k: t for k, t in convert_legacy_graph(dict(graph)).items() if not isinstance(t, DataNode)}
    keys = list(keys)
    priority: dict[Any, int] = {}
    for turn, key in enumerate(keys, 1):
        stack = [key]
        while stack:
            task = stack.pop()
            if task in priority:
                continue
            needs = tasks[task].dependencies & tasks.keys()
            priority[task] = -turn if needs else -turn - len(keys)
            stack.extend(needs)
    return priority


# ---------------------------------------------------------------------- sizes of tasks

TASK_BYTES = 256 << 20
"""Most bytes of the input of a composing task."""

RECHUNK = "tasks"
"""Method of rechunking: chunk by chunk. Dask's default on a cluster with many chunks ("p2p") moves the whole array
through the disks of the workers, and nothing is embedded before everything has been read."""


def keep_blocks(array: Any, kept: np.ndarray) -> Any:
    """Return a dask array (D, y, x) of float whose blocks are NaN, and not computed, where `kept` (y, x) is False.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> ones = da.ones((1, 1, 4), chunks=(1, 1, 2))
    >>> keep_blocks(ones, np.array([[True, False]])).compute()
    array([[[ 1.,  1., nan, nan]]])
    """
    name = f"kept-{tokenize(array.name, kept)}"
    graph: dict[Any, Any] = {}
    for i, height in enumerate(array.chunks[1]):
        for j, width in enumerate(array.chunks[2]):
            missing = (np.full, (array.shape[0], height, width), np.nan, array.dtype)
            graph[name, 0, i, j] = (array.name, 0, i, j) if kept[i, j] else missing
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[array])
    return da.Array(layers, name, array.chunks, meta=array._meta)


def even_chunks(chunks: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Cut each chunk into equal pieces of at most `side`, so that no piece needs two chunks.

    Examples
    --------
    >>> even_chunks((2048, 2048, 10), 1500)
    (1024, 1024, 1024, 1024, 10)
    """
    steps = [max(1, -(-c // -(-c // side))) if c else 1 for c in chunks]
    return tuple(min(step, c - at) for c, step in zip(chunks, steps, strict=True) for at in range(0, c, step))
