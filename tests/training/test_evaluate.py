"""Figures, costs and pictures of `python -m training.evaluate`; the truth is a tiny model's own maps, disturbed."""

import json
import multiprocessing
import os
import socket
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import datasets
import evaluate as hf_evaluate
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState
from conftest import save_labelled_by, save_model, tiny_model

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.export import export_model
from depict_hf.inference import score_stream, segment
from depict_hf.loading import load_model
from training import evaluate
from training.data.loading import load_dataset_splits
from training.data.samples import SegmentationDataset
from training.evaluation import evaluate_split as evaluation
from training.evaluation.corruptions import Corruption
from training.evaluation.evaluate_split import Execution, Protocol, spread
from training.evaluation.metrics import MeanIoU
from training.evaluation.worst_images import WorstImages

FIGURES = ("mean_iou", "mean_accuracy", "overall_accuracy", "per_class_iou", "per_class_accuracy", "num_images")
METRIC_SCRIPT = '''
"""Stands in for the real metric: the same interface, per-class areas summed over the images."""
import datasets
import evaluate
import numpy as np


class Areas(evaluate.Metric):
    def _info(self):
        images = {"predictions": datasets.Image(), "references": datasets.Image()}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(images)
        )

    def _compute(self, predictions, references, num_labels, ignore_index, reduce_labels=False):
        both, either, true = np.zeros((3, num_labels))
        for prediction, reference in zip(predictions, references):
            prediction, reference = np.array(prediction), np.array(reference)
            kept = reference != IGNORED
            for label in range(num_labels):
                found, meant = prediction[kept] == label, reference[kept] == label
                both[label] += (found & meant).sum()
                either[label] += (found | meant).sum()
                true[label] += meant.sum()
        return {
            "mean_iou": np.nanmean(both / either),
            "mean_accuracy": np.nanmean(both / true),
            "overall_accuracy": both.sum() / true.sum(),
            "per_category_iou": both / either,
            "per_category_accuracy": both / true,
        }
'''


@pytest.fixture(scope="module")
def labelled_folder(tmp_path_factory, model_folder) -> Path:
    return save_labelled_by(tmp_path_factory.mktemp("dataset"), model_folder)


@pytest.fixture(scope="module")
def loaded(model_folder, labelled_folder):
    model = DepictForSemanticSegmentation.from_pretrained(model_folder).eval()
    samples = SegmentationDataset(load_dataset_splits(labelled_folder)["test"], 5)
    return model, DepictImageProcessor.from_pretrained(model_folder), samples


def run_command(*arguments) -> int:
    return evaluate.main([*map(str, arguments), "--workers", "0"])


def count_alone(loaded, indices, corruption=None, **options) -> dict:
    """Image by image, by the metric's slower way."""
    model, image_processor, samples = loaded
    metric = MeanIoU(5)
    for index in indices:
        image = samples[index]["image"]
        image = image if corruption is None else corruption(image, index)
        predictions = segment(model, image_processor, [image.permute(1, 2, 0).numpy()], **options)
        metric.add_batch(predictions=predictions, references=[samples[index]["labels"]])
    return metric.compute()


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_the_record_counts_every_photograph_once(loaded, batch_size, workers):
    record = evaluation.evaluate(*loaded, execution=Execution(batch_size, workers))
    expected = count_alone(loaded, range(5))
    assert 0.5 < expected["mean_iou"] < 0.9
    # Photographs that share a forward pass may differ from single ones by rounding.
    assert record["mean_iou"] == pytest.approx(expected["mean_iou"], abs=2e-3)
    assert list(record["per_class_iou"].values()) == pytest.approx(expected["per_category_iou"].tolist(), abs=5e-3)
    assert record["num_images"] == 5 and record["num_processes"] == 1


