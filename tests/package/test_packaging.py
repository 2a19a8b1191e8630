"""What a release contains and says of itself."""

from __future__ import annotations

import re
import tomllib

from packaging.version import Version
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


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """`make test-oldest` runs on what pyproject.toml promises. Another torch may need gigabytes of GPU libraries."""
    extras = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(r for name in set(extras) - FOR_DEVELOPERS for r in extras[name])]
    bounds = dict(
        re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        for requirement in listed
        if not requirement.startswith("xr_anysat[")
    )
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert Version(pinned.pop("torch")) >= Version(bounds.pop("torch"))
    assert pinned == bounds
