"""Fit a temperature for a model's confidences: `python -m training.calibrate MODEL DATASET [--split validation] ...`.

It is written into the model folder's config.json and changes confidences, never labels. Processes started together by
`accelerate launch` or `torchrun` share the images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from depict_hf.loading import model_source
from depict_hf.photo_files import shown_lines

from .evaluation import (
    PixelSample,
    add_data_arguments,
    check_diagram,
    check_outputs,
    class_names,
    describe_calibration,
    draw_reliability,
    end_processes,
    environment,
    evaluate,
    figures_at,
    fit_temperature,
    load_samples,
    load_with_overrides,
    settings,
    start_processes,
    write_json,
)
from .stopping import run_stoppable

RECORD_NAME = "calibration.json"


def main(argv: Sequence[str] | None = None, prog: str = "python -m training.calibrate") -> int:
    """Fit, print and write temperature and record.

    Returns:
        0 if all went well, 1 if not, 130 or 143 if SIGINT or SIGTERM ended it.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("model", help="folder of a model with its image processor, or 'default'")
    add_data_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the pixels that are drawn (%(default)s)")
    parser.add_argument("--diagram", type=Path, metavar="FILE", help="draw before and after: .png, .svg or .pdf")
    parser.set_defaults(split="validation")
    arguments = parser.parse_args(argv)
    return run_stoppable(lambda: _run(arguments), prog, "the temperature is as it was; start it again")


def _run(arguments: argparse.Namespace) -> int:
    started_in = environment()
    try:
        state = start_processes()
        record = run(arguments, state) | {"environment": started_in}
        if state.is_main_process:
            folder = Path(model_source(arguments.model))
            path = arguments.output or folder / RECORD_NAME
            write_json(record, path)
            write_temperature(folder, record["temperature"])
            if arguments.diagram:
                names = {
                    f"{name}: temperature {record[name]['temperature']:g}": record[name] for name in ("before", "after")
                }
                draw_reliability(names, arguments.diagram)
            for name in ("before", "after"):
                print(f"{name + ':':8}{describe_calibration(record[name])}")
            print(f"temperature {record['temperature']:g} -> {folder / 'config.json'}; record -> {path}")
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    end_processes()
    return 0


def run(arguments: argparse.Namespace, state: PartialState) -> dict:
    """Evaluate the split once, and fit the temperature to a sample of its pixels; nothing is written.

    Returns:
        The record of `evaluate`, which does not depend on temperatures, with `model`, `dataset`, `split`, `seed`, the
        fitted `temperature`, `labelled_pixels` of all photographs, and of the pixels that were drawn among them the
        figures of `Calibration` with the temperature `before` and `after`.

    Raises:
        OSError: If model or data cannot be had.
        ValueError: If the model is none that can be changed, or arguments do not fit each other or the data.
    """
    source = check_source(arguments.model, arguments.backend)
    check_diagram(arguments.diagram)
    check_outputs(arguments, state, arguments.diagram)
    protocol, execution = settings(arguments, state)
    model, image_processor = load_with_overrides(arguments, source, state)
    samples = load_samples(arguments, class_names(model.config), bool(image_processor.do_reduce_labels), state)
    sample = PixelSample(seed=arguments.seed)
    record = evaluate(model, image_processor, samples, protocol, execution, score_observers=[sample])
    sample.merge(state)
    scores, labels = sample.pixels()
    temperature = fit_temperature(scores, labels)
    return record | {
        "model": arguments.model,
        "dataset": arguments.dataset,
        "split": arguments.split,
        "seed": arguments.seed,
        "temperature": temperature,
        "labelled_pixels": sample.num_seen,
        "before": figures_at(model.config.temperature, scores, labels),
        "after": figures_at(temperature, scores, labels),
    }


def check_source(name: str, backend: str = "pytorch") -> str:
    """The name of a model whose files can be changed.

    Raises:
        OSError: If "default" is asked for and not installed.
        ValueError: If it is no folder, or the folder of an export.
    """
    folder = Path(model_source(name))
    advice = "calibrate the model that it was made of, then export that"
    exports = [each.name for each in (folder / "model.onnx", folder / "model.pt2") if each.is_file()]
    if exports:
        raise ValueError(f"{name} holds an export, {exports[0]}, whose scores are not at hand; {advice}.")
    if backend != "pytorch":
        raise ValueError(f"Got --backend {backend}, which runs exports; {advice}.")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} is no folder with a model, and the temperature is written into the model's config.json; save a "
            "model of the Hub first, by model.save_pretrained(FOLDER) and image_processor.save_pretrained(FOLDER)."
        )
    return name


def write_temperature(folder: Path, temperature: float) -> None:
    """Set the temperature in a model folder's config.json and leave everything else in it as it is."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"temperature": temperature}
    write_json(dict(sorted(config.items())), path)


if __name__ == "__main__":
    sys.exit(main())
