"""Everything that names the options of `embed` agrees with the table that declares them."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest
from support.cubes import plain
from support.paths import ROOT

import xr_anysat
from xr_anysat import cli
from xr_anysat.config import DEFAULTS
from xr_anysat.cube.compositing import CompositeOptions
from xr_anysat.embedding.options import EmbedKeywords, EmbedOptions
from xr_anysat.record import FIELDS

OPTIONS = {f.name: f for f in fields(EmbedOptions)}

NOT_OF_EMBED = ["fetch_workers", "cache_dir", "offline"]
"""Configuration keys that are no option of `embed`."""


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(function).parameters)
    del found["cube"]
    return found


def test_signatures_have_the_declared_options() -> None:
    own = {"calibrate", "codec"}
    for function, more in ((xr_anysat.embed, {"by"}), (xr_anysat.plan, own)):
        found = {n: p for n, p in parameters(function).items() if n not in more}
        assert list(found) == list(OPTIONS)
        assert {n: p.default for n, p in found.items()} == {n: f.default for n, f in OPTIONS.items()}
        assert all(
            found[n].default is DEFAULTS[n] for n in found if n in DEFAULTS
        )  # `option` compares identities
    hints = get_type_hints(EmbedOptions)
    assert get_type_hints(xr_anysat.embed) == {
        **hints,
        **{n: get_type_hints(xr_anysat.embed)[n] for n in ("cube", "by", "return")},
    }
    assert {"frames": hints["frames"], **get_type_hints(EmbedKeywords)} == hints


def test_frames_and_statistics_take_declared_options() -> None:
    for function, own in ((xr_anysat.frames, {"n": "frames"}), (xr_anysat.statistics, {})):
        for name, parameter in parameters(function).items():
            assert parameter.default == OPTIONS[own.get(name, name)].default, (function, name)
    for f in fields(CompositeOptions):
        assert f.default is MISSING or f.default == OPTIONS[f.name].default


def test_embed_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: object() for name in OPTIONS}

    class Passed(Exception):
        pass

    def stop(cube: Any, options: EmbedOptions) -> None:
        assert vars(options) == given
        raise Passed

    monkeypatch.setattr(inspect.getmodule(xr_anysat.embed), "resolve_options", stop)
    with pytest.raises(Passed):
        xr_anysat.embed(plain(), **given)  # type: ignore[arg-type]


def test_the_configuration_and_the_command_line_name_declared_options() -> None:
    assert [k for k in DEFAULTS if k not in OPTIONS] == NOT_OF_EMBED
    assert all(DEFAULTS[k] is OPTIONS[k].default for k in DEFAULTS if k in OPTIONS)
    assert set(cli.EMBEDDING) <= set(OPTIONS)


def rows() -> list[str]:
    """The rows of the table in docs/options.md."""
    found = []
    for name, f in OPTIONS.items():
        environment = f"`XR_ANYSAT_{name.upper()}`" if name in DEFAULTS else ""
        default = json.dumps(f.default) if f.default is not None else "None"
        found.append(f"| `{name}=` | {environment} | `{default}` | {f.metadata['description']} |")
    return found


def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    found = [line for line in text.splitlines() if re.match(r"\| `\w+=`", line)]
    free = ", ".join(f"`{name}`" for name, f in FIELDS.items() if not f.results)
    assert f"All options change results beyond rounding, except {free}" in text.replace("\n", " ")
    assert found == rows(), "paste these rows into docs/options.md:\n" + "\n".join(rows())
