"""Models as commands load them: every weight from the files, in evaluation mode, by PyTorch or ONNX Runtime."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch
from transformers.image_utils import SizeDict

from .image_processing_depict import DepictImageProcessor
from .modeling_depict import DepictForSemanticSegmentation, SegmentationModel
from .weight_files import one_line, verify

if TYPE_CHECKING:
    from .onnx_backend import OnnxModel

DEFAULT_MODEL = Path(__file__).parent / "default_model"
# Checksum of its weights, as of `weight_files.verify`; they were written before files carried their own.
DEFAULT_CHECKSUM = "fcb0d77bd6af778193714d3e8762bdf0fd4448cc9a6758852342109109c3edd3"
BACKENDS = ("pytorch", "onnxruntime")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = ("auto", *DTYPES)


def default_model(
    device: torch.device | str = "cpu", dtype: str = "float32"
) -> tuple[DepictForSemanticSegmentation, DepictImageProcessor]:
    """Load the model that comes with the package, in evaluation mode, and its image processor.

    It is found from any working directory, and computes in float32 unless another dtype is asked for, although its
    files are stored in half precision.

    Args:
        device: Where the model computes.
        dtype: As for `load_model`.

    Raises:
        FileNotFoundError: If this installation carries no model.
    """
    return load_model("default", device, dtype)


def model_source(name: str | Path) -> str | Path:
    """Return what to load for a model's name: "default" is the model that comes with the package, wherever one stands.

    A folder called `default` in the working directory is therefore `./default`; a `Path` is always a folder.

    Raises:
        FileNotFoundError: If "default" is asked for and this installation carries no model.
    """
    if name != "default":
        return name
    if not (DEFAULT_MODEL / "config.json").is_file():
        raise FileNotFoundError("This installation carries no model; name one: a folder or Hub name (--model NAME).")
    return DEFAULT_MODEL


def training_device() -> torch.device:
    """Return the accelerator of PyTorch, whichever it is, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def fastest_device(index: int = 0) -> str:
    """Name the accelerator of PyTorch, cuda, mps or xpu, where there is one, else the CPU.

    Args:
        index: Index of this process on its machine; where there are several accelerators, processes take turns.
    """
    kind = training_device().type
    if kind not in ("cuda", "mps", "xpu"):
        return "cpu"
    return "mps" if kind == "mps" else f"{kind}:{index % torch.accelerator.device_count()}"


@overload
def load_model(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    backend: Literal["pytorch"] = "pytorch",
) -> tuple[DepictForSemanticSegmentation, DepictImageProcessor]: ...


@overload
def load_model(
    name: str | Path, device: torch.device | str = "cpu", dtype: str = "float32", *, backend: str
) -> tuple["DepictForSemanticSegmentation | OnnxModel", DepictImageProcessor]: ...


@overload
def load_model(
    name: str | Path, device: torch.device | str, dtype: str, backend: str
) -> tuple["DepictForSemanticSegmentation | OnnxModel", DepictImageProcessor]: ...


def load_model(
    name: str | Path, device: torch.device | str = "cpu", dtype: str = "float32", backend: str = "pytorch"
) -> tuple["DepictForSemanticSegmentation | OnnxModel", DepictImageProcessor]:
    """Load a model in evaluation mode, and its image processor.

    Args:
        name: Folder, Hub name or "default" (see `model_source`); for ONNX Runtime a folder that `depict export` wrote.
        dtype: Type of weights and computation, one of `DTYPE_NAMES`; "auto" is `native_dtype(device)`. `model.dtype`
            says which it became.
        backend: One of `BACKENDS`; exports compute as they were written.

    Raises:
        ValueError: If it cannot be loaded whole, or not to this device, or the options do not fit each other.
        OSError: If a folder holds no export, or "default" is asked for and not installed.
        ImportError: If ONNX Runtime is missing.
    """
    name = model_source(name)
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPE_NAMES)}.")
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend == "onnxruntime" and dtype not in ("auto", "float32"):
        raise ValueError(f"Got dtype {dtype} with ONNX Runtime, which computes as the file was written; omit it.")
    # Missing files, wrong settings, damaged weights, no such device: of these, the libraries that read them raise
    # errors of many kinds.
    try:
        if backend == "onnxruntime":
            from .onnx_backend import load_onnx

            return load_onnx(name, str(device)), DepictImageProcessor.from_pretrained(name)
        _check_own(name)
        model: DepictForSemanticSegmentation
        model, loading = DepictForSemanticSegmentation.from_pretrained(
            name, dtype=native_dtype(device) if dtype == "auto" else DTYPES[dtype], output_loading_info=True
        )
        image_processor = DepictImageProcessor.from_pretrained(name)
        model = model.eval().to(device)
    except Exception as error:
        if isinstance(error, ImportError) or (backend == "onnxruntime" and isinstance(error, FileNotFoundError)):
            raise
        raise ValueError(f"cannot load the model {name} to {device}: {one_line(error)}") from error
    # transformers only logs these, and fills missing weights with random numbers.
    for kind in ("missing_keys", "unexpected_keys"):
        if loading[kind]:
            keys = ", ".join(sorted(loading[kind])[:3])
            raise ValueError(f"{name} does not hold the weights its config.json describes; {kind}: {keys}, ...")
    return model, image_processor


