"""Tiny models, datasets and inputs, none of them square, and what several test modules do with them.

What only a few tests need is imported where it is used: most tests need no dataset.
"""

import os
import shutil
import signal
import socket
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from packaging.version import Version

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor

# A shell starts what is to run in the background with SIGINT ignored, which would go on into every test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that share the tests share the cores, with the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

DECODER_TYPES = ("sa", "ca", "cbsa", "mask_transformer", "linear")
# Of models that are compiled, which takes seconds a layer.
ONE_LAYER = {"num_hidden_layers": 1, "decoder_num_layers": 1, "decoder_cross_num_layers": 1}
CLASSES = ("sky", "road", "tree", "car", "pole")
# Of a recipe, for two epochs of two steps on the photographs of `dataset_folder`.
FIELDS = [
    f"class_names={','.join(CLASSES)}",
    "size=28",
    "crop_size=28",
    "window_size=28",
    "window_stride=14",
    "epochs=2",
    "batch_size=2",
    "warmup_steps=1",
    "evaluate_every_epochs=1",
    "num_workers=0",
    "precision=float32",
    "cache_features=false",
]


# Up to 2.9, fake tensors on "cuda" ask the driver, which raises or ends the process where there is none.
needs_fake_cuda = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="this PyTorch has no fake CUDA without a driver"
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes share the tests: 0, this one alone, for one module, else one more than there are cores.

    Up to four; one more, since some tests wait for processes that they have started.
    """
    modules = {argument.partition("::")[0] for argument in config.args}
    if len(modules) == 1 and modules.pop().endswith(".py"):
        return 0
    return min(4, 1 + (os.cpu_count() or 1))


def tiny_config(decoder_type: str = "sa", **overrides) -> DepictConfig:
    fields = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "decoder_type": decoder_type,
        "decoder_num_layers": 2,
        "decoder_num_heads": 2,
        "decoder_head_dim": 16,
        "decoder_cross_num_layers": 2,
        "decoder_cross_head_dim": 8,
        "num_labels": 5,
    }
    return DepictConfig(**(fields | overrides))


def tiny_model(decoder_type: str = "sa", **overrides) -> DepictForSemanticSegmentation:
    """A model whose random logits differ from pixel to pixel, in evaluation mode."""
    torch.manual_seed(0)
    model = DepictForSemanticSegmentation(tiny_config(decoder_type, initializer_range=0.3, **overrides))
    return model.eval()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def save_model(folder: Path, decoder_type: str = "sa", **overrides) -> Path:
    """Write a tiny model and its image processor as `from_pretrained` reads them."""
    tiny_model(decoder_type, **overrides).save_pretrained(folder)
    DepictImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def save_backbone(folder: Path, **overrides) -> Path:
    """Write a DINOv2 of random weights that are not those of a recipe's seed."""
    import transformers

    fields = {"image_size": 28, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(123)
    transformers.Dinov2Model(transformers.Dinov2Config(**(fields | overrides))).save_pretrained(folder)
    return folder


def save_split(folder: Path, split: str, images: list, labels: list) -> Path:
    """Write a split of a dataset in the layout of the Hub.

    Args:
        images, labels: Pictures, arrays that are made pictures, or encoded files as `datasets.Image` takes them.
    """
    import datasets

    columns = {
        name: [PIL.Image.fromarray(each) if isinstance(each, np.ndarray) else each for each in column]
        for name, column in (("image", images), ("label", labels))
    }
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def save_scenes(
    folder: Path, height: int, width: int, counts: dict[str, int], share_ignored: float | None = None
) -> Path:
    """Write photographs of 4 x 4 patches of five classes that differ in brightness, with their label maps."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        rows, columns = -(-height // 4), -(-width // 4)
        ids = [rng.integers(0, 5, (4, 4), np.uint8).repeat(rows, 0).repeat(columns, 1) for _ in range(count)]
        ids = [each[:height, :width] for each in ids]
        labels = ids
        if share_ignored is not None:
            labels = [np.where(rng.random(each.shape) < share_ignored, 255, each).astype(np.uint8) for each in ids]
        save_split(folder, split, [np.stack([each * 50] * 3, axis=-1) for each in ids], labels)
    return folder


def save_labelled_by(folder: Path, model_folder: Path) -> Path:
    """Write a test split: noise on ramps, labelled by a model of five classes, with 2 to 10 wrong or ignored rows."""
    from depict_hf.inference import segment

    model = DepictForSemanticSegmentation.from_pretrained(model_folder).eval()
    image_processor = DepictImageProcessor.from_pretrained(model_folder)
    rng = np.random.default_rng(0)
    images, labels = [], []
    for index, (height, width) in enumerate([(32, 48), (40, 32), (36, 36), (32, 64), (48, 40)]):
        ramp = np.linspace(0, 200, width)[None, :, None] * rng.random((1, 1, 3))
        images.append((ramp + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))
        truth = segment(model, image_processor, [images[-1]])[0].clone()
        truth[: 2 * index] = (truth[: 2 * index] + 1) % 5
        truth[-2:] = 255
        labels.append(truth.numpy().astype(np.uint8))
    return save_split(folder, "test", images, labels)


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Have activations computed again, by the name that the installed release of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


def palette_image(ids: np.ndarray) -> PIL.Image.Image:
    """A label map as a palette image with colours for five classes."""
    image = PIL.Image.fromarray(ids, mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 1, 2, 3])
    return image


def training_arguments(
    dataset: str, backbone: str, output: Path, *fields: str, recipe: str = "camvid_dinov2_small_sa"
) -> list[str]:
    """The command line of a training run with `FIELDS`, and then the further ones."""
    return [recipe, dataset, str(output), "--backbone", backbone, *FIELDS, *fields]


def make_trainer(dataset_folder: str, backbone_folder: str, output: Path, *fields: str):
    """The trainer of such a run, before it begins."""
    from training import train
    from training.recipes import camvid_dinov2_small

    recipe = camvid_dinov2_small("sa").override([*FIELDS, f"backbone={backbone_folder}", *fields])
    return train.build_trainer(recipe, train.load_dataset_splits(dataset_folder), output)[0]


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    find_spec("selenium") is None or BROWSER is None or DRIVER is None,
    reason="selenium is not installed (pip install 'depict-hf[test]')"
    if find_spec("selenium") is None
    else "no Chromium with its driver (Debian: apt-get install chromium chromium-driver)",
)
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="gradio is not installed (pip install 'depict-hf[demo]')"
)
BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, for tests marked `needs_browser`; its logs say what it asked for and complained of."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*BROWSER_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def set_screen(browser, width: int, theme: str = "light") -> None:
    """Give the browser's page a width in pixels, and say what the user prefers, light or dark."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def faint_texts(browser) -> list[str]:
    """Elements whose text has less contrast to what is behind it than the 4.5 that WCAG asks for."""
    script = """
    const channels = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => channels(color).slice(0, 3).map(each => each / 255)
      .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
      .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
    const behind = element => {
      const color = getComputedStyle(element).backgroundColor, [, , , alpha = 1] = channels(color);
      return alpha === 1 ? color : behind(element.parentElement);
    };
    const found = [];
    for (const element of document.querySelectorAll("p, h1, h2, h3, h4, th, dd, dt, button, li, label, legend, td")) {
      if (!element.innerText || element.classList.contains("hidden") || element.closest(".gram td")) continue;
      const pair = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
      if ((pair[0] + 0.05) / (pair[1] + 0.05) < 4.5) found.push(element.outerHTML.slice(0, 80));
    }
    return found"""
    return browser.execute_script(script)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory) -> str:
    """Photographs of 32 x 48 pixels, a tenth of whose pixels have no label."""
    counts = {"train": 5, "validation": 3, "test": 2}
    return str(save_scenes(tmp_path_factory.mktemp("scenes"), 32, 48, counts, share_ignored=0.1))


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    """A DINOv2 with drop path, which a frozen encoder must not apply."""
    return str(save_backbone(tmp_path_factory.mktemp("backbone"), drop_path_rate=0.5))


@pytest.fixture
def datasets_cache(tmp_path_factory, monkeypatch) -> Path:
    """What `datasets` keeps of what it reads ends up in a folder of the test's own."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(params=DECODER_TYPES)
def decoder_type(request) -> str:
    return request.param


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Two images of 32 x 48 pixels: 4 x 6 patches."""
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def image_processor() -> DepictImageProcessor:
    return DepictImageProcessor(size={"shortest_edge": 32})
