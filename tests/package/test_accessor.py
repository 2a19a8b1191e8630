"""The .anysat accessor: thin, documented, stateless, on both kinds of xarray objects."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import jedi
import numpy as np
import pytest
import xarray as xr
from support.cubes import BANDS, odc_stac, placed, plain
from support.paths import ROOT

import xr_anysat
from xr_anysat import AnySatError, CubeTypeError
from xr_anysat.accessor import CUBE_METHODS, EMBEDDING_METHODS

TINY = {"model": "tiny", "weights": "random"}
POSITIONAL = {
    "seam_score": 0,
    "frames": 1,
    "statistics": 1,
    "embed": 1,
    "embed_at": 2,
    "plan": 1,
    "pool": 1,
    "to_zarr": 2,
    "append": 1,
    "to_cog": 2,
    "check": 0,
    "preview": 0,
    "reduce": 1,
    "rgb": 0,
    "similarity": 1,
    "change": 1,
    "cluster": 1,
    "sample": 1,
    "zonal": 1,
    "nearest": 2,
    "classify": 2,
    "regress": 2,
    "evaluate": 2,
}
METHODS: dict[str, Callable[..., Any]] = {name: getattr(xr_anysat, name) for name in POSITIONAL}


@pytest.fixture(scope="module")
def emb() -> xr.DataArray:
    return placed().anysat.embed(2, **TINY)


def test_every_method_is_a_public_function() -> None:
    public = {n for n in dir(placed().anysat) if not n.startswith("_")}
    assert public == set(METHODS)
    assert public <= set(xr_anysat.__all__)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [plain, odc_stac], ids=["DataArray", "Dataset"])
def test_signatures_and_docstrings_are_the_functions(make: Callable[[], Any], name: str) -> None:
    function, method = METHODS[name], getattr(make().anysat, name)
    _, *rest = inspect.signature(function).parameters.values()
    assert list(inspect.signature(method).parameters.values()) == rest
    assert inspect.signature(method).return_annotation == inspect.signature(function).return_annotation
    unbound = inspect.signature(getattr(type(make().anysat), name))
    assert next(iter(unbound.parameters)) == "self"
    assert inspect.getdoc(method) == inspect.getdoc(function)
    assert method.__name__ == name


def test_methods_do_what_the_functions_do(emb: xr.DataArray) -> None:
    cube, ds = placed(), odc_stac()
    options = {"period": "2022", "reduce": "mean"}
    want = xr_anysat.frames(cube, 2, **options)
    for obj in (cube, ds):
        np.testing.assert_array_equal(obj.anysat.frames(2, **options), want)
        assert obj.anysat.statistics(2, **options) == xr_anysat.statistics(cube, 2, **options)
        np.testing.assert_array_equal(obj.anysat.embed(2, **TINY), emb)
    xr.testing.assert_identical(emb.anysat.pool(), xr_anysat.pool(emb))
    xr.testing.assert_identical(emb.anysat.pool("max"), xr_anysat.pool(emb, "max"))
    xr.testing.assert_identical(emb.anysat.pool(how="max"), xr_anysat.pool(emb, "max"))


def test_frames_chain_into_embed(emb: xr.DataArray) -> None:
    made = placed().anysat.frames(2)
    np.testing.assert_array_equal(made.anysat.embed(frames=None, **TINY), emb)
    assert made.anysat.statistics(None) == placed().anysat.statistics(2)


@pytest.mark.parametrize("make", [placed, odc_stac], ids=["DataArray", "Dataset"])
def test_cubes_pickle_after_the_accessor_was_used(make: Callable[[], Any]) -> None:
    cube = make().chunk()
    cube.anysat.embed(2, **TINY)
    again = pickle.loads(pickle.dumps(cube))
    xr.testing.assert_identical(again, cube)
    assert again.anysat.frames(2).shape == (2, 10, 4, 5)
    assert len(pickle.dumps(cube)) < 60_000


def test_the_accessor_holds_nothing_but_its_array() -> None:
    cube = placed()
    cube.anysat.frames(2)
    assert list(vars(cube.anysat)) == ["_obj"]
    assert cube.anysat._obj is cube


def test_positional_arguments_are_few() -> None:
    for name, most in POSITIONAL.items():
        kinds = [p.kind for p in inspect.signature(getattr(placed().anysat, name)).parameters.values()]
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) == most
        assert kinds.count(inspect.Parameter.VAR_KEYWORD) == 0
    with pytest.raises(TypeError, match="positional argument"):
        placed().anysat.frames(2, "2022")
    with pytest.raises(TypeError, match="unexpected keyword argument 'peroid'"):
        placed().anysat.frames(2, peroid="2022")


FOR_CUBES = {"frames", "statistics", "embed", "embed_at", "plan"}
FOR_BOTH = {"preview"}


def test_each_method_is_listed_for_its_kind_of_cube() -> None:
    assert set(CUBE_METHODS) == FOR_CUBES | FOR_BOTH
    assert set(EMBEDDING_METHODS) == set(METHODS) - FOR_CUBES


def call(obj: xr.DataArray | xr.Dataset, name: str) -> Any:
    """A method, called with nothing but what it has to have, which is never looked at."""
    method = getattr(obj.anysat, name)
    required = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
    needed = [p.name for p in required if p.kind is p.POSITIONAL_OR_KEYWORD]
    return method(*["nothing"] * len(needed))


@pytest.mark.parametrize("name", sorted(FOR_CUBES))
@pytest.mark.parametrize("form", ["DataArray", "Dataset", "vector"])
def test_what_is_for_cubes_refuses_embeddings(emb: xr.DataArray, name: str, form: str) -> None:
    obj = {"DataArray": emb, "Dataset": emb.to_dataset(), "vector": emb.anysat.pool()}[form]
    with pytest.raises(CubeTypeError, match=r"those of an embedding cube: expected a Sentinel-2 cube"):
        call(obj, name)


NO_EMBEDDINGS = {
    "cube": r"a DataArray with dims \('time', 'band', 'y', 'x'\): expected .*embed\(\) first",
    "cube of variables": r"a Dataset with dims .*embed\(\) first",
    "frames": r"a DataArray with dims \('time', 'band', 'y', 'x'\): expected .*embed\(\) first",
    "embedding in a Dataset": r"Dataset of \['anysat'\]: expected its DataArray .*dataset\['anysat'\]\.anysat\.",
    "vector": r"one vector \(D,\).*embed without pool=",
    "transposed": r"expected \(D, y, x\), use emb\.transpose\('D', 'y', 'x'\)",
}


TAKEN = {
    ("pool", "transposed"),
    *((name, kind) for name in FOR_BOTH for kind in ("cube", "cube of variables", "frames")),
}


@pytest.mark.parametrize(
    ("name", "kind"), sorted({*product(set(METHODS) - FOR_CUBES, NO_EMBEDDINGS)} - TAKEN)
)
def test_what_is_for_embeddings_refuses_what_is_none(emb: xr.DataArray, name: str, kind: str) -> None:
    obj = {
        "cube": placed, "cube of variables": odc_stac, "frames": lambda: placed().anysat.frames(2),
        "embedding in a Dataset": emb.to_dataset, "vector": emb.anysat.pool,
        "transposed": lambda: emb.transpose("y", "x", "D"),
    }[kind]()  # fmt: skip
    with pytest.raises(CubeTypeError, match=NO_EMBEDDINGS[kind]):
        call(obj, name)


@pytest.mark.slow
def test_type_checkers_see_the_signatures(tmp_path: Path) -> None:
    code = """
