"""Many photographs in one run, many threads on one model, and processes that begin after the import."""

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_model

from depict_hf import DepictImageProcessor
from depict_hf.inference import segment

# Segments a folder in this process, and prints what it holds at the beginning and the end of every fifth of the run.
MEASURING = """
import itertools, os, sys
from pathlib import Path
import depict_hf.results as results
from depict_hf.cli import main

written, count = itertools.count(1), int(sys.argv[1])  # files are written by several threads
write = results.ResultWriter.write
def write_and_measure(self, *args, **kwargs):
    outcome = write(self, *args, **kwargs)
    if next(written) % (count // 5) == 0:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        sys.stderr.write(f"held {resident} {len(os.listdir('/proc/self/fd'))}\\n")
    return outcome
results.ResultWriter.write = write_and_measure
sys.exit(main(["segment", "photos", "--model", "model", "--format", "png", "--json", "--dtype", "float32"]))
"""


def photo(seed: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and open files are read from Linux's /proc")
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_and_open_files_do_not_grow_with_the_photographs(count, model_folder, tmp_path):
    """Fails if results, photographs, futures or files are kept until the end."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "model").symlink_to(model_folder)
    for index in range(count):
        PIL.Image.fromarray(photo(index)).save(tmp_path / "photos" / f"{index}.png")
    command = [sys.executable, "-c", MEASURING, str(count)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(list((tmp_path / "segmented").glob("*_labels.png"))) == len(run.stdout.splitlines()) == count
    held = [tuple(map(int, each)) for each in re.findall(r"held (\d+) (\d+)\n", run.stderr)]
    (first_bytes, first_files), *_, (last_bytes, last_files) = held
    assert len(held) == 5 and last_files <= first_files + 2
    # A kept label map or photograph would take 0.4 or 1.2 KB; allocators keep some of what is theirs.
    assert last_bytes - first_bytes < 8 * 2**20 + 200 * count


def test_threads_that_share_a_model_get_what_one_alone_gets():
    """Fails if anything about a call is kept where another one finds it: matrices, buffers, settings."""
    model, image_processor = (
        tiny_model(window_size=32, window_stride=16),
        DepictImageProcessor(size={"shortest_edge": 32}),
    )
    photos = [photo(index, 32 + index % 5, 40 + index % 7) for index in range(64)]
    scales = [(1.0,), (0.75, 1.0), (1.0, 1.25)]

    def labels(index: int) -> torch.Tensor:
        return segment(model, image_processor, [photos[index]], scales[index % 3], flip=index % 2 == 0)[0]

    expected = [labels(index) for index in range(len(photos))]
    with ThreadPoolExecutor(32) as threads:
        for _ in range(2):
            found = list(threads.map(labels, range(len(photos))))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def compute_alone() -> None:
    torch.set_num_threads(1)  # threads of the process that was forked are not there


def segment_in_process(index: int) -> list[list[int]]:
    return segment(tiny_model(), DepictImageProcessor(size={"shortest_edge": 32}), [photo(index)])[0].tolist()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # of Python 3.12, on forking
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_begin_after_the_import(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    expected = [segment_in_process(index) for index in range(3)]
    with multiprocessing.get_context(method).Pool(2, compute_alone) as processes:
        assert processes.map_async(segment_in_process, range(3)).get(timeout=120) == expected
