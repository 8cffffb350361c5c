"""`import depict_hf` stays light, registers with transformers in any order, and imports point one way."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

REPOSITORY = Path(__file__).parents[1]


def run_python(code: str, *arguments: str) -> str:
    """Standard output of a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules_after(statement: str) -> set[str]:
    return set(run_python(f"import sys; {statement}; print(' '.join(sys.modules))").split())


@pytest.mark.parametrize(
    "statement",
    ["import depict_hf", "import depict_hf.cli", "from depict_hf import labels, cli"],
)
def test_what_needs_no_model_loads_no_torch(statement):
    """Fails if `depict --help` takes seconds again."""
    loaded = modules_after(statement)
    assert not {"transformers", "torch", "torchvision", "huggingface_hub", "accelerate"} & loaded


@pytest.mark.parametrize(
    ("setting", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
@pytest.mark.parametrize("statement", ["from depict_hf.cli import main; main([])", "import training"])
def test_threads_of_commands_sleep_soon_unless_told(statement, setting, spins):
    """Fails if PyTorch comes before the setting, which is then too late, or if a user's own one is lost."""
    code = f"""
import os, sys
[os.environ.pop(name, None) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")]
os.environ.update({setting!r})
try:
    {statement}
except SystemExit:
    pass
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""
    assert run_python(code).split()[-2:] == [spins, "False"]


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


LOAD = """
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1])
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "depict_hf.configuration_depict"
assert type(model).__module__ == "depict_hf.modeling_depict"
assert type(processor).__module__ == "depict_hf.image_processing_depict"
import depict_hf.registration
assert not any(type(each).__name__ == "RegisterAfterImport" for each in sys.meta_path)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import depict_hf",
        "import transformers, depict_hf",
        "from depict_hf.configuration_depict import DepictConfig",  # this import is what imports transformers
        "from depict_hf import *",
        "import depict_hf, importlib; importlib.reload(depict_hf); importlib.util.find_spec('transformers')",
    ],
)
def test_auto_classes_know_the_model_in_any_order(first, model_folder):
    run_python(f"import sys; {first}\n{LOAD}", str(model_folder))


THREADS = """
import importlib, sys, threading
sys.setswitchinterval(1e-5)
import depict_hf
errors, barrier = [], threading.Barrier(6)
def run(use, name):
    barrier.wait()
    try:
        use(name)
    except ImportError as error:
        errors.append((name, repr(error)))
def run_all(use, names):
    threads = [threading.Thread(target=run, args=(use, name), daemon=True) for name in names]
    for thread in threads: thread.start()
    for thread in threads: thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
"""


def test_first_use_by_many_threads_at_once(model_folder):
    code = """
run_all(lambda name: getattr(depict_hf, name), ["segment", "DepictConfig", "load_photo", "DepictImageProcessor",
        "modeling_depict", "DepictForSemanticSegmentation"])
assert not errors, errors
"""
    run_python(THREADS + code + LOAD, str(model_folder))


def test_imports_by_many_threads_at_once_end(model_folder):
    """Fails if a thread that imports one of our modules and one that imports transformers wait for each other.

    Single imports may fail, as they do without this package: transformers and torchvision are not made for that.
    """
    code = """
run_all(importlib.import_module, ["transformers", "depict_hf.configuration_depict", "depict_hf.modeling_depict",
        "depict_hf.image_processing_depict", "transformers", "depict_hf.vit"])
import transformers, depict_hf.modeling_depict
"""
    run_python(THREADS + code + LOAD, str(model_folder))


def test_an_import_of_transformers_that_fails_can_be_repeated(model_folder, tmp_path):
    """The hook must neither hide the error nor be used up by it."""
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('broken on purpose')")
    code = f"""
import sys
import depict_hf
sys.path.insert(0, {str(tmp_path)!r})
try:
    import transformers
except ImportError as error:
    assert "broken on purpose" in str(error)
else:
    raise AssertionError("no error")
sys.path.remove({str(tmp_path)!r})
sys.path_importer_cache.clear()
"""
    run_python(code + LOAD, str(model_folder))


def test_transformers_works_where_ours_cannot_be_imported():
    """With a warning that names the reason; whoever asks for our class gets the error itself."""
    code = """
import sys, warnings
import depict_hf
sys.modules["depict_hf.windows"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers
assert any("could not register" in str(each.message) and "depict_hf.windows" in str(each.message) for each in caught)
try:
    depict_hf.DepictImageProcessor
except ImportError as error:
    print(error)
"""
    assert "depict_hf.windows" in run_python(code)


