"""Every public name says what it does, in which shapes, and what it raises."""

import importlib
import inspect
import pydoc
import re
import types

import pytest

# The entrances: what they name is public. Modules without `__all__` give what they define.
MODULES = [
    "depict_hf",
    "depict_hf.analysis",
    "depict_hf.conversion",
    "depict_hf.decoders",
    "depict_hf.demo.answers",
    "depict_hf.demo.space",
    "depict_hf.explain",
    "depict_hf.export",
    "depict_hf.formats",
    "depict_hf.inference",
    "depict_hf.labels",
    "depict_hf.loading",
    "depict_hf.resampling",
    "depict_hf.to_published",
    "depict_hf.visualization",
    "depict_hf.windows",
    "training.data",
    "training.evaluation",
    "training.optimization",
    "training.recipe",
    "training.starting",
]


def public(name: str) -> dict:
    """Functions, classes and their public methods, by name."""
    module = importlib.import_module(name)
    own = [each for each, value in vars(module).items() if getattr(value, "__module__", None) == name]
    found = {}
    for each in getattr(module, "__all__", [each for each in own if not each.startswith("_")]):
        value = getattr(module, each)
        if isinstance(value, types.GenericAlias):  # such as Callable[...], which Python 3.10 takes for a class
            continue
        if inspect.isclass(value):
            methods = {key: item for key, item in vars(value).items() if inspect.isfunction(item) and key[0] != "_"}
            found |= {f"{each}.{key}": item for key, item in methods.items() if not overrides(value, key)}
        if inspect.isclass(value) or inspect.isfunction(value):
            found[each] = value
    return found


def overrides(kind: type, method: str) -> bool:
    """Whether another package's class documents the method that this one replaces."""
    return any(
        hasattr(base, method) for base in kind.__mro__[1:] if not base.__module__.startswith(("depict", "train"))
    )


def signature_of(function) -> str:
    """Parameters and result, without those that are functions themselves, which are told where they are defined."""
    signature = inspect.signature(function)
    kinds = [parameter.annotation for parameter in signature.parameters.values()] + [signature.return_annotation]
    return " ".join(str(kind) for kind in kinds if "Callable" not in str(kind))


def faults(value) -> list[str]:
    text = value.__doc__ or ""
    if not text or text.startswith(f"{value.__name__}("):  # what `dataclass` writes by itself
        return ["no docstring"]
    if not inspect.isfunction(value):
        return []
    missing = []
    if "Tensor" in signature_of(value) and not re.search(r"`\(|[Ss]hape|scalar", text):
        missing.append("takes or gives tensors, but tells no shape")
    source = inspect.getsource(inspect.unwrap(value))
    if re.search(r"^ +raise ", source.rpartition('"""')[2], re.MULTILINE) and "Raises:" not in text:
        missing.append("raises, but does not say what")
    return missing


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    found = public(module)
    assert found
    assert {name: each for name, value in found.items() if (each := faults(value))} == {}


def test_faults_are_found():
    def silent(): ...

    def untold(value: "Tensor"):  # noqa: F821
        """Do something."""
        raise ValueError

    assert faults(silent) == ["no docstring"]
    assert faults(untold) == ["takes or gives tensors, but tells no shape", "raises, but does not say what"]


def test_pydoc_reads_as_an_introduction():
    """Fails if the package's page does not name what it offers."""
    page = pydoc.plain(pydoc.render_doc(importlib.import_module("depict_hf")))
    opening = page[: page.index("PACKAGE CONTENTS")]
    for name in ("DepictForSemanticSegmentation", "DepictImageProcessor", "segment", "default_model"):
        assert name in opening, opening
