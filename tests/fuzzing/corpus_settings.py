"""Cases of tests/corpus: settings and command lines."""

from collections.abc import Iterator

from .bases import photographs
from .corpus_cases import Case, refused, right
from .makers import RECIPE


def settings() -> Iterator[Case]:
    nan, infinite = float("nan"), float("inf")
    for name, fields, message in (
        ("sound", {"hidden_size": 48, "num_attention_heads": 4, "window_size": 64, "window_stride": 32}, None),
        ("no-layers", {"num_hidden_layers": 0}, "at least 1"),
        ("negative-width", {"hidden_size": -48}, "at least 1"),
        ("true-for-a-number", {"hidden_size": True}, "expected int"),
        ("nan-range", {"initializer_range": nan}, "finite"),
        ("infinite-temperature", {"temperature": infinite}, "finite"),
        ("unknown-decoder", {"decoder_type": "x"}, "Unknown decoder_type"),
        ("stride-alone", {"window_stride": 4}, "needs a window_size"),
        ("probability-of-2", {"hidden_dropout_prob": 2.0}, "below 1"),
        ("list-for-a-size", {"image_size": [1, 2, 3]}, "(height, width)"),
        ("backbone-of-itself", {"backbone_config": {"model_type": "timm_backbone"}}, "no backbone of itself"),
    ):
        description = {"kind": "configuration", "fields": fields}
        yield Case(f"configuration-{name}", {}, description, right(**fields) if message is None else refused(message))
    for name, settings, message in (
        ("sound", {"size": {"shortest_edge": 8}}, None),
        ("no-size", {"size": {"shortest_edge": 0}}, "positive pixels"),
        ("nan-mean", {"image_mean": nan}, "finite"),
        ("unknown-filter", {"resample": 17}, "filter of PIL"),
        ("text-for-a-switch", {"do_resize": "yes"}, "True or False"),
        ("unknown-sides", {"size": {"width": 3}}, "size must have one of"),
        ("method", {"resize": 1}, "is no setting"),
    ):
        description = {"kind": "image_processor", "settings": settings}
        expected = right(shape=[1, 3, 8, 12]) if message is None else refused(message)
        yield Case(f"image_processor-{name}", {}, description, expected)
    for name, overrides, message in (
        ("sound", ["learning_rate=0.1", "data.size=64", "window_size=none", "window_stride=none"], None),
        ("nan-rate", ["learning_rate=nan"], "finite numbers"),
        ("unknown-field", ["learning_rat=1"], "did you mean"),
        ("no-value", ["learning_rate"], "needed field=value"),
        ("text-for-a-number", ["batch_size=\x1b[2J"], "needed a value of type int"),
        ("half-a-batch", ["batch_size=8.5"], "needed a value of type int"),
        ("seed-too-large", ["seed=99999999999999999999"], "at most"),
        ("stride-beyond-the-window", ["window_size=32", "window_stride=33"], "pixels are left out"),
        ("same-names", ["class_names=a,b,a"], "the same"),
        ("control-character", ["class_names=a,b\x07"], "control characters"),
        ("no-divisor", ["batch_size=3", "accumulation_steps=2"], "needed a multiple"),
        ("deviation-of-0", ["image_std=0,1,1"], "positive deviations"),
    ):
        description = {"kind": "recipe", "recipe": "camvid_dinov2_small_sa", "overrides": overrides}
        yield Case(f"recipe-{name}", {}, description, right() if message is None else refused(message))


def commands() -> Iterator[Case]:
    segment = "segment pairs/train/images --model model --dtype float32"
    train = f"training.train camvid_dinov2_small_sa pairs out --backbone backbone {RECIPE}"
    for name, line, message in (
        ("recipe-names-missing", f"{train} class_names=nowhere.txt", "nowhere.txt cannot be read"),
        ("segment", segment, None),
        ("segment-nothing", f"{segment} --classes moon", "is none of the model's classes"),
        ("segment-nan-scale", f"{segment} --scales nan", "positive numbers"),
        ("segment-infinite-scale", f"{segment} --scales inf", "positive numbers"),
        ("segment-wide-stride", f"{segment} --window-stride 99", "would skip pixels"),
        ("segment-no-model", "segment pairs/train/images --model nowhere", "cannot load the model nowhere"),
        ("segment-no-photo", "segment nowhere.png --model model", "exit 1: depict: nowhere.png: there is no such file"),
        ("segment-device", f"{segment} --device nonsense", "cannot load the model model to nonsense"),
        ("segment-alpha", f"{segment} --alpha nan", "Got alpha=nan"),
        ("segment-batch", f"{segment} --max-batch-pixels 0", "Got max_batch_pixels=0"),
        ("segment-option", f"{segment} --nonsense", "argparse exits with 2"),
        ("convert", "convert published_sa out", None),
        ("convert-nothing", "convert pairs out", "pairs/checkpoint.pth does not exist"),
        ("convert-over-photographs", "convert published_sa pairs", "pairs is not an empty folder"),
        ("export", "export model out --format torch-export --size 16 16", None),
        ("export-no-size", "export model out --format torch-export --size 0 16", "needed positive pixels"),
        ("export-int8", "export model out --format torch-export --int8", "Got int8 for format"),
        ("explain", "explain photographs/rgb.png --model model", None),
        ("explain-outside", "explain photographs/rgb.png --model model --at 99 0", "x goes from 0 to 23"),
        ("explain-class", "explain photographs/rgb.png --model model --class moon", "The model has no class"),
        ("explain-floats", "explain photographs/floats.tif --model model", "its values are floats"),
        ("evaluate", "evaluate model pairs --workers 0", None),
        ("evaluate-split", "evaluate model pairs --workers 0 --split nothing", "Got split 'nothing'"),
        ("evaluate-images", "evaluate model pairs --workers 0 --max-images 0", "Got at most 0 images"),
        ("evaluate-scale", "evaluate model pairs --workers 0 --scales 0", "needed one or more positive numbers"),
        ("evaluate-corruption", "evaluate model pairs --workers 0 --corruption fog:9", "Got severity 9 of fog"),
        ("calibrate", "calibrate model pairs --workers 0", None),
        ("calibrate-default-of-nothing", "calibrate nowhere pairs --workers 0", "nowhere is no folder with a model"),
        ("train-no-time", "train pairs out --from model --minutes nan", "Got --minutes nan"),
        ("train-classes", "train pairs out --from model --max-steps 1 --classes sky,road", "Got 2 class names"),
        ("recipe-one-step", train, None),
        ("recipe-batch", f"{train} batch_size=99", "lower batch_size"),
        ("recipe-decoder", f"{train} decoder_type=none", "Got decoder_type='none'"),
    ):
        expected = right(status=0) if message is None else refused(message, "Refusal")
        yield Case(f"command-{name}", {}, {"kind": "command", "base": ".", "arguments": line.split()}, expected)
    cut = {"photos/1.png": photographs()["rgb.png"][:300]}
    cut |= {f"photos/{index}.png": photographs()["rgb.png"] for index in (0, 2)}
    found = ["segmented/0_labels.png", "segmented/2_labels.png"]
    arguments = ["segment", "photos", "--model", "model", "--format", "png", "--dtype", "float32"]
    description = {"kind": "command", "base": ".", "arguments": arguments, "must_exist": found}
    yield Case("command-segment-neighbours", cut, description, refused("exit 1", "Refusal"))
