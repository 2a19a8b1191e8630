"""The comparison with upstream, on repositories made for the test and, if there is one, on a checkout."""

from __future__ import annotations

import os
import textwrap

import huggingface_hub.constants
import numpy as np
import pytest
from support.paths import ROOT

from xr_anysat.config import config
from xr_anysat.errors import OptionError, WeightsError
from xr_anysat.model import anysat, weights
from xr_anysat.model import verify as module
from xr_anysat.model.spec import Size
from xr_anysat.model.verify import Comparison, VerifyReport, verify

# As upstream's hubconf: the model at .model, keyword arguments of the same names, train mode.
HUBCONF = """
import sys
sys.path.insert(0, {root!r})
import torch
from xr_anysat.model.anysat import SIZES, AnySat
from xr_anysat.model.spec import Size

SIZES["tiny"] = Size(32, 1, 2)

class Hub(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.model = AnySat(size)

    def forward(self, x, patch_size, output):
        assert not self.training
        {before}
        return self.model(x, patch_size, output)

def anysat(pretrained, flash_attn, model_size):
    assert not pretrained and not flash_attn
    return Hub(model_size)
"""


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_loaded", {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with config.set(cache_dir=str(tmp_path / "cache"), weights=None, offline=False):
        yield


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setitem(anysat.SIZES, "tiny", Size(32, 1, 2))

    def write(before="pass", whole=None):
        folder = tmp_path / "upstream"
        folder.mkdir()
        text = HUBCONF.format(root=str(ROOT), before=before) if whole is None else whole
        (folder / "hubconf.py").write_text(textwrap.dedent(text))
        return folder

    return write


@pytest.mark.slow
def test_the_same_model_passes(repository):
    with config.set(model="tiny", weights="random:4"):
        report = verify(repository())
    assert report.passed
    assert report.max_abs_difference < 1e-5
    assert len(report.comparisons) == len(module.CASES) * 4
    assert {c.output for c in report.comparisons} == {"tile", "patch", "dense", "all"}
    assert "model 'tiny': passed" in repr(report)
    assert report.sha256 in str(report)


@pytest.mark.slow
def test_a_changed_weight_fails(repository):
    folder = repository(before="self.model.blocks[-1].mlp.fc2.bias.add_(0.001)")
    report = verify(folder, weights="random", model="tiny")
    assert not report.passed
    assert report.max_abs_difference > report.tolerance
    assert "FAILED" in str(report)


@pytest.mark.parametrize("theirs", [np.zeros((2, 3)), np.array([0.0, np.nan])])
def test_nan_and_other_shapes_fail(theirs):
    difference = module._difference(np.zeros(2), theirs)
    comparisons = (Comparison(10, 6, 3, "tile", 0.0), Comparison(10, 6, 3, "patch", difference))
    report = VerifyReport("r", "tiny", None, comparisons)
    assert not np.isfinite(report.max_abs_difference)
    assert not report.passed


def test_a_folder_without_hubconf(tmp_path):
    with pytest.raises(OptionError, match=r"has no hubconf.py; expected the root of a checkout"):
        verify(tmp_path, weights="random", model="tiny")


def test_neither_a_folder_nor_a_name(tmp_path):
    with pytest.raises(OptionError, match=r"is neither a folder on this machine nor owner/name on GitHub"):
        verify(tmp_path / "nowhere", weights="random", model="tiny")


def test_offline_needs_a_checkout():
    with config.set(offline=True), pytest.raises(OptionError, match=r"forbids it. Pass a local checkout"):
        verify(weights="random", model="tiny")


@pytest.mark.slow
def test_github_out_of_reach(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server listens there
    message = (
        r"(?s)'gastruc/anysat' could not be downloaded from GitHub:.*refused.*checkout: verify\(repo=PATH\)"
    )
    with pytest.raises(OptionError, match=message):
        verify(weights="random", model="tiny")


@pytest.mark.slow
def test_a_failing_repository_shows_its_last_lines(repository):
    folder = repository(whole="raise ImportError('no module named flash_thing')")
    message = r"(?s)did not run \(exit status 1\). Its last lines:.*no module named flash_thing.*install it"
    with pytest.raises(OptionError, match=message):
        verify(folder, weights="random", model="tiny")


def test_only_sizes_are_compared(repository):
    with pytest.raises(OptionError, match=r"model=AnySat: verify compares sizes by name"):
        verify(repository(), weights="random", model=anysat.AnySat("tiny"))


def test_tiny_has_no_official_checkpoint(repository):
    with pytest.raises(WeightsError, match="no official checkpoint of model='tiny'"):
        verify(repository(), model="tiny")


@pytest.mark.skipif(
    "ANYSAT_UPSTREAM" not in os.environ, reason="ANYSAT_UPSTREAM names no checkout of upstream"
)
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_upstream_itself(size):
    report = verify(os.environ["ANYSAT_UPSTREAM"], weights="random", model=size)
    assert report.passed, report
