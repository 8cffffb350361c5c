import pytest

from depict_hf.labels import DATASETS, class_colors, class_names, colors_for, distinct_color


def test_counts_and_landmarks():
    """Fails if a file is cut, reordered, or the background of Pascal Context is lost."""
    assert {name: len(class_names(name)) for name in DATASETS} == {
        "ade20k": 150,
        "camvid": 11,
        "cityscapes": 19,
        "pascal_context": 60,
    }
    assert class_names("ade20k")[2] == "sky" and class_colors("ade20k")[2] == (6, 230, 230)
    assert class_names("cityscapes")[13] == "car" and class_colors("cityscapes")[13] == (0, 0, 142)
    assert class_names("pascal_context")[0] == "background"
    assert class_names("camvid")[3] == "road" and class_colors("camvid")[3] == (128, 64, 128)


def test_names_are_unique_so_that_label2id_is_complete():
    for name in ("camvid", "cityscapes", "pascal_context"):
        assert len(set(class_names(name))) == len(class_names(name)), name


def test_models_of_known_datasets_keep_their_colours():
    assert colors_for(class_names("cityscapes")) == class_colors("cityscapes")
    renamed = ["roads", *class_names("cityscapes")[1:]]
    assert colors_for(renamed)[:3] == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]


def test_generated_colours_are_distinct():
    assert len({distinct_color(index) for index in range(256)}) == 256


def test_unknown_datasets_are_refused():
    with pytest.raises(ValueError, match="Unknown dataset 'coco'; choose one of ade20k"):
        class_names("coco")
