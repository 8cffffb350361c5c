import math

import pytest

from depict_hf.labels import class_colors, class_names, colors_for, datasets, distinct_color, find_classes
from depict_hf.labels.palette import distinct_colors, perceived, smallest_distances


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
    """In the order of the ids, not of the dictionary; other names, and who asks for them, get distinct colours."""
    id2label = dict(enumerate(class_names("cityscapes")))
    assert colors_for(dict(reversed(id2label.items()))) == class_colors("cityscapes")
    assert colors_for(id2label | {0: "roads"}) == colors_for(id2label, "distinct") == distinct_colors(19)
    camvid = dict(enumerate(class_names("camvid")))
    assert colors_for(camvid, "official") == class_colors("camvid")
    # Sky is blue and trees are green, but the colours are those of eleven classes.
    assert colors_for(camvid) != distinct_colors(11) and set(colors_for(camvid)) == set(distinct_colors(11))
    with pytest.raises(ValueError, match="Unknown palette 'pretty'; choose one of auto"):
        colors_for(camvid, "pretty")


# Distances in CIELAB of the two most similar colours, for normal vision, protanopes and deuteranopes; rounded down.
@pytest.mark.parametrize(
    ("count", "distances"),
    [(5, [83, 60, 61]), (11, [39, 27, 26]), (19, [31, 18, 19]), (30, [19, 13, 14]), (60, [13, 8, 8]), (150, [8, 5, 5])],
)
def test_distinct_colours_are_far_apart_for_colour_blind_people_too(count, distances):
    found = smallest_distances(distinct_colors(count))
    assert [math.floor(each) for each in found] == distances
    assert distinct_colors(count) == distinct_colors(255)[:count]


def test_colours_of_the_datasets_are_closer():
    """Why they are not the default where nobody expects them: of those of CamVid, two differ by 6."""
    assert max(smallest_distances(class_colors("camvid"))[1:]) < 7 < 26 < min(smallest_distances(distinct_colors(11)))
    assert min(smallest_distances(class_colors("cityscapes"))) < 4


def test_perceived_colours_are_those_of_the_standard():
    """CIELAB of sRGB red as commonly tabulated; protanopes see red and a dark green much the same."""
    assert perceived([(255, 0, 0)])[0, 0] == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    normal, protan, _ = smallest_distances([(163, 39, 40), (69, 69, 39)])
    assert normal > 50 and protan < 12


def test_classes_are_found_by_their_names():
    names = ["wall", "road, route", "screen, monitor", "monitor, display"]
    assert find_classes("Wall,route", names) == [0, 1]
    assert find_classes("road, route", names) == [1]
    with pytest.raises(ValueError, match="'lake' is none of the model's classes: wall, road"):
        find_classes("wall,lake", names)
    with pytest.raises(ValueError, match="'monitor' is the name of several classes: 'screen, monitor', 'monitor, dis"):
        find_classes("monitor", names)


def test_ids_with_a_gap_are_refused():
    with pytest.raises(ValueError, match=r"Got the ids \[1, 2\] for 2 classes; number them from 0"):
        colors_for({1: "road", 2: "car"})


def test_generated_colours_are_distinct():
    assert len({distinct_color(index) for index in range(5000)}) == 5000


def test_unknown_datasets_are_refused():
    with pytest.raises(ValueError, match="Unknown dataset 'coco'; choose one of ade20k"):
        class_names("coco")
