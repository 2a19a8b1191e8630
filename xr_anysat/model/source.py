"""Where weights come from: one of four kinds, and the text that a record keeps of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from xr_anysat.errors import OptionError

Kind = Literal["official", "random", "file", "module"]

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from.

    Its text, ``str(source)``, is what records keep: ``"official"``, ``"random:<seed>"``, the absolute path
    of a file, or ``"module:<token>"``. `parse` is its inverse.

    Attributes
    ----------
    kind : {"official", "random", "file", "module"}
        The published checkpoint, seeded random weights, a file, or a module object of this process.
    value : str
        The seed in digits, the path, or the token of the module; empty for the published checkpoint.

    Examples
    --------
    >>> WeightsSource.parse("random:7")
    WeightsSource(kind='random', value='7')
    >>> str(WeightsSource("random", "7"))
    'random:7'
    """

    kind: Kind
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a record."""
        kind, _, value = text.partition(":")
        if text == "official":
            return cls("official")
        if kind == "random":
            return cls("random", value or "0")
        if kind == "module":
            return cls("module", value)
        return cls("file", text)

    @classmethod
    def from_option(cls, weights: Any) -> Self:
        """Read the option ``weights`` of a user, without looking for a file.

        Parameters
        ----------
        weights : None, path, "official", "random", "random:<seed>" or ("random", seed)
            None is the published checkpoint, and ``"random"`` has the seed 0.

        Raises
        ------
        OptionError
            If it is none of these, or the seed is outside 0 to 2**63 - 1.
        """
        if weights is None or weights == "official":
            return cls("official")
        if isinstance(weights, str) and weights.partition(":")[0] == "random":
            text = cls.parse(weights).value
            return cls._of_seed(int(text) if text.isdecimal() else text, weights)
        if isinstance(weights, tuple | list) and len(weights) == 2 and weights[0] == "random":
            return cls._of_seed(weights[1], weights)
        if isinstance(weights, str | os.PathLike):
            return cls("file", str(Path(weights).expanduser().absolute()))
        raise OptionError(
            f"{weights=}: expected None (the official checkpoint), a path, 'random' or ('random', seed)"
        )

    @classmethod
    def _of_seed(cls, seed: Any, weights: Any) -> Self:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
            raise OptionError(f"{weights=}: expected a seed from 0 to 2**63 - 1, as in weights=('random', 7)")
        return cls("random", str(seed))

    def __str__(self) -> str:
        if self.kind == "official":
            return self.kind
        return self.value if self.kind == "file" else f"{self.kind}:{self.value}"

    @property
    def seed(self) -> int:
        """The seed of random weights."""
        return int(self.value)

    @property
    def path(self) -> Path:
        """The path of a file."""
        return Path(self.value)
