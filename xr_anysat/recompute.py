"""A lazy cube once more, under other keys: what is made of both is read twice rather than kept in memory.

Statistics of a whole cube come before its first embedding. Were both made of the same tasks, dask
would hold every frame in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import dask.array as da
import xarray as xr
from dask.base import clone_key
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
