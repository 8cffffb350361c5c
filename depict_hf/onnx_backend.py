"""Exported ONNX models behind the interface that `inference.segment` needs of a model."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .configuration_depict import DepictConfig
from .modeling_depict import WINDOWS_PER_PASS, DepictSemanticSegmenterOutput
from .windows import cut_windows, enlarge_to_window, merge_windows, resize_bilinear, window_corners

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def require_onnx(*packages: str) -> None:
    """Raise ImportError, naming the extra, unless the packages can be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"The package {package} is needed for ONNX and cannot be imported ({error}); install the extra: "
                'pip install "depict-hf[onnx]".'
            ) from error


def start_session(path: Path, device: str = "cpu", num_threads: int | None = None) -> "onnxruntime.InferenceSession":
    """Open an ONNX file.

    Args:
        device: A key of `PROVIDERS`.
        num_threads: Of one operation on the CPU; by default as many as PyTorch uses.

    Raises:
        ValueError: If ONNX Runtime does not offer the device, or cannot read the file.
        ImportError: If ONNX Runtime is missing.
    """
    require_onnx("onnxruntime")
    import onnxruntime

    provider = PROVIDERS.get(torch.device(device).type)
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"This installation of ONNX Runtime does not compute on {device!r}, only with "
            f"{', '.join(onnxruntime.get_available_providers())}; choose device cpu, or install onnxruntime-gpu for "
            "cuda."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(dict.fromkeys([provider, PROVIDERS["cpu"]])))
    # Its exceptions have no common class of their own.
    except Exception as error:
        raise ValueError(f"ONNX Runtime cannot read {path}: {error}") from error


def load_onnx(folder: str | Path, device: str = "cpu", num_threads: int | None = None) -> "OnnxModel":
    """Load the folder that `export.export_model` wrote; its image processor loads as any other.

    Args:
        device: "cpu" or "cuda"; tensors come and go on the CPU either way.
        num_threads: As for `start_session`.

    Raises:
        OSError: If the folder does not hold an export.
        ValueError: As `start_session`.
        ImportError: If ONNX Runtime is missing.
    """
    folder = Path(folder)
    path = folder / "model.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model.onnx; make such a folder with `depict export MODEL OUT`.")
    return OnnxModel(start_session(path, device, num_threads), DepictConfig.from_pretrained(folder))


class OnnxModel:
    """An exported model that is called as `DepictForSemanticSegmentation` is in evaluation mode.

    Attributes:
        config: Of the model that was exported.
        input_size: (height, width) pixels that the graph is bound to, or None if it takes any.
        training: Always False.
        device: Where tensors are expected and returned: the CPU.
        dtype: float32.
    """

    training = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, session: "onnxruntime.InferenceSession", config: DepictConfig):
        import onnxruntime

        self.config = config
        self._session = session
        # Label maps and enlarged logits are left out: outputs that were not asked for would be computed all the same.
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True
        names = {output.name for output in session.get_outputs()}
        self._output = "patch_logits" if "patch_logits" in names else "logits"
        [pixel_values] = session.get_inputs()
        size = tuple(pixel_values.shape[-2:])
        self.input_size = size if all(isinstance(side, int) for side in size) else None

    def __call__(self, pixel_values: Tensor) -> DepictSemanticSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised; a side longer than `config.window_size`
                makes windows.

        Returns:
            `logits` as of `DepictSemanticSegmenterOutput`.

        Raises:
            ValueError: If the graph does not take images of this size.
        """
        window_size = self.config.window_size
        if window_size is not None and max(pixel_values.shape[-2:]) > window_size:
            return DepictSemanticSegmenterOutput(logits=self._windowed_logits(pixel_values, window_size))
        return DepictSemanticSegmenterOutput(logits=self._whole_logits(pixel_values))

    def _whole_logits(self, pixel_values: Tensor) -> Tensor:
        """Logits of whole images, on the patch grid or, where that would cover padding, at the input's size."""
        height, width = pixel_values.shape[-2:]
        if self.input_size not in (None, (height, width)):
            raise ValueError(
                f"Got images of {height}x{width} pixels, but the graph takes {self.input_size[0]}x"
                f"{self.input_size[1]}; use the image processor saved beside it at scale 1, or export without --size."
            )
        values = pixel_values.to(self.device, self.dtype).contiguous().numpy()
        [logits] = self._session.run([self._output], {"pixel_values": values}, self._options)
        logits = torch.from_numpy(logits)
        patch_size = self.config.encoder_patch_size
        if self._output == "patch_logits" and (height % patch_size or width % patch_size):
            padded_size = (height + -height % patch_size, width + -width % patch_size)
            logits = resize_bilinear(logits, padded_size)[..., :height, :width]
        return logits

    def _windowed_logits(self, pixel_values: Tensor, window_size: int) -> Tensor:
        """Merged logits of all windows, at the input's size."""
        size = tuple(pixel_values.shape[-2:])
        enlarged = enlarge_to_window(pixel_values, window_size)
        enlarged_size = tuple(enlarged.shape[-2:])
        corners = window_corners(enlarged_size, window_size, self.config.window_stride or window_size)
        windows = cut_windows(enlarged, corners, window_size)
        logits = torch.cat([self._whole_logits(part) for part in windows.split(WINDOWS_PER_PASS)])
        merged = merge_windows(list(logits.split(len(pixel_values))), corners, enlarged_size, window_size)
        return resize_bilinear(merged, size)