def _check_own(name: str | Path) -> None:
    """Refuse a folder whose weights would come from elsewhere, and the package's own model where it is damaged."""
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            "adapter_config.json in it names another model that its weights belong to; merge them by PEFT's "
            "merge_and_unload, and save the result"
        )
    if folder == DEFAULT_MODEL:
        verify(folder / "model.safetensors", DEFAULT_CHECKSUM)


def native_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bfloat16 where the processor multiplies it natively, which is faster at hardly any loss, else float32.

    CPUs do with AVX512_BF16 or AMX, GPUs if CUDA says so without emulation; of other devices it is not known.
    """
    device = torch.device(device)
    native = False
    if device.type == "cpu":
        # Before PyTorch 2.10 it is asked for each of them.
        capabilities = getattr(torch.cpu, "get_capabilities", _older_capabilities)()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    elif device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def _older_capabilities() -> dict[str, bool]:
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def override_protocol(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    size: int | None = None,
    window_size: int | Literal["none"] | None = None,
    window_stride: int | None = None,
) -> None:
    """Change how `segment` reads photographs, in place; what is None stays as the model carries it.

    Args:
        size: Pixels of the shorter side; where the longer side is bounded, its bound moves along.
        window_size: Side of the windows in pixels, or "none" for whole images.
        window_stride: Pixels between windows; where only `window_size` is given, windows overlap by as many pixels as
            before, if they are larger than that, and else not at all.

    Raises:
        ValueError: If a number is not positive, or there is a stride without a window or one that is larger than it.
    """
    numbers = {"size": size, "window_size": window_size, "window_stride": window_stride}
    for name, value in numbers.items():
        if value is not None and value != "none" and value < 1:
            raise ValueError(f"Got {name}={value}, needed at least 1 pixel.")
    settled = getattr(model, "settled", None)
    if settled and any(value is not None for value in numbers.values()):
        raise ValueError(
            f"The exported file {settled} by itself, so that no size or windows can be chosen here; export the model "
            "without --dynamic, or change its settings before."
        )
    config = model.config
    window, stride = config.window_size, config.window_stride
    if window_size is not None:
        overlap = window - (stride or window) if window else 0
        window = None if window_size == "none" else window_size
        stride = window if window is None or overlap >= window else window - overlap
    if window_stride is not None:
        if window is None:
            raise ValueError(f"Got window_stride={window_stride} for whole images; give a window_size, too.")
        if window_stride > window:
            raise ValueError(
                f"Got window_stride={window_stride}, larger than the window_size of {window}, which would skip pixels; "
                "lower the stride or enlarge the window."
            )
        stride = window_stride
    input_size = getattr(model, "input_size", None)
    if input_size is not None and window != config.window_size:
        raise ValueError(
            f"Got window_size={window_size}, but the exported file takes {input_size[0]} x {input_size[1]} pixels; "
            "export the model with other windows."
        )
    config.window_size, config.window_stride = window, stride
    if size is not None:
        shortest, longest = image_processor.size.get("shortest_edge"), image_processor.size.get("longest_edge")
        bound = {"longest_edge": size * longest // shortest} if shortest and longest else {}
        image_processor.size = SizeDict(shortest_edge=size, **bound)


def parse_window_size(text: str) -> int | Literal["none"]:
    """Parse the option `--window-size` of commands, for `override_protocol`: pixels, or "none" for whole images."""
    return "none" if text == "none" else int(text)
