"""Registers this package's classes with transformers, as late as that can be without anyone noticing.

Registering needs transformers and torch, which take seconds to import, and `depict --help` or a script that only reads
class names needs neither. So where transformers is imported already, `register_with_transformers` registers at once;
else it leaves an import hook, which registers as soon as transformers has been imported. Either way
`AutoModelForSemanticSegmentation` knows "depict", in whatever order the two packages are imported.
"""

import sys
import threading
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

PACKAGE = __name__.rpartition(".")[0]


def register_with_transformers() -> None:
    """Make transformers' Auto classes know "depict": now, or when transformers has been imported."""
    if any(isinstance(finder, RegisterAfterImport) for finder in sys.meta_path):
        return
    if sys.modules.get("transformers") is None:
        sys.meta_path.insert(0, RegisterAfterImport())
    else:
        _register()


class RegisterAfterImport(MetaPathFinder):
    """Finds nothing itself, and has a say at the end of two kinds of imports: of transformers and of this package.

    One rule holds at the end of each of them: if transformers is there, and no module of this package is half imported,
    in this thread or another, the classes are registered and the hook removes itself. The second condition is why our
    own modules are watched too: where one of them is what imports transformers, our classes do not exist yet when that
    import ends, but do when the module's own does.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Modules of ours that are being executed, and "" while the classes are being registered.
        self.running: set[str] = set()

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """Return the specification that the other finders give, with a loader that reports when it is done.

        Asking for it without loading, as `importlib.util.find_spec` does, changes nothing.
        """
        if name != "transformers" and not name.startswith(f"{PACKAGE}."):
            return None
        for finder in list(sys.meta_path):
            find = None if isinstance(finder, RegisterAfterImport) else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._report(spec)
                return spec
        return None

    def _report(self, spec: ModuleSpec) -> None:
        """Wrap `exec_module` of this one loader, which belongs to this one specification."""
        loader: Any = spec.loader  # whose method is replaced, which no annotation allows
        execute = loader.exec_module

        def exec_module(module) -> None:
            del loader.exec_module  # what is left is the loader as it was
            ours = {spec.name} - {"transformers"}
            with self.lock:
                self.running |= ours
            try:
                execute(module)
            finally:
                with self.lock:
                    self.running -= ours
            self._register_if_ready()

        loader.exec_module = exec_module

    def _register_if_ready(self) -> None:
        # Another thread may begin to import a module of ours while we register. It then waits for transformers, whose
        # import has not ended, and we for its module; Python sees that and gives us the module half imported. That
        # ends in an ImportError here, and in the other thread in an import that ends well, and registers. A second
        # attempt is for that thread having ended just now.
        for attempt in range(2):
            with self.lock:
                if self.running or self not in sys.meta_path or sys.modules.get("transformers") is None:
                    return
                self.running.add("")
            try:
                _register()
            except Exception as error:
                with self.lock:
                    self.running.discard("")
                    if self.running:
                        return
                if attempt:
                    # transformers itself works; whoever asks this package for a class gets the error.
                    warnings.warn(f"{PACKAGE} could not register its classes with transformers: {error}", stacklevel=2)
            else:
                with self.lock:
                    self.running.discard("")
                    sys.meta_path.remove(self)
                return


def _register() -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, AutoVideoProcessor

    from .configuration_depict import DepictConfig
    from .image_processing_depict import DepictImageProcessor
    from .modeling_depict import DepictForSemanticSegmentation

    AutoConfig.register("depict", DepictConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(DepictConfig, DepictForSemanticSegmentation, exist_ok=True)
    AutoImageProcessor.register(
        DepictConfig, image_processor_classes={"torchvision": DepictImageProcessor}, exist_ok=True
    )
    # There is none for videos. Unless that is said, pipelines take the code of the image processor that travels with a
    # model for that of a video processor, and ask on the terminal whether to run it.
    AutoVideoProcessor.register(DepictConfig, video_processor_classes={}, exist_ok=True)
    # They also travel with saved models, which then load with `trust_remote_code=True` elsewhere.
    DepictConfig.register_for_auto_class()
    DepictForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
    DepictImageProcessor.register_for_auto_class()
