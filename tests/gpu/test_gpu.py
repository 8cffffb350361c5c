"""What only a GPU can show, by `make gpu`; with DEPICT_TEST_DEVICE=cpu, what of it a CPU can show, as a rehearsal."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import DECODER_TYPES, tiny_config, tiny_model
from PIL import Image
from safetensors.torch import load_file

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.conversion import convert_checkpoint
from depict_hf.inference import segment
from depict_hf.windows import resize_bilinear
from training.data import Normalization
from training.optimization import RecipeLoss

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = sorted((REPOSITORY / "tests" / "data" / "published").iterdir())
LOSSES = {
    "own": None,
    "weighted": {"class_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])},
    "focal": {"focal_gamma": 1.5},
    "dice": {"dice_weight": 0.7},
}
CLASSES = ("sky", "road", "tree", "car", "pole")


@pytest.fixture(scope="module")
def device() -> torch.device:
    device = torch.device(os.environ.get("DEPICT_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture
def cuda(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("only CUDA has it")
    return device


@pytest.fixture
def exact():
    """Products in float32 without rounding to TF32, for comparisons with the CPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def photograph(height: int = 70, width: int = 110) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def training_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Bytes as the data loader brings them; the last rows of the second image are padding."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 32, 48), generator=generator, dtype=torch.uint8)
    labels[1, 20:] = 255
    batch = {
        "pixel_values": torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8),
        "labels": labels,
        "input_size": torch.tensor([[32, 48], [20, 48]]),
    }
    return {name: each.to(device) for name, each in batch.items()}


def training_pass(model, normalize: Normalization, loss: RecipeLoss | None, batch: dict[str, torch.Tensor]):
    """Loss of a batch of bytes, and its gradients in the model."""
    pixel_values = normalize(batch["pixel_values"], batch["input_size"])
    if loss is None:
        value = model(pixel_values, labels=batch["labels"]).loss
    else:
        value = loss(model(pixel_values).logits, batch["labels"])
    value.backward()
    return value


def make_loss(name: str) -> RecipeLoss | None:
    return None if LOSSES[name] is None else RecipeLoss(**LOSSES[name])