def test_scales_flips_corruption_and_a_part_of_the_split(loaded):
    corruption = Corruption("impulse_noise", 5)
    protocol = Protocol((0.5, 1.0), True, corruption=corruption, max_images=3)
    record = evaluation.evaluate(*loaded, protocol, Execution(batch_size_images=1))
    expected = count_alone(loaded, [0, 1, 3], corruption, scales=(0.5, 1.0), flip=True)
    assert (record["mean_iou"], record["overall_accuracy"]) == (expected["mean_iou"], expected["overall_accuracy"])
    clean = evaluation.evaluate(*loaded, replace(protocol, corruption=None), Execution(batch_size_images=1))
    assert clean["overall_accuracy"] != record["overall_accuracy"]
    assert record["protocol"]["corruption"] == "impulse_noise:5"
    assert record["num_images"] == 3


def test_overrides_of_the_protocol(loaded, model_folder, labelled_folder, tmp_path, monkeypatch, capsys):
    """The record says what was done, and its figures are those of a model that was saved so."""
    passes = []
    monkeypatch.setattr(evaluation, "score_stream", lambda *args: (passes.append(args[5]), score_stream(*args))[1])
    options = ["--size", 48, "--window-size", 40, "--window-stride", 24, "--max-batch-pixels", 1600]
    output = tmp_path / "record.json"
    assert run_command(model_folder, labelled_folder, *options, "--output", output) == 0
    record = json.loads(output.read_text())
    read = record["protocol"]
    assert (read["size"], read["window_size"], read["window_stride"]) == ({"shortest_edge": 48}, 40, 24)
    assert set(passes) == {1600}
    built = tiny_model("sa", window_size=40, window_stride=24), DepictImageProcessor(size={"shortest_edge": 48})
    expected = count_alone((*built, loaded[2]), range(5))
    assert record["mean_iou"] == pytest.approx(expected["mean_iou"], abs=2e-3)
    assert record["mean_iou"] != pytest.approx(count_alone(loaded, range(5))["mean_iou"], abs=2e-3)

    # Refused before anything is evaluated, and replaced when told.
    again = (model_folder, labelled_folder, "--window-size", "none", "--output", output)
    passes.clear()
    assert run_command(*again) == 1 and not passes
    error = f"error: {output} exists; add --overwrite to replace it, or choose another name."
    assert capsys.readouterr().err.splitlines()[-1] == error
    assert json.loads(output.read_text()) == record
    assert run_command(*again, "--overwrite") == 0
    assert json.loads(output.read_text())["protocol"]["window_size"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window-stride", 8], "Got window_stride=8 for whole images; give a window_size"),
        (["--window-size", 16, "--window-stride", 24], "larger than the window_size of 16"),
        (["--max-batch-pixels", 0], "Got --max-batch-pixels 0, needed at least 1"),
    ],
)
def test_overrides_that_do_not_fit(model_folder, labelled_folder, capsys, options, message):
    assert run_command(model_folder, labelled_folder, *options) == 1
    assert message in capsys.readouterr().err


def test_parts_are_evenly_spaced():
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(233, 4) == [0, 58, 116, 174]
    with pytest.raises(ValueError, match="at most 0 images"):
        spread(5, 0)


