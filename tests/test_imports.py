"""`import depict_hf` stays light, and imports between modules point one way."""

import importlib
import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_stays_light():
    loaded = modules_after("import depict_hf, depict_hf.inference, depict_hf.cli")
    assert "depict_hf.modeling_depict" in loaded
    heavy = {"datasets", "evaluate", "matplotlib", "gradio", "timm", "pandas", "training", "depict_hf.conversion"}
    assert not heavy & loaded


@pytest.mark.parametrize(
    ("former", "name", "room"),
    [
        ("training.metrics", "MeanIoU", "training.evaluation"),
        ("training.trainer", "SegmentationTrainer", "training.optimization"),
        ("training.features", "FeatureDataset", "training.data"),
        ("training.baseline", "StraightforwardModel", "training.evidence"),
    ],
)
def test_moved_modules_stay_importable(former, name, room):
    """By their former names they hold the same objects, so that isinstance and pickles go on working."""
    with pytest.warns(DeprecationWarning, match=f"{former} has moved to {room}"):
        sys.modules.pop(former, None)
        module = importlib.import_module(former)
    assert getattr(module, name) is getattr(importlib.import_module(room), name)


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("configuration_depict", ["vit", "decoders", "windows", "modeling_depict", "inference"]),
        ("windows", ["vit", "decoders", "modeling_depict", "inference"]),
        ("decoders", ["modeling_depict", "inference"]),
        ("modeling_depict", ["inference", "conversion", "visualization", "cli"]),
        ("inference", ["conversion", "visualization", "cli"]),
    ],
)
def test_imports_point_one_way(module, later):
    """Each module is loaded without the package's `__init__`, which imports several."""
    code = (
        "import importlib.util, types; "
        "package = types.ModuleType('depict_hf'); "
        "package.__path__ = importlib.util.find_spec('depict_hf').submodule_search_locations; "
        "sys.modules['depict_hf'] = package; "
        f"import depict_hf.{module}"
    )
    # find_spec does not run the package.
    assert not {f"depict_hf.{name}" for name in later} & modules_after(code)
