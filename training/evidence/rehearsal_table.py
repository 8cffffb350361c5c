"""The records of rehearsals as a page: what was gone through, and what the rows of the paper are estimated to cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from .costs import ASSUMED_RATES, ASSUMED_SCALING, describe_assumptions


def render_rehearsals(records: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown with two tables of records of `rehearse`: the rehearsals, measured, and the costs, estimated."""
    lines = [
        "# Rows of the paper, rehearsed",
        "",
        "Each was gone through once by `python -m training.train RECIPE --rehearse`: reading, ten steps, resuming in "
        "the middle, the published protocol at one and at six scales, card, and conversion to the published format and "
        "back. Encoders started from random numbers of the published shape; nothing here is a figure of accuracy.",
        "",
        "| recipe | encoder | images a step | TFLOP a step | peak memory, GiB | minutes | resumed |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for record in records:
        rehearsed = record["rehearsed"]
        peak = rehearsed["peak_bytes"]
        [resumed] = [each["result"] for each in record["stages"] if each["stage"] == "resuming"]
        cells = (
            record["recipe"],
            rehearsed["encoder"],
            f"{rehearsed['batch_size']} of {record['cost']['batch_size']}",
            f"{rehearsed['flops_per_step'] / 1e12:.2f}",
            "-" if peak is None else f"{peak / 2**30:.1f}",
            f"{record['seconds'] / 60:.1f}",
            resumed.partition("ends with ")[2],
        )
        lines.append(f"| {' | '.join(cells)} |")
    several = [each for each in ASSUMED_SCALING if each > 1]
    names = [f"{precision}, {cards}" for cards in ASSUMED_SCALING for precision in ASSUMED_RATES]
    memory = [f"GiB on each of {cards}" for cards in (1, *several)]
    lines += [
        "",
        "## What the whole rows would cost",
        "",
        f"{describe_assumptions()} Columns name the precision and the number of cards. Memory is what a step in "
        "float32 keeps: weights, gradients, momentum and the outputs that the backward pass needs.",
        "",
        f"| recipe | million weights | steps | TFLOP a step | {' | '.join([*names, *memory])} |",
        f"|---|---:|---:|---:|{'---:|' * len([*names, *memory])}",
    ]
    for record in records:
        cost = record["cost"]
        hours = [
            f"{cost['hours'][str(cards)][precision]:.3g}" if str(cards) in cost["hours"] else "-"
            for cards in ASSUMED_SCALING
            for precision in ASSUMED_RATES
        ]
        kept = [
            f"{cost['bytes_per_card'][str(cards)] / 2**30:.1f}" if str(cards) in cost["bytes_per_card"] else "-"
            for cards in (1, *several)
        ]
        cells = (
            record["recipe"],
            f"{cost['parameters'] / 1e6:.1f}",
            str(cost["steps"]),
            f"{cost['flops_per_step'] / 1e12:.2f}",
            *hours,
            *kept,
        )
        lines.append(f"| {' | '.join(cells)} |")
    reduced = dict.fromkeys(each for record in records for each in record["reduced"])
    lines += ["", "Reduced for the rehearsals:", "", *[f"- {each}" for each in reduced]]
    return "\n".join(lines) + "\n"
