"""Whole runs as their own processes: two against one, and killed at any moment against undisturbed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_trainer import FIELDS, dataset_folder  # noqa: F401  (a fixture)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plain_backbone_folder(tmp_path_factory) -> str:
    """A DINOv2 of random weights without drop path, whose draws would differ between processes."""
    torch.manual_seed(7)
    config = transformers.Dinov2Config(
        image_size=28, patch_size=14, hidden_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("plain_backbone")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def command(dataset: str, backbone: str, output: Path, *options: str) -> list[str]:
    fields = [*FIELDS, "freeze_encoder=false", "report_to=none"]
    return ["camvid_dinov2_small_sa", dataset, str(output), "--backbone", backbone, *fields, *options]


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "training.train", *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=300) == 0, log.read_text()


def assert_same_weights(folder: Path, expected: Path, tolerance: float) -> None:
    weights, expected = (load_file(each / "model.safetensors") for each in (folder, expected))
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    "options",
    [["batch_size=4", "accumulation_steps=1"], ["batch_size=4", "accumulation_steps=2", "class_balance=1"]],
    ids=["plain", "accumulated and weighted"],
)
def test_two_processes_train_as_one(dataset_folder, plain_backbone_folder, tmp_path, options):  # noqa: F811
    """Crops have unequal numbers of labelled pixels, so a mean of the processes' means would differ."""
    one = start(command(dataset_folder, plain_backbone_folder, tmp_path / "one", *options), tmp_path / "one.log")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    arguments = command(dataset_folder, plain_backbone_folder, tmp_path / "two", *options)
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    two = [
        start(arguments, tmp_path / "two.log", RANK=rank, LOCAL_RANK=rank, ACCELERATE_USE_CPU="true", **launched)
        for rank in ("0", "1")
    ]
    finish(one, tmp_path / "one.log")
    for process in two:
        finish(process, tmp_path / "two.log")
    assert_same_weights(tmp_path / "two", tmp_path / "one", tolerance=2e-5)
    records = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert records[0]["num_images"] == records[1]["num_images"] == 2


def kill_until_done(arguments: list[str], log: Path, first_step: float, moments: list[float]) -> int:
    """Start, kill and resume; the last start is left alone. Returns the number of processes that were killed."""
    killed = 0
    for moment in moments:
        process = start([*arguments, "--resume"], log)
        try:
            process.wait(timeout=first_step + moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    finish(start([*arguments, "--resume"], log), log)
    return killed


def test_a_killed_run_resumed_ends_with_the_same_weights(dataset_folder, plain_backbone_folder, tmp_path):  # noqa: F811
    """Killed twice between the first step and the end, wherever that is; a checkpoint after every step."""
    options = ["epochs=20", "evaluate_every_epochs=20", "save_every_steps=1"]
    arguments = command(dataset_folder, plain_backbone_folder, tmp_path / "whole", *options)
    whole = start(arguments, tmp_path / "whole.log")
    begin = time.monotonic()
    while not any((tmp_path / "whole").glob("checkpoint-*")) and whole.poll() is None:
        time.sleep(0.05)
    first_step = time.monotonic() - begin
    finish(whole, tmp_path / "whole.log")
    training_seconds = time.monotonic() - begin - first_step
    arguments = command(dataset_folder, plain_backbone_folder, tmp_path / "killed", *options)
    moments = [0.15 * training_seconds, 0.3 * training_seconds]
    killed = kill_until_done(arguments, tmp_path / "killed.log", first_step, moments)
    assert killed, "the run was too fast to be killed"
    assert_same_weights(tmp_path / "killed", tmp_path / "whole", tolerance=0)
    sessions = json.loads((tmp_path / "killed" / "recipe.json").read_text())["sessions"]
    assert sessions[0]["resumed_from"] is None
    assert any(session["resumed_from"] for session in sessions)
