"""Damaged files of weights and settings: each ends in one line that names what is wrong, and none loads silently."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import save_model, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor, load_model
from depict_hf.conversion import convert_checkpoint, read_weights
from depict_hf.encoder_weights import check_tensors
from depict_hf.familiarity import FILE_NAME, Familiarity, load_familiarity
from depict_hf.inference import segment
from depict_hf.published_files import read_variant
from depict_hf.weight_files import WeightsError, read_header, seal, verify
from depict_hf.windows import window_corners

PUBLISHED = Path(__file__).parent / "data" / "published" / "segmenter_linear"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def published(tmp_path) -> Path:
    (tmp_path / "published").mkdir()
    for name in ("checkpoint.pth", "variant.yml"):
        shutil.copy(PUBLISHED / name, tmp_path / "published")
    return tmp_path / "published"


def refuse(call, message: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestOwnFolders:
    def test_the_checksum_changes_nothing_else(self, folder):
        path = folder / "model.safetensors"
        header = verify(path)
        assert header.metadata.keys() == {"format", "sha256"}
        values = tiny_model().state_dict()
        assert all(torch.equal(value, values[name]) for name, value in load_file(path).items())
        before = path.read_bytes()
        seal(path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("place", [-1, -5000, -20_000])
    def test_a_flipped_bit(self, folder, place):
        """In the last bits of a mantissa, where the model would compute nearly as before."""
        flip(folder / "model.safetensors", place)
        for load in (load_model, DepictForSemanticSegmentation.from_pretrained):
            refuse(lambda load=load: load(folder), r"model\.safetensors is damaged: its weights have the checksum")

    def test_a_damaged_name_of_the_checksum(self, folder):
        path = folder / "model.safetensors"
        flip(path, path.read_bytes().index(b'"sha256"') + 1)
        flip(path, -1)
        refuse(lambda: load_model(folder), "is damaged: its weights have the checksum")

    def test_files_of_others_have_no_checksum(self, folder):
        path = folder / "model.safetensors"
        save_file(load_file(path), path, {"format": "pt"})
        assert verify(path).metadata == {"format": "pt"}
        load_model(folder)

    def test_shards(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        DepictImageProcessor().save_pretrained(tmp_path)
        shards = sorted(tmp_path.glob("*.safetensors"))
        assert len(shards) > 1 and all("sha256" in verify(path).metadata for path in shards)
        assert torch.equal(load_model(tmp_path)[0].decoder.class_tokens, model.decoder.class_tokens)
        flip(shards[0], -1)
        refuse(lambda: load_model(tmp_path), "is damaged")

    def test_an_index_that_leads_elsewhere(self, tmp_path):
        inside = tmp_path / "inside"
        tiny_model().save_pretrained(inside, max_shard_size="20KB")
        DepictImageProcessor().save_pretrained(inside)
        path = inside / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        [first, *_] = sorted(set(index["weight_map"].values()))
        shutil.move(inside / first, tmp_path / first)
        path.write_text(path.read_text().replace(first, f"../{first}"))
        refuse(lambda: load_model(inside), "needed files in its own folder")

    @pytest.mark.parametrize("length", [0, 7, 100, 60_000])
    def test_a_truncated_file(self, folder, length):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        refuse(lambda: load_model(folder), "is no whole safetensors file")

    def test_headers_that_lie(self, tmp_path):
        def written(tensors: str, data: bytes = bytes(8)) -> Path:
            (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(tensors)) + tensors.encode() + data)
            return tmp_path / "x.safetensors"

        tensor = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
        assert read_header(written("{" + tensor + "}")).shapes == {"a": (2,)}
        for text, message in [
            ("{" + tensor + ", " + tensor + "}", "a name stands there twice"),
            ("{" + tensor.replace("[2]", "[3]") + "}", r"F32 of shape \[3\] in 8 bytes"),
            ("{" + tensor.replace("[2]", "[1000000000000]") + "}", "in 8 bytes"),
            ("{" + tensor.replace("[0, 8]", "[4, 12]") + "}", "leave a gap or overlap"),
            ("{" + tensor.replace("[0, 8]", "[-8, 0]") + "}", "no whole number"),
            ("[" * 100_000, "cannot be read"),
            ("{}", "describes 10 bytes, the file has 18"),
        ]:
            refuse(lambda text=text: read_header(written(text)), message, WeightsError)

    def test_sizes_are_compared_before_memory_is_taken(self, folder):
        """A terabyte of weights for one configuration; none of it may be asked for."""
        change(folder / "config.json", hidden_size=48_000, intermediate_size=60_000)
        message = r"holds weights of other shapes .* encoder\.embeddings\.cls_token is \(1, 1, 24\)"
        refuse(lambda: load_model(folder), message)
        refuse(lambda: DepictForSemanticSegmentation.from_pretrained(folder), message, RuntimeError)

    def test_missing_weights_are_bounded(self, folder):
        change(folder / "config.json", num_hidden_layers=1000, hidden_size=24, intermediate_size=48)
        refuse(lambda: load_model(folder), "missing_keys")
        state = {"encoder.norm.weight": torch.ones(24)}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        change(folder / "config.json", intermediate_size=60_000)
        refuse(lambda: load_model(folder), "numbers are not in its files, which hold 24")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_no_numbers_are_counted(self, tmp_path, value):
        model = tiny_model()
        with torch.no_grad():
            model.decoder.class_tokens[0, :2, :3] = value
        model.save_pretrained(tmp_path)
        message = r"NaN or infinite \(decoder\.class_tokens: 6 of 120\)"
        refuse(lambda: DepictForSemanticSegmentation.from_pretrained(tmp_path), message)

    def test_large_sums_are_no_infinite_values(self):
        from depict_hf.weight_files import check_finite

        check_finite(
            [("a", torch.full((4,), 3e38)), ("ids", torch.tensor([1])), ("half", torch.ones(70_000).half())], "x"
        )

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("config.json", "{", "not a valid JSON"),
            ("config.json", "[" * 100_000, "is no JSON object of settings"),
            ("config.json", "[]", "cannot load the model"),
            ("preprocessor_config.json", "[1]", "cannot load the model"),
            ("preprocessor_config.json", "{", "cannot load the model"),
        ],
    )
    def test_settings_that_are_none(self, folder, file, text, message):
        (folder / file).write_text(text)
        refuse(lambda: load_model(folder), message)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"configuration_files": ["../config.1.0.0.json"]}, "has configuration_files, which may take"),
            ({"attn_implementation": "someone/kernel"}, "has attn_implementation, which may take"),
            ({"to_dict": 1}, "'to_dict' is no setting"),
            ({"attribute_map": {"a": "attribute_map"}}, "'attribute_map' is no setting"),
            ({"dtype": "save"}, "Unknown dtype='save'"),
            ({"num_labels": 10**9}, "must be at most"),
            ({"backbone_config": {"model_type": "timm_backbone", "backbone": "x"}}, "no backbone of itself"),
            ({"backbone_config": {"model_type": "dinov2", "num_hidden_layers": 10**9}}, "at most 1000"),
            ({"backbone_config": {"model_type": "dinov2", "hidden_size": 10**9}}, "must be at most 1048576"),
        ],
    )
    def test_settings_of_a_hostile_hand(self, folder, values, message):
        change(folder / "config.json", **values)
        refuse(lambda: load_model(folder), message)

    def test_adapters_name_other_models(self, folder):
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
        refuse(lambda: load_model(folder), r"adapter_config\.json in it names another model")

    def test_familiarity(self, folder):
        Familiarity.fit(torch.randn(30, 24)).save(folder)
        whole = (folder / FILE_NAME).read_bytes()
        flip(folder / FILE_NAME, -2)
        refuse(lambda: load_familiarity(folder), "is damaged")
        (folder / FILE_NAME).write_bytes(whole)
        tensors = load_file(folder / FILE_NAME)
        for name, value, message in [
            ("mean", torch.zeros(23), r"mean of shape \(23,\)"),
            ("rest", torch.tensor(0.0), "rest that is not positive"),
            ("other", torch.zeros(1), "'other'"),
        ]:
            save_file(tensors | {name: value}, folder / FILE_NAME)
            refuse(lambda: load_familiarity(folder), message)


class TestPublishedFiles:
    def test_a_flipped_bit(self, published):
        """PyTorch's own reader does not compare the checksums of its archives."""
        path = published / "checkpoint.pth"
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        flip(path, largest.header_offset + 1000)
        refuse(lambda: convert_checkpoint(published), "is damaged: the checksum of")
        refuse(lambda: read_weights(path), "is damaged: the checksum of")

    @pytest.mark.parametrize("length", [0, 3, 1000, 300_000])
    def test_a_truncated_file(self, published, length):
        path = published / "checkpoint.pth"
        path.write_bytes(path.read_bytes()[:length])
        refuse(lambda: convert_checkpoint(published), "damaged")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.tensor([1.0, float("nan"), float("inf")]), "x: 2 of 3"),
            (torch.zeros(1).expand(10**9), "has less numbers than that"),
            (torch.zeros(3, dtype=torch.int64), "as torch.int64 torch.strided, needed dense floating-point"),
            (torch.zeros(3).to_sparse(), "torch.sparse_coo"),
            ([1.0], "holds 'x' as list"),
        ],
    )
    def test_values_that_are_no_weights(self, published, value, message):
        refuse(lambda: check_tensors({"x": value}, published / "checkpoint.pth"), message)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("d_model: 48", "d_model: 1000000000", "d_model=1000000000, but the weights 48|must be at most"),
            ("n_layers: 2", "n_layers: 900", "n_layers=900, but the weights 2"),
            ("distilled: false", "distilled: true", "distilled=True, but the weights False"),
            ("n_heads: 3", "n_heads: many", "num_attention_heads"),
            ("n_heads: 3", "n_heads: 0", "must be at least 1"),
            ("patch_size: 16", "patch_size: 16\n  patch_size: 16", "'patch_size' stands there more than once"),
            ("log_dir: log", "log_dir: " + "[" * 500 + "]" * 500, "deeper than 16 levels|is not YAML"),
            ("log_dir: log", "log_dir: !!timestamp 2001-99-99", "is not YAML of plain values"),
            ("log_dir: log", "log_dir: [" + "x" * 70_000 + "]", "at most 65536"),
        ],
    )
    def test_variants_that_do_not_fit(self, published, old, new, message):
        path = published / "variant.yml"
        path.write_text(path.read_text().replace(old, new))
        refuse(lambda: convert_checkpoint(published), message)

    def test_aliases_are_written_out_on_paper_only(self, tmp_path):
        lines = ["net_kwargs: {}", "a0: &a0 [x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
        (tmp_path / "variant.yml").write_text("\n".join(lines))
        refuse(lambda: read_variant(tmp_path / "variant.yml"), "more than 10000 values, aliases written out")

    def test_what_may_matter_is_named_and_the_rest_listed(self, published):
        from depict_hf.conversion import convert_with_report

        path = published / "variant.yml"
        text = path.read_text().replace("n_heads: 3", "n_heads: 2\n  qk_norm: true").replace("amp: false", "notes: x")
        path.write_text(text.replace("n_cls: 6", "n_cls: 7"))
        conversion = convert_with_report(published)
        for each in ("net_kwargs.qk_norm", "n_cls=7, but the weights 6 classes", "n_heads=2, but the published"):
            assert each in conversion.warning
        assert "settings not read: notes" in conversion.report


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "384"}, "Field 'hidden_size' expected int"),
        ({"hidden_size": True}, "expected int, got bool"),
        ({"hidden_size": 10**9}, "must be at most 65536"),
        ({"num_hidden_layers": 10**9}, "must be at most 1000"),
        ({"layer_norm_eps": float("nan")}, "must be positive"),
        ({"initializer_range": float("nan")}, "must be a finite number"),
        ({"window_size": 8}, "does not hold one patch of 16 pixels"),
        ({"temperature": 1e-300}, "must be positive and finite"),
        ({"id2label": {0: "a", 2: "b"}}, "number classes from 0 without a gap"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "id2label says 0 is 'a', but label2id 1"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"c": 5}}, "gives 'c' the id 5"),
    ],
)
def test_values_of_the_configuration(fields, message):
    refuse(lambda: DepictConfig(**fields), message)


