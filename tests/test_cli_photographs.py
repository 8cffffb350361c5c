"""`depict` on photographs with odd names, and on what only looks like one: a line for it, and its neighbours' maps."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from conftest import save_model

from depict_hf.cli import main
from depict_hf.photographs import find_photographs

ODD_NAMES = [
    b"line\nbreak.png",
    b"\x1b[31mred.png",
    b"latin1-\xe9.png",
    "Gruß \u202e gnp.png".encode(),
    b"-.png",
    b"....png",
]


def save_photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (60, 40), (90, 120, 200)).save(path, "PNG")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


def segment(model_folder, output, *arguments) -> int:
    return main(["segment", *map(str, arguments), "--model", str(model_folder), "--output", str(output)])


class TestNames:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ODD_NAMES:
            save_photo(tmp_path / "photos" / os.fsdecode(name))
        return tmp_path / "photos"

    def test_each_is_one_line_and_has_its_results(self, folder, model_folder, tmp_path):
        """In a process of its own whose output is plain ASCII, which can encode no other names."""
        (folder / os.fsdecode(b"\xff\ndamaged.png")).write_bytes(b"no photograph")
        command = [sys.executable, "-m", "depict_hf", "segment", folder, "--model", model_folder, "--output"]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[1])}
        for options in ([], ["--json"]):
            output = tmp_path / f"out{len(options)}"
            result = subprocess.run([*command, output, *options], capture_output=True, env=environment)
            printed, errors = result.stdout.decode("ascii"), result.stderr.decode("ascii")
            assert result.returncode == 1 and "Traceback" not in errors
            assert r"depict: " in errors and r"\udcff\ndamaged.png: it is no image of a format that is read" in errors
            assert "\x1b" not in printed + errors
            stems = {os.fsencode(Path(os.fsdecode(name)).stem) for name in ODD_NAMES}
            labels = {name for name in os.listdir(os.fsencode(output)) if name.endswith(b"_labels.png")}
            assert labels == {stem + b"_labels.png" for stem in stems}
            if options:
                records = [json.loads(line) for line in printed.splitlines()]
                assert {os.fsencode(record["file"]) for record in records if "error" not in record} == {
                    os.fsencode(folder / os.fsdecode(name)) for name in ODD_NAMES
                }
            else:
                assert sum(" -> " in line for line in printed.splitlines()) == len(ODD_NAMES)
                assert r"line\nbreak.png -> " in printed and r"latin1-\udce9.png -> " in printed

    def test_explaining_one(self, folder, model_folder, tmp_path, capsys):
        photo, page = folder / os.fsdecode(ODD_NAMES[2]), tmp_path / "page.html"
        assert main(["explain", str(photo), "--model", str(model_folder), "--output", str(page)]) == 0
        assert r"latin1-\udce9.png -> " in capsys.readouterr().out
        assert r"latin1-\udce9.png" in page.read_text(encoding="utf-8").replace("\\\\", "\\")
        (folder / os.fsdecode(b"\xff.png")).write_bytes(b"")
        assert main(["explain", str(folder / os.fsdecode(b"\xff.png")), "--model", str(model_folder)]) == 2
        assert r"\udcff.png: it is empty" in capsys.readouterr().err


def test_what_only_looks_like_a_photograph_loses_no_neighbour(model_folder, tmp_path, capsys):
    folder = tmp_path / "photos"
    first, last = save_photo(folder / "a.png"), save_photo(folder / "z.png")
    (folder / "empty.gif").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    save_photo(tmp_path / "other").rename(folder / "several.gif")
    frames = [PIL.Image.new("RGB", (60, 40), color) for color in ("red", "blue")]
    frames[0].save(folder / "several.gif", save_all=True, append_images=frames[1:])
    header = io.BytesIO()
    PIL.Image.new("L", (13_000, 11_000)).save(header, "PNG")
    (folder / "huge.png").write_bytes(header.getvalue()[:60])
    PIL.Image.new("RGB", (140_000, 1)).save(folder / "narrow.png")
    (tmp_path / "nothing").mkdir()
    names = ["empty.gif", "folder.jpg", "broken.png", "loop.png", "device.png", "pipe.png", "huge.png", "narrow.png"]
    for number, given in enumerate(([folder], sorted(folder.iterdir()), [folder, tmp_path / "nothing", "a" * 300])):
        output = tmp_path / f"out{number}"
        assert segment(model_folder, output, *given, "--json") == 1
        printed = capsys.readouterr()
        records = {record["file"]: record for record in map(json.loads, printed.out.splitlines())}
        assert {name for name, record in records.items() if "files" in record} == {
            str(path) for path in (first, last, folder / "several.gif")
        }
        assert "several pictures" in records[str(folder / "several.gif")]["note"]
        for name in names:
            lines = [line for line in printed.err.splitlines() if f"/{name}: " in line]
            assert len(lines) == 1 and records[str(folder / name)]["error"] in lines[0]
        assert "13000 x 11000 pixels, more than the 134217728 allowed" in records[str(folder / "huge.png")]["error"]
        assert "for the model, more than the" in records[str(folder / "narrow.png")]["error"]
    assert "in which no image files are found" in records[str(tmp_path / "nothing")]["error"]
    assert "File name too long" in records["a" * 300]["error"]


def test_the_limit_of_pixels_is_an_option(model_folder, tmp_path, capsys):
    photo = save_photo(tmp_path / "photo.png")
    assert segment(model_folder, tmp_path / "out", photo, "--max-photo-pixels", "2399") == 1
    assert "60 x 40 pixels, more than the 2399 allowed; make it smaller, or raise" in capsys.readouterr().err
    assert segment(model_folder, tmp_path / "out", photo, "--max-photo-pixels", "2400") == 0
    for wrong in ("0", "-3", "many"):
        with pytest.raises(SystemExit):
            segment(model_folder, tmp_path / "out", photo, f"--max-photo-pixels={wrong}")
        assert f"'{wrong}' is no whole number of 1 or more" in capsys.readouterr().err


def test_beyond_pillows_limit(model_folder, tmp_path, monkeypatch):
    """Pillow refuses twice its limit by itself; fails if the option does not reach it."""
    photo = save_photo(tmp_path / "photo.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    assert segment(model_folder, tmp_path / "out", photo) == 1
    assert segment(model_folder, tmp_path / "out", photo, "--max-photo-pixels", "2400") == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_too_short_for_an_explanation_is_one_line(error, model_folder, tmp_path, capsys, monkeypatch):
    photo = save_photo(tmp_path / "photo.png")

    def fails(*args, **options):
        raise error

    monkeypatch.setattr("depict_hf.explain.explain", fails)
    assert main(["explain", str(photo), "--model", str(model_folder), "--output", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("depict: there is not enough memory; take a smaller")
    monkeypatch.setattr("depict_hf.explain.explain", lambda *args: undefined)  # noqa: F821
    with pytest.raises(NameError):
        main(["explain", str(photo), "--model", str(model_folder), "--output", str(tmp_path / "page.html")])


def test_suffixes_of_all_formats_are_found(tmp_path):
    for suffix in (".jpg", ".JPEG", ".png", ".bmp", ".gif", ".ppm", ".webp", ".tif", ".tiff", ".avif", ".jp2"):
        (tmp_path / f"photo{suffix}").touch()
    (tmp_path / "page.pdf").touch()
    (tmp_path / "photo.eps").touch()
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "sub.png" / "inner.png").touch()
    found = {str(each.path.relative_to(tmp_path)) for each in find_photographs([tmp_path], tmp_path / "out", ["png"])}
    assert len(found) == 12 and "sub.png" in found and not found & {"page.pdf", "photo.eps"}
    found = {each.path.name for each in find_photographs([tmp_path], tmp_path / "out", ["png"], recursive=True)}
    assert "inner.png" in found and "sub.png" not in found


def test_a_closed_standard_input(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert segment(model_folder, tmp_path / "out", "-") == 2
    assert "depict: Got - for standard input, which is closed; name an image file" in capsys.readouterr().err
