"""The cost of CBSA is linear in the tokens, that of MSSA is not; the record says so in both time and FLOPs."""

import pytest
import torch

from depict_hf import DepictConfig
from training.evaluation.measurement import log_slope
from training.evidence.exponent import measure_exponents, part_flops, render_exponents

GRIDS = [(side, side) for side in (32, 64, 128)]


def exponent(decoder_type: str, part: str) -> float:
    config = DepictConfig.from_preset("vit_small_patch16_384", decoder_type=decoder_type, num_labels=150)
    return log_slope([height * width for height, width in GRIDS], part_flops(config, part, GRIDS))


def test_cbsa_is_linear_from_512_to_2048_pixels():
    assert exponent("cbsa", "decoder") == pytest.approx(1, abs=0.06)
    assert exponent("sa", "decoder") > 1.6


def test_decoder_flops_in_closed_form():
    """Per layer of "sa": two products with P and two of attention; then the scores of every patch and class."""
    config = DepictConfig.from_preset("vit_tiny_patch16_384", decoder_type="sa", num_labels=7)
    tokens = 4 * 6 + 7
    layer = 2 * 2 * tokens * 300 * 192 + 2 * 2 * 3 * tokens**2 * 100
    assert part_flops(config, "decoder", [(4, 6)]) == [3 * layer + 2 * 24 * 7 * 192]


def test_record_and_table(monkeypatch):
    """Times are proportional to 2 ** (calls so far), which no exponent but the table's could show."""
    seconds = iter([1.0, 2.0, 4.0, 32.0, 3.0, 3.0, 12.0, 48.0])
    monkeypatch.setattr(
        "training.evidence.exponent.interleaved_seconds",
        lambda functions, *args, **kwargs: {name: [next(seconds)] for name in functions},
    )
    record = measure_exponents("vit_tiny_patch16_384", 7, [64, 128], 1, 0.0, torch.device("cpu"))
    assert record["tokens"] == [16, 64]
    assert record["costs"]["sa"]["decoder"]["seconds"] == [1.0, 4.0]
    assert record["costs"]["sa"]["decoder"]["time_exponent"] == pytest.approx(1)
    assert record["costs"]["cbsa"]["decoder"]["time_exponent"] == pytest.approx(2)
    assert record["costs"]["sa"]["whole model"]["time_exponent"] == pytest.approx(1)
    assert record["costs"]["cbsa"]["whole model"]["time_exponent"] == pytest.approx(2)
    lines = render_exponents(record).splitlines()
    assert lines[1].split() == ["tokens", "16", "64"]
    assert lines[2].split() == ["sa", "decoder", "ms", "1000.0", "4000.0", "1.00"]


def test_parts_run():
    record = measure_exponents("vit_tiny_patch16_384", 7, [64, 96], 1, 0.0, torch.device("cpu"))
    for parts in record["costs"].values():
        assert all(value > 0 for cost in parts.values() for value in cost["seconds"])
        assert parts["whole model"]["flops"][0] > parts["decoder"]["flops"][0]
