"""JSON of results and records, and the rules by which a value that was read is checked.

What is read from a file may come from anybody. It is checked once, before use: `parse_json` parses it, `plain` gives
attributes of any file format one form, and `violation` says which `Rule` a value breaks.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any, ClassVar, Self

import numpy as np

from xr_anysat.errors import CubeError, OptionError
from xr_anysat.shared.values import is_number, is_whole_number

MAX_DEPTH = 32
"""Largest depth of lists and objects in JSON that is read. The metadata of a store have about 10."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


# ---------------------------------------------------------------------- parsing


def parse_json(text: Any) -> Any:
    """Parse JSON that may come from anybody.

    Raises
    ------
    ValueError
        If `text` is not JSON, is nested too deeply, or repeats a name in an object.

    Examples
    --------
    >>> parse_json('{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> parse_json("[" * 100 + "]" * 100)
    Traceback (most recent call last):
    ValueError: JSON of more than 32 levels
    """
    if not isinstance(text, str | bytes | bytearray):
        raise ValueError(f"a {type(text).__name__} instead of JSON text")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"JSON of more than {MAX_DEPTH} levels") from None
    level, depth = [value], 0
    while level := [child for each in level for child in _children(each)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"JSON of more than {MAX_DEPTH} levels")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("JSON with an object that repeats a name")
    return found


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def plain(value: Any) -> Any:
    """Return an attribute of any file format in the types of JSON: NumPy scalars and arrays as numbers and lists.

    Examples
    --------
    >>> plain(np.array([1, 2])), plain(np.float32(0.5)), plain(np.array(3)), plain(("a",))
    ([1, 2], 0.5, 3, ['a'])
    """
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def read_value(value: Any, rule: Rule) -> Any:
    """Return an attribute in the form that `rule` holds for, or in plain types if there is none.

    NetCDF has no lists of length one, and some libraries write every number as such a list.

    Examples
    --------
    >>> read_value(np.array([3]), whole(1)), read_value("2022-01-01", list_of(DATE))
    (3, ['2022-01-01'])
    """
    value = plain(value)
    other = value[0] if isinstance(value, list) and len(value) == 1 else [value]
    return other if not rule.holds(value) and rule.holds(other) else value


def attribute_json(name: Any, value: Any) -> str:
    """Return an attribute as JSON.

    Raises
    ------
    CubeError
        If JSON cannot represent it.
    """
    try:
        text = json.dumps(plain(value))
        if not isinstance(name, str):
            raise TypeError(f"its name is a {type(name).__name__}")
    except (TypeError, ValueError, RecursionError) as error:
        raise CubeError(
            f"attribute {name!r} is {_SHORT.repr(value)}, which JSON cannot represent ({error}): convert it to text or "
            f"numbers, or drop it, emb.attrs.pop({name!r})"
        ) from error
    return text


