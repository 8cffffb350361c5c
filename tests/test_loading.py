"""Overrides of the protocol that a model carries."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import tiny_model

from depict_hf import DepictImageProcessor
from depict_hf.inference import segment
from depict_hf.loading import load_model, native_dtype, override_protocol, parse_window_size

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("before", "overrides", "after"),
    [
        ((64, 32), {}, (64, 32)),
        ((64, 48), {"window_size": 96}, (96, 80)),  # the overlap of 16 stays
        ((64, 48), {"window_size": 16}, (16, 16)),  # and is dropped where it does not fit
        ((64, None), {"window_size": 48}, (48, 48)),
        ((None, None), {"window_size": 48}, (48, 48)),
        ((None, None), {"window_size": 48, "window_stride": 40}, (48, 40)),
        ((64, 48), {"window_stride": 64}, (64, 64)),
        ((64, 48), {"window_size": "none"}, (None, None)),
    ],
)
def test_windows(before, overrides, after):
    model = tiny_model(window_size=before[0], window_stride=before[1])
    override_protocol(model, DepictImageProcessor(), **overrides)
    assert (model.config.window_size, model.config.window_stride) == after


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 512, "longest_edge": 2048}, {"shortest_edge": 48, "longest_edge": 192}),
        ({"shortest_edge": 32}, {"shortest_edge": 48}),
        ({"height": 32, "width": 64}, {"shortest_edge": 48}),
    ],
)
def test_size_moves_the_bound_of_the_longer_side_along(size, expected, tmp_path):
    image_processor = DepictImageProcessor(size=size)
    override_protocol(tiny_model(), image_processor, size=48)
    image_processor.save_pretrained(tmp_path)
    for each in (image_processor, DepictImageProcessor.from_pretrained(tmp_path)):
        assert dict(each.size) == expected


def test_segment_follows():
    """What was overridden predicts as a model that was built so."""
    model, image_processor = tiny_model(window_size=32), DepictImageProcessor(size={"shortest_edge": 32})
    [before] = segment(model, image_processor, [PHOTO])
    override_protocol(model, image_processor, size=48, window_size=40, window_stride=24)
    built = tiny_model(window_size=40, window_stride=24)
    [expected] = segment(built, DepictImageProcessor(size={"shortest_edge": 48}), [PHOTO])
    [after] = segment(model, image_processor, [PHOTO])
    assert torch.equal(after, expected) and not torch.equal(after, before)


@pytest.mark.parametrize(
    ("window", "overrides", "message"),
    [
        (None, {"window_stride": 8}, "Got window_stride=8 for whole images; give a window_size"),
        (64, {"window_size": "none", "window_stride": 8}, "for whole images"),
        (64, {"window_stride": 65}, "larger than the window_size of 64"),
        (64, {"window_size": 8, "window_stride": 9}, "larger than the window_size of 8"),
        (64, {"window_size": 0}, "Got window_size=0, needed at least 1 pixel"),
        (64, {"size": -1}, "Got size=-1"),
    ],
)
def test_what_does_not_fit_changes_nothing(window, overrides, message):
    model, image_processor = tiny_model(window_size=window), DepictImageProcessor()
    with pytest.raises(ValueError, match=message):
        override_protocol(model, image_processor, **overrides)
    assert (model.config.window_size, dict(image_processor.size)) == (window, {"shortest_edge": 512})


def test_an_export_of_one_size_keeps_its_window():
    model = tiny_model(window_size=64)
    model.input_size = (64, 64)
    with pytest.raises(ValueError, match="the exported file takes 64 x 64 pixels"):
        override_protocol(model, DepictImageProcessor(), window_size=32)
    override_protocol(model, DepictImageProcessor(), window_stride=32)
    assert model.config.window_stride == 32


def test_option_of_commands():
    assert (parse_window_size("none"), parse_window_size("48")) == ("none", 48)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_processor_decides_the_dtype(capabilities, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert native_dtype() == native_dtype("cpu") == native_dtype(torch.device("cpu")) == expected
    tiny_model().save_pretrained(tmp_path)
    DepictImageProcessor().save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype="auto")[0].dtype == expected
    assert load_model(tmp_path)[0].dtype == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_cuda_decides_without_emulation(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: True if including_emulation else native
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert native_dtype("cuda:0") == (torch.bfloat16 if native else torch.float32)


def test_other_devices_compute_in_float32():
    assert native_dtype("mps") == torch.float32


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown dtype 'int4'; choose one of auto, float32, bfloat16, float16"):
        load_model(tmp_path, dtype="int4")
