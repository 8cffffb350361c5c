"""Recipes, training, evaluation and evidence for `depict_hf`.

Modules that have moved into the rooms `data`, `optimization`, `evaluation` and `evidence` can still be imported by
their former names, with a warning.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from depict_hf.threads import spin_briefly

_MOVED = {
    **{
        name: f"data.{name}"
        for name in ("augmentation", "checks", "features", "imagefolder", "layouts", "reading", "streaming")
    },
    **{
        name: f"optimization.{name}"
        for name in ("adapters", "averaging", "checkpoints", "losses", "stochastic_depth", "trainer")
    },
    **{
        name: f"evaluation.{name}"
        for name in ("corruptions", "measurement", "metrics", "pictures", "records", "worst_images")
    },
    **{name: f"evidence.{name}" for name in ("baseline", "comparison_report", "costs", "exponent")},
    "benchmark_cases": "evidence.benchmark_tasks",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules under the names that they had before; what they hold is the very same objects."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new_name = f"{__name__}.{_MOVED[module.__name__.rpartition('.')[2]]}"
        warnings.warn(f"{module.__name__} has moved to {new_name}.", DeprecationWarning, stacklevel=2)
        moved = vars(importlib.import_module(new_name))
        vars(module).update({name: value for name, value in moved.items() if not name.startswith("__")})


# This runs before the commands of this package import PyTorch.
spin_briefly()

# Before other finders for installed projects, such as those of editable installs, but after ordinary files.
if not any(type(finder).__name__ == _MovedModules.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, _MovedModules())
