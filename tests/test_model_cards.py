"""Tables in the README and on the cards are those of the measured records beside them."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load

from depict_hf import DepictConfig
from depict_hf.hub import render_card
from depict_hf.hub.claims import unbacked_claims
from depict_hf.loading import DEFAULT_MODEL
from training import cards as cards_command
from training.evaluation.records import percent, render_table
from training.evidence import robustness_card, white_box_card
from training.evidence.claims import (
    build_claims,
    build_exploration,
    read_plan,
    render_claims,
    render_exploration,
)
from training.evidence.comparison_report import with_deviation
from training.evidence.model_cards import card_folders, paper_model_names, paper_records, render_index
from training.evidence.paper import PAPER_ROWS
from training.evidence.rehearsal_table import render_rehearsals
from training.evidence.robustness_summary import summarize_sections, verdict
from training.evidence.tradeoff import render_tradeoff
from training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/evaluation.json"))
REHEARSALS = sorted((ROOT / "model_cards" / "rehearsals").glob("*.json"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


RENDERED = [*card_folders(ROOT / "model_cards"), DEFAULT_MODEL]


@pytest.mark.parametrize("folder", RENDERED, ids=lambda folder: folder.name)
def test_cards_are_rendered_from_what_lies_beside_them(folder):
    """`python -m training.cards model_cards depict_hf/default_model` brings them up to date."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == render_card(folder)
    assert unbacked_claims(text, folder) == []
    card = ModelCard(text)
    assert card.data.license and card.data.library_name == "transformers"
    assert metadata_load(folder / "README.md")["pipeline_tag"] == "image-segmentation"
    claimed = [(each.metric_type, each.metric_value, each.dataset_split) for each in card.data.eval_results or ()]
    paths = [*folder.glob("evaluation.json"), *sorted(folder.glob("evaluation_*.json"))]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    kinds = ("mean_iou", "mean_accuracy", "overall_accuracy")
    assert claimed == [(kind, round(100 * each[kind], 2), each["split"]) for each in records for kind in kinds]


@pytest.mark.parametrize("name", paper_model_names())
def test_cards_of_the_papers_models_are_of_their_recipes(name):
    folder = ROOT / "model_cards" / name
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    assert found == json.loads(json.dumps(paper_records(name)))


def test_the_papers_figures_stand_on_its_cards_alone_and_as_its():
    """Each figure of DEPICT in `PAPER_ROWS` on one card, in a table that says whose it is, and never as measured."""
    figures = {}
    for name in paper_model_names():
        text = (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8")
        assert "model-index" not in text and "## Results" not in text
        section = text.partition("## The paper's figures\n")[2].partition("\n## ")[0]
        if section:
            assert "mIoU, the paper's |" in section and "not measured here" in section
            figures[name] = [line.split("|")[2].strip() for line in section.splitlines() if line.startswith("| ")][2:]
    expected = {
        (row.dataset, f"{row.single_scale:.1f}", f"{row.multi_scale:.1f}")
        for row in PAPER_ROWS
        if row.decoder_type == "sa"
    }
    datasets = ("ade20k", "cityscapes", "pascal_context")
    assert {(next(each for each in datasets if name.startswith(each)), *each) for name, each in figures.items()} == (
        expected
    )


def test_the_index_lists_every_card():
    text = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
    assert text == render_index(ROOT / "model_cards")
    assert all(f"({folder.name}/README.md)" in text for folder in card_folders(ROOT / "model_cards"))


def test_the_command_writes_a_card(tmp_path, capsys):
    (tmp_path / "card.json").write_text('{"title": "Mine", "summary": "A model."}')
    assert cards_command.main([str(tmp_path)]) == 0
    assert "# Mine\n\nA model.\n" in (tmp_path / "README.md").read_text()
    (tmp_path / "evaluation.json").write_text("{")
    assert cards_command.main([str(tmp_path)]) == 1
    assert "evaluation.json is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_cards_show_their_record(folder):
    record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert render_table(record) in (folder / "README.md").read_text(encoding="utf-8")
    assert record["num_images"] > 0 and record["metric_definition"]


def test_the_readme_shows_the_default_models_record():
    config = DepictConfig.from_pretrained(DEFAULT_MODEL)
    records = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in CARDS]
    [record] = [each for each in records if list(each["per_class_iou"]) == list(config.id2label.values())]
    assert render_table(record) in README


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/evaluation_*.json")), ids=lambda path: path.stem)
def test_further_evaluations_are_those_measured(path):
    """On the card, and in the README but for corruptions; on the images of `evaluation.json`, or on other data."""
    record, whole = (json.loads(each.read_text(encoding="utf-8")) for each in (path, path.parent / "evaluation.json"))
    figure = percent(record["mean_iou"]).strip()
    assert figure in (path.parent / "README.md").read_text(encoding="utf-8")
    if not record.get("corruptions"):
        assert record["num_images"] == whole["num_images"] or record["protocol"].get("classes")
        assert figure in README


