"""Whole runs as their own processes: two against one, and killed at any moment against undisturbed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import training_arguments
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]


def command(dataset: str, backbone: str, output: Path, *options: str) -> list[str]:
    return training_arguments(dataset, backbone, output, "freeze_encoder=false", "report_to=none", *options)


def start(arguments: list[str], log: Path, module: str = "training.train", **environment: str) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def start_two(arguments: list[str], log: Path, module: str = "training.train", **environment: str) -> list:
    """Two processes on the CPU that train together."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launched |= {"ACCELERATE_USE_CPU": "true"} | environment
    return [start(arguments, log, module, RANK=rank, LOCAL_RANK=rank, **launched) for rank in ("0", "1")]


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=300) == 0, log.read_text()


def assert_same_weights(folder: Path, expected: Path, tolerance: float) -> None:
    weights, expected = (load_file(each / "model.safetensors") for each in (folder, expected))
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ["batch_size=4", "accumulation_steps=1"], id="plain", marks=pytest.mark.slow
        ),  # less than the other one
        pytest.param(["batch_size=4", "accumulation_steps=2", "class_balance=1"], id="accumulated and weighted"),
    ],
)
def test_two_processes_train_as_one(dataset_folder, backbone_folder, tmp_path, options):
    """Crops have unequal numbers of labelled pixels, so a mean of the processes' means would differ.

    The backbone has drop path, which must drop the same branches of the same images.
    """
    one = start(command(dataset_folder, backbone_folder, tmp_path / "one", *options), tmp_path / "one.log")
    two = start_two(command(dataset_folder, backbone_folder, tmp_path / "two", *options), tmp_path / "two.log")
    finish(one, tmp_path / "one.log")
    for process in two:
        finish(process, tmp_path / "two.log")
    assert_same_weights(tmp_path / "two", tmp_path / "one", tolerance=2e-5)
    records = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert records[0]["num_images"] == records[1]["num_images"] == 2


@pytest.mark.slow
def test_processes_that_share_the_model_train_as_one_and_resume(dataset_folder, backbone_folder, tmp_path):
    """FSDP, of torch's second version."""
    options = ["epochs=4", "evaluate_every_epochs=2"]
    one = start(command(dataset_folder, backbone_folder, tmp_path / "one", *options), tmp_path / "one.log")
    finish(one, tmp_path / "one.log")
    arguments = command(dataset_folder, backbone_folder, tmp_path / "two", *options)
    launch = partial(
        start_two,
        log=tmp_path / "two.log",
        module="tests.training.fsdp_on_cpu",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    )
    for process in launch(arguments):
        finish(process, tmp_path / "two.log")
    assert_same_weights(tmp_path / "two", tmp_path / "one", tolerance=2e-5)
    assert (tmp_path / "two" / "checkpoint-8" / "pytorch_model_fsdp.bin").is_file()  # it was FSDP
    shutil.rmtree(tmp_path / "two" / "checkpoint-8")
    (tmp_path / "two" / "model.safetensors").unlink()
    for process in launch([*arguments, "--resume"]):
        finish(process, tmp_path / "two.log")
    assert_same_weights(tmp_path / "two", tmp_path / "one", tolerance=2e-5)


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


def test_a_killed_run_resumed_ends_with_the_same_weights(dataset_folder, backbone_folder, tmp_path):
    """Killed twice between the first step and the end, wherever that is; a checkpoint after every step."""
    options = ["epochs=20", "evaluate_every_epochs=20", "save_every_steps=1", "average_decay=0.9"]
    killed = kill_and_compare(dataset_folder, backbone_folder, tmp_path, options, shares=[0.15, 0.3])
    assert killed, "the run was too fast to be killed"
    sessions = json.loads((tmp_path / "killed" / "recipe.json").read_text())["sessions"]
    assert sessions[0]["resumed_from"] is None
    assert any(session["resumed_from"] for session in sessions)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["lora_rank=2"], ["accumulation_steps=2"], ["average_decay=0.99"]])
def test_a_run_killed_at_many_moments(dataset_folder, backbone_folder, tmp_path, options):
    """Also while packages are imported, data are read, checkpoints and the final model are written."""
    options = ["epochs=40", "evaluate_every_epochs=3", "save_every_steps=2", *options]
    shares = [-0.9, -0.1, 0.0, 0.05, 0.1, 0.12, 0.17, 0.2, 0.3, 0.4]
    assert kill_and_compare(dataset_folder, backbone_folder, tmp_path, options, shares) >= 5


def kill_and_compare(dataset: str, backbone: str, folder: Path, options: list[str], shares: list[float]) -> int:
    """Run once without disturbance and once killed and resumed; both must end with the same weights.

    Args:
        shares: When to kill: 0 is the time of the first checkpoint, 1 the end of the run, -1 its start.

    Returns:
        How many times the run was killed before it had ended by itself.
    """
    arguments = command(dataset, backbone, folder / "whole", *options)
    begin = time.monotonic()
    whole = start(arguments, folder / "whole.log")
    while not any((folder / "whole").glob("checkpoint-*")) and whole.poll() is None:
        time.sleep(0.05)
    before = time.monotonic() - begin
    finish(whole, folder / "whole.log")
    after = time.monotonic() - begin - before
    moments = [share * (after if share > 0 else before) for share in shares]
    arguments = command(dataset, backbone, folder / "killed", *options)
    killed = kill_until_done(arguments, folder / "killed.log", before, moments)
    assert_same_weights(folder / "killed", folder / "whole", tolerance=0)
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_every_process_ends_a_run_that_goes_on(dataset_folder, backbone_folder, tmp_path, processes):
    """To the processes that read data, too, as schedulers and `torchrun` send it; of two, here, to one alone."""
    options = ["epochs=60", "evaluate_every_epochs=60", "num_workers=1", "size=56", "crop_size=56"]
    launch = (lambda *each: [start(*each)]) if processes == 1 else start_two
    log = tmp_path / "log"
    arguments = command(dataset_folder, backbone_folder, tmp_path / "stopped", *options)
    running = launch(arguments, log)
    while "'loss'" not in (log.read_text() if log.exists() else ""):
        assert running[0].poll() is None, log.read_text()
        time.sleep(0.05)
    group = [running[0].pid, *children(running[0].pid)]
    assert len(group) > 1
    for each in group:
        os.kill(each, signal.SIGTERM)
    for process in running:
        assert process.wait(timeout=120) == 143, log.read_text()
    [checkpoint] = (tmp_path / "stopped").glob("checkpoint-*")
    assert 10 <= int(checkpoint.name.partition("-")[2]) < 120
    text = log.read_text()
    assert "Traceback" not in text and text.count("stopped by SIGTERM") == 1
    for process in launch([*arguments, "--resume"], log):
        finish(process, log)
    for process in launch(command(dataset_folder, backbone_folder, tmp_path / "whole", *options), log):
        finish(process, log)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole", tolerance=0)


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
