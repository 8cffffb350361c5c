"""Rounds alternate and count as promised; memory, FLOPs and exponents are those of cases known in closed form."""

import sys

import pytest
import torch
import torch.nn.functional as F

from training.evaluation.measurement import (
    count_flops,
    interleaved_seconds,
    log_slope,
    matrix_product,
    peak_extra_bytes,
)


def test_functions_take_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repetitions=3)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


@pytest.mark.parametrize("warm_up", [False, True])
def test_one_round_counts_however_small_the_budget(warm_up):
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a")}, 5, budget_seconds=0, warm_up=warm_up)
    assert len(seconds["a"]) == 1
    assert len(calls) == 1 + warm_up


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_the_highest_and_not_the_last():
    def use() -> None:
        first = torch.ones(8 * 2**20)  # 32 MiB
        first = torch.cat([first, first])  # and 64 MiB while both live
        del first
        torch.ones(2**20)

    use()
    assert peak_extra_bytes(use) == pytest.approx(96 * 2**20, rel=0.05)
    assert peak_extra_bytes(lambda: None) < 2**20


def test_flops_of_linear_layers_and_fused_attention():
    """Attention has two products forward; backward five, two for each of those and the scores once more."""
    tokens = torch.randn(2, 3, 50, 16, requires_grad=True)
    weight = torch.randn(8, 16)
    with torch.inference_mode():
        assert count_flops(lambda: F.linear(tokens, weight)) == 2 * (2 * 3 * 50) * 16 * 8
    product = 2 * (2 * 3) * 50 * 50 * 16
    with torch.inference_mode():
        assert count_flops(lambda: F.scaled_dot_product_attention(tokens, tokens, tokens)) == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(tokens, tokens, tokens).sum().backward()) == 7 * product


def test_matrix_product_knows_its_flops():
    product, flops = matrix_product(torch.bfloat16)
    with torch.inference_mode():
        assert product().dtype == torch.bfloat16
        assert count_flops(product) == flops


def test_slope_is_the_exponent():
    sizes = [2, 3, 7, 11]
    assert log_slope(sizes, [5 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    with pytest.raises(ValueError, match=r"Got sizes \[4, 4\], needed at least two different ones"):
        log_slope([4, 4], [1, 2])
