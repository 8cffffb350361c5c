"""SIGTERM and SIGINT end a run with a checkpoint of the step in which they came, from which it goes on bit for bit."""

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import training_arguments
from safetensors.torch import load_file

from training import train
from training.data import SegmentationDataset
from training.optimization import SegmentationTrainer
from training.optimization.checkpoints import is_complete
from training.stopping import Stopped, command_line, deferred, received, run_stoppable

FIELDS = ("report_to=none", "sample_pictures=0", "epochs=3", "average_decay=0.5")


def run(dataset, backbone, output, *fields, resume=False):
    arguments = training_arguments(dataset, backbone, output, *FIELDS, *fields)
    return train.main([*arguments, *(["--resume"] if resume else [])])


@pytest.fixture
def signal_in_step(monkeypatch):
    """Has a signal come in the middle of an optimiser step, counted from 1."""

    def send(number: int, step: int) -> None:
        compute_loss = SegmentationTrainer.compute_loss

        def compute_and_send(self, *args, **kwargs):
            if self.state.global_step == step - 1:
                os.kill(os.getpid(), number)
            return compute_loss(self, *args, **kwargs)

        monkeypatch.setattr(SegmentationTrainer, "compute_loss", compute_and_send)

    yield send


@pytest.mark.parametrize(
    ("number", "step", "code", "fields"),
    [
        (signal.SIGINT, 2, 130, ["keep_best=true"]),
        # Early stopping also restores what callbacks asked for when the checkpoint was written.
        (signal.SIGTERM, 5, 143, ["early_stopping=9", "accumulation_steps=2"]),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    number, step, code, fields, dataset_folder, backbone_folder, tmp_path, signal_in_step, monkeypatch, capsys
):
    """In the middle of an epoch, and in a step that is evaluated."""
    assert run(dataset_folder, backbone_folder, tmp_path / "whole", *fields) == 0
    handler = signal.getsignal(number)
    with monkeypatch.context():
        signal_in_step(number, step)
        assert run(dataset_folder, backbone_folder, tmp_path / "stopped", *fields) == code
        monkeypatch.undo()
    assert signal.getsignal(number) is handler
    output = tmp_path / "stopped"
    assert is_complete(output / f"checkpoint-{step}")
    assert not (output / "model.safetensors").exists()
    lines = capsys.readouterr().err.splitlines()
    [line] = [each for each in lines if "stopped by" in each]
    assert f"stopped by {number.name}; the weights of step {step} are in {output}/checkpoint-{step}; go on" in line
    command = shlex.split(line.partition("go on with: ")[2])
    assert command[:4] == ["python", "-m", "training.train", "camvid_dinov2_small_sa"]
    assert train.main(command[3:]) == 0
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/average.safetensors"):
        expected, weights = (load_file(tmp_path / folder / name) for folder in ("whole", "stopped"))
        assert all(torch.equal(weights[each], value) for each, value in expected.items()), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["evaluate", "calibrate", "robustness", "white_box"])
def test_commands_that_measure_end_in_a_line_and_leave_nothing(
    command, number, code, model_folder, dataset_folder, tmp_path, monkeypatch, capsys
):
    """While a photograph is read. Fails if a stack is printed, or a record or temperature of half the images stays."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def read(self, index):
        os.kill(os.getpid(), number)
        time.sleep(9)  # where the handler raises

    monkeypatch.setattr(SegmentationDataset, "__getitem__", read)
    record = tmp_path / "record.json"
    main = importlib.import_module(f"training.{command}").main
    splits = ["--split", "validation", "--workers", "0", "--output", str(record)]
    assert main([str(model), dataset_folder, *splits]) == code
    [line] = [each for each in capsys.readouterr().err.splitlines() if "stopped by" in each]
    assert f"training.{command}: stopped by {number.name}; " in line and line.endswith("start it again")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_signal_outside_of_training_ends_at_once(capsys):
    def command() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    assert run_stoppable(command, "name", "start it again") == 143
    assert capsys.readouterr().err == "name: stopped by SIGTERM; start it again\n"


def test_a_signal_is_noted_while_it_is_deferred_and_ends_the_command_later(capfd):
    def command() -> int:
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second one of these is usual
            assert received() == signal.SIGTERM
        raise Stopped(received(), "this much is done")

    assert run_stoppable(command, "name", "go on") == 143
    assert capfd.readouterr().err.endswith("name: stopped by SIGTERM; this much is done; go on\n")
    assert run_stoppable(lambda: 7 if received() is None else 8, "name", "") == 7  # nothing is left of it


def test_a_second_sigint_ends_at_once():
    code = (
        "import os, signal, time\n"
        "from training.stopping import deferred, run_stoppable\n"
        "def command():\n"
        "    with deferred():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "run_stoppable(command, 'name', '')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert finished.returncode == 130
    assert "a second Ctrl-C ends at once" in finished.stderr


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # the second is Python's own choice from 3.14 on
def test_a_process_that_reads_data_ends_with_the_one_that_started_it(method):
    """Else a run never ends, since Python waits for such processes after it has sent them SIGTERM."""
    code = (
        "from torch.utils.data import DataLoader\n"
        "from training.stopping import survive\n"
        "options = dict(num_workers=1, persistent_workers=True, worker_init_fn=survive)\n"
        f"loader = DataLoader(range(3), multiprocessing_context={method!r}, **options)\n"
        "print([each.item() for each in loader])"
    )
    # Threads of a library for sums would take the signal in place of the thread that waits for it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (ended.returncode, ended.stdout.strip()) == (0, "[0, 1, 2]"), ended.stderr


def test_ignored_signals_stay_ignored():
    """As `nohup` and shells leave SIGINT to what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run_stoppable(lambda: os.kill(os.getpid(), signal.SIGINT) or 5, "name", "") == 5
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_errors_are_not_taken_for_a_signal():
    def command() -> int:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_stoppable(command, "name", "")


def test_the_command_that_goes_on_can_be_pasted():
    assert command_line("depict train", ["my data", "OUT"], "--resume") == "depict train 'my data' OUT --resume"
    assert command_line("depict train", ["--resume", "OUT"], "--resume") == "depict train --resume OUT"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\udce9.jpg", "it's\\\t", "é☃\u2028"])
def test_names_that_no_terminal_shows_can_be_pasted(name):
    """Fails if a line has a line break or an escape in it, or the shell makes another name of it."""
    line = command_line("printf %s", [name])
    assert line.isprintable()
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout == os.fsencode(name)
