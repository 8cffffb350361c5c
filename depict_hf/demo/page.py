"""The page of `depict demo`, made with Gradio."""

import os
import socket
import tempfile
import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from ..passes import is_out_of_memory
from ..photo_files import allowed_pixels, shown
from .answers import MOST_OVERLAP, SIZES, Answer, Choices, Demo

TITLE = "DEPICT: every pixel's class, and why"
FILE_MEGABYTES = 64
KEPT_SECONDS = 3600  # Photographs and what was found, of a visitor who does nothing more.
WAITING = 24  # Visitors whose photographs wait while that of another is computed; more are asked to come later.
READING_AT_ONCE = 8

EXPLAINED = (
    "What depict explain shows: how every part of this photograph came to its class, which head looked where, what the "
    "model is unsure about, and whether the decoder compresses. It opens at the pixel read last, is made at one size, "
    "and takes several times as long as the classes."
)

_EMPTY = [["plain", "Drop, paste or choose a photograph, or take an example."]]
_ASK = [["plain", "Click on the picture to read a pixel."]]


def build_page(demo: Demo) -> gr.Blocks:
    """Make the page; `serve` shows it.

    Of what visitors do, only pictures go to the server's disk, into Gradio's folder for temporary files, and are
    deleted after an hour. Whatever is computed with the model waits in one queue, one photograph at a time.
    """
    model = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        _lines([["title", TITLE], ["plain", demo.knowledge]], "knowledge")
        answer, at = gr.State(None, time_to_live=KEPT_SECONDS), gr.State(None, time_to_live=KEPT_SECONDS)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                photo = gr.Image(
                    label="Photograph",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=260,
                    elem_id="photograph",
                    placeholder="Drop or paste a photograph\n- or -\nchoose one",
                )
                # Gradio would decode the file before we do, by other rules and with errors of its own.
                photo.preprocess = _path_of
                gr.Examples(_examples(), photo, label="Examples (drawn for this page)", elem_id="examples")
                with gr.Accordion("How the model looks", open=False, elem_id="choices"):
                    sizes = gr.Radio(
                        [(each.label, name) for name, each in SIZES.items()],
                        value="one",
                        label="Sizes at which the model looks",
                        visible=demo.image_processor.do_resize,
                        elem_id="sizes",
                    )
                    overlap = gr.Slider(
                        0,
                        MOST_OVERLAP,
                        value=demo.overlap or 0,
                        step=1,
                        label="Overlap of windows, %",
                        info=f"The model's own is {demo.overlap} %; more takes longer.",
                        visible=demo.overlap is not None,
                        elem_id="overlap",
                    )
                again = gr.Button("Segment", variant="primary", elem_id="again")
            with gr.Column(scale=3, min_width=320):
                message = _lines(_EMPTY, "message")
                with gr.Tabs():
                    with gr.Tab("Classes"):
                        reading = _lines([], "reading")
                        viewer = _html("viewer", "viewer")
                    with gr.Tab("Explanation"):
                        _lines([["plain", EXPLAINED]], "explained")
                        explain = gr.Button("Explain this photograph", elem_id="explain")
                        trouble = _lines([], "trouble")
                        explanation = _html("explanation", "explanation")

        def segment(path: str | None, sizes: str, overlap: float) -> tuple:
            """Return values for `outputs`; what was read and explained of the photograph before is gone."""
            found, lines = None, _EMPTY
            if path is not None:
                found, lines = _attempt(path, lambda: demo.answer(path, Choices(sizes, round(overlap))))
            if found is None:
                return None, None, [], lines, None, None, []
            return found, found.for_page(), _ASK, _said(found), None, None, []

        def read(found: Answer | None, event: gr.EventData) -> tuple:
            """The line for a pixel, and the pixel."""
            if found is None:
                return [["warning", "This was too long ago: segment the photograph again."]], None
            try:
                pixel = found.read(getattr(event, "x", None), getattr(event, "y", None))
            except ValueError as error:
                return [["problem", str(error)]], None
            return [["reading", pixel.sentence()]], (pixel.x, pixel.y)

        def tell(path: str | None, overlap: float, at: tuple[int, int] | None) -> tuple:
            """The page that explains, and a message."""
            if path is None:
                return None, _EMPTY
            text, lines = _attempt(path, lambda: demo.explanation(path, Choices(overlap=round(overlap)), at))
            return text and {"page": text, "name": f"{Path(path).stem}_explained.html"}, lines

        outputs = [answer, viewer, reading, message, at, explanation, trouble]
        for trigger in (photo.change, again.click):
            trigger(segment, [photo, sizes, overlap], outputs, show_progress_on=[message], **model)
        reads = {"concurrency_limit": READING_AT_ONCE, "api_visibility": "private"}
        viewer.read(read, [answer], [reading, at], show_progress="hidden", trigger_mode="always_last", **reads)
        explain.click(tell, [photo, overlap, at], [explanation, trouble], show_progress_on=[trouble], **model)
    page.queue(max_size=WAITING)
    return page


