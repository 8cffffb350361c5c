"""`depict convert` and `depict export` killed at any moment: what they write is whole, or not there.

A kill leaves the disk as it is. So the folder is looked at whenever the command is about to touch any file, from inside
its process (PEP 578), which is oftener than real kills could be; some of these are among the slow tests.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing.cases import BASES

from depict_hf.cli import main
from depict_hf.unfinished import UNFINISHED

COMMANDS = {
    "convert": ["convert", str(BASES / "published_sa")],
    "export": ["export", str(BASES / "model"), "--format", "torch-export", "--size", "16", "16"],
}


class Watch:
    """What a folder held when this process was about to touch a file: contents by name, no state twice in a row.

    Attributes:
        folder: The folder; None while there is none to look at.
        states: What it held; None where it was not there.
        unfinished: How many times something unfinished stood beside it.
    """

    def __init__(self):
        self.folder, self.states, self.unfinished = None, [], 0

    def hear(self, event: str, arguments: tuple) -> None:
        if self.folder is not None and (event == "open" or event.startswith(("os.", "shutil."))):
            self.look()

    def look(self) -> None:
        folder, self.folder = self.folder, None  # looking touches files too
        state = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None
        self.unfinished += any(path.name.startswith(UNFINISHED) for path in folder.parent.iterdir())
        if not self.states or state != self.states[-1]:
            self.states.append(state)
        self.folder = folder


WATCH = Watch()
sys.addaudithook(WATCH.hear)  # It cannot be taken away again.


def watched(arguments: list[str], folder: Path) -> list[dict[str, bytes] | None]:
    """Run a command that writes a folder; return what the folder held, before it, in between and at the end."""
    WATCH.states, WATCH.unfinished, WATCH.folder = [], 0, folder
    try:
        assert main([*arguments, str(folder)]) == 0
        WATCH.look()
    finally:
        WATCH.folder = None
    assert WATCH.unfinished > 5  # else it would not have been looked at while it was written
    return WATCH.states


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_is_whole_or_not_there_at_any_moment(arguments, tmp_path):
    """Fails if anything has its own name before all of it is there, in a new folder or in place of an old one."""
    *before, whole = watched(arguments, tmp_path / "out")
    assert before == [None] and whole
    old = dict.fromkeys(whole, b"old")
    for name, contents in old.items():
        (tmp_path / "out" / name).write_bytes(contents)
    assert watched([*arguments, "--overwrite"], tmp_path / "out") == [old, whole]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_killed_processes(arguments, tmp_path):
    """Fails if a kill leaves a part of a folder under its name, or if the next run leaves what the kill left."""
    # Begins to write after all is imported, and says so.
    code = "import sys, depict_hf.writing as w; from depict_hf.cli import main\nbegin = w.begin\n"
    code += "w.begin = lambda *a, **k: (print('begun', flush=True), begin(*a, **k))[1]\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments, str(tmp_path / "out"), "--overwrite"]
    rng, whole, outcomes = random.Random(0), None, []
    for seconds in [None, *(rng.uniform(0, 0.5) for _ in range(6))]:
        for path in (tmp_path / "out").glob("*"):
            path.unlink()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"begun\n"
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        names = sorted(path.name for path in (tmp_path / "out").glob("*"))
        whole = whole or names
        assert names in ([], whole)
        outcomes.append(process.returncode)
    assert outcomes[0] == 0 and -signal.SIGKILL in outcomes
    assert main([*arguments, str(tmp_path / "out"), "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
