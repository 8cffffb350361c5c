"""Files and folders are whole or not there, after a kill, on a full disk, and beside other runs."""

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from depict_hf.photographs import find_photographs
from depict_hf.unfinished import UNFINISHED, begin, delete_unfinished
from depict_hf.writing import (
    DiskFullError,
    UnwritableError,
    check_file,
    check_folder,
    encode_picture,
    whole_folder,
    write_all,
    write_whole,
)

ROOT = Path(__file__).parents[1]


def start(code: str, *arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, **options)


def kill_in_its_time(process: subprocess.Popen, seconds: float) -> None:
    """Kill a process so many seconds after it has printed its first line."""
    process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    process.wait()
    process.stdout.close()


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(UNFINISHED)]


@pytest.mark.parametrize("seed", range(4))
def test_files_are_whole_after_a_kill(seed, tmp_path):
    """Fails if a file gets its name before its contents; what is left over is deleted, and nothing else is."""
    code = """
import sys
from pathlib import Path
from depict_hf.writing import write_all
print("begun", flush=True)
for turn in range(10**6):
    write_all({Path(sys.argv[1], f"{name}.txt"): "01"[turn % 2] * 300_000 for name in "abc"})
"""
    process = start(code, tmp_path, stdout=subprocess.PIPE)
    kill_in_its_time(process, random.Random(seed).uniform(0.02, 0.3))
    files = list(tmp_path.glob("*.txt"))
    assert files
    for path in files:
        assert path.read_text() in ("0" * 300_000, "1" * 300_000)
    delete_unfinished([tmp_path])
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize("seed", range(4))
def test_folders_are_replaced_at_once(seed, tmp_path):
    """Fails if files of a new model ever stand beside some of the old one."""
    code = """
import sys
from depict_hf.writing import whole_folder
for turn in range(10**6):
    with whole_folder(sys.argv[1] + "/model", replace=True) as folder:
        for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (folder / name).write_text(str(turn) * 1000)
    print("written", flush=True)
"""
    process = start(code, tmp_path, stdout=subprocess.PIPE)
    kill_in_its_time(process, random.Random(seed).uniform(0.01, 0.2))
    held = {path.name: path.read_text() for path in (tmp_path / "model").iterdir()}
    assert sorted(held) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert len(set(held.values())) == 1
    check_folder(tmp_path / "model", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_has_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """Fails if files are moved unsynchronised, or one of several before the last is on the disk."""
    events = []

    def noted(name, original):
        def call(*arguments, **options):
            events.append(name)
            return original(*arguments, **options)

        return call

    for name in ("write", "fdatasync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    write_all({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert events == ["write", "write", "fdatasync", "fdatasync", "replace", "replace"]

    events.clear()
    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "rename", noted("rename", os.rename))
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "a").touch()
        (folder / "b").touch()
    # Both files and their folder; and then that folder in its place, and the one above.
    assert events == ["fsync"] * 3 + ["rename"] + ["fsync"] * 2


@pytest.mark.parametrize(
    ("existing", "links", "held"),
    [
        ("replace", True, "new"),
        ("refuse", True, "old"),
        ("keep", True, "old"),
        ("refuse", False, "old"),
        ("keep", False, "old"),
    ],
)
def test_files_that_are_there(existing, links, held, tmp_path, monkeypatch):
    """Of two files, one is written meanwhile by another run; also where the file system has no hard links."""

    def no_link(*arguments):
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    synchronize = os.fdatasync
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    monkeypatch.setattr(os, "fdatasync", lambda each: (synchronize(each), paths[1].write_text("old")))
    if existing == "refuse":
        with pytest.raises(UnwritableError, match=r"b\.txt was not written, since another run wrote it meanwhile"):
            write_all(dict.fromkeys(paths, "new"), existing)
    else:
        write_all(dict.fromkeys(paths, "new"), existing)
    assert [path.read_text() for path in paths] == ["new", held]
    assert sorted(tmp_path.iterdir()) == paths

    if existing == "refuse":
        # Known before anything is written.
        with pytest.raises(UnwritableError, match=r"b\.txt was not written"):
            write_all({tmp_path / "c.txt": "new", paths[1]: "new"}, existing)
        assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, DiskFullError, r"b was not written, since the disk is full; make room"),
        (errno.EDQUOT, DiskFullError, r"b was not written, since the disk is full"),
        (errno.EFBIG, UnwritableError, r"b cannot be written: File too large"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_a_full_disk_leaves_what_was_there(call, number, kind, message, tmp_path, monkeypatch):
    """Both for contents and, where the system writes later, for the synchronisation."""
    calls, original = [], getattr(os, call)

    def fail(descriptor, *arguments):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        return original(descriptor, *arguments)

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind, match=message) as caught:
        write_all({tmp_path / "a": "new", tmp_path / "b": "new"})
    assert type(caught.value) is kind and caught.value.errno == number
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    """As systems make them for large contents, and before a disk is full."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    write_whole("0123456789" * 5, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "0123456789" * 5


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("I/O error: Disk quota exceeded (os error 122)"),
    ],
)
@pytest.mark.parametrize("there", ["nothing", "empty", "filled", "replaced"])
def test_a_folder_that_does_not_fit_leaves_what_was_there(error, there, tmp_path):
    """Libraries have errors of their own for a full disk."""
    folder = tmp_path / "model"
    if there != "nothing":
        folder.mkdir()
    if there in ("filled", "replaced"):
        (folder / "config.json").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DiskFullError, match="model was not written, since the disk is full"):  # noqa: SIM117
        with whole_folder(folder, replace=there == "replaced") as place:
            (place / "config.json").write_text("new")
            raise error
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() == "old" for path in before if path.is_file())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="no such model"), whole_folder(tmp_path / "model"):
        raise ValueError("no such model")
    assert not list(tmp_path.iterdir())


def test_two_runs_into_one_folder(tmp_path):
    """The second to be done is refused, and what the first wrote stays."""
    with pytest.raises(UnwritableError, match="another run wrote it meanwhile"):  # noqa: SIM117
        with whole_folder(tmp_path / "model") as place:
            (place / "config.json").write_text("second")
            with whole_folder(tmp_path / "model") as other:
                (other / "config.json").write_text("first")
    assert (tmp_path / "model" / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_that_cannot_be_moved(tmp_path, monkeypatch):
    """Mount points and file systems that cannot exchange folders: files are moved, weights last and old ones first."""

    class NoExchange:
        def __init__(self, *arguments, **options): ...

    monkeypatch.setattr(ctypes, "CDLL", NoExchange)
    moved = []
    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(f"+{Path(new).name}"), replace(old, new)))
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (moved.append(f"-{path.name}"), unlink(path)))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "old.py"):
        (folder / name).write_text("old")
    with whole_folder(folder, replace=True) as place:
        for name in ("config.json", "model.onnx", "model.json"):
            (place / name).write_text("new")
    assert moved[:3] == ["-model.safetensors", "-config.json", "-old.py"]
    assert sorted(moved[3:5]) == ["+config.json", "+model.json"] and moved[5] == "+model.onnx"
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("config.json", "model.onnx", "model.json"), "new"
    )

    mount = tmp_path / "mount"
    mount.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mount)
    with whole_folder(mount) as place:
        assert place.parent == mount
        (place / "config.json").write_text("new")
    assert [path.name for path in mount.iterdir()] == ["config.json"]


def test_only_what_nobody_writes_any_more_is_deleted(tmp_path):
    """What another process writes stays, be it a file or a folder, and so does whatever has another name."""
    code = """
