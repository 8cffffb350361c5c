"""Runs of `depict segment` that end early, and those that go on after them."""

import errno
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import save_model

from depict_hf import inference, results
from depict_hf.cli import main
from depict_hf.resuming import REPLACING
from depict_hf.unfinished import UNFINISHED

ROOT = Path(__file__).parents[1]
FORMATS = "png,npy,geojson"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten small photographs, three of them in a sub-folder."""
    for index in range(10):
        path = tmp_path / "photos" / ("day" if index > 6 else "") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).resize((60, 40)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def arguments(photos, model_folder) -> list[str]:
    # One photograph in a pass, so that few are in hand at a time.
    options = ["--recursive", "--format", FORMATS, "--dtype", "float32", "--max-batch-pixels", "1"]
    return ["segment", str(photos), "--model", str(model_folder), *options]


def held(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too, by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commands(text: str) -> list[str]:
    """The command that the last line printed says to go on with."""
    return shlex.split(text.splitlines()[-1].partition("go on with: depict ")[2])


def segment(arguments: list[str], output: Path, *more: str) -> int:
    return main([*arguments, "--output", str(output), *more])


def test_results_are_not_overwritten_unless_told(arguments, tmp_path, capsys):
    """And that is said before the model is loaded, which here does not even exist."""
    out = tmp_path / "out"
    assert segment(arguments, out) == 0
    before = held(out)
    (out / "5.geojson").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    capsys.readouterr()
    elsewhere = [str(tmp_path / "nowhere") if each == arguments[3] else each for each in arguments]
    assert segment(elsewhere, out) == 2
    assert capsys.readouterr().err == (
        f"depict: {out} holds results of 10 of these 10 photographs, such as {out / '0_labels.png'}; add --resume to "
        "leave out those that are done, or --overwrite to replace them.\n"
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == stamps

    # Of a photograph that is not done, what is there stays, and the rest is added.
    (out / "5_labels.npy").write_bytes(b"mine")
    assert segment(arguments, out, "--resume", "--json") == 0
    printed = capsys.readouterr()
    assert [Path(json.loads(line)["file"]).name for line in printed.out.splitlines()] == ["5.png"]
    assert "depict: done before: 9 of 10 photographs\n" in printed.err
    assert held(out) == before | {"5_labels.npy": b"mine"}
    assert segment(elsewhere, out, "--resume") == 0  # Nothing is left for which a model is needed.

    assert segment(arguments, out, "--overwrite") == 0
    assert held(out) == before
    with pytest.raises(SystemExit):
        segment(arguments, out, "--overwrite", "--resume")
    assert "not allowed with" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_does_not_lose_the_others(arguments, photos, tmp_path, capsys):
    """Where a folder has a result's name, or a file that of a folder for results; labels before it are written."""
    out = tmp_path / "out"
    (out / "2_labels.npy").mkdir(parents=True)
    (out / "day").write_text("a file")
    assert segment(arguments, out, "--json") == 1
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    failed = {Path(each["file"]).name: each["error"] for each in records if "error" in each}
    assert sorted(failed) == ["2.png", "7.png", "8.png", "9.png"] and len(records) == 10
    assert failed["2.png"] == f"{out / '2_labels.npy'} cannot be written: Is a directory"
    assert failed["7.png"].startswith(f"{out / 'day' / '7_labels.png'} cannot be written: ")
    assert f"depict: {photos / '2.png'}: {failed['2.png']}\n" in printed.err
    assert len(held(out)) == 1 + 3 * 6
    assert not [name for name in held(out) if name.startswith("2")]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_run(number, arguments, tmp_path, capsys, monkeypatch):
    """With what is done whole, and a command that does the rest once there is room."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert segment(arguments, reference) == 0
    write, sizes = os.write, []

    def fill(descriptor, data):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if UNFINISHED not in name:
            return write(descriptor, data)
        sizes.append(len(data))
        if len(sizes) > 11:  # the third file of the fourth photograph
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        assert segment(arguments, out) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"depict: stopped: {out / '3.geojson'} was not written, since the disk is full; done: ")
    assert "; done: 3 of 10 photographs; make room, and go on with: depict segment --resume " in last
    assert held(out) == {name: data for name, data in held(reference).items() if int(Path(name).name[0]) < 3}

    assert main(commands(last)) == 0
    assert held(out) == held(reference)


def test_output_that_is_printed_to_a_full_disk(arguments, tmp_path, capsys):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "depict_hf", *arguments, "--output", str(tmp_path / "out"), "--json"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in result.stderr.splitlines() if line.startswith("depict: ")]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "No space left on device; done: " in lines[-1]
    assert "of 10 photographs; make room, and go on with: depict segment --resume " in lines[-1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_signals_end_the_run_after_what_is_in_hand(
    number, status, options, arguments, tmp_path, capsys, monkeypatch, model_folder
):
    """The results of another model, which a run with --overwrite was replacing, do not count as done."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert segment(arguments, reference) == 0
    if options:
        other = save_model(tmp_path / "other", "linear")
        assert segment([str(other) if each == str(model_folder) else each for each in arguments], out) == 0
        assert all(held(out)[name] != held(reference)[name] for name in held(reference))
        time.sleep(0.02)  # longer than a tick of the clock that files are dated by
    write, written = results.ResultWriter.write, []

    def stop_at_third(writer, photograph, *rest):
        written.append(photograph.path.name)
        if len(written) == 3:
            os.kill(os.getpid(), number)
        return write(writer, photograph, *rest)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(results.ResultWriter, "write", stop_at_third)
        assert segment(arguments, out, *options) == status
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    # The third, those that wait to be written behind it, and the one in the model.
    assert 3 <= len(written) <= 6
    name = signal.Signals(number).name
    assert last.startswith(f"depict: stopped by {name}; done: {len(written)} of 10 photographs; go on with: depict ")
    assert printed.out.count(" -> ") == len(written)
    done = {name: data for name, data in held(reference).items() if f"{Path(name).name[0]}.png" in written}
    assert done.items() <= held(out).items() and len(done) == 3 * len(written)

    assert main(commands(last)) == 0
    assert f"depict: done before: {len(written)} of 10 photographs" in capsys.readouterr().err
    assert held(out) == held(reference)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_replacement_that_was_done_elsewhere_is_forgotten(arguments, tmp_path):
    """Fails if a note of what a killed run was replacing outlives the run that replaces it."""
    out = tmp_path / "out"
    assert segment(arguments, out) == 0
    (out / f"{REPLACING}1-0").write_text(json.dumps(["0_labels.png", "day/8_labels.npy"]))
    os.utime(out / f"{REPLACING}1-0", (time.time() + 1000,) * 2)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert segment(arguments, out, "--resume") == 0
    changed = {path.name for path in out.rglob("*.*") if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {f"{name}{end}" for name in "08" for end in ("_labels.png", "_labels.npy", ".geojson")}
    assert not list(out.glob(f"{REPLACING}*"))


def test_a_second_interrupt_ends_at_once(arguments, tmp_path):
    """Fails if it waits for a writer that hangs, as on a network drive that is gone."""
    code = """
import os, sys, time
from depict_hf import results
from depict_hf.cli import main
def hang(*arguments):
    print("hangs", flush=True)
    time.sleep(600)
results.ResultWriter.write = hang
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, *arguments, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout.readline() == b"hangs\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    process.stdout.close()


def test_a_signal_before_anything_is_in_hand(arguments, tmp_path, capsys, monkeypatch):
    """SIGTERM while a model is loaded ends the command like Ctrl-C, in one line and not in a traceback."""
    monkeypatch.setattr(results, "load_model", lambda *options: signal.raise_signal(signal.SIGTERM))
    assert segment(arguments, tmp_path / "out") == 143
    assert capsys.readouterr().err == "depict: stopped by SIGTERM; nothing is left half-written; start it again.\n"
    monkeypatch.setattr(results, "load_model", lambda *options: signal.raise_signal(signal.SIGINT))
    assert segment(arguments, tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()


def test_two_runs_into_one_folder(arguments, tmp_path, capsys, monkeypatch):
    """A run that finds its results written by another meanwhile leaves them alone, and says so; --resume is content."""
    out = tmp_path / "out"
    monkeypatch.setattr(results, "segment_files", inference.segment_files)
    load = results.load_model

    def other_run_first(*options):
        monkeypatch.setattr(results, "load_model", load)
        (out / "day").mkdir(parents=True)
        (out / "3_labels.npy").write_bytes(b"another's")
        return load(*options)

    monkeypatch.setattr(results, "load_model", other_run_first)
    assert segment(arguments, out) == 1
    errors = capsys.readouterr().err
    assert errors.count("3_labels.npy was not written, since another run wrote it meanwhile") == 1
    assert held(out)["3_labels.npy"] == b"another's" and len(held(out)) == 1 + 9 * 3

    monkeypatch.setattr(results, "load_model", other_run_first)
    out = tmp_path / "again"
    assert segment(arguments, out, "--resume") == 0
    assert held(out)["3_labels.npy"] == b"another's" and len(held(out)) == 10 * 3


KILLER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from depict_hf import cli, export, results, conversion, explain
arguments, delays = sys.argv[2:], [float(each) for each in sys.argv[1].split(",")]
for delay in delays:
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(cli.main(arguments))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def kill(arguments: list[str], delays: list[float]) -> list[int]:
    """Run a command, and kill it after so many seconds; the same again for each; return the exit codes."""
    command = [sys.executable, "-c", KILLER, ",".join(map(str, delays)), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return list(map(int, printed.split()))


def test_kills_at_random_moments_lose_nothing(arguments, tmp_path):
    """Fails if a result has its name before it is whole, or if what is left over is never deleted."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert segment(arguments, reference) == 0
    # From moments before the first result to some after the last, on a machine of any speed.
    delays = sorted(random.Random(0).uniform(0.02, 0.8) for _ in range(6))
    codes = kill([*arguments, "--output", str(out), "--resume"], [0.02, *delays])
    assert -signal.SIGKILL in codes, codes
    found, whole = held(out), held(reference)
    assert [name for name, data in found.items() if UNFINISHED not in name and data != whole[name]] == []
    assert segment(arguments, out, "--resume") == 0
    assert sorted(held(out)) == sorted(whole)
    assert held(out) == whole


def test_processes_that_share_photographs_stop_together(arguments, tmp_path):
    """A signal to torchrun reaches all of them; a single process goes on."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert segment(arguments, reference) == 0
    slowly = """
import os, sys, time
from depict_hf import results
from depict_hf.cli import main
write = results.ResultWriter.write
def slow(*arguments):
    open(os.path.join(os.path.dirname(__file__), "begun" + os.environ["RANK"]), "w").close()
    time.sleep(1)
    return write(*arguments)
results.ResultWriter.write = slow
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "slowly.py").write_text(slowly)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*torchrun, str(tmp_path / "slowly.py"), *arguments, "--output", str(out), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not list(out.glob("*.geojson")) or len(list(tmp_path.glob("begun*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    lines = [line for line in errors.splitlines() if "depict: stopped by SIGTERM; done: " in line]
    done = len(list(out.rglob("*.geojson")))
    assert 1 <= done < 10
    assert len(lines) == 2 and all(line.endswith("; go on with: the same command and --resume") for line in lines)
    assert sum(int(line.partition("; done: ")[2].split()[0]) for line in lines) == done
    assert {f"process {rank} of 2" in errors for rank in (1, 2)} == {True}
    assert segment(arguments, out, "--resume") == 0
    assert held(out) == held(reference)
