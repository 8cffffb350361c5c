"""The page of an explanation in a browser: what a click and keys show is what the instruments say."""

import json
import re
import time

import numpy as np
import PIL.Image
import pytest
from conftest import DECODER_TYPES, faint_texts, needs_browser, set_screen, tiny_model

from depict_hf import DepictImageProcessor
from depict_hf.analysis import analyze, attention_map, contributions, lens
from depict_hf.explain import explain

pytestmark = [pytest.mark.slow, needs_browser]
NAMES = ("sky", "road", "</script><b>bold", 'car "&" co', "<!--tree")
MINUS = "\u2212"  # as the page prints it
WINDOWS = {"window_size": 32, "window_stride": 24}


@pytest.fixture(scope="module")
def photo() -> PIL.Image.Image:
    """90 x 60 pixels, resized to 72 x 48: 9 x 6 patches, or 3 x 2 windows of 4 x 4, which overlap."""
    noise = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((90, 60), PIL.Image.Resampling.BICUBIC)


@pytest.fixture
def opened(browser, photo, tmp_path):
    """A function that opens the page of a tiny model, waits until it is drawn, and returns model and explanation.

    Afterwards nothing may have been asked for but the file, and the console must be empty.
    """

    def open_page(decoder_type: str = "sa", width: int = 1280, theme: str = "light", **options):
        names = dict(enumerate(options.pop("names", NAMES)))
        windows = options.pop("windows", {})
        model = tiny_model(decoder_type, id2label=names, label2id={v: k for k, v in names.items()}, **windows)
        explanation = explain(model, DepictImageProcessor(size={"shortest_edge": 48}), photo, **options)
        file = tmp_path / "page.html"
        file.write_text(explanation.page(), encoding="utf-8")
        set_screen(browser, width, theme)
        browser.get_log("performance")
        browser.get(file.as_uri())
        until(lambda: browser.execute_script("return document.body.dataset.ready") or problem(browser))
        assert not problem(browser)
        return model, explanation

    yield open_page
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        each["params"]["request"]["url"].split(":")[0]
        for each in messages
        if each["method"] == "Network.requestWillBeSent"
    }
    assert asked <= {"file", "data"} and "file" in asked
    assert browser.get_log("browser") == []


def until(happened) -> None:
    for _ in range(300):
        if happened():
            return
        time.sleep(0.1)
    raise TimeoutError("The page was not drawn within 30 seconds.")


def problem(browser) -> str:
    return browser.execute_script("return document.getElementById('problem').textContent")


def text(browser, element_id: str) -> str:
    return browser.execute_script("return document.getElementById(arguments[0]).innerText", element_id)


def rows(browser, element_id: str) -> list[list[str]]:
    """Cells of the body of a section's table."""
    script = """return Array.from(document.querySelectorAll(`#${arguments[0]} tbody tr`),
                row => Array.from(row.children, cell => cell.innerText.trim()))"""
    return browser.execute_script(script, element_id)


def click_at(browser, x: float, y: float) -> None:
    """Click with the mouse on a point of the photograph, in its own pixels."""
    picture = browser.find_element("id", "picture")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    size = picture.size
    from selenium.webdriver import ActionChains

    actions = ActionChains(browser, duration=0)
    # Offsets are from the middle.
    offset = [int((x / 90 - 0.5) * size["width"]), int((y / 60 - 0.5) * size["height"])]
    actions.move_to_element_with_offset(picture, *offset).click().perform()


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser, duration=0).send_keys(*keys).perform()


def percent(share: float) -> str:
    return f"{100 * share:.{0 if share > 0.0995 else 1}f}\u00a0%"


def shares_in(words: str) -> list[float]:
    return [float(each) / 100 for each in re.findall(r"([\d.]+)\u00a0%", words)]


def shown(*values: float, digits: int = 2):
    """Equal as far as the page prints it: the last digit may be another one, since packed numbers are rounded twice."""
    return pytest.approx(values[0] if len(values) == 1 else list(values), abs=1.01 * 10**-digits)


def points(share: float) -> str:
    return percent(share).removesuffix("\u00a0%")


def number(words: str) -> float:
    return float(words.replace(MINUS, "-"))