import sys
from pathlib import Path
from depict_hf.unfinished import begin
print(begin(Path(sys.argv[1]))[1], begin(Path(sys.argv[1]), folder=True)[1], flush=True)
sys.stdin.read()
"""
    process = start(code, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    written = set(map(Path, process.stdout.readline().split()))
    others = {tmp_path / f"{UNFINISHED}of-mine", tmp_path / "photo.jpg"}
    for path in others:
        path.touch()
    delete_unfinished([tmp_path, tmp_path / "missing"])
    assert set(tmp_path.iterdir()) == written | others and len(written) == 2
    process.communicate()
    delete_unfinished([tmp_path])
    assert set(tmp_path.iterdir()) == others


def test_what_is_unfinished_is_no_photograph(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    descriptor, path = begin(tmp_path)
    PIL.Image.new("RGB", (8, 8)).save(path, "PNG")
    os.close(descriptor)
    assert [each.path.name for each in find_photographs([tmp_path], tmp_path / "out", ["png"])] == ["a.png"]


def test_devices_are_written_to_directly(tmp_path):
    """Fails if a link such as /dev/stdout is replaced by a file, which takes it from all other programs too."""
    code = 'from depict_hf.writing import write_whole; write_whole("text", "/dev/stdout"); write_whole("", "/dev/null")'
    before = os.readlink("/dev/stdout")
    with (tmp_path / "printed").open("w") as file:
        assert start(code, stdout=file).wait() == 0
    assert (tmp_path / "printed").read_text() == "text"
    assert os.readlink("/dev/stdout") == before and Path("/dev/null").is_char_device()


def test_outputs_are_refused_before_anything_is_computed(tmp_path):
    file, folder = tmp_path / "record.json", tmp_path / "model"
    file.write_text("old")
    check_file(file, overwrite=True)
    check_file(None)
    with pytest.raises(ValueError, match=r"record\.json exists; add --overwrite to replace it"):
        check_file(file)
    with pytest.raises(ValueError, match="is a folder, needed the name of a file"):
        check_file(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"x\.json cannot be written: .*record\.json is no folder"):
        check_file(file / "x.json")
    check_folder(folder)
    folder.mkdir()
    check_folder(folder)
    (folder / "config.json").touch()
    with pytest.raises(ValueError, match=r"is not an empty folder; choose a new one.*or add --overwrite"):
        check_folder(folder)
    check_folder(folder, overwrite=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"more than a model or an export, such as thesis\.tex, which"):
        check_folder(folder, overwrite=True)
    with pytest.raises(ValueError, match="is not an empty folder"):
        check_folder(file, overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_folders_that_do_not_allow_it(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="does not allow it"):
        check_file(tmp_path / "x.json")
    with pytest.raises(UnwritableError, match="Permission denied"):
        write_whole("", tmp_path / "x.json")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_are_what_saving_makes_of_them(suffix, tmp_path):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / f"a{suffix}")
    assert encode_picture(image, f"b{suffix}") == (tmp_path / f"a{suffix}").read_bytes()


def test_a_signal_leaves_nothing(tmp_path, monkeypatch):
    """Fails if what is unfinished is put away only where an error is an `Exception`."""

    def stop(descriptor):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fdatasync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole("text", tmp_path / "file")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder"):
        signal.raise_signal(signal.SIGINT)
    assert not unfinished(tmp_path) and not list(tmp_path.iterdir())
