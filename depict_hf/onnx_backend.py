"""Exported ONNX models behind the interface that `inference.segment` needs of a model."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .configuration_depict import DepictConfig
from .modeling_depict import DepictSemanticSegmenterOutput
from .weight_files import CHECKSUM, file_checksum, one_line
from .windows import merge_windows

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
        num_threads: Threads of one operation on the CPU; by default as many as PyTorch uses.

    Raises:
        ValueError: If ONNX Runtime does not offer the device, or cannot read the file, or its weights are not in it.
        ImportError: If ONNX or ONNX Runtime is missing.
    """
    require_onnx("onnx", "onnxruntime")
    import onnxruntime

    provider = PROVIDERS.get(device.partition(":")[0])
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"This installation of ONNX Runtime does not compute on {device!r}, only with "
            f"{', '.join(onnxruntime.get_available_providers())}; choose device cpu, or install onnxruntime-gpu for "
            "cuda."
        )
    _check_weights_inside(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(dict.fromkeys([provider, PROVIDERS["cpu"]])))
    # Its exceptions have no common class of their own.
    except Exception as error:
        raise ValueError(f"ONNX Runtime cannot read {path}: {one_line(error)}; export or copy it again.") from error


def _check_weights_inside(path: Path) -> None:
    """Refuse a file that says in which others its weights lie: up to 1.23, ONNX Runtime reads any that it names.

    Raises:
        ValueError: If it does, or is no ONNX file.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # its classes change with the release of protobuf
        raise ValueError(f"{path} is no ONNX file: {one_line(error)}; export or copy it again.") from error
    outside = [each.name for each in _tensors(model) if each.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise ValueError(
            f"{path} has {len(outside)} tensors, such as {one_line(outside[0], 100)}, that lie in other files, needed "
            "all of them in it, as `depict export` writes it."
        )


def _tensors(message: Any) -> Iterator[Any]:
    """Find the tensors in a message of ONNX, wherever they are: of graphs within graphs, of functions, sparse ones."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for each in [value] if hasattr(value, "ListFields") else value:
            if each.DESCRIPTOR.name == "TensorProto":
                yield each
            else:
                yield from _tensors(each)


def load_onnx(folder: str | Path, device: str = "cpu", num_threads: int | None = None) -> "OnnxModel":
    """Load the folder that `export.export_model` wrote; its image processor loads as any other.

    Args:
        device: "cpu" or "cuda"; tensors come and go on the CPU either way.
        num_threads: As for `start_session`.

    Raises:
        OSError: If the folder does not hold an export.
        ValueError: As `start_session`; if the file is not what was written, by the checksum in `model.json` where there
            is one; or if its inputs and outputs are not those of an export.
        ImportError: If ONNX Runtime is missing.
    """
    folder = Path(folder)
    path = folder / "model.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model.onnx; make such a folder with `depict export MODEL OUT`.")
    _verify(path)
    return OnnxModel(start_session(path, device, num_threads), DepictConfig.from_pretrained(folder))


