"""Both sides of every task do the same work on the same weights; ratios point the way their names say."""

import json
import re

import pytest
import torch
from conftest import tiny_model

from training.benchmark import main
from training.evidence import benchmark, benchmark_tasks
from training.evidence.benchmark import render, run_task
from training.evidence.benchmark_tasks import (
    Side,
    Task,
    attention_bytes,
    end_to_end,
    other_models,
    stages,
    training_step,
)

CPU = torch.device("cpu")


@pytest.fixture
def no_onnx(monkeypatch):
    monkeypatch.setattr(benchmark_tasks, "find_spec", lambda name: None)


def results(task: Task) -> list:
    return [side.run() for side in task.sides.values()]


@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.5), "flip": True}], ids=["single", "multi"])
def test_label_maps_of_both_sides_agree(options, no_onnx):
    photo = benchmark_tasks.random_photo(32, 43)
    task = end_to_end({"ours": tiny_model(window_size=32, window_stride=20)}, photo, batch=2, **options)
    reference, ours = results(task)
    assert len(reference) == len(ours) == 2
    assert reference[0].shape == (32, 43) and reference[0].unique().numel() > 1
    assert (reference[0] == ours[0]).float().mean() > 0.999


def test_stages_of_both_sides_agree(decoder_type):
    forward, encoder, decoder, maps = stages({"ours": tiny_model(decoder_type)}, size=32, batch=2)
    torch.testing.assert_close(*results(forward), atol=1e-4, rtol=1e-3)
    (patches, grid), (our_patches, our_grid) = results(encoder)
    torch.testing.assert_close(patches, our_patches, atol=1e-5, rtol=1e-4)
    assert tuple(grid) == tuple(our_grid) == (4, 4)
    torch.testing.assert_close(*results(decoder), atol=1e-4, rtol=1e-3)
    reference, ours = results(maps)
    assert torch.equal(reference, torch.stack(list(ours)).to(reference.dtype))


def test_training_steps_of_both_sides_agree(decoder_type):
    """The second loss depends on the first step."""
    task = training_step(tiny_model(decoder_type), size=32, batch=2)
    first, second = results(task), results(task)
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*second)
    assert first[0] != second[0]


def test_lower_precision_keeps_the_weights():
    model = tiny_model()
    models = benchmark_tasks.in_dtypes(model, [torch.float32, torch.bfloat16])
    assert models["depict_hf float32"] is model and model.dtype == torch.float32
    bf16 = models["depict_hf bfloat16"]
    assert bf16.dtype == torch.bfloat16
    assert torch.equal(bf16.decoder.class_tokens, model.decoder.class_tokens.to(torch.bfloat16))


def test_attention_bytes():
    """Five tokens of five classes join 4 x 6 patches in "sa"; the encoder has a class token and one head more."""
    assert attention_bytes(tiny_model("sa").config, (32, 48), 2) == 4 * 2 * 3 * 25**2
    assert attention_bytes(tiny_model("sa", num_labels=50).config, (32, 48), 2) == 4 * 2 * 2 * 74**2


def test_ratios(monkeypatch):
    """The reference takes 3 s, 8 bytes and 30 FLOPs, the other 2 s, 2 bytes and 10; the matrix product 1e9 FLOP/s."""
    values = {"reference": (3.0, 8, 30), "ours": (2.0, 2, 10)}
    sides = {name: Side(lambda name=name: name) for name in values} | {"huge": Side(print, attention_bytes=10**18)}
    monkeypatch.setattr(benchmark, "count_flops", lambda run: values[run()][2])
    monkeypatch.setattr(benchmark, "peak_extra_bytes", lambda run, device: values[run()][1])
    monkeypatch.setattr(benchmark, "matrix_product", lambda dtype, device: (lambda: "product", 10**9))
    monkeypatch.setattr(
        benchmark,
        "interleaved_seconds",
        lambda functions, *args, **kwargs: {name: [values.get(name, (1.0,))[0]] * 2 + [50.0] for name in functions},
    )
    task = Task("work", "sa", (3, 4), 1, sides, left_out={"absent": "needs more"})
    record = run_task(task, 3, 1.0, CPU)
    ours = record["sides"]["ours"]
    assert (ours["median_seconds"], ours["speed_up"], ours["memory_ratio"], ours["flops"]) == (2.0, 1.5, 0.25, 10)
    assert ours["share_of_matrix_product_rate"] == pytest.approx(10 / 2 / 1e9)
    assert record["sides"]["huge"] == {"left_out": "attention weights do not fit into memory"}
    lines = render(record).splitlines()
    assert [line.split()[-7:-5] for line in lines[:2]] == [["3000.0", "1.00"], ["2000.0", "1.50"]]
    assert lines[2].split(maxsplit=1)[1] == "left out: needs more"


def test_command_writes_what_it_prints(tmp_path, capsys, no_onnx):
    path = tmp_path / "results.json"
    options = ["--encoder", "vit_tiny_patch16_384", "--sizes", "64", "--labels", "7", "--repetitions", "1"]
    assert main([*options, "--dtypes", "float32", "--what", "photo", "stages", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert [task["what"] for task in record["tasks"]] == [
        "photograph to label map",
        "forward",
        "encoder",
        "decoder",
        "logits to label map",
    ]
    for task in record["tasks"]:
        assert render(task) in printed
        ours, reference = task["sides"]["depict_hf float32"], task["sides"]["straightforward float32"]
        assert ours["speed_up"] == reference["median_seconds"] / ours["median_seconds"]
        if task["what"] in ("forward", "encoder", "decoder"):  # label maps are upsampled by matrix products in ours
            assert ours["flops"] == reference["flops"]
    assert "left out: needs the extra" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "100"], r"--sizes: got \[100\], needed multiples of the patch \(16 pixels\) from 64 on"),
        (["--batches", "0"], r"--batches: got \[0\], needed at least 1"),
        (["--decoders", "mlp"], "invalid choice: 'mlp'"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_other_models_give_label_maps():
    task = other_models(tiny_model(num_labels=7), size=64, batch=2)
    for name, side in task.sides.items():
        maps = side.run()
        assert [tuple(each.shape) for each in maps] == [(64, 64)] * 2, name
        assert max(each.max() for each in maps) < 7, name


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_label_map():
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    photo = benchmark_tasks.random_photo(32, 43)
    task = end_to_end({"ours": tiny_model(window_size=32, window_stride=20)}, photo)
    reference, _, exported = results(task)
    assert (reference[0] == exported[0]).float().mean() > 0.999
    sides = run_task(task, repetitions=1, budget_seconds=1, device=torch.device("cpu"))["sides"]
    # Its arithmetic is not PyTorch's to count.
    assert [bool(side["flops"]) for side in sides.values()] == [True, True, False]
