"""The claims of the abstract and the method section, what tests each, and the rule of the verdicts.

Thresholds were fixed before any model was looked at. Every test is a margin, which has to be below zero; it is computed
per image (or per model, where it is a matter of weights alone), so that its interval is that of a mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from depict_hf.analysis.steps import LAYERED_DECODERS, SUBSPACE_DECODERS

from .intervals import bootstrap_mean, crossed_mean
from .white_box import NORMALIZATIONS

NEAR = 0.1  # deviation from an orthonormal system, at most
CAPTURED = 0.9  # share of what the principal subspace holds, at least
INCOHERENT = 0.5  # of the overlap of random subspaces, at most
COMPACT = 1.25  # times the fragments or outlines of the ground truth, at most

HOLDS, IN_PART, DOES_NOT, UNDEFINED = "holds", "holds in part", "does not hold", "not defined"
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Test:
    """One margin of a claim.

    Args:
        name: For tables.
        formula: What is computed, in the names of the record.
        margin: That, of the figures of one image or of the weights, and of those it is compared with.
        required: Whether the claim holds only if this is met; else it can make it hold in part.
        kinds: Decoders that it is defined for.
        of_weights: Whether it is one number per model.
        against: "untrained", "linear" or nothing.
    """

    name: str
    formula: str
    margin: Callable[[Figures, Figures], float]
    required: bool
    kinds: tuple[str, ...]
    of_weights: bool = False
    against: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim with its tests.

    Args:
        name: For headings.
        statement: What is claimed.
        values: Figures of the record that tables show, by name with their meaning.
        tests: Its tests.
    """

    name: str
    statement: str
    values: Mapping[str, str]
    tests: tuple[Test, ...]


def _lowers(quantity: str, name: str) -> Test:
    key = f"{quantity}_{name}"
    kinds = LAYERED_DECODERS if quantity == "rate" else SUBSPACE_DECODERS
    symbol = "R" if quantity == "rate" else "R^c"
    return Test(f"{symbol} falls, {name}", key, lambda own, _: own[key], True, kinds)


CLAIMS = (
    Claim(
        "Compression",
        "Self-attention lowers the coding rate of the patch tokens.",
        {
            f"{quantity}_{name}": f"change of {symbol} in nats, {name}"
            for quantity, symbol in (("rate", "R"), ("compression", "R^c"))
            for name in NORMALIZATIONS
        }
        | {"negative_steps": "share of negative step sizes"},
        tuple(_lowers(quantity, name) for quantity in ("rate", "compression") for name in NORMALIZATIONS),
    ),
    Claim(
        "Subspaces",
        "Each head's projection is near orthonormal, and heads are incoherent.",
        {
            "deviation": "deviation from orthonormal rows",
            "deviation_any_scale": "the same up to a common length",
            "overlap": "overlap of heads",
            "chance": "overlap of random subspaces",
        },
        (
            Test(
                "rows orthonormal",
                f"deviation - {NEAR}",
                lambda own, _: own["deviation"] - NEAR,
                True,
                SUBSPACE_DECODERS,
                of_weights=True,
            ),
            Test(
                "heads incoherent",
                f"overlap - {INCOHERENT} chance",
                lambda own, _: own["overlap"] - INCOHERENT * own["chance"],
                True,
                SUBSPACE_DECODERS,
                of_weights=True,
            ),
            Test(
                "rows orthogonal and of one length",
                f"deviation_any_scale - {NEAR}",
                lambda own, _: own["deviation_any_scale"] - NEAR,
                False,
                SUBSPACE_DECODERS,
                of_weights=True,
            ),
            Test(
                "closer to that than untrained",
                "deviation_any_scale - deviation_any_scale(untrained)",
                lambda own, other: own["deviation_any_scale"] - other["deviation_any_scale"],
                False,
                SUBSPACE_DECODERS,
                of_weights=True,
                against="untrained",
            ),
            Test(
                "more incoherent than untrained",
                "overlap - overlap(untrained)",
                lambda own, other: own["overlap"] - other["overlap"],
                False,
                SUBSPACE_DECODERS,
                of_weights=True,
                against="untrained",
            ),
        ),
    ),
    Claim(
        "Class tokens",
        "Class tokens are near an orthonormal basis of the principal subspace of the patch tokens.",
        {
            "class_deviation": "deviation of class vectors from orthonormal ones (cosines)",
            "captured": "energy of the patch vectors in their span",
            "best": "energy in the principal subspace",
            "span_chance": "energy in a random subspace",
            "angle": "mean principal angle between both, degrees",
            "captured_centered": "energy in their span, patch vectors centred",
            "best_centered": "energy in the principal subspace, centred",
        },
        (
            Test(
                "class vectors orthonormal",
                f"class_deviation - {NEAR}",
                lambda own, _: own["class_deviation"] - NEAR,
                True,
                LAYERED_DECODERS,
            ),
            Test(
                "they span the principal subspace",
                f"{CAPTURED} best - captured",
                lambda own, _: CAPTURED * own["best"] - own["captured"],
                True,
                LAYERED_DECODERS,
            ),
            Test(
                "they span it, centred",
                f"{CAPTURED} best_centered - captured_centered",
                lambda own, _: CAPTURED * own["best_centered"] - own["captured_centered"],
                True,
                LAYERED_DECODERS,
            ),
            Test(
                "closer to orthonormal than untrained",
                "class_deviation - class_deviation(untrained)",
                lambda own, other: own["class_deviation"] - other["class_deviation"],
                False,
                LAYERED_DECODERS,
                against="untrained",
            ),
            Test(
                "hold more than untrained",
                "captured/best (untrained) - captured/best",
                lambda own, other: other["captured"] / other["best"] - own["captured"] / own["best"],
                False,
                LAYERED_DECODERS,
                against="untrained",
            ),
            Test(
                "hold more than untrained, centred",
                "captured_centered/best_centered (untrained) - captured_centered/best_centered",
                lambda own, other: (
                    other["captured_centered"] / other["best_centered"]
                    - own["captured_centered"] / own["best_centered"]
                ),
                False,
                LAYERED_DECODERS,
                against="untrained",
            ),
        ),
    ),
    Claim(
        "Compact masks",
        "Dot products of patch and class tokens yield compact masks.",
        {
            "components": "connected components per class",
            "components_truth": "the same in the ground truth",
            "variation": "total variation of the label map",
            "variation_truth": "the same in the ground truth",
            "variation_lens": "the same read before the first layer",
        },
        (
            Test(
                "not more fragments than the ground truth",
                f"components - {COMPACT} components_truth",
                lambda own, _: own["components"] - COMPACT * own["components_truth"],
                True,
                LAYERED_DECODERS,
            ),
            Test(
                "not longer outlines than the ground truth",
                f"variation - {COMPACT} variation_truth",
                lambda own, _: own["variation"] - COMPACT * own["variation_truth"],
                True,
                LAYERED_DECODERS,
            ),
            Test(
                "shorter outlines than before the first layer",
                "variation - variation_lens",
                lambda own, _: own["variation"] - own["variation_lens"],
                False,
                LAYERED_DECODERS,
            ),
            Test(
                "fewer fragments than the linear decoder",
                "components - components(linear)",
                lambda own, other: own["components"] - other["components"],
                False,
                LAYERED_DECODERS,
                against="linear",
            ),
        ),
    ),
)


