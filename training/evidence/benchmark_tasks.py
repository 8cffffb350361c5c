"""What `training.benchmark` compares: the same task done by several sides."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.conversion import PUBLISHED_OVERLAP
from depict_hf.inference import segment
from depict_hf.vit import LayerRecord

from .baseline import StraightforwardModel
from .paper import PUBLISHED_SCALES as PUBLISHED_SCALES

PUBLISHED_WINDOW = 512
REFERENCE = "straightforward"
OURS = "depict_hf"
EOMT = "EoMT-S"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Side:
    """One way to do a task.

    Args:
        run: Does it once.
        dtype: Type that it computes in.
        attention_bytes: Size of the largest matrix of attention weights that it forms; 0 for fused attention.
        count_flops: Whether its arithmetic is PyTorch's, so that it can be counted.
    """

    run: Callable[[], object]
    dtype: torch.dtype = torch.float32
    attention_bytes: int = 0
    count_flops: bool = True


@dataclass(frozen=True)
class Task:
    """One task, by every side that can do it; ratios are to the first side.

    Args:
        what: Is done.
        decoder: Kind of decoder of our model; empty where other models take part.
        size: (height, width) of the images in pixels.
        batch: Images at a time.
        sides: Sides by name.
        count_flops: Whether counting, which costs a run of every side, is worth it.
        left_out: Reasons, by the names of sides that cannot do it here.
    """

    what: str
    decoder: str
    size: tuple[int, int]
    batch: int
    sides: dict[str, Side]
    count_flops: bool = True
    left_out: dict[str, str] = field(default_factory=dict)


def build_model(
    encoder: str, decoder_type: str, num_labels: int, device: torch.device, window_size: int | None = None
) -> DepictForSemanticSegmentation:
    """Build a model with random weights, the same at every call, without dropout and in evaluation mode.

    Args:
        window_size: Pixels of the windows that larger images are cut into, which overlap as published.
    """
    torch.manual_seed(0)
    fields = {"decoder_type": decoder_type, "num_labels": num_labels, "decoder_dropout": 0.0}
    if window_size is not None:
        fields |= {"window_size": window_size, "window_stride": window_size - PUBLISHED_OVERLAP}
    return DepictForSemanticSegmentation(DepictConfig.from_preset(encoder, **fields)).eval().to(device)


def in_dtypes(
    model: DepictForSemanticSegmentation, dtypes: Sequence[torch.dtype]
) -> dict[str, DepictForSemanticSegmentation]:
    """Return the model under the name of each dtype, float32 itself and copies otherwise."""
    return {
        f"{OURS} {dtype_name(dtype)}": model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
        for dtype in dtypes
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_photo(height: int, width: int) -> np.ndarray:
    """Draw a smooth random photograph, `(height, width, 3)` uint8, the same at every call."""
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 255
    photo = F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 255)
    return photo[0].permute(1, 2, 0).to(torch.uint8).contiguous().numpy()


def attention_bytes(config: DepictConfig, size: tuple[int, int], batch: int) -> int:
    """Return the bytes of the largest matrix of attention weights that the straightforward way forms, float32."""
    tokens = (size[0] // config.patch_size) * (size[1] // config.patch_size) + 1
    largest = config.num_attention_heads * tokens**2
    if config.decoder_type in ("sa", "mask_transformer"):
        largest = max(largest, config.decoder_num_heads * (tokens - 1 + config.num_labels) ** 2)
    return 4 * batch * largest


def end_to_end(
    models: dict[str, DepictForSemanticSegmentation],
    photo: np.ndarray,
    batch: int = 1,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Task:
    """Time photographs in memory to label maps at their own size, by windows.

    Args:
        models: Ours, by name; the first one's weights are the reference's.
        photo: `batch` times the same one; its shorter side is the image processor's size.
    """
    model = next(iter(models.values()))
    image_processor = DepictImageProcessor(size={"shortest_edge": min(photo.shape[:2])})
    straightforward = StraightforwardModel(model)
    sides = {
        f"{REFERENCE} float32": Side(
            lambda: [straightforward.segment(image_processor, photo, scales, flip) for _ in range(batch)]
        )
    }
    for name, ours in models.items():
        sides[name] = Side(partial(segment, ours, image_processor, [photo] * batch, scales, flip), ours.dtype)
    left_out = {}
    if not flip and model.device.type == "cpu":
        if all(find_spec(package) for package in ONNX_PACKAGES):
            exported = _export(model, image_processor)
            sides[f"{OURS} onnxruntime"] = Side(
                lambda: segment(exported, image_processor, [photo] * batch), count_flops=False
            )
        else:
            left_out[f"{OURS} onnxruntime"] = 'needs the extra: pip install ".[onnx]"'
    what = "multi-scale with flips" if flip else "photograph to label map"
    return Task(what, model.config.decoder_type, photo.shape[:2], batch, sides, not flip, left_out)


def _export(model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor):
    """Return the model in ONNX Runtime."""
    from depict_hf.export import export_model
    from depict_hf.onnx_backend import load_onnx

    with tempfile.TemporaryDirectory() as folder:
        export_model(model, image_processor, Path(folder))
        return load_onnx(folder)


def stages(models: dict[str, DepictForSemanticSegmentation], size: int, batch: int) -> list[Task]:
    """Time the forward pass to logits on the patch grid, encoder and decoder alone, and logits to label maps."""
    model = next(iter(models.values()))
    straightforward = StraightforwardModel(model)
    images = torch.randn(batch, 3, size, size, device=model.device)
    grid_size = (size // model.config.patch_size,) * 2
    patches = torch.randn(batch, grid_size[0] * grid_size[1], model.config.hidden_size, device=model.device)
    logits = torch.randn(batch, model.config.num_labels, *grid_size, device=model.device)
    image_processor = DepictImageProcessor()
    functions = {
        "forward": (
            lambda x: straightforward.decode(*straightforward.encode(x)),
            lambda ours, x: ours(x).logits,
            images,
        ),
        "encoder": (straightforward.encode, lambda ours, x: ours.encoder(x, LayerRecord()), images),
        "decoder": (
            lambda x: straightforward.decode(x, grid_size),
            lambda ours, x: ours.decoder(x, grid_size),
            patches,
        ),
        "logits to label map": (
            lambda x: F.interpolate(x, size=(size, size), mode="bilinear").softmax(dim=1).argmax(dim=1),
            lambda ours, x: image_processor.post_process_semantic_segmentation(
                SimpleNamespace(logits=x), [(size, size)] * batch
            ),
            logits,
        ),
    }
    tasks = []
    for what, (reference, ours_function, inputs) in functions.items():
        formed = 0 if what == "logits to label map" else attention_bytes(model.config, (size, size), batch)
        sides = {f"{REFERENCE} float32": Side(_inference(reference, inputs), attention_bytes=formed)}
        for name, ours in models.items():
            sides[name] = Side(_inference(ours_function, ours, inputs.to(ours.dtype)), ours.dtype)
        tasks.append(Task(what, model.config.decoder_type, (size, size), batch, sides))
    return tasks


def training_step(model: DepictForSemanticSegmentation, size: int, batch: int) -> Task:
    """Time forward pass, loss, backward pass, and the step of the recipes' SGD, float32; the task returns the loss."""
    images = torch.randn(batch, 3, size, size, device=model.device)
    labels = torch.randint(0, model.config.num_labels, (batch, size, size), device=model.device)
    ours, reference = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    straightforward = StraightforwardModel(reference)
    formed = attention_bytes(model.config, (size, size), batch) * (
        model.config.num_hidden_layers + model.config.decoder_num_layers
    )
    sides = {
        f"{REFERENCE} float32": Side(
            _step(reference, lambda: straightforward.loss(images, labels)), attention_bytes=formed
        ),
        f"{OURS} float32": Side(_step(ours, lambda: ours(images, labels=labels).loss)),
    }
    return Task("training step", model.config.decoder_type, (size, size), batch, sides)