def test_the_default_model_is_calibrated_as_its_card_says():
    """The temperature shipped is the one that was fitted, and the card's figures are those of the record."""
    folder = ROOT / "model_cards" / "camvid_dinov2_small_finetuned_sa"
    record = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    assert DepictConfig.from_pretrained(DEFAULT_MODEL).temperature == record["temperature"]
    assert record["split"] == "validation"
    card = (folder / "README.md").read_text(encoding="utf-8")
    test = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    measured = [(record, record[name]) for name in ("before", "after")]
    measured += [(test, test[name]) for name in ("uncalibrated", "calibration")]
    for (each, figures), temperature in zip(measured, 2 * [1, record["temperature"]], strict=True):
        assert figures["temperature"] == temperature
        error, area = figures["expected_calibration_error"], figures["risk_coverage"]["area"]
        cells = (
            f"{each['split']}, {each['num_images']} images",
            f"{temperature:g}",
            percent(error).strip(),
            f"{figures['negative_log_likelihood']:.4f}",
            f"{figures['brier_score']:.4f}",
            percent(area).strip(),
        )
        assert f"| {' | '.join(cells)} |" in card
    error = percent(test["calibration"]["expected_calibration_error"]).strip()
    assert f"Its expected calibration error there is {error} %." in README
    for split in ("validation", "test"):
        assert f"(calibration_{split}.png)" in card and (folder / f"calibration_{split}.png").is_file()


def test_the_readme_shows_the_comparison():
    path = ROOT / "model_cards" / "comparison_camvid" / "comparison.json"
    decoders = json.loads(path.read_text(encoding="utf-8"))["decoders"]
    assert decoders.keys() >= {"sa", "ca", "mask_transformer", "linear"}
    for name, decoder in decoders.items():
        costs = f"{decoder['parameters']:,} | {decoder['flops'] / 1e9:.2f} | {decoder['milliseconds']:.0f}"
        assert f"| {name} | {costs} | {with_deviation(decoder['test'])} |" in README


def test_the_readme_shows_the_speed():
    record = json.loads((ROOT / "model_cards" / "speed_cpu" / "benchmark.json").read_text(encoding="utf-8"))
    for task in record["tasks"]:
        if task["what"] in ("photograph to label map", "multi-scale with flips", "training step"):
            reference, *others = task["sides"].values()
            cells = [f"{1000 * reference['median_seconds']:.0f} ms"] + [
                f"{1000 * side['median_seconds']:.0f} ms ({side['speed_up']:.1f}x, {side['memory_ratio']:.2f})"
                for side in others
            ]
            assert " | ".join(cells) in README
        elif task["what"] == "images to label maps":
            for name, side in task["sides"].items():
                assert f"{name} {1000 * side['median_seconds']:.0f} ms" in " ".join(README.split())
    costs = json.loads((ROOT / "model_cards" / "speed_cpu" / "exponent.json").read_text(encoding="utf-8"))
    for decoder in costs["exponents"]["costs"].values():
        assert f"to the power of {decoder['decoder']['time_exponent']:.2f}" in " ".join(README.split())


