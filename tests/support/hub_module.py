"""A module that is called like upstream's."""

from __future__ import annotations

from typing import Any

import torch

from xr_anysat.model.anysat import AnySat


class Hub(torch.nn.Module):
    """Called like upstream's hub module: knows no validity and no ``local``."""

    def __init__(self, inner: AnySat) -> None:
        super().__init__()
        self.model = inner

    def forward(self, x: dict[str, Any], patch_size: int, output: str = "patch") -> Any:
        assert output in ("patch", "tile", "dense", "all")
        return self.model(x, patch_size=patch_size, output=output)