def _verify(path: Path) -> None:
    """Compare an exported file with the checksum that stands beside it; ValueError where they differ."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{beside} is not JSON ({one_line(error, 200)}); export or copy the folder again.") from error
    expected = settings.get(CHECKSUM) if isinstance(settings, dict) else None
    if expected is not None and (found := file_checksum(path)) != expected:
        raise ValueError(
            f"{path} is damaged: its checksum is {found[:12]}..., needed {str(expected)[:12]}..., with which it was "
            "written; export or copy the folder again."
        )


class OnnxModel:
    """An exported model that is called as `DepictForSemanticSegmentation` is in evaluation mode, without windows.

    Attributes:
        config: Configuration of the model that was exported; `segment` cuts windows by it, unless the file does.
        input_size: (height, width) pixels that the graph is bound to, or None if it takes any.
        pads: Whether images go in as they are, because the graph pads them where it needs to.
        settled: What the file does itself, and `segment` therefore cannot do otherwise, in words; None if nothing.
        training: Always False.
        device: Where tensors are expected and returned: the CPU.
        dtype: Type of the logits: float32.
    """

    training = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, session: "onnxruntime.InferenceSession", config: DepictConfig):
        self.config = config
        self._session = session
        # Earlier files call logits `patch_logits` where they cover padding, too.
        outputs = {output.name: output.shape for output in session.get_outputs()}
        found = [name for name in ("logits", "patch_logits") if name in outputs]
        given = [(each.name, each.type, len(each.shape)) for each in session.get_inputs()]
        kinds = [("pixel_values", kind, 4) for kind in ("tensor(float)", "tensor(uint8)")]
        if len(found) != 1 or len(given) != 1 or given[0] not in kinds:
            raise ValueError(
                f"The file has inputs {one_line(str(given), 200)} and outputs {one_line(str(list(outputs)), 200)}, "
                "needed pixel_values of four dimensions (float or uint8), and logits; export the model again."
            )
        [self._output] = found
        channels = outputs[self._output][1:2]
        if channels and isinstance(channels[0], int) and channels[0] != config.num_labels:
            raise ValueError(
                f"The file gives logits of {channels[0]} classes, but config.json beside it has {config.num_labels}; "
                "needed the folder as `depict export` wrote it."
            )
        self.pads = self._output == "logits"
        [pixel_values] = session.get_inputs()
        self._takes_photographs = pixel_values.type == "tensor(uint8)"
        size = tuple(pixel_values.shape[1:3] if self._takes_photographs else pixel_values.shape[2:])
        self.input_size = size if all(isinstance(side, int) for side in size) else None
        metadata = session.get_modelmeta().custom_metadata_map
        settled = {"resize_inside": "resizes photographs", "windows_inside": "cuts windows"}
        self.settled = " and ".join(text for name, text in settled.items() if metadata.get(name) == "true") or None

    def __call__(self, pixel_values: Tensor) -> DepictSemanticSegmenterOutput:
        """Segment images as a whole.

        Args:
            pixel_values: `(batch, channels, height, width)`, as the image processor beside the file makes them:
                normalised or, where the file does that, uint8.

        Returns:
            `logits` as of `DepictSemanticSegmenterOutput`: on the patch grid or, where that could cover padding, at
            the input's size.

        Raises:
            ValueError: If the graph does not take images of this size or type.
        """
        height, width = pixel_values.shape[-2:]
        if self.input_size not in (None, (height, width)):
            raise ValueError(
                f"Got images of {height}x{width} pixels, but the graph takes {self.input_size[0]}x"
                f"{self.input_size[1]}; call `segment` with the image processor saved beside it, at scale 1 unless it "
                "has windows, or export without --size."
            )
        if self._takes_photographs:
            if pixel_values.dtype != torch.uint8:
                raise ValueError(
                    f"Got {pixel_values.dtype}, but the graph normalises by itself and takes uint8; use the image "
                    "processor saved beside it."
                )
            values = pixel_values.to(self.device).permute(0, 2, 3, 1)
        else:
            values = pixel_values.to(self.device, self.dtype)
        try:
            [logits] = self._session.run([self._output], {"pixel_values": values.contiguous().numpy()})
        # Of a graph that is no export of ours, ONNX Runtime's own errors.
        except Exception as error:
            raise ValueError(f"ONNX Runtime cannot compute images of {height}x{width}: {one_line(error)}.") from error
        logits = torch.from_numpy(logits)
        patch_size = self.config.encoder_patch_size
        if not self.pads and (height % patch_size or width % patch_size):
            padded_size = (height + -height % patch_size, width + -width % patch_size)
            logits = merge_windows([logits], [(0, 0)], (height, width), padded_size)
        return DepictSemanticSegmenterOutput(logits=logits)
