"""Checkpoint files that tests make."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.formula import weight
from xr_anysat.model.anysat import AnySat


def formula_state(size: str) -> dict[str, torch.Tensor]:
    """The formula weights of all 418 tensors (fewer for smaller sizes)."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in AnySat(size).state_dict().items()}
    return {k: torch.from_numpy(weight(k, s)) for k, s in shapes.items()}


def formula_checkpoint(folder: Path, size: str) -> Path:
    """A whole checkpoint of formula weights, as safetensors."""
    path = folder / f"formula-{size}.safetensors"
    save_file(formula_state(size), str(path))
    return path


@cache
def formula_model(size: str, precision: str | None = None) -> AnySat:
    """A model under the formula weights that the goldens were made with, as loaded or packed to be run."""
    if precision is not None:
        return copy.deepcopy(formula_model(size)).pack(precision)
    model = AnySat(size, sensors=("s2",)).eval()
    model.load_state_dict(
        {k: torch.from_numpy(weight(k, tuple(v.shape))) for k, v in model.state_dict().items()}
    )
    return model