def test_classes_can_be_pickled_and_names_listed():
    code = """
import pickle
import depict_hf
assert {"segment", "load_photo", "DepictConfig", "default_model"} <= set(dir(depict_hf))
config = pickle.loads(pickle.dumps(depict_hf.DepictConfig(num_labels=7)))
assert type(config) is depict_hf.DepictConfig and config.num_labels == 7
assert depict_hf.modeling_depict.DepictForSemanticSegmentation is depict_hf.DepictForSemanticSegmentation
assert depict_hf.windows.pad_to_multiple
for name in ("nothing", "_nothing"):
    try:
        getattr(depict_hf, name)
    except AttributeError as error:
        assert f"module 'depict_hf' has no attribute '{name}'" in str(error)
    else:
        raise AssertionError(name)
"""
    run_python(code)


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
    """All that a module loads, by way of others too, before any of its functions is called."""
    loaded, waiting = set(), {module}
    while waiting:
        loaded |= waiting
        paths = [REPOSITORY / "depict_hf" / f"{name}.py" for name in waiting]
        waiting = set().union(*(imported_modules(path, "top") for path in paths if path.is_file())) - loaded
    assert not loaded & set(later)
    assert loaded > {module} and (module != "inference" or {"modeling_depict", "resampling"} <= loaded)


def imported_modules(path: Path, where: Literal["top", "anywhere"] = "anywhere") -> set[str]:
    """Modules of the package that a file of it imports, by the first part of their names."""
    package = ".".join(path.parent.relative_to(REPOSITORY).parts)
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if where == "top" else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("depict_hf.")}


def test_the_analysis_receives_its_model():
    """Fails if it loads or downloads one itself, or knows of commands and pages, be it within a function."""
    needed = {
        "analysis",
        "configuration_depict",
        "decoders",
        "image_processing_depict",
        "inference",
        "modeling_depict",
        "photo_files",
        "resampling",
        "vit",
        "windows",
    }
    files = list((REPOSITORY / "depict_hf" / "analysis").glob("*.py"))
    assert len(files) > 5
    assert {path.name: imported_modules(path) - needed for path in files} == {path.name: set() for path in files}


def test_imports_within_functions_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    path = tmp_path / "depict_hf" / "analysis" / "terms.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch\nfrom .steps import exact\nfrom .. import hub\n"
        "def load():\n    from ..loading import load_model\n    import depict_hf.cli\n"
    )
    assert imported_modules(path) == {"analysis", "hub", "loading", "cli"}


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("depict_hf/vit.py", "from .modeling_depict import DepictForSemanticSegmentation", "TID253"),
        ("depict_hf/windows.py", "from . import inference", "TID253"),
        ("depict_hf/modeling_depict.py", "import depict_hf.inference", "TID253"),
        ("depict_hf/cli.py", "def train():\n    from training import train", "TID251"),
        ("depict_hf/inference.py", "from .training.train import main", "TID251"),
        ("training/train.py", "from depict_hf.inference import segment", None),
        ("depict_hf/inference.py", "from .modeling_depict import DepictForSemanticSegmentation", None),
    ],
)
def test_the_linter_knows_the_direction_of_imports(file, line, rule):
    """Fails if a pattern of pyproject.toml no longer matches what it is meant for."""
    pytest.importorskip("ruff", reason="needs the extra test")
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251,TID253", "--output-format", "concise"]
    result = subprocess.run(
        [*command, "--stdin-filename", str(REPOSITORY / file), "-"],
        input=f"{line}\n",
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert result.returncode == (0 if rule is None else 1), result.stdout + result.stderr
    assert rule is None or rule in result.stdout


def test_imports_cost_what_transformers_and_torch_cost():
    """Fails if a module of ours does work when it is imported. Counted are seconds in each module itself."""
    code = "from depict_hf import default_model, segment"
    command = [sys.executable, "-X", "importtime", "-c", code]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    times = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", text, re.MULTILINE)
    own = sum(int(time) for time, name in times if name.split(".")[0] == "depict_hf")
    assert {"torch", "transformers", "depict_hf.modeling_depict"} <= {name for _, name in times}
    assert own < 0.1 * sum(int(time) for time, _ in times)
