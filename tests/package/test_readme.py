"""The README, the page of options and CONTRIBUTING name what exists."""

from __future__ import annotations

import inspect
import re

import pytest
from support.paths import ROOT

import xr_anysat
from xr_anysat.config import DEFAULTS

OPTIONS = (ROOT / "docs" / "options.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_argument_of_embed_is_in_the_options_table() -> None:
    named = set(re.findall(r"`(\w+)=`", OPTIONS))
    assert set(inspect.signature(xr_anysat.embed).parameters) - {"cube"} <= named


def test_every_environment_variable_is_there_and_no_other() -> None:
    assert set(re.findall(r"XR_ANYSAT_([A-Z_]+[A-Z])", OPTIONS)) == {k.upper() for k in DEFAULTS}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/promises.md"])
def test_every_file_named_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in re.findall(r"`((?:tests|xr_anysat|docs|benchmarks)/[^`*]+)`", text):
        assert (ROOT / name).exists(), name
    if page == "README.md":
        for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (ROOT / name).exists(), name


def test_contributing_names_every_package() -> None:
    packages = {p.parent.name for p in (ROOT / "xr_anysat").glob("*/__init__.py")}
    missing = {name for name in packages if f"`xr_anysat/{name}/`" not in CONTRIBUTING}
    assert not missing