def serve(
    model: str = "default",
    device: str = "cpu",
    host: str | None = None,
    port: int | None = None,
    max_photo_pixels: int | None = None,
) -> None:
    """Show the page until the process is told to end, by SIGINT or SIGTERM.

    Args:
        model: Folder, Hub name or "default".
        device: Where it computes.
        host: Address to listen at; by default this machine's own, which no other can reach.
        port: By default the first that is free from 7860 on.
        max_photo_pixels: Pixels that a photograph's file may declare, `answers.MAX_PHOTO_PIXELS` by default.

    Raises:
        ValueError, OSError: If the address cannot be listened at, or the model not be loaded.
    """
    _check_address(host or "127.0.0.1", port or 0)
    demo = Demo.load(model, device, max_photo_pixels)
    allowed_pixels(demo.max_photo_pixels)
    with tempfile.TemporaryDirectory(prefix="depict_demo_") as folder:
        # Uploads of all programs with Gradio lie in one folder otherwise, and stay there.
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(demo)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=f"{FILE_MEGABYTES}mb",
            footer_links=["settings"],
            ssr_mode=False,
            enable_monitoring=False,
            theme=_theme(),
            css=_ACCENT,
            js=_web("paste.js"),
        )
        print(f"depict: open {address} in a browser; Ctrl-C ends it.", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Refuse, before a model is loaded, an address that is taken or not this machine's."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Cannot listen at {host}, port {port} ({reason}); choose another by --host or --port."
        ) from error


# Gradio's accent colour has no value of its own for dark pages.
_ACCENT = ".dark { --color-accent: var(--primary-400); }"


def _theme() -> gr.Theme:
    """Fonts of the visitor's own machine, and colours with the contrast of 4.5 that WCAG asks for."""
    plain, fixed = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    fonts = {"font": list(map(gr.themes.Font, plain)), "font_mono": list(map(gr.themes.Font, fixed))}
    quiet = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
    button, pointed = "button_primary_background_fill", "button_primary_background_fill_hover"
    return gr.themes.Default(primary_hue="blue", **fonts).set(
        color_accent="*primary_600",
        **dict.fromkeys(quiet, "*neutral_600"),
        **{f"{name}_dark": "*neutral_300" for name in quiet},
        **dict.fromkeys((button, f"{button}_dark"), "*primary_700"),
        **dict.fromkeys((pointed, f"{pointed}_dark"), "*primary_800"),
    )


def _web(name: str) -> str:
    return (files(__package__) / "web" / name).read_text(encoding="utf-8")


def _html(name: str, elem_id: str, value: Any = None) -> gr.HTML:
    """Make a component of our own from its files."""
    parts = {"html_template": "html", "css_template": "css", "js_on_load": "js"}
    return gr.HTML(value, elem_id=elem_id, **{key: _web(f"{name}.{suffix}") for key, suffix in parts.items()})


def _lines(lines: list[list[str]], elem_id: str) -> gr.HTML:
    """Show lines of text, each with its kind: plain, reading, warning or problem."""
    return _html("lines", elem_id, lines)


def _examples() -> list[list[str]]:
    folder = Path(__file__).parent / "examples"
    return [[str(folder / f"{name}.jpg")] for name in ("street", "street_at_dusk", "page_of_text")]


def _path_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _attempt(path: str, compute: Any) -> tuple[Any, list[list[str]]]:
    """Return what is computed for a photograph, or None and a line on why it cannot be."""
    try:
        return compute(), []
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not is_out_of_memory(error):
            raise
        return None, [["problem", f"{shown(Path(path).name)}: {error}"]]


def _said(answer: Answer) -> list[list[str]]:
    record = answer.record
    size = f"{shown(record['file'])}: {record['width']} x {record['height']} pixels"
    lines = [["plain", f"{size}, mean confidence {100 * record['mean_confidence']:.1f} %"]]
    return lines + [["warning", _sentence(record[key])] for key in ("warning", "note") if key in record]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
