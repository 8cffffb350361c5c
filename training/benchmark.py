"""Time a forward pass against the same arithmetic with attention written out, in one interleaved run.

    python -m training.benchmark

Both sides have the same weights and input; "eager" computes softmax(q k^T) v step by step, as the published code does.
"""

import argparse
import platform
import statistics
import time

import torch

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from depict_hf.configuration_depict import DECODER_TYPES, ENCODER_PRESETS

IMPLEMENTATIONS = ("eager", "sdpa")


def forward_seconds(
    model: DepictForSemanticSegmentation, pixel_values: torch.Tensor, repetitions: int
) -> dict[str, float]:
    """Median seconds of a forward pass per attention implementation; repetitions alternate between them."""
    seconds = {name: [] for name in IMPLEMENTATIONS}
    for repetition in range(repetitions + 1):
        for name in IMPLEMENTATIONS:
            model.set_attn_implementation(name)
            start = time.perf_counter()
            with torch.inference_mode():
                # Reading a value waits for the device.
                model(pixel_values).logits.sum().item()
            if repetition:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=ENCODER_PRESETS, default="vit_small_patch16_384")
    parser.add_argument("--decoders", nargs="+", choices=DECODER_TYPES, default=list(DECODER_TYPES))
    parser.add_argument("--size", type=int, default=512, help="side of the square input in pixels")
    parser.add_argument("--labels", type=int, default=150, help="number of classes")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    pixel_values = torch.randn(1, 3, args.size, args.size, device=args.device)
    print(
        f"{args.encoder}, {args.size}x{args.size}, {args.labels} classes, float32, {args.device} "
        f"({platform.machine()}, {torch.get_num_threads()} threads), torch {torch.__version__}"
    )
    print(f"{'decoder':<18}{'eager ms':>10}{'ours ms':>10}{'speed-up':>10}")
    for decoder_type in args.decoders:
        config = DepictConfig.from_preset(args.encoder, decoder_type=decoder_type, num_labels=args.labels)
        model = DepictForSemanticSegmentation(config).eval().to(args.device)
        seconds = forward_seconds(model, pixel_values, args.repetitions)
        eager, ours = (seconds[name] for name in IMPLEMENTATIONS)
        print(f"{decoder_type:<18}{1000 * eager:>10.1f}{1000 * ours:>10.1f}{eager / ours:>10.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