@pytest.mark.parametrize(("kind", "card"), [("robustness", robustness_card), ("white_box", white_box_card)])
def test_cards_of_measurements_are_rendered_from_their_records(kind, card):
    for path in (ROOT / "model_cards").glob(f"{kind}_*/{card.RECORD_NAME}"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert (path.parent / "README.md").read_text(encoding="utf-8") == card.render_card(record)
        assert (path.parent / card.FIGURE_NAME).is_file()


def test_the_readme_says_what_the_cards_on_the_claims_say():
    folder = ROOT / "model_cards"
    record = json.loads((folder / "robustness_camvid" / "robustness.json").read_text(encoding="utf-8"))
    groups = summarize_sections(record)["attention-noise"]["relative"]["groups"]
    left = {
        name: f"{100 * each['removed']['mean'] / each['clean']['mean']:.0f} %"
        for name, each in groups.items()
        if "removed" in each
    }
    text = " ".join(README.split())
    assert f"at zero it keeps {left['mask_transformer']} of its mIoU, `sa` {left['sa']}." in text
    assert "(less robust: sa, ca; more robust: cbsa)" in verdict(record) and "Nor is it [more robust]" in text
    record = json.loads((folder / "white_box_camvid" / "white_box.json").read_text(encoding="utf-8"))
    assert record["verdicts"]["sa"]["Compression"] == "does not hold"
    found = [claims for claims in record["verdicts"].values() if claims["Compression"] != "not defined"]
    assert all("holds" not in claims.values() for claims in found)


def test_the_report_on_the_plan_follows_from_its_runs():
    """Fails if the report is of older runs, of another plan, or was written by hand."""
    folder = ROOT / "model_cards" / "claims"
    record = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    plan = read_plan(folder / "PLAN.md")
    assert record["plan"] == plan.digest
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == render_claims(record) == render_claims(build_claims(plan, folder / "results"))
    assert record["pending"] == []
    found = {(test["decoder"], test["hypothesis"], test["dataset"]): test for test in record["tests"]}
    assert {test["verdict"] for key, test in found.items() if key[1] == "H1"} == {"supported"}
    assert all(test["interval"][0] > 0 for key, test in found.items() if key[1] == "H1")
    sets = ("camvid", "labelmefacade")
    verdicts = {
        (decoder, kind): [found[decoder, kind, name]["verdict"] for name in sets]
        for decoder in ("sa", "ca", "cbsa")
        for kind in ("H3a", "H3b", "H4")
    }
    assert verdicts["sa", "H4"] == verdicts["ca", "H4"] == verdicts["ca", "H3a"] == ["contradicted"] * 2
    assert verdicts["cbsa", "H4"] == verdicts["sa", "H3a"] == verdicts["sa", "H3b"] == ["open"] * 2
    assert verdicts["cbsa", "H3b"] == ["supported"] * 2
    points = {key: f"{100 * test['difference']:+.2f}" for key, test in found.items()}
    first, second, third = ([points[name, "H1", each] for each in sets] for name in ("sa", "cbsa", "ca"))
    behind, robust = ([points[name, kind, each] for each in sets] for name, kind in (("sa", "H4"), ("cbsa", "H3b")))
    parameters = {each["decoder"]: f"{100 * each['ratio']:.1f} %" for each in record["parameters"]}
    for sentence in (
        f"`sa` by {first[0]} points of mIoU on CamVid and {first[1]} on LabelMeFacade, `cbsa` by {second[0]} and "
        f"{second[1]}, `ca` by {third[0]} and {third[1]}.",
        f"`sa` yes, {parameters['sa']}; `ca` ({parameters['ca']}) and `cbsa` ({parameters['cbsa']}) no.",
        f"`sa` and `ca` are behind it, `sa` by {behind[0]} and {behind[1]}; `cbsa` is level.",
        f"open for `sa`; `cbsa` is, to absolute noise (it keeps {robust[0]} and {robust[1]} points more of its mIoU)",
    ):
        assert sentence in " ".join(README.split())


def test_what_was_looked_into_afterwards_follows_from_its_records():
    """Fails if figures were changed by hand, or the README says of step sizes what the records do not show."""
    folder = ROOT / "model_cards" / "claims"
    found = build_exploration(read_plan(folder / "PLAN.md"), folder / "results")
    assert json.loads((folder / "exploration.json").read_text(encoding="utf-8")) == found
    assert (folder / "EXPLORATION.md").read_text(encoding="utf-8") == render_exploration(found)
    for decoders in found.values():
        models = decoders["sa"]["models"].values()
        far = [each for each in models if each["update"] > 0.4]
        assert len(far) == 3 and all(each["class_iou"] < 0.02 for each in far)
        assert all(each["update"] < 0.25 and each["class_iou"] > 0.04 for each in models if each not in far)


def test_the_table_of_cost_against_accuracy_shows_its_record():
    folder = ROOT / "model_cards" / "tradeoff_camvid"
    record = json.loads((folder / "tradeoff.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == render_tradeoff(record)
    named = {each["quality"]: each for each in record["points"].values() if each["model"] == "default"}
    points = [named[name] for name in ("fast", "best", "balanced")]
    seconds, scores = (
        [f"{each[key] * factor:.1f}" for each in points] for key, factor in (("milliseconds", 0.001), ("mean_iou", 100))
    )
    text = " ".join(README.split())
    assert f"{seconds[0]}, {seconds[1]} and {seconds[2]} seconds a CamVid frame on two CPU cores" in text
    assert f"with {scores[0]}, {scores[1]} and {scores[2]} mIoU on ten validation frames" in text
    assert f"has {len(record['points'])} ways to run a model" in text and record["max_images"] == 10


@pytest.mark.skipif(not REHEARSALS, reason="no row of the paper has been rehearsed yet")
def test_the_table_of_rehearsals_shows_their_records():
    records = [json.loads(path.read_text(encoding="utf-8")) for path in REHEARSALS]
    for record, path in zip(records, REHEARSALS, strict=True):
        assert record["recipe"] == path.stem and record["rehearsed"]["flops_per_step"] > 0
    order = {name: place for place, name in enumerate(RECIPES)}
    records.sort(key=lambda record: order[record["recipe"]])
    assert render_rehearsals(records) == (REHEARSALS[0].parent / "README.md").read_text(encoding="utf-8")
