"""Fields of a recipe that say what they mean and what values they take, and how texts become their values."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from depict_hf.photo_files import shown as shown_text
from depict_hf.ranges import shown

# No rate, step, size or seed has a use beyond this; what is larger is a slip.
MOST = 2**32


def setting(
    meaning: str,
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declare a field of a section.

    Args:
        meaning: What it decides, in a sentence or two, units included.
        default: Its value unless a recipe says otherwise; without one, every recipe must say.
        least: Its least value.
        below: What its value must be less than.
        most: Its largest value; no number may be above `MOST` in any case.
        choices: All values that it may have, besides None where its type allows that.
    """
    metadata = {"meaning": meaning, "least": least, "below": below, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Fields with meanings and ranges, checked as soon as they have values.

    Raises:
        ValueError: If a value is of another type, or out of its range.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_of(value, hints[field.name]):
                wanted = getattr(field.type, "__name__", field.type)
                raise ValueError(f"Got {field.name}={shown(value)}, needed a value of type {wanted}.")
            _check_range(field, value)


def _is_of(value: object, hint: Any) -> bool:
    """Say whether a value has the type of an annotation; whole numbers are floats, too, True and False no numbers."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return len(items) == len(value) and all(map(_is_of, value, items))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


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
        raise ValueError(f"Got {field.name}={shown(value)}, needed one of {', '.join(choices)}.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"Got {field.name}={value}, needed finite numbers.")
        if isinstance(number, (int, float)) and abs(number) > MOST:
            raise ValueError(f"Got {field.name}={shown(value)}, needed at most {MOST:g}.")
    most = field.metadata["most"]
    if most is not None and value > most:
        raise ValueError(f"Got {field.name}={value}, needed at most {most:g}.")
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
        raise ValueError(f"Got {name}={shown_text(text[:100])}, needed a value of type {wanted}.") from None


def text_of(value: object) -> str:
    """Write a value as `parse_value` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
