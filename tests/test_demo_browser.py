"""The page of `depict demo` in a browser, served by the command itself: what it shows is what `segment` says."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest
from conftest import faint_texts, free_port, needs_browser, needs_gradio, save_model, set_screen

from depict_hf.cli import main
from depict_hf.demo import Choices, Demo
from depict_hf.inference import segment

pytestmark = [pytest.mark.slow, needs_browser, needs_gradio]
NAMES = ("sky", "road", "<b>bold</b>", "car {{value}} ${value}", "tree & co")
WINDOWS = {"window_size": 32, "window_stride": 24}
MOST_PIXELS = 20_000
SECONDS = 60


class Served(NamedTuple):
    """Where the page is, what it should answer, and where the server keeps its temporary files."""

    address: str
    demo: Demo
    temporary: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    labels = dict(enumerate(NAMES))
    save_model(folder / "model", id2label=labels, label2id={v: k for k, v in labels.items()}, **WINDOWS)
    temporary = folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "depict_hf", "demo", "--model", str(folder / "model"), "--port", str(free_port())]
    process = subprocess.Popen(
        [*command, "--max-photo-pixels", str(MOST_PIXELS)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    line = process.stdout.readline()
    assert line.startswith("depict: open http://127.0.0.1:"), line
    yield Served(line.split()[2], Demo.load(str(folder / "model")), temporary)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert list(temporary.glob("depict_demo_*")) == []


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Two photographs of smooth noise, 150 x 100 and 80 x 120 pixels."""
    rng, paths = np.random.default_rng(5), []
    for name, size in (("first.png", (150, 100)), ("second.png", (80, 120))):
        noise = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        paths.append(tmp_path_factory.mktemp("photos") / name)
        PIL.Image.fromarray(noise).resize(size, PIL.Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture
def opened(browser, served):
    """A function that opens the page. In the end nothing may have been asked of others, and no error been logged."""

    def open_page(width: int = 1280, theme: str = "light") -> None:
        set_screen(browser, width, theme)
        browser.get_log("performance")
        browser.get_log("browser")
        browser.get(served.address)
        until(lambda: browser.find_elements("css selector", "#photograph input[type=file]"))
        until(lambda: "Drop, paste" in said(browser, "message"))

    yield open_page
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert [url for url in asked if not url.startswith((served.address, "data:", "blob:", "about:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def until(happened, seconds: float = SECONDS):
    """Wait for something that is true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := happened():
            return result
        time.sleep(0.1)
    raise TimeoutError(f"Did not happen within {seconds} seconds.")


def text(browser, selector: str) -> str:
    script = "return document.querySelector(arguments[0])?.innerText.trim() ?? ''"
    return browser.execute_script(script, selector)


def said(browser, element_id: str) -> str:
    """The lines in one of the page's places for them, where Gradio also lays its progress over."""
    return text(browser, f"#{element_id} .lines")


def visible(browser, selector: str):
    """The element, as soon as it can be seen; Gradio makes what is folded away when it is opened."""
    return until(lambda: [each for each in browser.find_elements("css selector", selector) if each.is_displayed()])[0]


def drawn(browser) -> str | None:
    """The number of the photograph that is drawn, None where there is none."""
    return browser.execute_script("return document.querySelector('[data-shown]')?.dataset.shown")


def upload(browser, path: Path) -> None:
    """Choose a photograph, and wait until its classes are drawn."""
    before = drawn(browser)
    until(lambda: browser.find_elements("css selector", "#photograph input[type=file]"))[0].send_keys(str(path))
    until(lambda: drawn(browser) not in (None, before) and path.name in said(browser, "message"))


def click_at(browser, x: int, y: int, size: tuple[int, int]) -> str:
    """Click on a pixel of the photograph, and return what is said about it."""
    from selenium.webdriver import ActionChains

    picture = browser.find_element("css selector", "canvas.picture")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    box = picture.rect
    offset = [
        round(((at + 0.5) / side - 0.5) * box[name])
        for at, side, name in ((x, size[0], "width"), (y, size[1], "height"))
    ]
    before = said(browser, "reading")
    ActionChains(browser, duration=0).move_to_element_with_offset(picture, *offset).click().perform()
    return until(lambda: (line := said(browser, "reading")) != before and line.endswith(")") and line)


def place(sentence: str) -> tuple[int, int]:
    x, y = sentence.removesuffix(")").split("(x ")[-1].split(", y ")
    return int(x), int(y)


def colors_at(browser, x: int, y: int) -> list[int]:
    script = """return Array.from(document.querySelector("canvas.picture").getContext("2d")
                .getImageData(arguments[0], arguments[1], 1, 1).data).slice(0, 3)"""
    return browser.execute_script(script, x, y)


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser, duration=0).send_keys(*keys).perform()


def test_a_click_says_what_segment_says(opened, browser, served, photos):
    opened()
    upload(browser, photos[0])
    demo = served.demo
    [expected] = segment(demo.model, demo.image_processor, [photos[0]], return_confidence=True)
    answer = demo.answer(photos[0])
    for pixel in ((20, 10), (140, 90), (75, 30)):
        line = click_at(browser, *pixel, (150, 100))
        x, y = place(line)
        assert abs(x - pixel[0]) <= 1 and abs(y - pixel[1]) <= 1
        label, confidence = NAMES[expected.labels[y, x]], float(expected.confidence[y, x])
        assert line.startswith(f"{label}, {100 * confidence:.1f} %; next would be ")
        assert line == answer.read(x, y).sentence()
    assert f"mean confidence {100 * expected.confidence.mean():.1f} %" in said(browser, "message")


def test_legend_switches_and_opacity(opened, browser, served, photos):
    """Every class that occurs with its share; pixels are blended, and are the photograph's where a class is off."""
    from selenium.webdriver.common.keys import Keys

    opened()
    upload(browser, photos[0])
    answer = served.demo.answer(photos[0])
    classes = answer.record["classes"]
    found = [each.text.split("\n") for each in browser.find_elements("css selector", "#viewer .legend li")]
    assert [" ".join(each) for each in found] == [f"{each['name']} {100 * each['share']:.1f} %" for each in classes]

    picture = np.asarray(PIL.Image.open(io.BytesIO(answer.picture)), dtype=float)
    # Away from borders of classes, where there are dark lines.
    labels = answer.labels
    inside = labels == classes[0]["id"]
    for axis in (0, 1):
        inside &= (np.roll(labels, -1, axis) == labels) & (np.roll(labels, 1, axis) == labels)
    inside[[0, -1]] = inside[:, [0, -1]] = False
    y, x = np.argwhere(inside)[inside.sum() // 2]

    def expect(weight: float) -> None:
        blended = picture[y, x] + weight * (np.array(classes[0]["color"]) - picture[y, x])
        until(lambda: np.abs(np.array(colors_at(browser, int(x), int(y))) - blended).max() < 3, 10)

    expect(0.55)
    slider = browser.find_element("css selector", "#viewer .slider")
    slider.send_keys(Keys.END)
    expect(1)
    box = browser.find_element("css selector", "#viewer .legend input")
    box.send_keys(Keys.SPACE)
    expect(0)
    other = np.argwhere(answer.labels == classes[1]["id"])[0]
    assert colors_at(browser, int(other[1]), int(other[0])) != picture[tuple(other)].astype(int).tolist()
    browser.find_element("css selector", "#viewer [data-all=on]").click()
    expect(1)
    browser.find_element("css selector", "#viewer [data-all=off]").click()
    expect(0)
    browser.find_element("css selector", "#viewer [data-all=on]").click()
    slider.send_keys(Keys.HOME)
    expect(0)


def test_label_map_and_record_are_downloaded(opened, browser, served, photos, tmp_path):
    opened()
    upload(browser, photos[1])
    answer = served.demo.answer(photos[1])
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    for link in browser.find_elements("css selector", "#viewer .files a"):
        link.click()
    png, record = tmp_path / "second_labels.png", tmp_path / "second.json"
    until(lambda: png.is_file() and record.is_file() and not list(tmp_path.glob("*.crdownload")), 20)
    assert np.array_equal(np.asarray(PIL.Image.open(png)), answer.labels)
    assert json.loads(record.read_text()) == answer.record | {"model": json.loads(record.read_text())["model"]}


def test_choices_count(opened, browser, served, photos):
    opened()
    upload(browser, photos[0])
    browser.find_element("css selector", "#choices button").click()
    visible(browser, "#sizes input[value=three]").click()
    field = visible(browser, "#overlap input[type=number]")
    field.clear()
    field.send_keys("0\t")
    before = drawn(browser)
    browser.find_element("id", "again").click()
    until(lambda: drawn(browser) not in (None, before))
    expected = served.demo.answer(photos[0], Choices("three", 0)).record
    url = browser.find_elements("css selector", "#viewer .files a")[1].get_attribute("href")
    found = json.loads(base64.b64decode(url.partition(",")[2]))
    assert found["protocol"] == {"scales": [0.75, 1.0, 1.25], "flip": False, "window_size": 32, "window_stride": 32}
    assert found["classes"] == expected["classes"]


def bad(kind: str, folder: Path) -> tuple[Path, str]:
    path = folder / f"{kind}.png"
    if kind == "damaged":
        PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:5000])
        return path, "so it is damaged or cut off; get it again, or save it anew"
    if kind == "text":
        path.write_text("This is no picture.")
        return path, "it is no image of a format that is read"
    PIL.Image.new("RGB", (201, 100)).save(path)
    return path, f"it has 201 x 100 pixels, more than the {MOST_PIXELS} allowed"


@pytest.mark.parametrize("kind", ["damaged", "text", "large"])
def test_bad_files_get_a_line_and_the_next_one_works(kind, opened, browser, photos, tmp_path):
    path, words = bad(kind, tmp_path)
    opened()
    browser.find_element("css selector", "#photograph input[type=file]").send_keys(str(path))
    until(lambda: path.name in said(browser, "message"))
    message = said(browser, "message")
    assert words in message and "\n" not in message and "Traceback" not in message
    assert drawn(browser) is None
    upload(browser, photos[0])


def test_a_removed_photograph_takes_everything_with_it(opened, browser, photos):
    opened()
    upload(browser, photos[0])
    click_at(browser, 20, 20, (150, 100))
    browser.find_element("css selector", "#photograph button[aria-label='Remove Image']").click()
    until(lambda: drawn(browser) is None and "Drop, paste" in said(browser, "message"))
    assert said(browser, "reading") == "" and not browser.find_element("css selector", "canvas.picture").is_displayed()


def test_two_visitors_at_once(opened, browser, served, photos):
    """In two tabs, each with its own photograph; readings, sent in turns, never mix."""
    opened()
    first = browser.current_window_handle
    browser.find_element("css selector", "#photograph input[type=file]").send_keys(str(photos[0]))
    browser.switch_to.new_window("tab")
    second = browser.current_window_handle
    try:
        opened()
        browser.find_element("css selector", "#photograph input[type=file]").send_keys(str(photos[1]))
        for window, path in ((first, photos[0]), (second, photos[1])):
            browser.switch_to.window(window)
            until(lambda path=path: drawn(browser) and path.name in said(browser, "message"))
        answers = [served.demo.answer(path) for path in photos]
        for pixel in ((11, 13), (60, 70)):
            for window, answer in ((first, answers[0]), (second, answers[1])):
                browser.switch_to.window(window)
                line = click_at(browser, *pixel, (answer.record["width"], answer.record["height"]))
                assert line == answer.read(*place(line)).sentence()
    finally:
        browser.switch_to.window(second)
        browser.close()
        browser.switch_to.window(first)


def test_a_pasted_photograph_is_taken(opened, browser, photos):
    opened()
    script = """
    const bytes = Uint8Array.from(atob(arguments[0]), each => each.charCodeAt(0));
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
    document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));"""
    browser.execute_script(script, base64.b64encode(photos[1].read_bytes()).decode())
    until(lambda: drawn(browser))
    assert "pasted.png: 80 x 120 pixels" in said(browser, "message")


def test_keys_are_enough(opened, browser, served, photos):
    """Tab reaches everything; Enter takes an example, arrows move over the picture and read it."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    opened()
    reached = []
    for _ in range(12):
        press(browser, Keys.TAB)
        reached.append(browser.execute_script("return document.activeElement.closest('[id]')?.id ?? ''"))
        if browser.execute_script("return document.activeElement.closest('#examples') !== null"):
            break
    else:
        raise AssertionError(f"Tab does not reach the examples, but {reached}.")
    before = drawn(browser)
    upload(browser, photos[0])
    for _ in range(40):
        press(browser, Keys.TAB)
        if browser.execute_script("return document.activeElement.matches('canvas.picture')"):
            break
    else:
        raise AssertionError("Tab does not reach the picture.")
    assert drawn(browser) != before
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    until(lambda: said(browser, "reading").endswith("(x 83, y 46)"))
    ActionChains(browser, duration=0).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).key_up(Keys.SHIFT).perform()
    until(lambda: said(browser, "reading").endswith("(x 82, y 46)"))
    assert said(browser, "reading") == served.demo.answer(photos[0]).read(82, 46).sentence()
    seen = set()
    for _ in range(12):
        press(browser, Keys.TAB)
        seen.add(browser.execute_script("return document.activeElement.type || document.activeElement.tagName"))
    assert seen >= {"range", "checkbox", "button", "A"}


def test_the_explanation_opens_at_the_pixel_read(opened, browser, served, photos):
    opened()
    upload(browser, photos[0])
    x, y = place(click_at(browser, 130, 20, (150, 100)))
    next(
        each for each in browser.find_elements("css selector", "button[role=tab]") if each.text == "Explanation"
    ).click()
    visible(browser, "#explain").click()
    frame = until(lambda: browser.find_elements("css selector", "#explanation iframe"))[0]
    assert frame.get_attribute("srcdoc") == served.demo.explanation(photos[0], at=(x, y))
    browser.switch_to.frame(frame)
    try:
        until(lambda: browser.execute_script("return document.body.dataset.ready"))
        assert text(browser, "#name") == "first.png"
        assert browser.execute_script("return document.getElementById('picture').getBoundingClientRect().width") > 300
    finally:
        browser.switch_to.default_content()
    upload(browser, photos[1])
    assert browser.find_elements("css selector", "#explanation iframe") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_off_and_words_stand_out(width, theme, opened, browser, photos):
    opened(width, theme)
    upload(browser, photos[0])
    click_at(browser, 20, 20, (150, 100))
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert faint_texts(browser) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--port", "TAKEN"], "use"), (["--port", "99999"], "port"), (["--host", "192.0.2.1"], "address")],
)
def test_addresses_that_cannot_be_had_cost_a_line(options, reason, served, capsys):
    """Before the model is loaded, which here would fail."""
    taken = served.address.rsplit(":", 1)[1].strip("/")
    arguments = [each.replace("TAKEN", taken) for each in options]
    assert main(["demo", "--model", "nothing/like/this", *arguments]) == 2
    found = capsys.readouterr().err
    assert re.fullmatch(
        r"depict: Cannot listen at [\d.]+, port \d+ \(.*\); choose another by --host or --port.\n", found
    )
    assert reason in found


def test_the_server_keeps_to_itself(served, tmp_path):
    """Files of the machine stay closed, uploads are bounded, and nothing is offered to programs."""
    for path in ("/etc/passwd", str(Path(__file__))):
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            urllib.request.urlopen(f"{served.address}gradio_api/file={path}")
    with urllib.request.urlopen(f"{served.address}gradio_api/info") as response:
        assert json.load(response) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    boundary = b'--bound\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'
    body = boundary + bytes(65 * 2**20) + b"\r\n--bound--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=bound"}
    request = urllib.request.Request(f"{served.address}gradio_api/upload", body, headers)
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)):
        urllib.request.urlopen(request)
    assert sum(path.stat().st_size for path in served.temporary.rglob("*") if path.is_file()) < 10 * 2**20
