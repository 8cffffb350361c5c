"""What must be right on a GPU, without one: fake CUDA tensors raise where devices mix or a value is read back."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import needs_fake_cuda, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes as no_modes
from transformers import Dinov2Config
from transformers.initialization import no_init_weights

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.inference import segment, segment_stream

pytestmark = needs_fake_cuda

BACKBONE = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)


def on_cuda(decoder_type: str = "sa", **overrides) -> DepictForSemanticSegmentation:
    """A model that was real, on the CPU, before it was moved."""
    with no_modes():
        model = tiny_model(decoder_type, **overrides)
    return model.to("cuda")


def backward(loss: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """Gradients by leaf, node by node; PyTorch's own engine needs a driver to wait for CUDA's streams."""
    order, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    arriving = {loss.grad_fn: {0: torch.ones_like(loss)}}
    gradients = {}
    for node in reversed(order):
        values = arriving.pop(node, {})
        if hasattr(node, "variable"):
            gradients[node.variable] = values[0]
            continue
        with torch.no_grad():
            arguments = [values.get(index) for index in range(max(values, default=0) + 1)]
            written_in_python = getattr(node, "_forward_cls", None)
            results = written_in_python.backward(node, *arguments) if written_in_python else node(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        for (following, index), value in zip(node.next_functions, results, strict=False):
            if following is not None and value is not None:
                value = value.sum_to_size(following._input_metadata[index].shape)  # of what was broadcast
                total = arriving.setdefault(following, {})
                total[index] = value if index not in total else total[index] + value
    return gradients


@pytest.fixture(autouse=True)
def fake_cuda():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture(params=["sa", "ca", "cbsa", "mask_transformer", "linear", "backbone", "moved"])
def build(request):
    """Makes a model on fake CUDA: with each decoder, with a backbone, or moved there after it was made."""

    def build(**overrides) -> DepictForSemanticSegmentation:
        if request.param == "moved":
            return on_cuda(**overrides)
        if request.param == "backbone":
            overrides["backbone_config"] = BACKBONE
        decoder_type = "sa" if request.param == "backbone" else request.param
        # Drawing from a truncated normal distribution ends when values that are read say so.
        with torch.device("cuda"), no_init_weights():
            return DepictForSemanticSegmentation(tiny_config(decoder_type, **overrides)).eval()

    return build


def check(tensor: torch.Tensor, shape: tuple[int, ...], device: str = "cuda") -> None:
    assert isinstance(tensor, FakeTensor)
    assert (tensor.device.type, tuple(tensor.shape)) == (device, shape)


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, device="cuda")


@pytest.mark.parametrize("size", [(32, 48), (30, 41)])
def test_forward(build, size):
    grid = (4, 6) if size == (32, 48) else size
    check(build()(images(*size)).logits, (2, 5, *grid))


@pytest.mark.parametrize("size", [(32, 64), (45, 71), (24, 50)])
def test_windows(build, size):
    """Of one row, of several that overlap by more than half, and of an image that is enlarged first."""
    check(build(window_size=32, window_stride=20)(images(*size)).logits, (2, 5, *size))


@pytest.mark.parametrize(("size", "ids"), [((32, 48), torch.int64), ((30, 41), torch.uint8)])
def test_a_training_step(build, size, ids):
    model = build().train()
    labels = torch.zeros(2, 37, 53, dtype=ids, device="cuda")
    loss = model(images(*size), labels=labels).loss
    check(loss, ())
    gradients = backward(loss)
    for name, parameter in model.named_parameters():
        if not name.endswith("mask_token"):  # of a backbone that was trained by masking patches
            check(gradients[parameter], tuple(parameter.shape))


def test_loss_of_windows(build):
    model = build(window_size=32, window_stride=20)
    loss = model(images(32, 64), labels=torch.zeros(2, 32, 64, dtype=torch.long, device="cuda")).loss
    check(loss, ())
    assert len(backward(loss)) > 20


@pytest.mark.parametrize("targets", [None, [(50, 70), (131, 20)]])
def test_label_maps_of_logits(build, targets):
    maps = DepictImageProcessor().post_process_semantic_segmentation(build()(images(32, 48)), targets)
    for each, size in zip(maps, targets or [(4, 6)] * 2, strict=True):
        check(each, size)
        assert each.dtype == torch.int64


@pytest.mark.parametrize(
    ("windows", "options", "return_confidence"),
    [
        ({}, {}, False),
        ({}, {}, True),
        ({"window_size": 32, "window_stride": 12}, {}, False),
        ({"window_size": 32, "window_stride": 12}, {"scales": (0.5, 1.5), "flip": True}, True),
    ],
)
def test_segment(build, windows, options, return_confidence):
    """Photographs that are prepared on the CPU; the result is copied there, and nothing else."""
    model, processor = build(temperature=1.5, **windows), DepictImageProcessor(size={"shortest_edge": 32})
    photos = [np.zeros((50, 70, 3), np.uint8), PIL.Image.new("RGB", (40, 90))]
    results = segment(model, processor, photos, **options, return_confidence=return_confidence)
    for result, size in zip(results, [(50, 70), (90, 40)], strict=True):
        for part, dtype in zip(
            result if return_confidence else [result], (torch.int64, torch.float32, torch.float32), strict=False
        ):
            check(part, size, "cpu")
            assert part.dtype == dtype


def test_what_was_kept_before_serves_fake_tensors_and_fake_ones_are_not_kept():
    """The same sizes with real tensors before, under the mode, and after; sizes that no other test has."""
    processor = DepictImageProcessor(size={"shortest_edge": 32})
    photos = [np.full((57, 73, 3), 9, np.uint8), np.full((57, 79, 3), 9, np.uint8)]
    with no_modes():
        model = tiny_model("ca", window_size=32)
        [before] = segment(model, processor, photos[:1], return_confidence=True)
    check(segment(on_cuda("ca", window_size=32), processor, photos[:1])[0], (57, 73), "cpu")
    check(segment(on_cuda("ca", window_size=32), processor, photos[1:])[0], (57, 79), "cpu")
    with no_modes():
        for photo in photos:
            [after] = segment(model, processor, [photo], return_confidence=True)
            assert not any(isinstance(part, FakeTensor) for part in after)
        assert torch.equal(segment(model, processor, photos[:1])[0], before.labels)


def test_without_permission_to_mix_real_tensors_in():
    """Nothing that the engine makes is a real tensor under the mode, which may forbid them."""
    with no_modes(), FakeTensorMode(), torch.device("cuda"), no_init_weights():
        model = DepictForSemanticSegmentation(tiny_config("ca", window_size=32, window_stride=12)).eval()
        logits = model(torch.randn(1, 3, 45, 71)).logits
        check(logits, (1, 5, 45, 71))
        loss = model.train()(torch.randn(1, 3, 32, 41), labels=torch.zeros(1, 32, 41, dtype=torch.long)).loss
        assert len(backward(loss)) > 20


def test_the_harness_raises():
    """Without these errors the tests above would show nothing."""
    model = on_cuda()
    logits = model(images(32, 48)).logits
    with pytest.raises(Exception, match=r"item|data-dependent|local_scalar_dense|Unhandled FakeTensor"):
        logits.sum().item()
    with pytest.raises(Exception, match=r"nonzero|[Dd]ynamic"):
        logits[logits > 0]
    with pytest.raises(RuntimeError, match=r"found at least two devices|Unhandled FakeTensor Device"):
        logits + torch.zeros(2, 5, 4, 6, device="cpu")
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        next(
            segment_stream(
                _OnCpu(model), DepictImageProcessor(size={"shortest_edge": 32}), [np.zeros((50, 70, 3), np.uint8)]
            )
        )


class _OnCpu:
    """A model that says that it is on the CPU, so that photographs stay there."""

    training, device = False, torch.device("cpu")

    def __init__(self, model: DepictForSemanticSegmentation):
        self.config, self._model = model.config, model

    def __call__(self, pixel_values: torch.Tensor):
        return self._model(pixel_values)