def judge(record: Mapping, group: str) -> dict[str, dict]:
    """Apply every claim's tests to one group of models.

    Returns:
        By claim: `verdict`; `met` and `failed`, names of its tests; `tests`: by name `mean` and `interval` of the
        margin. A test that is not defined for the group, or whose comparison was not measured, is not there.
    """
    results = {}
    for claim in CLAIMS:
        tests = {}
        for test in claim.tests:
            margins = _margins(record, group, test)
            if margins is not None:
                tests[test.name] = crossed_mean(margins) if test.of_weights else bootstrap_mean(margins)
        met = [name for name, margin in tests.items() if is_below_zero(margin)]
        required = [test.name for test in claim.tests if test.required and test.name in tests]
        verdict = HOLDS if set(required) <= set(met) else IN_PART if met else DOES_NOT
        results[claim.name] = {
            "verdict": verdict if required else UNDEFINED,
            "met": met,
            "failed": [name for name in tests if name not in met],
            "tests": tests,
        }
    return results


def is_below_zero(margin: Mapping) -> bool:
    """Whether the whole interval is below zero; the mean decides where there is none, for lack of repetitions."""
    interval = margin["interval"]
    return (margin["mean"] if interval is None else interval[1]) < 0


def _margins(record: Mapping, group: str, test: Test) -> list[list[float]] | None:
    kind = record["groups"][group]["decoder_type"]
    if kind not in test.kinds:
        return None
    models = record["groups"][group]["models"]
    linear = next((name for name, each in record["groups"].items() if each["decoder_type"] == "linear"), None)
    if test.against == "linear" and linear is None:
        return None
    rows = []
    for model in models:
        own = record["models"][model]
        if test.of_weights:
            other = record["untrained"][model]["weights"]
            if own["weights"]["overlap"] is None and "overlap" in test.formula:
                return None
            rows.append([test.margin(own["weights"], other)])
            continue
        others: Sequence[Figures] = record["untrained"][model]["images"]
        if test.against == "linear":
            assert linear is not None  # or the test was left out
            images = [record["models"][each]["images"] for each in record["groups"][linear]["models"]]
            others = [
                {"components": sum(image["components"] for image in one) / len(one)}
                for one in zip(*images, strict=True)
            ]
        rows.append([test.margin(*pair) for pair in zip(own["images"], others, strict=True)])
    return rows


def values(record: Mapping, group: str, which: str, name: str) -> dict | None:
    """Return mean and interval of a figure over a group's models and images; None where it is not defined.

    Args:
        which: "models" or "untrained".
        name: Of a figure of the weights or of an image.
    """
    found = [record[which][model] for model in record["groups"][group]["models"]]
    if all(each["weights"].get(name) is not None for each in found):
        return crossed_mean([[each["weights"][name]] for each in found])
    if all(name in each["images"][0] for each in found):
        return bootstrap_mean([[image[name] for image in each["images"]] for each in found])
    return None