from xr_anysat.accessor import AnySatAccessor
def f(on: AnySatAccessor) -> None:
    reveal_type(on.embed(8, patch_size=40))
    reveal_type(on.statistics())
    reveal_type(on.seam_score())
    on.embed(patch_sise=40)
    on.frames(8, "2022")
"""
    (tmp_path / "code.py").write_text(code)
    # in the project's folder, where the lint before has left what it knows
    done = subprocess.run(
        [sys.executable, "-m", "mypy", tmp_path / "code.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    revealed = re.findall(r'Revealed type is "([\w.]+)"', done.stdout)
    assert [name.rpartition(".")[2] for name in revealed] == ["DataArray", "Statistics", "Dataset"]
    assert re.findall(r":(\d): error: ([A-Z]\w+ \w+)", done.stdout) == [
        ("7", "Unexpected keyword"),
        ("8", "Too many"),
    ]


@pytest.mark.slow
def test_completion_and_help() -> None:
    cube = placed()
    found = jedi.Interpreter("cube.anysat.", [{"cube": cube}]).complete()
    assert {c.name for c in found if not c.name.startswith("_")} == set(METHODS)
    (signature,) = jedi.Interpreter("cube.anysat.embed(", [{"cube": cube}]).get_signatures()
    assert [p.name for p in signature.params][:3] == ["frames", "by", "period"]
    shown = pydoc.plain(pydoc.render_doc(cube.anysat.embed))
    assert "embed(frames: 'int | None' = 8, *, by:" in shown
    assert "Embed a Sentinel-2 cube with AnySat." in shown


def test_refusals_are_what_python_users_expect() -> None:
    for error, builtin in {
        "CubeError": ValueError, "CubeTypeError": TypeError, "OptionError": ValueError,
        "WeightsError": ValueError, "DeviceError": ValueError,
    }.items():  # fmt: skip
        assert issubclass(getattr(xr_anysat, error), AnySatError)
        assert issubclass(getattr(xr_anysat, error), builtin)
    assert not issubclass(AnySatError, ValueError)
    assert issubclass(xr_anysat.AnySatWarning, UserWarning)
    assert set(BANDS) == set(xr_anysat.BANDS)


def test_every_public_name_is_there_and_told_of() -> None:
    for name in xr_anysat.__all__:
        assert getattr(xr_anysat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        xr_anysat.embedd  # noqa: B018
