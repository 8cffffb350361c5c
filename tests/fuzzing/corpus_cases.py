"""What a case of tests/corpus is made of."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One case: its name, which begins with its kind, its files, how they are read, and what must come of it."""

    name: str
    files: dict[str, bytes]
    description: dict[str, Any]
    expected: dict[str, Any]


def refused(message: str, error: str = "ValueError") -> dict[str, Any]:
    return {"refused": {"error": error, "message": message}}


def right(**facts: Any) -> dict[str, Any]:
    return {"right": facts}
