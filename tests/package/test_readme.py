"""The README names what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from support.paths import ROOT

import xr_anysat
from xr_anysat.config import DEFAULTS

README = (ROOT / "README.md").read_text()


def test_every_argument_of_embed_is_in_the_options_table() -> None:
    named = set(re.findall(r"`(\w+)=`", README))
    assert set(inspect.signature(xr_anysat.embed).parameters) - {"cube"} <= named


def test_every_environment_variable_is_there_and_no_other() -> None:
    assert set(re.findall(r"XR_ANYSAT_([A-Z_]+[A-Z])", README)) == {k.upper() for k in DEFAULTS}


def test_every_test_file_and_picture_named_exists() -> None:
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).is_file(), name
    for name in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_contributing_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "xr_anysat"
    modules = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if not p.name.startswith("_")}
    missing = {m for m in modules if Path(m).name not in text}
    assert not missing
