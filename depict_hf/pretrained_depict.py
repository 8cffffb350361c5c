"""Loading and saving weights as transformers does, with what it leaves out: checksums, sizes before memory, NaN."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from .weight_files import Header, WeightsError, check_archive, check_finite, one_line, seal, verify

# Weights that a configuration asks for and a file lacks are made anew, as for another decoder; at most this many
# numbers (1 GiB in float32), or as many as the files hold, so that a damaged configuration cannot ask for any memory.
MOST_NEW_NUMBERS = 2**28


class CheckedPreTrainedModel(PreTrainedModel):
    """A model whose files are checked before their weights are used.

    `save_pretrained` writes a checksum into the files of weights. `from_pretrained` compares it, refuses weights that
    are NaN or infinite, and compares shapes before it takes memory for them.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """Load as `PreTrainedModel.from_pretrained` does.

        Raises:
            OSError: If a file is missing or cannot be read.
            ValueError: If a file is damaged, or the files do not fit each other.
            ImportError: If a package is missing that an argument asks for.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            if type(error) not in (OSError, ValueError) or str(error).isprintable():
                raise
            raise type(error)(one_line(error)) from error
        # Of damaged files, transformers and the libraries that it reads them with raise errors of many kinds.
        except Exception as error:
            raise WeightsError(
                f"The model {pretrained_model_name_or_path} cannot be loaded ({type(error).__name__}): "
                f"{one_line(error)}"
            ) from error

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args: Any, **kwargs: Any):
        """Check files whose weights are about to be read, and then the weights; the model still is without values."""
        if state_dict is None and checkpoint_files:
            _check_place(load_config.pretrained_model_name_or_path, checkpoint_files)
            if all(str(path).endswith(".safetensors") for path in checkpoint_files):
                headers = [verify(path) for path in checkpoint_files]
                _check_shapes(model, headers, load_config)
            else:
                for path in checkpoint_files:
                    check_archive(path)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        check_finite(model.state_dict().items(), str(load_config.pretrained_model_name_or_path or "state_dict"))
        return loaded

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, and write a checksum into each file of weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if not self.should_save_on_this_rank(kwargs.get("is_main_process", args[0] if args else True)):
            return
        variant = kwargs.get("variant")
        name = re.compile(rf"model{re.escape(f'.{variant}') if variant else ''}(-\d{{5}}-of-\d{{5}})?\.safetensors")
        for path in sorted(Path(save_directory).glob("model*.safetensors")):
            if name.fullmatch(path.name):
                seal(path)


def _check_place(source: str | None, paths: Iterable[str]) -> None:
    """Refuse files of weights that an index names outside of the model's folder."""
    if source is None or not Path(source).is_dir():
        return
    folder = Path(source).absolute()
    for path in paths:
        # By its name: what is in the folder may be a link elsewhere, as in the Hub's cache.
        parts = Path(path).absolute().relative_to(folder).parts if Path(path).absolute().is_relative_to(folder) else ()
        if not parts or ".." in parts:
            raise WeightsError(f"{source} names weights in {path}, needed files in its own folder; do not use it.")


def _check_shapes(model: PreTrainedModel, headers: list[Header], load_config: Any) -> None:
    """Refuse weights of other shapes, and more missing ones than `MOST_NEW_NUMBERS` says, before memory is taken."""
    found = {name: shape for header in headers for name, shape in header.shapes.items()}
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = [name for name in needed if name in found and found[name] != needed[name]]
    # Names may have other prefixes, and quantized weights have shapes of their own: transformers sees to both.
    if other and not load_config.ignore_mismatched_sizes and not load_config.is_quantized:
        text = ", ".join(f"{name} is {found[name]}, needed {needed[name]}" for name in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise WeightsError(
            f"{load_config.pretrained_model_name_or_path} holds weights of other shapes than its configuration "
            f"describes: {text}{more}; load with the config.json that they were saved with."
        )
    new = sum(math.prod(shape) for name, shape in needed.items() if name not in found or name in other)
    present = sum(math.prod(shape) for shape in found.values())
    if new > max(MOST_NEW_NUMBERS, present):
        raise WeightsError(
            f"{load_config.pretrained_model_name_or_path} describes a model of which {new:.3g} numbers are not in its "
            f"files, which hold {present:.3g}; load with the config.json that they were saved with."
        )