@pytest.mark.parametrize("decoder_type", [kind for kind in DECODER_TYPES if kind != "linear"])
def test_a_click_explains_the_patch_below_it(decoder_type, opened, browser, photo):
    model, explanation = opened(decoder_type, windows=WINDOWS)
    x, y = 70, 20
    click_at(browser, x + 0.5, y + 0.5)
    window, row, column = explanation.layout.locate(x, y)
    recording = analyze(model, DepictImageProcessor(size={"shortest_edge": 48}), photo, window=window)
    patch = row * recording.grid_size[1] + column
    stages = lens(model, recording)[0, :, :, row, column].double().softmax(-1)
    order = stages.argsort(dim=-1, descending=True)
    label, second = order[-1, :2].tolist()

    verdict = text(browser, "verdict")
    assert f"row {row + 1}, column {column + 1} of window {window + 1}" in verdict
    assert all(NAMES[each] in verdict for each in (label, second))
    assert ("nearly" in verdict) == (stages[-1, label] - stages[-1, second] < explanation.numbers["unsure"]["margin"])
    assert shares_in(verdict) == shown(stages[-1, label].item(), stages[-1, second].item())

    found = rows(browser, "readings")
    for each, probabilities, best in zip(found, stages, order[:, 0], strict=True):
        assert each[1] == NAMES[best]
        assert shares_in(each[2] + each[4]) == shown(probabilities[best].item(), probabilities[label].item())

    split = contributions(model, recording, [patch], [label, second])
    values = split.values[0, :, 0]
    for rather in (False, True):
        worth = values[:, 0] - (values[:, 1] if rather else 0)
        found = {each[0]: each[1] for each in rows(browser, "contributions")}
        for layer in range(2):
            members = [k for k, term in enumerate(split.terms) if term.layer == layer]
            assert number(found[f"Layer {layer + 1}"]) == shown(worth[members].sum().item(), digits=3)
        total = split.totals[0, 0, 0] - (split.totals[0, 0, 1] if rather else 0)
        assert number(found["Lead" if rather else "Sum: cosine"]) == shown(total.item(), digits=3)
        browser.find_elements("css selector", "#contributions .choice button")[1].click()

    buttons = browser.find_elements("css selector", "#heads .maps button")
    assert len(buttons) == attention_map(model, recording, 0, (row, column)).shape[1] * 2
    buttons[-1].click()
    assert buttons[-1].get_attribute("aria-pressed") == "true"
    assert f"Layer 2, head {len(buttons) // 2}" in text(browser, "overlay-note")


def test_heat_is_brightest_where_the_head_looks_most(opened, browser):
    """Pixels of the picture: those of the patch with the largest share are more orange than without the map."""
    _, explanation = opened()
    patch = explanation.numbers["patch"]
    shares = np.array(patch["attention"])[0, 1]
    row, column = np.unravel_index(shares.argmax(), shares.shape)
    browser.find_element("css selector", "#heads .maps button[data-layer='0'][data-head='1']").click()
    left, top, right, bottom = explanation.layout.box(0, int(row), int(column))
    script = """const context = document.getElementById("picture").getContext("2d");
                return Array.from(context.getImageData(arguments[0], arguments[1], 1, 1).data)"""
    found = browser.execute_script(script, (left + right) / 2, (top + bottom) / 2)
    assert np.abs(np.array(found[:3]) - [255, 178, 30]).max() < 60


def test_keys_move_and_explain(opened, browser):
    """As with a screen reader: every step is said, and Enter explains where the cursor is."""
    from selenium.webdriver.common.keys import Keys

    _, explanation = opened(at=(45, 30))
    layout, patches = explanation.layout, explanation.patches
    start = explanation.numbers["patch"]
    browser.execute_script("document.getElementById('grid').focus()")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    index = layout.index(0, start["row"] - 1, start["column"] + 2)
    label, second = patches.classes[index, -1]
    said = text(browser, "live")
    assert shares_in(said) == shown(*patches.probabilities[index, -1])
    assert re.sub(r"[\d.]+\u00a0%", "%", said) == (
        f"{NAMES[label]}, %; runner-up {NAMES[second]}, %; row {start['row']}, column {start['column'] + 3}"
    )
    assert f"row {start['row'] + 1}, column {start['column'] + 1}" in text(browser, "verdict")
    press(browser, Keys.ENTER)
    assert f"row {start['row']}, column {start['column'] + 3}" in text(browser, "verdict")
    assert text(browser, "live").startswith("Explained: ")
    for _ in range(9):
        press(browser, Keys.ARROW_LEFT)
    assert text(browser, "live").startswith("Edge of the photograph.")
    assert "column 1" in text(browser, "live")


