"""Damaged and odd files of every kind: each ends in the outcome that its `case.json` expects.

A case is added by a folder in tests/corpus; see tests/fuzzing/__init__.py.
"""

import pytest
from fuzzing.cases import BASES, CORPUS, DESCRIPTION, description, differs, run

CASES = sorted(path.parent for path in CORPUS.glob(f"*/{DESCRIPTION}"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_each_case_ends_as_it_must(folder, tmp_path, datasets_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert differs(run(folder, tmp_path / "work"), description(folder)["expected"]) == ""


def test_all_of_it_is_small():
    """Fails if a case is added whose file was not cut down to what breaks."""
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < 2**20 and max(sizes) < 2**16 and BASES.is_dir()