def test_fields_are_checked_when_they_are_set_too():
    config = tiny_config()
    refuse(lambda: setattr(config, "window_size", "64"), "window_size")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": 0}, "image_std=0 must be from 1e-12"),
        ({"image_mean": [0.5, 0.5]}, "one for each of the three channels"),
        ({"image_mean": float("nan")}, "must be a finite number"),
        ({"rescale_factor": float("inf")}, "must be a finite number"),
        ({"do_resize": "yes"}, "must be True or False"),
        ({"size": {"shortest_edge": 10**9}}, "at most 65536"),
        ({"size": {"shortest_edge": True}}, "needed are positive pixels"),
        ({"size": []}, "must be pixels by name"),
        ({"resample": 17}, "must be a filter of PIL"),
        ({"resize": 1}, "'resize' is no setting"),
    ],
)
def test_settings_of_the_image_processor(settings, message):
    refuse(lambda: DepictImageProcessor(**settings), message)


@pytest.mark.parametrize(
    ("size", "window_size", "window_stride", "message"),
    [
        ((4000, 3000), 512, 1, "has 8684121 windows of 512 every 1, needed at most 131072"),
        ((20_000, 20_000), 2048, 64, "has 79524 windows of 2048 every 64"),  # few enough, but too large together
        ((64, 64), 32, 33, "positive stride of at most the window"),
        ((64, 64), 32, 0, "positive stride"),
        ((64, 31), 32, 16, "a window of at most the image"),
    ],
)
def test_windows_are_bounded(size, window_size, window_stride, message):
    refuse(lambda: window_corners(size, window_size, window_stride), message)


def test_as_many_windows_as_allowed():
    assert len(window_corners((4000, 3000), 512, 64)) == 56 * 40


@pytest.mark.parametrize("scales", [(float("nan"),), (float("inf"),), (True,), ("1",), (0,), (1e9,), ()])
def test_scales(scales):
    refuse(lambda: segment(tiny_model(), DepictImageProcessor(), [], scales), "needed one or more positive numbers")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("window_size=32 window_stride=33", "needed at most that, or pixels are left out"),
        ("crop_size=1000000000", "needed at most 65536"),
        ("learning_rate=nan", "needed finite numbers"),
        ("image_std=0,1,1", "needed positive deviations"),
        ("seed=99999999999999999999", "needed at most 4.29497e"),
        ("class_names=a,b,a", "some are empty or the same"),
    ],
)
def test_recipes(override, message):
    from training.recipes import camvid_dinov2_small

    refuse(lambda: camvid_dinov2_small("sa").override(override.split()), message)


def test_types_of_recipes_are_checked_without_the_command_line():
    from training.recipes import camvid_dinov2_small

    for value in (True, "8", 8.0, [8]):
        refuse(lambda value=value: camvid_dinov2_small("sa").replace(batch_size=value), "Got batch_size=.*type int")
