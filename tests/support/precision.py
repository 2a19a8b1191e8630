"""How far from float32 an embedding may be in another precision."""

from __future__ import annotations

import numpy as np
import torch

ERRORS = {
    "bfloat16": (0.012, 1e-4),
    "float16": (0.002, 2e-6),
    # without VNNI instructions, weights have 7 bits instead of 8
    "int8": (0.035, 8e-4) if torch.cpu._is_vnni_supported() else (0.045, 1.2e-3),
}
"""Relative L2 of all vectors, and largest cosine distance of one."""


def errors(got: np.ndarray, want: np.ndarray, axis: int) -> tuple[float, float]:
    """Relative L2 of all vectors along `axis`, and the largest cosine distance of one; NaN where `want` is."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    a, b = (np.moveaxis(v, axis, -1).reshape(-1, v.shape[axis]).astype(float) for v in (got, want))
    there = ~np.isnan(b).any(1)
    a, b = a[there], b[there]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)), float(1 - cosine.min())


def near(got: np.ndarray, want: np.ndarray, precision: str, axis: int) -> None:
    """As near as that precision comes, and no nearer than rounding."""
    relative, cosine = errors(got, want, axis)
    most, widest = ERRORS[precision]
    assert most / 100 < relative < most, relative
    assert 0 < cosine < widest
