"""What a release contains and says of itself."""

from __future__ import annotations

import re
import tomllib

from support.paths import ROOT

import xr_anysat

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOR_DEVELOPERS = {"all", "docs", "test"}


def test_all_has_every_extra_for_users() -> None:
    extras = PROJECT["optional-dependencies"]
    (requirement,) = extras["all"]
    listed = re.fullmatch(r"xr_anysat\[(.*)\]", requirement)
    assert listed is not None
    assert set(listed[1].split(",")) == set(extras) - FOR_DEVELOPERS


def test_one_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == xr_anysat.__version__  # type: ignore[index]
    assert "version" in PROJECT["dynamic"]