def test_two_processes_give_the_figures_of_one(model_folder, labelled_folder, tmp_path, capfd):
    """Three photographs for one process, two for the other; the contact sheet is that of all five."""
    common = [model_folder, labelled_folder, "--batch-size", 1, "--corruption", "shot_noise:2", "--worst", 3]
    two, one = (
        [*common, "--output", tmp_path / f"{name}.json", "--contact-sheet", tmp_path / f"{name}.png"]
        for name in ("two", "one")
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # Forked, to spare them the import of everything.
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=run_as_one_of_two, args=(rank, port, two)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert capfd.readouterr().out.count("overall accuracy") == 1
    assert run_command(*one) == 0
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one")}
    assert [records[name]["num_processes"] for name in ("two", "one")] == [2, 1]
    for name in (*FIGURES, "corruptions", "protocol"):
        assert records["two"][name] == records["one"][name], name
    for suffix in (".png", "-shot_noise-2.png"):
        assert (tmp_path / f"two{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()


def run_as_one_of_two(rank: int, port: int, arguments) -> None:
    """As a launcher starts processes, on the CPU."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    PartialState._reset_state()
    sys.exit(run_command(*arguments))


def test_costs_of_processes_together():
    """Two processes: 3 images in 6 s, 1 in 5 s; together 4 images in the longer time."""
    shares = {"resident": 10, "cuda": None}
    costs = evaluation._costs(
        [
            {"images": 3, "seconds": 6.0, "model_seconds": 1.5, "metric_seconds": 0.5, **shares},
            {"images": 1, "seconds": 4.0, "model_seconds": 2.0, "metric_seconds": 0.0, **shares, "resident": 30},
        ]
    )
    assert costs == {
        "num_processes": 2,
        "images_per_second": 4 / 6,
        "images_per_second_model_alone": 2.5,
        "metric_share": 0.05,
        "peak_memory_bytes": {"resident": 30, "cuda": None},
    }


def test_the_environment_is_that_of_the_start(loaded, monkeypatch):
    events = []
    monkeypatch.setattr(evaluation, "environment", lambda: events.append("environment") or {"commit": "abc"})
    original = evaluation.score_stream
    monkeypatch.setattr(evaluation, "score_stream", lambda *each: events.append("segment") or original(*each))
    record = evaluation.evaluate(*loaded)
    assert events[0] == "environment" and events.count("environment") == 1
    assert record["environment"] == {"commit": "abc"}


class Endless(torch.utils.data.Dataset):
    """Photographs made when they are asked for; it knows how many of them are still held."""

    num_labels = 5
    left_out = ()

    def __init__(self, length: int):
        self.length = length
        self.alive = weakref.WeakValueDictionary()
        self.most_alive = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = np.full((3, 32, 40), index % 250, dtype=np.uint8)
        self.alive[index] = image
        self.most_alive = max(self.most_alive, len(self.alive))
        return {"image": torch.from_numpy(image), "labels": torch.full((32, 40), index % 5)}


def test_memory_does_not_grow_with_the_number_of_images(loaded):
    most = []
    for length in (8, 60):
        samples, worst = Endless(length), WorstImages(3)
        evaluation.evaluate(*loaded[:2], samples, execution=Execution(batch_size_images=2), observers=[worst.add])
        assert len(worst.images) == 3
        most.append(samples.most_alive)
    assert most[0] == most[1] <= 5


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision_is_used_and_recorded(model_folder, labelled_folder, tmp_path, monkeypatch, name, dtype):
    seen = []
    original = evaluation.score_stream

    def watched(model, *arguments):
        seen.append(model.dtype)
        return original(model, *arguments)

    monkeypatch.setattr(evaluation, "score_stream", watched)
    output = tmp_path / "record.json"
    assert run_command(model_folder, labelled_folder, "--dtype", name, "--output", output) == 0
    assert set(seen) == {dtype}
    record = json.loads(output.read_text())
    assert record["precision"] == name
    exact = evaluation.evaluate(*load_model(model_folder), samples_of(labelled_folder))
    assert exact["precision"] == "float32"
    assert record["overall_accuracy"] == pytest.approx(exact["overall_accuracy"], abs=0.05)


def test_exported_models_are_evaluated(loaded, model_folder, labelled_folder, tmp_path, capsys):
    """Through the backend that was asked for: a folder without model.safetensors has nothing else."""
    folder, output = tmp_path / "onnx", tmp_path / "record.json"
    export_model(*load_model(model_folder), folder)
    assert run_command(folder, labelled_folder, "--backend", "onnxruntime", "--output", output) == 0
    exact = evaluation.evaluate(*loaded[:2], samples_of(labelled_folder))
    assert json.loads(output.read_text())["mean_iou"] == pytest.approx(exact["mean_iou"], abs=2e-3)
    assert run_command(folder, labelled_folder, "--backend", "onnxruntime", "--dtype", "bfloat16") == 1
    assert "Got dtype bfloat16 with ONNX Runtime" in capsys.readouterr().err


def samples_of(folder) -> SegmentationDataset:
    return SegmentationDataset(load_dataset_splits(folder)["test"], 5)


def test_corruptions_and_their_contact_sheets(loaded, model_folder, labelled_folder, tmp_path, capsys):
    output, sheet = tmp_path / "record.json", tmp_path / "sheets" / "worst.png"
    options = ["--corruption", "contrast:5", "--corruption", "brightness:1", "--batch-size", 1]
    written = ["--output", output, "--contact-sheet", sheet, "--worst", 2]
    assert run_command(model_folder, labelled_folder, *options, *written) == 0
    record = json.loads(output.read_text())
    assert record["mean_iou"] == count_alone(loaded, range(5))["mean_iou"]
    assert [(each["corruption"], each["severity"]) for each in record["corruptions"]] == [
        ("contrast", 5),
        ("brightness", 1),
    ]
    contrast = record["corruptions"][0]
    assert contrast["mean_iou"] == count_alone(loaded, range(5), Corruption("contrast", 5))["mean_iou"]
    assert contrast["retention"] == contrast["mean_iou"] / record["mean_iou"] < 1
    assert "contrast:5  mean IoU" in capsys.readouterr().out
    assert {each.name for each in sheet.parent.iterdir()} == {
        "worst.png",
        "worst-contrast-5.png",
        "worst-brightness-1.png",
    }
    # The most disturbed label maps are the last two; each row shows a photograph 320 pixels wide, 48 x 40 first.
    assert PIL.Image.open(sheet).height > 2 * 30


@pytest.fixture(scope="module")
def metric_scripts(tmp_path_factory):
    """Paths of local metric modules, one that leaves out ignored pixels and one that does not.

    Their compiled copies stay in the tests' folder.
    """
    folder = tmp_path_factory.mktemp("metrics")
    paths = []
    for name, ignored in (("right", "ignore_index"), ("wrong", "-1")):
        (folder / name).mkdir()
        paths.append(folder / name / f"{name}.py")
        paths[-1].write_text(METRIC_SCRIPT.replace("IGNORED", ignored))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(hf_evaluate.config, "HF_METRICS_CACHE", folder / "maps")
        patch.syspath_prepend(folder / "modules")
        yield paths


def test_the_metric_of_evaluate_confirms_ours(model_folder, labelled_folder, tmp_path, metric_scripts):
    script, output = metric_scripts[0], tmp_path / "record.json"
    options = ["--metric", "evaluate", "--metric-script", script, "--output", output]
    assert run_command(model_folder, labelled_folder, *options) == 0
    record = json.loads(output.read_text())
    assert record["cross_check"]["mean_iou"] == pytest.approx(record["mean_iou"], abs=1e-12)
    assert record["cross_check"]["largest_difference"] < 1e-12
    assert record["cross_check"]["source"] == str(script)


def test_another_metric_is_told_apart(model_folder, labelled_folder, tmp_path, metric_scripts, capsys):
    """One that counts ignored pixels: the command fails, but keeps its record."""
    output = tmp_path / "record.json"
    options = ["--metric", "evaluate", "--metric-script", metric_scripts[1], "--output", output]
    assert run_command(model_folder, labelled_folder, *options) == 1
    assert "error: evaluate's mean_iou differs by 0." in capsys.readouterr().err
    assert json.loads(output.read_text())["cross_check"]["largest_difference"] > 1e-3


def test_a_metric_that_cannot_be_had_is_an_error(model_folder, labelled_folder, monkeypatch, capsys):
    def unreachable(source, **options):
        raise FileNotFoundError(f"Couldn't find a module script for {source}")

    monkeypatch.setattr(hf_evaluate, "load", unreachable)
    assert run_command(model_folder, labelled_folder, "--metric", "evaluate") == 1
    message = capsys.readouterr().err
    assert "mean_iou of evaluate cannot be loaded; pass the path of a copy of metrics/mean_iou/mean_iou.py" in message
    assert run_command(model_folder, labelled_folder, "--metric", "evaluate", "--metric-script", "no/such.py") == 1
    assert "Got the metric script no/such.py, which does not exist" in capsys.readouterr().err


def test_the_metric_of_evaluate_wants_one_process(model_folder, labelled_folder):
    state = PartialState()
    arguments = ["--metric", "evaluate"]

    class TwoProcesses:
        num_processes = 2
        device = state.device

    with pytest.raises(ValueError, match="--metric evaluate keeps every label map in one process"):
        evaluate.run(parse(model_folder, labelled_folder, *arguments), TwoProcesses())


def parse(*arguments):
    """The arguments as `main` would hand them over."""
    caught = []

    def keep(parsed, state):
        caught.append(parsed)
        raise ValueError("only parsed")

    original, evaluate.run = evaluate.run, keep
    try:
        evaluate.main([*map(str, arguments)])
    finally:
        evaluate.run = original
    return caught[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corruption", "fogg:2"], "Got corruption 'fogg'; did you mean 'fog'"),
        (["--batch-size", "0"], "Got --batch-size 0, needed at least 1"),
        (["--contact-sheet", "worst.txt"], "Got --contact-sheet worst.txt, needed the name of a picture"),
        (["--worst", "0", "--contact-sheet", "worst.png"], "Got count=0, needed at least 1 image"),
        (["--max-images", "0"], "Got at most 0 images"),
        (["--split", "tset"], "Got split 'tset'"),
    ],
)
def test_command_line_refuses(model_folder, labelled_folder, options, message, capsys):
    assert run_command(model_folder, labelled_folder, *options) == 1
    assert message in capsys.readouterr().err


def test_models_with_missing_weights_are_refused(labelled_folder, tmp_path, capsys):
    folder = save_model(tmp_path / "model")
    model = DepictForSemanticSegmentation.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if name != "decoder.class_tokens"}
    model.save_pretrained(folder, state_dict=weights)
    assert run_command(folder, labelled_folder) == 1
    assert "missing_keys: decoder.class_tokens" in capsys.readouterr().err


def test_unreadable_images_are_named_by_workers_too(loaded):
    """The message arrives as it was, without the worker's stack."""
    model, image_processor, samples = loaded
    rows = [dict(row) for row in samples.encoded]
    rows[3]["image"] = {"bytes": b"no image", "path": "broken.png"}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    broken = SegmentationDataset(datasets.Dataset.from_list(rows, features=features), 5, split="test")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^Image 3 of split test cannot be read: .*broken\.png"):
            evaluation.evaluate(model, image_processor, broken, execution=Execution(2, workers))


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 1)])
def test_images_that_cannot_be_read_any_more_are_left_out_if_told_so(loaded, tmp_path, capsys, batch_size, workers):
    """The fourth is gone since the split was checked: figures and counts are those of the others."""
    model, image_processor, samples = loaded
    rows = [dict(row) for row in samples.encoded]
    rows[3]["image"] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    data = datasets.Dataset.from_list(rows, features=features)
    damaged = SegmentationDataset(data, 5, split="test", skip_unreadable=True)
    record = evaluation.evaluate(model, image_processor, damaged, execution=Execution(batch_size, workers))
    rest = evaluation.evaluate(model, image_processor, samples.without([3]))
    assert record["per_class_iou"] == rest["per_class_iou"]
    assert record["num_images"] == rest["num_images"] == len(samples) - 1
    assert record["left_out"] == [str(tmp_path / "gone.png")]
    assert "left out: Image 3 of split test cannot be read: photograph" in capsys.readouterr().err


def test_numbers_of_classes_must_agree(loaded):
    model, image_processor, samples = loaded
    with pytest.raises(ValueError, match="The model has 5 classes and the data 7"):
        evaluation.evaluate(model, image_processor, SegmentationDataset(samples.dataset, 7))


def test_a_part_without_labels_has_no_figures(loaded):
    """JSON has no NaN: everything is None, under corruption too."""

    class Unlabelled(Endless):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"labels": torch.full((32, 40), 255)}

    record = evaluation.evaluate(*loaded[:2], Unlabelled(2))
    assert record["mean_iou"] is record["overall_accuracy"] is record["per_class_iou"]["LABEL_0"] is None
    assert evaluation.under_corruption(record, Corruption("fog", 1), record)["retention"] is None


def test_protocols_are_recorded_whole(loaded):
    protocol = replace(Protocol(), scales=(0.5,), flip=True)
    recorded = evaluation.evaluate(*loaded, replace(protocol, max_images=1))["protocol"]
    assert (recorded["scales"], recorded["flip"], recorded["size"]) == ([0.5], True, {"shortest_edge": 32})
