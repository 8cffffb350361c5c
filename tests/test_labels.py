import pytest

from depict_hf.labels import class_colors, class_names, colors_for, datasets, distinct_color


def test_counts_and_landmarks():
    """Fails if a file is cut, reordered, or the background of Pascal Context is lost."""
    assert {name: len(class_names(name)) for name in datasets()} == {
        "ade20k": 150,
        "camvid": 11,
        "cityscapes": 19,
        "pascal_context": 60,
    }
    assert class_names("ade20k")[2] == "sky" and class_colors("ade20k")[2] == (6, 230, 230)
    assert class_names("cityscapes")[13] == "car" and class_colors("cityscapes")[13] == (0, 0, 142)
    names = class_names("pascal_context")  # ids follow the alphabet, as those of the 459 classes that they come from
    assert names[0] == "background" and names[1:] == sorted(names[1:])
    assert class_names("camvid")[3] == "road" and class_colors("camvid")[3] == (128, 64, 128)
    for name in datasets():
        assert len(class_colors(name)) == len(class_names(name))
        assert all(0 <= value <= 255 for color in class_colors(name) for value in color)


def test_names_are_unique_so_that_label2id_is_complete():
    for name in datasets():
        assert len(set(class_names(name))) == len(class_names(name)), name


def test_models_of_known_datasets_keep_their_colours():
    """In the order of the ids, not of the dictionary; other names get the generated colours."""
    id2label = dict(enumerate(class_names("cityscapes")))
    assert colors_for(dict(reversed(id2label.items()))) == class_colors("cityscapes")
    assert colors_for(id2label | {0: "roads"})[:3] == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]


def test_ids_with_a_gap_are_refused():
    with pytest.raises(ValueError, match=r"Got the ids \[1, 2\] for 2 classes; number them from 0"):
        colors_for({1: "road", 2: "car"})


def test_generated_colours_are_distinct():
    assert len({distinct_color(index) for index in range(5000)}) == 5000


def test_unknown_datasets_are_refused():
    with pytest.raises(ValueError, match="Unknown dataset 'coco'; choose one of ade20k"):
        class_names("coco")
