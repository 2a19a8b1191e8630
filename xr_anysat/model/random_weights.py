"""Seeded random weights, identical on every machine."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from xr_anysat.model.state_dict import state_shapes

if TYPE_CHECKING:
    import torch

RANDOM_WEIGHTS_VERSION = 1  # raise it if `random_state` changes


def random_sha256(size: str, seed: int) -> str:
    """Hash the recipe of random weights, which stands in for the hash of a file."""
    recipe = f"xr_anysat random weights v{RANDOM_WEIGHTS_VERSION} size={size} seed={seed}"
    return hashlib.sha256(recipe.encode()).hexdigest()


def random_state(size: str, seed: int, sensors: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Make seeded random weights: each tensor depends only on the seed, its name and its shape.

    The weights of an S2-only model are therefore a subset of those of the whole model. They have the same
    bits on every machine and with every version of NumPy, which guarantees the raw stream of Philox.

    Parameters
    ----------
    size : {"tiny", "small", "base"}
        The model's size.
    seed : int
        From 0 to 2**63 - 1.
    sensors : collection of str, optional
        Sensors whose projectors are included; None means all eleven.

    Returns
    -------
    dict of str to Tensor
        float32, on the CPU. Linear and convolution weights are uniform with variance 1 / fan-in;
        norm weights are near one and biases small, but no two are equal, so that a mistake in any of
        them is visible in the results.
    """
    import torch

    return {
        name: torch.from_numpy(_random_tensor(name, shape, seed))
        for name, shape in state_shapes(size, sensors).items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Any:
    import numpy as np

    if name.endswith("pad_parameter"):
        return np.zeros(shape, np.float32)
    if name.endswith(".bias"):
        middle, spread = 0.0, 0.1
    elif name.endswith(".weight") and len(shape) == 1:  # LayerNorm, GroupNorm
        middle, spread = 1.0, 0.1
    elif name.endswith(".weight"):  # Linear (out, in), convolution (out, in, height, width)
        middle, spread = 0.0, float(np.sqrt(3.0 / np.prod(shape[1:])))
    else:  # cls_token, q_learned, Q, lookup_table_weight
        middle, spread = 0.0, 0.5
    count = int(np.prod(shape))
    key = np.array([seed, zlib.crc32(name.encode())], np.uint64)
    raw = np.random.Philox(key=key).random_raw((count + 1) // 2)
    bits = raw.astype("<u8").view("<u4")[:count].astype(np.uint32)  # the same byte order on any machine
    uniform = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return (np.float32(middle) + np.float32(spread) * uniform).reshape(shape)