def other_models(model: DepictForSemanticSegmentation, size: int, batch: int) -> Task:
    """Time normalised images to label maps of the same size: ours, then transformers' models with random weights."""
    images = torch.randn(batch, 3, size, size, device=model.device)
    targets = [(size, size)] * batch
    sides = {f"{OURS} {model.config.decoder_type}": Side(_to_maps(model, DepictImageProcessor(), images, targets))}
    for name, (other, processor) in _build_others(model.config.num_labels, size).items():
        sides[name] = Side(_to_maps(other.eval().to(model.device), processor, images, targets))
    left_out = {} if EOMT in sides else {EOMT: "needs scipy: pip install scipy"}
    return Task("images to label maps", "", (size, size), batch, sides, left_out=left_out)


def _build_others(num_labels: int, size: int) -> dict[str, tuple[nn.Module, object]]:
    """Build models of the published sizes with image processors, by name; EoMT only where scipy, for its loss, is."""
    labels = {"id2label": {index: str(index) for index in range(num_labels)}}
    b2 = {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
    segformer_processor = transformers.SegformerImageProcessor()
    others = {
        "SegFormer-B0": (
            transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**labels)),
            segformer_processor,
        ),
        "SegFormer-B2": (
            transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**b2, **labels)),
            segformer_processor,
        ),
        "DPT (ViT-B/16)": (
            transformers.DPTForSemanticSegmentation(transformers.DPTConfig(image_size=size, **labels)),
            transformers.DPTImageProcessor(),
        ),
    }
    if find_spec("scipy"):
        small = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3}
        config = transformers.EomtConfig(image_size=size, num_queries=100, **small, **labels)
        processor = transformers.EomtImageProcessor(size={"shortest_edge": size, "longest_edge": size})
        others[EOMT] = (transformers.EomtForUniversalSegmentation(config), processor)
    return others


def _to_maps(model: nn.Module, image_processor, images: Tensor, targets: list[tuple[int, int]]) -> Callable:
    def run() -> list[Tensor]:
        with torch.inference_mode():
            return image_processor.post_process_semantic_segmentation(model(images), targets)

    return run


def _inference(function: Callable, *arguments) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return function(*arguments)

    return run


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def run() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return run