def test_keys_reach_every_window(opened, browser):
    """From the left edge to the right one over windows whose grids do not meet, always onwards."""
    from selenium.webdriver.common.keys import Keys

    opened(at=(1, 1), windows=WINDOWS)
    browser.execute_script("document.getElementById('grid').focus()")
    seen = []
    for _ in range(14):
        press(browser, Keys.ARROW_RIGHT)
        seen.append(text(browser, "live"))
    assert any("window 2" in each for each in seen) and "Edge" in seen[-1] and "column 4 of window 3" in seen[-1]


def test_page_opens_at_what_was_asked_for(opened, browser):
    _, explanation = opened(at=(70, 20), class_name="road")
    assert "row 3, column 8" in text(browser, "verdict")
    assert browser.execute_script("return document.getElementById('class-choice').selectedOptions[0].text") == "road"
    found = next((each for each in explanation.numbers["classes"] if each["id"] == 1), None)
    assert found is None or percent(found["share"]) in text(browser, "class-body")


def test_names_from_files_are_text(opened, browser):
    _, explanation = opened(name="<b>x</b>.png", class_name=NAMES[2])
    assert (
        browser.execute_script("return document.querySelectorAll('b b, strong b, li b, h1 b, td b, th b').length") == 0
    )
    assert text(browser, "name") == "<b>x</b>.png"
    assert browser.title == "<b>x</b>.png explained"
    assert NAMES[explanation.numbers["classes"][0]["id"]] in text(browser, "legend")


@pytest.mark.parametrize("decoder_type", ["mask_transformer", "linear"])
def test_black_boxes_leave_out_what_they_do_not_have(decoder_type, opened, browser):
    _, explanation = opened(decoder_type)
    missing = explanation.numbers["missing"]
    assert text(browser, "subspaces-body") == missing["subspaces"]
    assert not browser.find_elements("css selector", "#subspaces table")
    if decoder_type == "linear":
        assert missing["attention"] in text(browser, "heads")
        assert not browser.find_elements("css selector", "#heads button, #rates svg, #tokens table")
        name, total = rows(browser, "contributions")[-1][:2]
        assert name == "Sum: score" and number(total) == shown(explanation.numbers["patch"]["score"], digits=3)
    else:
        assert "MLP" in [each[0] for each in rows(browser, "contributions")]
        assert text(browser, "rate-sentence") == explanation.numbers["rates"]["sentence"]


def test_synonyms_are_cut_short_where_nothing_else_is_meant(opened, browser):
    """As in ADE20K, whose names list them; the numbers keep the whole names."""
    names = ("sky", "screen, silver screen", "wall, partition", "screen, monitor", "</script>, end")
    _, explanation = opened(names=names)
    expected = ["sky", "screen, silver screen", "wall", "screen, monitor", "</script>"]
    found = [line.rsplit(" ", 1)[0] for line in text(browser, "legend").splitlines() if line]
    assert found == [expected[each["id"]] for each in explanation.numbers["classes"]]
    assert tuple(explanation.numbers["model"]["class_names"]) == names


def test_what_it_is_unsure_about_is_shown(opened, browser):
    _, explanation = opened(windows=WINDOWS)
    pairs = explanation.numbers["unsure"]["pairs"]
    found = rows(browser, "unsure-body")
    assert len(found) == len(pairs) > 0
    for each, pair in zip(found, pairs, strict=True):
        assert all(NAMES[label] in each[0] for label in pair["classes"])
        assert each[1:3] == [percent(pair["share"]), points(pair["margin"])]
    browser.find_element("css selector", "#unsure-body button").click()
    window, row, column = explanation.layout.place(pairs[0]["patch"])
    assert f"row {row + 1}, column {column + 1} of window {window + 1}" in text(browser, "verdict")
    assert text(browser, "overlay-note").startswith("Outlined is where")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_cut_off_and_words_stand_out(width, theme, opened, browser):
    """The page does not scroll sideways, and text has the contrast 4.5 that WCAG asks for."""
    opened(width=width, theme=theme, windows=WINDOWS)
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert faint_texts(browser) == []
