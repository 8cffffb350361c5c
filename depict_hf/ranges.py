"""Ranges of settings: one error for what is no number, no whole one, too small, too large, or not finite."""

import math
import unicodedata
from typing import Any

# Pixels of a side, channels, widths and classes; what is larger is a slip or an attack, and would take the memory.
MOST_SIZE = 2**16
# Layers of one kind.
MOST_LAYERS = 1000
# Entries, and depth, of settings within settings.
MOST_ENTRIES = 10_000
MOST_DEPTH = 16


def check_whole(name: str, value: Any, least: int = 1, most: int = MOST_SIZE) -> None:
    """Raise ValueError unless the value is a whole number, which True and False are not, of the range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be a whole number.")
    if value < least:
        raise ValueError(f"{name}={shown(value)} must be at least {least}.")
    if value > most:
        raise ValueError(f"{name}={shown(value)} must be at most {most}.")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise ValueError unless the value is a finite number, which True and False are not, of the range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be a number.")
    # Whole numbers that no float can hold are beyond any range that there is.
    if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > 1e300:
        raise ValueError(f"{name}={shown(value)} must be a finite number.")
    if not least <= value <= most:
        raise ValueError(f"{name}={shown(value)} must be from {least:g} to {most:g}.")


def check_class_name(name: Any) -> None:
    """Raise ValueError unless a class's name is text without control characters, which would reach terminals."""
    if not isinstance(name, str) or any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in name):
        raise ValueError(
            f"The class name {shown(name)} must be text of one line without control characters; rename it."
        )


def check_nested(name: str, settings: Any) -> None:
    """Raise ValueError unless settings within settings are few, shallow and finite, and their sizes have bounds.

    For settings of other packages, whose names are not known here: no number may be above 2^20, nor those whose names
    speak of layers above `MOST_LAYERS`.
    """
    waiting, seen = [(name, settings, 0)], 0
    while waiting:
        path, value, depth = waiting.pop()
        seen += 1
        if depth > MOST_DEPTH or seen > MOST_ENTRIES:
            raise ValueError(f"{name} is deeper than {MOST_DEPTH} levels or has more than {MOST_ENTRIES} entries.")
        if isinstance(value, dict):
            waiting += [(f"{path}[{key!r}]", each, depth + 1) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(path, each, depth + 1) for each in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            check_number(path, value)
            is_depth = any(word in path.rpartition("[")[2] for word in ("layer", "depth", "block"))
            if abs(value) > (MOST_LAYERS if is_depth else 2**20):
                raise ValueError(f"{path}={shown(value)} must be at most {MOST_LAYERS if is_depth else 2**20}.")


def check_image_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError where settings of an image processor have values out of their ranges.

    Sizes are whole pixels up to `MOST_SIZE`; means finite, and deviations positive, one for all channels or one for
    each, which are three where images are made RGB; switches are True or False; what is None has its default.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name.startswith("do_"):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={shown(value)} must be True or False.")
        elif name in ("size", "crop_size", "pad_size"):
            listed = isinstance(value, list | tuple)
            # What is none of these is transformers' own `SizeDict`, or a dict.
            sides = list(value if listed else [value] if isinstance(value, int | float | str) else dict(value).values())
            if not sides or (listed and len(sides) != 2):
                raise ValueError(f"{name}={shown(value)} must be pixels by name, such as {{'shortest_edge': 512}}.")
            for side in sides:
                if side is not None and (type(side) is not int or not 1 <= side <= MOST_SIZE):
                    raise ValueError(
                        f"Got {name}={shown(value)}; needed are positive pixels, at most {MOST_SIZE}, by the names of "
                        "sides, such as {'shortest_edge': 512}."
                    )
        elif name in ("image_mean", "image_std"):
            numbers = list(value) if isinstance(value, list | tuple) else [value]
            lengths = (1, 3) if settings.get("do_convert_rgb") in (None, True) else (1, 2, 3, 4)
            if len(numbers) not in lengths:
                raise ValueError(f"{name}={shown(value)} must be one number, or one for each of the three channels.")
            for number in numbers:
                check_number(name, number, 1e-12 if name == "image_std" else -1e6, 1e6)
        elif name == "rescale_factor":
            check_number(name, value, 1e-12, 1e6)
        elif name == "resample":
            # Filters of PIL and torchvision are enumerations, which have values of their own.
            is_filter = hasattr(value, "value") or (type(value) is int and value in range(6))
            if not is_filter:
                raise ValueError(f"{name}={shown(value)} must be a filter of PIL, from 0 to 5, such as 2 for bilinear.")


def shown(value: Any) -> str:
    """Write a value in one line, or how large it is where that would be long."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"{'-' if value < 0 else ''}2^{abs(value).bit_length() - 1} or more"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."
