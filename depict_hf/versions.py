"""What is installed, for reports of faults: read from the packages' metadata, so that nothing heavy is imported."""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

NAME = "depict-hf"


def version_line() -> str:
    """Say in one line which depict-hf, torch, transformers and Python these are."""
    own = installed(NAME)
    own = f"{NAME} {own}" if own else f"{NAME}, not installed: run from its source code"
    others = [f"{name} {installed(name) or 'missing'}" for name in ("torch", "transformers")]
    return f"{own} ({', '.join([*others, f'Python {platform.python_version()}'])})"


def installed(name: str) -> str | None:
    """Return the version of a distribution, or None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements() -> dict[str, list[str]]:
    """Return the names of the distributions that the package needs, and under the name of each extra, those of it.

    Returns:
        "" for what is always needed. Empty where the package is not installed.
    """
    found: dict[str, list[str]] = {}
    try:
        lines = requires(NAME) or []
    except PackageNotFoundError:
        return found
    for line in lines:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        assert name is not None, line
        found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def describe_installation() -> Iterator[str]:
    """Yield lines on the versions, the machine and what computes on it; imports torch.

    Names of the machine, of its user and of folders are left out, so that the lines can be passed on.
    """
    yield version_line()
    yield f"{platform.system()} {platform.release()}, {platform.machine()}"
    for extra, names in requirements().items():
        if extra == "test":
            continue
        each = ", ".join(f"{name} {installed(name) or 'missing'}" for name in names)
        yield f"{f'extra {extra}' if extra else 'needed'}: {each}"
    import torch

    from .loading import native_dtype, training_device

    device = training_device()
    kind = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    yield f"computes on {device.type}{kind} in {str(native_dtype(device)).removeprefix('torch.')}"
    yield f"{torch.get_num_threads()} threads"
