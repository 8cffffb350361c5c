"""A few cases of each kind that chance makes, and that one which breaks the rule is noticed, kept and repeated.

`make fuzz` runs as many as there is time for.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzzing import mutations, readers, workers
from fuzzing.__main__ import main
from fuzzing.cases import BASES, description, fault_of_message
from fuzzing.makers import MAKERS
from fuzzing.workers import make

from depict_hf import weight_files

REPOSITORY = Path(__file__).parents[1]
# Of each kind but commands.
CASES = {"photographs": 60, "weights": 40, "data": 30, "settings": 100}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", CASES)
def test_nothing_breaks_the_rule(kind, tmp_path, capsys):
    status = main(["--kinds", kind, "--cases", str(CASES[kind]), "--seed", "0", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"{kind}: {CASES[kind]} cases" in printed


def test_no_command_breaks_the_rule(tmp_path):
    """By a process of its own: some commands train, which a copy of a process that has trained before cannot."""
    arguments = ["--kinds", "commands", "--cases", "12", "--seed", "0", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    command = [sys.executable, "-m", "fuzzing", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "commands: 12 cases" in result.stdout


def leak(*_):
    raise TypeError("an integer is required")


def two_lines(*_):
    raise OSError("two\nlines of words")


def no_word(*_):
    raise ValueError("")


def too_large(*_):
    return bytearray(10**11)


def die(*_):
    os._exit(3)


def hang(*_):
    time.sleep(9)


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (leak, "TypeError: an integer is required"),
        (two_lines, "the message has several lines"),
        (no_word, "the message has no words"),
        (too_large, "MemoryError"),
        (die, "the process ended with 3"),
        (hang, "TookTooLong: more than 1 seconds"),
    ],
)
def test_an_escape_stops_it_and_is_kept(read, told, tmp_path, monkeypatch, capsys):
    """Fails if a reader that leaks, dies or hangs passes; the folder that it names must repeat it."""
    with monkeypatch.context() as context:
        context.setattr(readers, "read_photo", read)
        context.setattr(workers, "SECONDS", 1)
        assert main(["--kinds", "photographs", "--cases", "40", "--seed", "1", "--output", str(tmp_path)]) == 1
        printed = capsys.readouterr().out
        [kept] = tmp_path.glob("photographs-1-*")
        assert told in printed and f"--repeat {kept}" in printed and description(kept)["kind"] == "photograph"
        assert main(["--repeat", str(kept)]) == 1 and told in capsys.readouterr().out
    assert main(["--repeat", str(kept)]) == 0  # by the reader itself


def test_damaged_weights_that_load_are_told(tmp_path, monkeypatch, capsys):
    """Fails if weights that nobody compares with their checksum pass."""
    monkeypatch.setattr(weight_files, "_digest", lambda path, header: header.metadata.get(weight_files.CHECKSUM))
    assert main(["--kinds", "weights", "--cases", "300", "--seed", "1", "--output", str(tmp_path)]) == 1
    assert "damaged weights were loaded" in capsys.readouterr().out


@pytest.mark.parametrize("kind", MAKERS)
def test_a_seed_and_a_number_make_a_case(kind, tmp_path):
    """Fails if a case cannot be made again, or is that of another seed."""
    for number in range(8):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            make(kind, seed, number, tmp_path / f"{name}{number}")
    first, again, other = (
        [
            {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in sorted(tmp_path.glob(f"{name}*"))
        ]
        for name in "abc"
    )
    assert first == again != other


def test_every_way_to_damage_changes_something():
    rng = random.Random(0)
    data = (BASES / "photographs" / "rgb.png").read_bytes()
    for name, damage in mutations._BYTES.items():
        assert any(bytes(damage(rng, bytearray(data), [b"other file"])) != data for _ in range(5)), name


def test_what_counts_as_words():
    assert not fault_of_message("it is empty; get it again")
    for text in ("", "key", "a b\nc d", "a b \x1b[2J", "x y " * 1000):
        assert fault_of_message(text)
    assert not fault_of_message("two lines of\nplain words here", several_lines=True)
