"""Fields of a recipe that say what they mean and what values they take, and how texts become their values."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


def setting(
    meaning: str,
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declare a field of a section.

    Args:
        meaning: What it decides, in a sentence or two, units included.
        default: Its value unless a recipe says otherwise; without one, every recipe must say.
        least: Its least value.
        below: What its value must be less than.
        choices: All values that it may have, besides None where its type allows that.
    """
    metadata = {"meaning": meaning, "least": least, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Fields with meanings and ranges, checked as soon as they have values.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_range(field, getattr(self, field.name))


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Write a hint for messages about an unknown name: the most similar one, and all there are."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"; did you mean {nearest!r}? Known are {', '.join(known)}"


def _check_range(field: dataclasses.Field, value: Any) -> None:
    least, below, choices = (field.metadata[name] for name in ("least", "below", "choices"))
    if value is None:
        return
    if choices is not None and value not in choices:
        raise ValueError(f"Got {field.name}={value!r}, needed one of {', '.join(choices)}.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"Got {field.name}={value}, needed finite numbers.")
    if least is not None and value < least:
        raise ValueError(f"Got {field.name}={value}, needed at least {least:g}.")
    if below is not None and value >= below:
        raise ValueError(f"Got {field.name}={value}, needed less than {below:g}.")


def parse_value(name: str, text: str, hint: Any) -> object:
    """Return the value of a type that a text stands for: tuples are separated by commas, None is "none".

    Raises:
        ValueError: If the text is no value of that type.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and text.lower() == "none":
        return None
    kind = options[0]
    try:
        if typing.get_origin(kind) is tuple:
            items, parts = typing.get_args(kind), text.split(",")
            items = items[:1] * len(parts) if items[-1] is Ellipsis else items
            return tuple(item(part) for item, part in zip(items, parts, strict=True))
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = hint.__name__ if isinstance(hint, type) else hint
        raise ValueError(f"Got {name}={text}, needed a value of type {wanted}.") from None


def text_of(value: object) -> str:
    """Write a value as `parse_value` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
