"""`depict train` on made photographs and a tiny backbone: what it writes, going on after a kill, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Backbone, Dinov2Config

from depict_hf.loading import load_model
from training import own_classes, session
from training.evaluation import draw_curves
from training.evaluation.report import smoothed
from training.optimization import PacedTrainer
from training.planning import MachineFacts

SMALL = ["size=28", "crop_size=28", "window_size=28", "window_stride=14", "batch_size=2", "precision=float32"]
COLORS = np.array([[90, 120, 90], [210, 60, 60], [60, 60, 220]])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six photographs to train on, two and three to evaluate on: bright squares, whose colour is their class."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for index in range(count):
            labels = np.zeros((28, 42), np.uint8)
            for label in (1, 2):
                top, left = generator.integers(0, 14), generator.integers(0, 28)
                labels[top : top + 12, left : left + 12] = label
            photo = (COLORS[labels] + generator.normal(0, 10, (28, 42, 3))).clip(0, 255).astype(np.uint8)
            for kind, array in (("images", photo), ("masks", labels)):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / split / kind / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Backbone(Dinov2Config(**sizes, reshape_hidden_states=True)).save_pretrained(folder)
    return folder


def train(data, output, backbone, *more):
    names = ["--from", str(backbone), "--classes", "ground,red,blue"]
    return own_classes.main([str(data), str(output), *names, *more, *SMALL])


def test_a_run_writes_model_pictures_and_report(data, backbone, tmp_path, capsys):
    output = tmp_path / "out"
    assert train(data, output, backbone, "--max-steps", "50") == 0
    printed = capsys.readouterr().out
    assert "kept: all" in printed and "validation mIoU" in printed and "fine-tuning, step 30" in printed
    model, processor = load_model(output)
    assert model.config.id2label == {0: "ground", 1: "red", 2: "blue"}
    assert (model.config.window_size, model.config.window_stride) == (28, 14)
    assert dict(processor.size)["shortest_edge"] == 28
    assert {each.name for each in output.iterdir()} >= {"curves.png", "worst.png", "report.md", "evaluation.json"}
    assert not (output / "work").exists()
    record = json.loads((output / "evaluation.json").read_text())
    assert record["num_images"] == 3 and record["split"] == "test"
    report = (output / "report.md").read_text()
    assert f"depict segment PHOTO --model {output}" in report and f"depict evaluate {output} {data}" in report
    # Pixels of each class, counted here from the files.
    for split, column in (("train", 4), ("test", 5)):
        masks = [np.array(Image.open(path)) for path in (data / split / "masks").iterdir()]
        counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=3)
        rows = [line.split("|") for line in report.splitlines() if line.startswith(("| ground", "| red", "| blue"))]
        assert [int(row[column].replace(",", "")) for row in rows] == counts.tolist()
    # The last weights of the first stage are where the second begins, and both are trained.
    stages = {event["stage"] for event in map(json.loads, (output / "history.jsonl").read_text().splitlines())}
    assert stages >= {"decoder", "fine-tuning"}
    assert own_classes.main([str(data), str(output), "--from", str(backbone)]) == 1
    assert "not an empty folder; pass --resume" in capsys.readouterr().err


class CountingClock:
    """A quarter of a second passes whenever it is looked at, however busy the machine is."""

    def __init__(self):
        self.now = time.monotonic()

    def __call__(self):
        self.now += 0.25
        return self.now


def test_minutes_end_a_run_in_time_with_both_stages_evaluated(data, backbone, tmp_path, monkeypatch):
    clock = CountingClock()
    start = clock.now
    monkeypatch.setattr(session, "Budget", partial(session.Budget, clock=clock))
    facts = MachineFacts("cpu", 14, 3, 32, "float32", 0.1, 0.5, 0.5, processors=1)
    monkeypatch.setattr(session, "measure", lambda *arguments: facts)
    assert train(data, tmp_path / "out", backbone, "--minutes", "3") == 0
    assert 0.9 * 180 < clock.now - start < 1.02 * 180
    events = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    for stage in ("decoder", "fine-tuning"):
        assert sum("mean_iou" in event for event in events if event["stage"] == stage) > 1


def test_a_killed_run_goes_on_from_its_last_checkpoint(data, backbone, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"

    class Killed(BaseException):
        pass

    evaluations = []
    evaluate = PacedTrainer.evaluate

    def evaluate_and_die(self, *args, **kwargs):
        evaluations.append(self.state.global_step)
        if len(evaluations) == 5:
            raise Killed
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(PacedTrainer, "evaluate", evaluate_and_die)
    with pytest.raises(Killed):
        train(data, output, backbone, "--max-steps", "100")
    assert evaluations == [10, 20, 30, 40, 10]
    spent = json.loads((output / "history.jsonl").read_text().splitlines()[-1])["seconds"]
    assert train(data, output, backbone, "--max-steps", "101", "--resume") == 1
    assert "max_steps=101, there 100" in capsys.readouterr().err
    assert train(data, output, backbone, "--max-steps", "100", "--resume") == 0
    assert "Stage decoder: done before" in capsys.readouterr().out
    assert evaluations[5:] == [10, 20, 30, 40, 50, 60]
    events = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    assert events[-1]["seconds"] > spent and events[-1]["stage"] == "evaluation"
    assert train(data, output, backbone, "--max-steps", "100", "--resume") == 0
    assert "is finished" in capsys.readouterr().out


def test_a_stopped_run_goes_on_as_if_it_had_not_been(data, backbone, tmp_path, monkeypatch, capsys):
    """Stopped in each stage at steps that are not evaluated; not with other data, which would end otherwise."""
    data = shutil.copytree(data, tmp_path / "data")
    assert train(data, tmp_path / "whole", backbone, "--max-steps", "50") == 0
    stops = [("freeze", 13), ("move", 17)]
    compute_loss = PacedTrainer.compute_loss

    def stop(self, *args, **kwargs):
        encoder = "freeze" if self.recipe.model.freeze_encoder else "move"
        if stops and (encoder, self.state.global_step) == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(PacedTrainer, "compute_loss", stop)
    output = tmp_path / "stopped"
    assert train(data, output, backbone, "--max-steps", "50") == 143
    assert (output / "work" / "1-decoder" / "checkpoint-14" / "complete.json").is_file()
    event = json.loads((output / "history.jsonl").read_text().splitlines()[-1])
    assert (event["stage"], event["step"]) == ("decoder", 14)
    mask = data / "train" / "masks" / "3.png"
    kept = mask.read_bytes()
    Image.fromarray(np.ones((28, 42), np.uint8)).save(mask)
    assert train(data, output, backbone, "--max-steps", "50", "--resume") == 1
    assert "Got --resume with other data than in" in capsys.readouterr().err
    mask.write_bytes(kept)
    assert train(data, output, backbone, "--max-steps", "50", "--resume") == 143
    assert not stops
    message = capsys.readouterr().err
    assert "work/2-fine-tuning/checkpoint-18; go on with: python -m training.own_classes" in message
    assert train(data, output, backbone, "--max-steps", "50", "--resume") == 0
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(stopped[name], each) for name, each in whole.items())


@pytest.mark.parametrize("text", ["", "[]", '{"asked": {}, "start": [], "plan": {"stages": [3]}}', "{" * 100_000])
def test_a_damaged_record_is_refused(text, data, backbone, tmp_path, capsys):
    (tmp_path / "run.json").write_text(text)
    assert train(data, tmp_path, backbone, "--max-steps", "50", "--resume") == 1
    message = capsys.readouterr().err
    assert "run.json is no record of a run (" in message or "Got --resume with other settings than in" in message


def test_curves_are_left_out_with_a_line_where_matplotlib_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert not draw_curves([{"stage": "decoder", "seconds": 1.0, "loss": 1.0}], tmp_path / "curves.png")
    assert "pip install 'depict-hf[plots]'" in capsys.readouterr().out


def test_smoothing_begins_at_the_first_value_and_follows():
    assert smoothed([2.0]) == [2.0]
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)
    assert smoothed([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "Got --minutes 0.0, needed more than 0"),
        (["--max-steps", "-1"], "Got --max-steps -1"),
        (["--minutes", "0.01"], "give more --minutes"),
        (["epochs=3"], "Got epochs as a field; use --minutes"),
    ],
)
def test_refusals(data, backbone, tmp_path, capsys, options, message):
    assert train(data, tmp_path / "out", backbone, *options) == 1
    assert message in capsys.readouterr().err


def test_help_needs_nothing_heavy():
    code = "import sys; from training import own_classes as own; own.build_parser().format_help(); "
    code += "print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "False\n"