def json_default(value: Any) -> Any:
    """Convert NumPy numbers and arrays for JSON, and other values of attrs to text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


# ---------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """What a value that was read must be.

    Attributes
    ----------
    expected : str
        Description of valid values, for messages.
    holds : callable
        Returns whether a value is valid; takes any value.
    required : bool
        Whether the entry must exist.
    """

    expected: str
    holds: Callable[[Any], bool]
    required: bool = True


def violation(value: Any, rule: Rule) -> str | None:
    """Return what was seen and what was expected if `value` breaks `rule`; None if it does not.

    Examples
    --------
    >>> violation(3, whole(1)), violation("3", whole(1))
    (None, "is '3': expected a whole number from 1")
    """
    return None if rule.holds(value) else f"is {_SHORT.repr(value)}: expected {rule.expected}"


def first_violation(values: Any, rules: Mapping[str, Rule]) -> str | None:
    """Return the first entry of `values` that breaks its rule; None if there is none. Other entries are valid.

    Examples
    --------
    >>> first_violation({"k": 0}, {"k": whole(1)}), first_violation({}, {"k": whole(1)})
    ("'k' is 0: expected a whole number from 1", "'k' is missing: expected a whole number from 1")
    """
    if not isinstance(values, dict):
        return f"it is {_SHORT.repr(values)}: expected a JSON object"
    for name, rule in rules.items():
        if name in values:
            problem = violation(values[name], rule)
            if problem is not None:
                return f"{name!r} {problem}"
        elif rule.required:
            return f"{name!r} is missing: expected {rule.expected}"
    return None


MAX_TEXT_CHARS = 4096
"""Longest text in a record, which is the longest path of Linux. JSON is checked after it is parsed."""

TEXT = Rule("text", lambda v: isinstance(v, str) and len(v) <= MAX_TEXT_CHARS and v.isprintable())

NUMBER = Rule("a finite number", is_number)

DATE = Rule(
    "a date such as '2022-12-31'",
    lambda v: isinstance(v, str) and re.fullmatch(r"(?a:\d{4}-\d\d-\d\d)", v) is not None and _is_day(v),
)

OBJECT = Rule("a JSON object", lambda v: isinstance(v, dict))


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def whole(minimum: int, maximum: float = math.inf) -> Rule:
    """Return the rule of a whole number within bounds, both included."""
    expected = f"a whole number from {minimum}" + ("" if maximum == math.inf else f" to {maximum}")
    return Rule(expected, lambda v: is_whole_number(v, minimum, maximum))


def one_of(*choices: Any) -> Rule:
    """Return the rule of a value of given choices, of the same type."""
    known = [(type(c), c) for c in choices]
    return Rule(
        f"one of {', '.join(map(repr, choices))}",
        lambda v: isinstance(v, str | int | None) and (type(v), v) in known,
    )


def list_of(rule: Rule, length: int | None = None, *, minimum: int = 0) -> Rule:
    """Return the rule of a list of `length` values, or of at least `minimum`, that `rule` holds for."""
    size = "" if length is None and not minimum else f" of {length or f'{minimum} or more'}"
    lengths = range(minimum, 2**63) if length is None else range(length, length + 1)
    return Rule(
        f"a list{size}, each {rule.expected}",
        lambda v: isinstance(v, list) and len(v) in lengths and all(map(rule.holds, v)),
    )


def optional(rule: Rule) -> Rule:
    """Return the rule of an entry that may be missing."""
    return replace(rule, required=False)


def or_none(rule: Rule) -> Rule:
    """Return the rule of a value that may be None, which is null in JSON."""
    return replace(rule, expected=f"{rule.expected}, or null", holds=lambda v: v is None or rule.holds(v))


# ---------------------------------------------------------------------- results


@dataclass(frozen=True)
class Stored:
    """A dataclass of plain numbers, text, tuples and dicts, which JSON restores without a difference.

    A subclass declares the rules of its fields, by which JSON is checked.
    """

    RULES: ClassVar[Mapping[str, Rule]]

    def to_json(self) -> str:
        """Convert to JSON, which `from_json` reads without loss of precision."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` returned.

        Raises
        ------
        OptionError
            If `text` is something else. The message names the field, what was seen and what was expected.
        """
        try:
            return cls.from_values(parse_json(text))
        except ValueError as error:
            raise OptionError(
                f"{str(text)[:80]!r} contains no {cls.__name__} ({error}): expected what to_json() returned"
            ) from error

    @classmethod
    def from_values(cls, values: Any) -> Self:
        """Check the values of parsed JSON, and return the object that they describe.

        Raises
        ------
        ValueError
            Naming the field, what was seen and what was expected.
        """
        problem = first_violation(values, cls.RULES)
        if problem is None and not values.keys() <= cls.RULES.keys():
            problem = f"unknown {', '.join(map(repr, sorted(values.keys() - cls.RULES.keys())))}"
        if problem is not None:
            raise ValueError(problem)
        return cls(**values)
