"""Records of evaluations: what they ran on, as a table, as JSON."""

import io
import platform
import subprocess
import sys
from pathlib import Path

import datasets
import torch
import transformers
from transformers import PretrainedConfig

from depict_hf.hub import percent as percent
from depict_hf.hub import render_table as render_table
from depict_hf.writing import write_json as write_json
from depict_hf.writing import write_whole as write_whole


def environment() -> dict[str, str | int | None]:
    """Versions, commit of the code (None outside a checkout; "+" marks uncommitted changes) and hardware."""
    return {
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
    }


def class_names(config: PretrainedConfig) -> list[str]:
    """The names of a model's classes in the order of their ids."""
    return [config.id2label[index] for index in range(config.num_labels)]


def git_commit(folder: Path) -> str | None:
    """Hash of the commit checked out around `folder`, with "+" where tracked files were changed; None without git."""
    try:
        outputs = [
            subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return outputs[0].strip() + ("+" if outputs[1].strip() else "")


def describe(record: dict) -> str:
    """The lines below the table of a record: corruptions, the other metric, calibration, speed and memory."""
    lines = [
        f"{each['corruption']}:{each['severity']}  mean IoU {percent(each['mean_iou']).strip()}, "
        f"retained {percent(each['retention']).strip()} %"
        for each in record.get("corruptions", ())
    ]
    if "cross_check" in record:
        difference = record["cross_check"]["largest_difference"]
        lines.append(f"mean_iou of evaluate: largest difference {difference:.3g}")
    lines += [
        f"at temperature {record[name]['temperature']:g}: {describe_calibration(record[name])}"
        for name in ("calibration", "uncalibrated")
        if name in record
    ]
    memory = ", ".join(
        f"{kind} {value / 2**20:.0f} MiB" for kind, value in record["peak_memory_bytes"].items() if value is not None
    )
    lines.append(
        f"{record['num_images']} images, {record['images_per_second']:.2f} a second, metric "
        f"{100 * record['metric_share']:.2f} % of the time, peak memory {memory}"
    )
    return "\n".join(lines)


def describe_calibration(figures: dict) -> str:
    """One line on what `Calibration.figures` returned."""
    if not figures["num_pixels"]:
        return "no labelled pixels"
    return (
        f"calibration error {100 * figures['expected_calibration_error']:.2f} %, negative log-likelihood "
        f"{figures['negative_log_likelihood']:.4f} nats, Brier score {figures['brier_score']:.4f}, area under risk and "
        f"coverage {100 * figures['risk_coverage']['area']:.2f} %, {figures['num_pixels']} pixels"
    )


def flush_every_line() -> None:
    """Have lines reach a log file as they are printed, not when a buffer is full."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def write_figure(figure, path: Path, dpi: int) -> None:
    """Write or replace a figure of matplotlib, as `write_whole` does; the suffix says in which format."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=dpi)
    write_whole(buffer.getvalue(), path)
