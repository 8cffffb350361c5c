"""What `depict --version` and `depict info` say."""

import getpass
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import torch

from depict_hf import versions
from depict_hf.cli import main


def test_info_names_what_is_installed_and_nothing_private(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("depict-hf", "torch", "transformers", "safetensors", "peft"):
        assert f"{name} {version(name)}" in printed
    assert "extra onnx: onnx " in printed
    assert f"{torch.get_num_threads()} threads" in printed
    for private in (str(Path.cwd()), str(Path.home()), socket.gethostname()):
        assert private not in printed
    assert f"/{getpass.getuser()}/" not in printed


def test_missing_packages_are_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: None if name in ("torch", "peft") else "1.0")
    assert (
        versions.version_line()
        == f"depict-hf 1.0 (torch missing, transformers 1.0, Python {platform.python_version()})"
    )
    assert "extra lora: peft missing" in list(versions.describe_installation())


def test_requirements_go_to_their_extras(monkeypatch):
    lines = ["torch>=2.6", "onnx>=1.18; extra == 'onnx'", 'a.b-c; python_version < "4" and extra == "on-nx"']
    monkeypatch.setattr(versions, "requires", lambda name: lines)
    assert versions.requirements() == {"": ["torch"], "onnx": ["onnx"], "on-nx": ["a.b-c"]}
