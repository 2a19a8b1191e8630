"""Where weights come from: one class reads and writes the text of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from xr_anysat.model.source import WeightsSource


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("official", "official", ""),
        ("random:0", "random", "0"),
        (f"random:{2**63 - 1}", "random", str(2**63 - 1)),
        ("/data/AnySat.pth", "file", "/data/AnySat.pth"),
        ("C:\\data\\random:7.pth", "file", "C:\\data\\random:7.pth"),
        ("/data/official", "file", "/data/official"),
        ("module:0123abcd", "module", "0123abcd"),
    ],
)
def test_the_text_of_a_record_is_read_and_written(text: str, kind: str, value: str) -> None:
    source = WeightsSource.parse(text)
    assert (source.kind, source.value) == (kind, value)
    assert str(source) == text
    assert {source: 1}[pickle.loads(pickle.dumps(source))] == 1


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (None, "official"),
        ("official", "official"),
        ("random", "random:0"),
        ("random:", "random:0"),
        ("random:007", "random:7"),
        (("random", 7), "random:7"),
        (["random", 7], "random:7"),
        (Path("/data/w.pth"), "/data/w.pth"),
        # a record may name a module of its process; a user passes the object, so this is a file
        ("module:w.pth", str(Path("module:w.pth").absolute())),
        ("randomly.pth", str(Path("randomly.pth").absolute())),
    ],
)
def test_what_a_user_passes(option: object, text: str) -> None:
    source = WeightsSource.from_option(option)
    assert str(source) == text
    assert source.kind == ("file" if Path(text).is_absolute() else text.partition(":")[0])