def normalization() -> Normalization:
    return Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_logits_are_those_of_the_published_code(folder, device, exact):
    expected = load_file(folder / "expected.safetensors")
    model = convert_checkpoint(folder)[0].eval().to(device)
    with torch.inference_mode():
        model.config.window_size = None
        pixel_values = expected["forward.pixel_values"].to(device)
        logits = resize_bilinear(model(pixel_values).logits, pixel_values.shape[-2:]).cpu()
    stride = model.config.num_labels // expected["forward.logits"].shape[1]
    torch.testing.assert_close(logits[:, ::stride], expected["forward.logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_label_maps_are_those_of_the_cpu(decoder_type, tf32, device, exact):
    """By windows. Scores differ in their last bits, so that a tie may fall the other way: one pixel in a thousand.

    With TF32 the network is rounded, but not how its scores are enlarged: nine of ten pixels stay.
    """
    processor = DepictImageProcessor(size={"shortest_edge": 70})
    [expected] = segment(tiny_model(decoder_type, window_size=32, window_stride=24), processor, [photograph()])
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    model = tiny_model(decoder_type, window_size=32, window_stride=24).to(device)
    [found] = segment(model, processor, [photograph()])
    agreement = (torch.as_tensor(found).cpu() == torch.as_tensor(expected)).float().mean().item()
    assert agreement >= (0.9 if tf32 else 0.999)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_half_precision_is_near_float32(decoder_type, dtype, device, exact):
    pixel_values = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)).to(device)
    model = tiny_model(decoder_type).to(device)
    with torch.inference_mode():
        expected = model(pixel_values).logits
        logits = model.to(dtype)(pixel_values).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    error = (logits.float() - expected).square().mean() / expected.square().mean()
    assert error.sqrt() < 0.05


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_the_cpu(name, device, exact):
    found = []
    for place in (torch.device("cpu"), device):
        model = tiny_model("sa").train().to(place)
        value = training_pass(model, normalization(), make_loss(name), training_batch(place))
        found.append((value.cpu(), [each.grad.cpu() for each in model.parameters() if each.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_a_training_step_waits_for_nothing(decoder_type, name, cuda):
    """After the first one, which copies constants and loads kernels."""
    model = tiny_model(decoder_type).train().to(cuda)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    normalize, loss, batch = normalization(), make_loss(name), training_batch(cuda)
    training_pass(model, normalize, loss, batch)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        training_pass(model, normalize, loss, batch)
        optimizer.step()
        optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
def test_windows_wait_for_nothing(decoder_type, cuda):
    model = tiny_model(decoder_type, window_size=32, window_stride=24).to(cuda)
    pixel_values = torch.randn(1, 3, 70, 110, device=cuda)
    with torch.inference_mode():
        model(pixel_values)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            model(pixel_values)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("decoder_type", ["sa", "mask_transformer", "linear"])
def test_attention_kernels_compute_the_same(implementation, decoder_type, cuda):
    """With heads of 64 numbers, as both kernels take them, in bfloat16."""
    if implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("needs the package flash_attn")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 128, "decoder_head_dim": 64}
    torch.manual_seed(0)
    config = tiny_config(decoder_type, initializer_range=0.3, **sizes)
    model = DepictForSemanticSegmentation(config).eval().to(cuda, torch.bfloat16)
    pixel_values = torch.randn(2, 3, 32, 48, device=cuda, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(pixel_values).logits.float()
        model.set_attn_implementation(implementation)
        logits = model(pixel_values).logits.float()
    error = (logits - expected).square().mean() / expected.square().mean()
    assert error.sqrt() < 0.05


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    """Photographs of 32 x 48 pixels whose classes differ in brightness, in the layout of the Hub."""
    folder = tmp_path_factory.mktemp("scenes")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("validation", 3), ("test", 2)):
        ids = [rng.integers(0, 5, (4, 4), np.uint8).repeat(8, 0).repeat(12, 1) for _ in range(count)]
        columns = {
            "image": [Image.fromarray(np.stack([each * 50] * 3, axis=-1)) for each in ids],
            "label": [Image.fromarray(each) for each in ids],
        }
        dataset = datasets.Dataset.from_dict(columns, features=features)
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    """A tiny native model that runs start from."""
    folder = tmp_path_factory.mktemp("start")
    names = dict(enumerate(CLASSES))
    fields = {"drop_path_rate": 0.3, "id2label": names, "label2id": {name: index for index, name in names.items()}}
    torch.manual_seed(0)
    DepictForSemanticSegmentation(tiny_config("sa", **fields)).save_pretrained(folder)
    return str(folder)


def command(scenes: str, start: str, output: Path, *fields: str) -> list[str]:
    options = [
        f"class_names={','.join(CLASSES)}",
        f"start_from={start}",
        "reduce_labels=false",
        "size=32",
        "crop_size=32",
        "window_size=none",
        "window_stride=none",
        "final_window_stride=none",
        "epochs=4",
        "batch_size=4",
        "evaluate_every_epochs=2",
        "num_workers=1",
        "test_split=test",
        "report_to=none",
    ]
    return ["-m", "training.train", "ade20k_vit_tiny_sa", scenes, str(output), *options, *fields]


def run_processes(commands: list[list[str]], environment: list[dict[str, str]]) -> None:
    processes = [
        subprocess.Popen([sys.executable, *each], cwd=REPOSITORY, env=os.environ | variables)
        for each, variables in zip(commands, environment, strict=True)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)


@pytest.mark.parametrize("fields", [["precision=fp16"], ["precision=bf16"], ["tf32=true"], ["compile=true"]], ids=str)
def test_a_run_in_each_precision(fields, scenes, start, tmp_path, device):
    """Trains, evaluates, saves finite weights, and goes on from its checkpoint; fp16 with its gradients' scale."""
    if device.type == "cpu" and fields[0] in ("precision=fp16", "compile=true"):
        pytest.skip("is refused on a CPU, or takes minutes")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_processes([command(scenes, start, whole, *fields)], [{"CUDA_VISIBLE_DEVICES": "0"}])
    weights = load_file(whole / "model.safetensors")
    assert all(torch.isfinite(each).all() for each in weights.values())
    assert (whole / "checkpoint-8" / "scaler.pt").exists() == ("precision=fp16" in fields)
    assert 0 <= json.loads((whole / "evaluation.json").read_text())["mean_iou"] <= 1
    resumed.mkdir()
    for name in ("checkpoint-4", "recipe.json"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, resumed / name)
    arguments = [*command(scenes, start, resumed, *fields), "--resume"]
    run_processes([arguments], [{"CUDA_VISIBLE_DEVICES": "0"}])
    again = load_file(resumed / "model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, atol=1e-3, rtol=0, msg=name)


def test_two_gpus_train_as_one(scenes, start, tmp_path, cuda):
    """With NCCL, and drop path, weighted classes and two passes in a step."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    fields = ["accumulation_steps=2", "class_balance=1"]
    run_processes([command(scenes, start, tmp_path / "one", *fields)], [{"CUDA_VISIBLE_DEVICES": "0"}])
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    run_processes(
        [command(scenes, start, tmp_path / "two", *fields)] * 2,
        [launched | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")],
    )
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0, msg=name)
