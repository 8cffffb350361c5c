"""Ranges of settings: one error for what is no number, no whole one, too small, too large, or not finite."""

import math
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
        raise ValueError(f"{name}={value!r} must be a whole number.")
    if value < least:
        raise ValueError(f"{name}={shown(value)} must be at least {least}.")
    if value > most:
        raise ValueError(f"{name}={shown(value)} must be at most {most}.")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise ValueError unless the value is a finite number, which True and False are not, of the range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number.")
    # Whole numbers that no float can hold are beyond any range that there is.
    if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > 1e300:
        raise ValueError(f"{name}={shown(value)} must be a finite number.")
    if not least <= value <= most:
        raise ValueError(f"{name}={shown(value)} must be from {least:g} to {most:g}.")


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


def shown(value: Any) -> str:
    """Write a value as it is, or how large it is where that would take many digits."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1} or more"
    return str(value)
