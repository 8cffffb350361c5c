"""Models and data sets to the Hub and back, against a server of its own; commands know it by `HF_ENDPOINT` alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import save_model
from hub_server import HubServer
from hub_session import Session

LOADS_ALONE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "depict_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import numpy as np
from transformers import pipeline
segmenter = pipeline("image-segmentation", model="me/first", revision="v1", trust_remote_code=True)
assert type(segmenter.model).__module__.startswith("transformers_modules.")
found = segmenter(sys.argv[1])
labels = sum((segmenter.model.config.label2id[each["label"]] + 1) * (np.array(each["mask"]) == 255) for each in found)
PIL = __import__("PIL.Image")
PIL.Image.fromarray((labels - 1).astype(np.uint8)).save(sys.argv[2])
"""


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two models whose weights differ; the first has a card, a sample picture, and what does not travel."""
    names = {0: "sky", 1: "road", 2: "car", 3: "tree", 4: "sign"}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    first, second = (tmp_path_factory.mktemp(name) / name for name in ("first", "second"))
    save_model(first, "sa", window_size=32, **labels)
    save_model(second, "sa", window_size=32, decoder_num_heads=3, **labels)
    (first / "README.md").write_text("---\nlicense: mit\n---\n# First\n\n| class | IoU |\n|---|---|\n| sky | 12.34 |\n")
    (first / "evaluation.json").write_text(json.dumps({"per_class_iou": {"sky": 0.1234}}))
    (first / "LICENSE").write_text("As you like.")
    (first / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    PIL.Image.fromarray(noise).save(first / "pictures" / "sample.png")
    for name in ("checkpoint-5/model.safetensors", ".env", "optimizer.pt", "notes.py"):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_text("secret")
    return first, second


@pytest.fixture(scope="module")
def session(server, home, folders):
    """Has the first model uploaded by the command, as me/first with the tag v1, and both prepared."""
    session = Session(server, home)
    session.pushed = session.command("push", folders[0], "first", "--tag", "v1")
    session.run(
        "import contextlib, dataclasses, os\n"
        "from pathlib import Path\n"
        "from depict_hf.hub import UploadError, claim, prepared, upload\n"
        "import depict_hf.hub.folder\n"
        "depict_hf.hub.folder._check_loading = lambda *given: None  # which the command has done\n"
        "stack = contextlib.ExitStack()\n"
        f"ready = stack.enter_context(prepared({str(folders[0])!r}))\n"
        f"second = Path({str(folders[1])!r})\n"
        "changed = {name: second / name for name in ('config.json', 'model.safetensors')}\n"
        "other = dataclasses.replace(ready, files={**ready.files, **changed})\n"
    )
    yield session
    session.process.stdin.close()
    session.process.wait(60)


@pytest.fixture(autouse=True)
def without_faults(server):
    yield
    server.faults.clear()
    server.multipart = True


@pytest.fixture
def photo(tmp_path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((60, 40)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def label_map(folder: Path) -> np.ndarray:
    return np.array(PIL.Image.open(folder / "photo_labels.png"))


def held(server: HubServer, name: str) -> set[str]:
    """What a repository holds by which a model could load; nothing where there is no repository."""
    repository = server.repositories.get(("model", name))
    return {"config.json", "model.safetensors"} & set(repository.files()) if repository else set()


def test_a_push_is_one_commit_of_all_that_travels(server, session, folders):
    pushed = session.pushed
    assert pushed["status"] == 0 and "depict:" not in pushed["err"], pushed
    repository = server.repositories["model", "me/first"]
    assert pushed["out"] == f"Uploaded: {server.address}/me/first/commit/{repository.branches['main']}\n"
    assert len(repository.commits) == 2 and repository.tags == {"v1": repository.branches["main"]}
    files = repository.files()
    expected = {"README.md", "LICENSE", "LICENSE-CODE", "evaluation.json", "pictures/sample.png", "model.safetensors"}
    assert expected | {"config.json", "preprocessor_config.json", "modeling_depict.py", "decoders.py"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name in (".env", "optimizer.pt", "notes.py")]
    for name in ("model.safetensors", "README.md", "pictures/sample.png"):
        assert files[name] == (folders[0] / name).read_bytes(), name
    assert repository.large == {"model.safetensors", "pictures/sample.png"}
    assert "_name_or_path" not in json.loads(files["config.json"])
    assert (folders[0] / "config.json").read_bytes() != b"" and not (folders[0] / "LICENSE-CODE").exists()


@pytest.mark.parametrize("multipart", [False, True])
def test_large_files_go_in_one_piece_or_in_parts(server, session, multipart):
    server.multipart = multipart
    server.objects.clear()
    server.requests.clear()
    assert "/commit/" in session.upload(f"'me/parts-{multipart}', private={multipart}")
    repository = server.repositories["model", f"me/parts-{multipart}"]
    assert (
        repository.files()["model.safetensors"] == server.repositories["model", "me/first"].files()["model.safetensors"]
    )
    assert repository.private == multipart
    puts, completed = (sum(each.startswith(kind) for each in server.requests) for kind in ("PUT", "POST complete"))
    assert (puts > 2 and completed == 2) if multipart else (puts == 2 and completed == 0)


def test_it_loads_back_by_every_way_and_revision(server, session, folders, photo, tmp_path):
    """`segment --model`, `from_pretrained`, and the pipeline without the package make the same masks."""
    assert "/commit/" in session.upload("'me/first', revision='next', tag='v2'", "other")
    repository = server.repositories["model", "me/first"]
    assert repository.branches["next"] == repository.tags["v2"] != repository.branches["main"] == repository.tags["v1"]
    for name, model in (("local", folders[0]), ("hub", "me/first")):
        answer = session.command("segment", photo, "--model", model, "--output", tmp_path / name, "--dtype", "float32")
        assert answer["status"] == 0, answer
    expected = label_map(tmp_path / "local")
    assert len(np.unique(expected)) > 1
    assert np.array_equal(label_map(tmp_path / "hub"), expected)
    command = [sys.executable, "-c", LOADS_ALONE, photo, tmp_path / "alone.png"]
    alone = subprocess.run(command, env=session.environment, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert np.array_equal(np.array(PIL.Image.open(tmp_path / "alone.png")), expected)
    session.run(
        "import torch\n"
        "from depict_hf import DepictForSemanticSegmentation\n"
        "pixels = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))\n"
        "def logits(name, revision=None):\n"
        "    model = DepictForSemanticSegmentation.from_pretrained(name, revision=revision).eval()\n"
        "    return model(pixels).logits.detach()\n"
    )
    for revision, folder in ((None, folders[0]), ("v1", folders[0]), ("next", folders[1]), ("v2", folders[1])):
        assert session.run(f"value = torch.equal(logits('me/first', {revision!r}), logits({str(folder)!r}))"), revision


def test_a_second_push_replaces_the_first(server, session):
    assert "/commit/" in session.upload("'me/twice'")
    before = server.repositories["model", "me/twice"].branches["main"]
    assert session.upload("'me/twice'").endswith(before)  # nothing changed
    assert "/commit/" in session.upload("'me/twice'", "other")
    repository = server.repositories["model", "me/twice"]
    assert (
        len(repository.commits) == 3 and repository.files()["config.json"] != repository.commits[before]["config.json"]
    )


CUT = None
FAULTS = [
    ("create", 401, {}, "log in with `hf auth login`"),
    ("create", 429, {"Retry_After": "17"}, r"too many requests.*push again in 17 seconds"),
    ("create", CUT, {}, r"the connection to http://127\.0\.0\.1:\d+ failed \(.*\); try again"),
    ("preupload", 429, {}, "too many requests"),
    ("put", CUT, {}, r"the connection to .* failed"),
    ("put", 403, {}, "no permission to write"),
    ("complete", 500, {}, "the Hub failed with status 500"),
    ("verify", 404, {}, "the Hub does not find it"),
    ("commit", 412, {}, "it was changed meanwhile"),
    ("commit", CUT, {}, r"the connection to .* failed"),
    ("commit", 503, {}, "the Hub failed with status 503"),
]


@pytest.mark.parametrize("branch", [None, "next"])
@pytest.mark.parametrize(("operation", "status", "headers", "message"), FAULTS)
def test_what_fails_says_so_in_a_line_and_leaves_no_model(server, session, operation, status, headers, message, branch):
    server.repositories.pop(("model", "me/faults"), None)
    server.objects.clear()
    server.fail(operation, status, message="said by the server", **headers)
    failed = session.upload(f"'me/faults', revision={branch!r}")
    assert "\n" not in failed
    assert re.search(f"UploadError: me/faults was not uploaded: .*{message}", failed), failed
    assert status is CUT or "said by the server" in failed
    assert not held(server, "me/faults")
    repository = server.repositories.get(("model", "me/faults"))
    assert not repository or set(repository.branches) == {"main"}


def test_a_fault_that_passes_is_no_fault(server, session):
    server.objects.clear()
    server.fail("preupload", 429, times=2, Retry_After="1")
    server.fail("put", CUT, times=1)
    assert "/commit/" in session.upload("'me/passes'")
    assert held(server, "me/passes") == {"config.json", "model.safetensors"}


def test_a_killed_upload_leaves_nothing_and_can_be_repeated(server, session):
    with server.holding("commit") as arrived:
        child = session.run(
            "value = os.fork()\nif value == 0:\n    try: upload(ready, 'me/killed')\n    finally: os._exit(0)\n"
        )
        assert arrived()
        session.run(f"os.kill({child}, 9); value = os.waitpid({child}, 0)[1]")
        server.fail("commit", CUT, times=1)
    assert not held(server, "me/killed")
    server.faults.clear()
    assert "/commit/" in session.upload("'me/killed'")
    assert held(server, "me/killed") == {"config.json", "model.safetensors"}


def test_repositories_of_others_and_other_models_are_refused(server, session):
    server.create("you/model")
    assert "no permission to write to you/model" in session.upload("'you/model'")
    server.create(
        "me/bert", {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"0", "notes.txt": b"mine"}
    )
    refused = session.upload("'me/bert'")
    assert "me/bert exists and holds a model of the type bert; choose another name, or add --overwrite" in refused
    assert "UploadError: me/bert exists" in session.order(code="claim('me/bert')")["error"]
    assert "/commit/" in session.upload("'me/bert', overwrite=True")
    files = server.repositories["model", "me/bert"].files()
    assert "pytorch_model.bin" not in files and files["notes.txt"] == b"mine"
    assert json.loads(files["config.json"])["model_type"] == "depict"

    server.create("me/adapter", {"adapter_config.json": b"{}", "README.md": b"mine"})
    assert "holds weights of another: adapter_config.json" in session.upload("'me/adapter'")
    server.create("me/public")
    assert "me/public is public, but --private was asked for" in session.upload("'me/public', private=True")
    assert "me/first has a tag v1 already" in session.upload("'me/first', tag='v1'", "other")
    assert not held(server, "me/adapter") and not held(server, "me/public")


def test_a_change_in_between_is_not_lost(server, session):
    """Fails if a push writes over a commit that it has not seen."""
    server.create("me/race")
    session.run(
        "import threading\nresult = []\n"
        "def work():\n"
        "    try: result.append(upload(ready, 'me/race'))\n"
        "    except UploadError as error: result.append(str(error))\n"
        "thread = threading.Thread(target=work); thread.start()"
    )
    with server.holding("commit") as arrived:
        session.run("pass")
        assert arrived()
        server.repositories["model", "me/race"].commit({"README.md": b"somebody else's"})
    assert "it was changed meanwhile" in session.run("thread.join(); value = result[0]")
    assert server.repositories["model", "me/race"].files() == {"README.md": b"somebody else's"}


def test_without_a_token_or_permission_to_go_online(session):
    session.run("token = os.environ.pop('HF_TOKEN')")
    assert "log in with `hf auth login`, or set HF_TOKEN" in session.upload("'me/nobody'")
    session.run("os.environ['HF_TOKEN'] = 'hf_wrong'")
    assert "log in with `hf auth login`, or set HF_TOKEN to a valid token" in session.upload("'me/nobody'")
    session.run("os.environ['HF_TOKEN'] = token")
    session.run("import huggingface_hub.constants as constants; constants.HF_HUB_OFFLINE = True")
    assert "HF_HUB_OFFLINE is set, so that nothing is sent" in session.upload("'me/nobody'")
    session.run("constants.HF_HUB_OFFLINE = False")
    assert "UploadError: a//b was not uploaded: Repo id must" in session.upload("'a//b'")


def test_a_tag_that_fails_does_not_hide_the_upload(server, session):
    server.fail("tag", 500)
    failed = session.upload("'me/untagged', tag='v1'")
    assert failed.startswith(f"UploadError: Uploaded as {server.address}/me/untagged/commit/")
    assert "but without the tag v1" in failed and "\n" not in failed
    assert held(server, "me/untagged") == {"config.json", "model.safetensors"}


def test_changed_weights_do_not_load(server, session, photo, tmp_path):
    files = dict(server.repositories["model", "me/first"].files())
    weights = bytearray(files["model.safetensors"])
    weights[-3] ^= 1
    server.create("me/changed", files | {"model.safetensors": bytes(weights)})
    answer = session.command("segment", photo, "--model", "me/changed", "--output", tmp_path / "out")
    assert answer["status"] == 2 and answer["err"].splitlines()[-1].startswith(
        "depict: cannot load the model me/changed"
    )
    assert "its weights have the checksum" in answer["err"] and not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("how", ["offline", "dead"])
def test_without_network_the_cache_serves_and_all_else_is_a_line(server, session, home, photo, tmp_path, how):
    """Under HF_HUB_OFFLINE=1, and where nobody answers at the endpoint."""
    session.command("segment", photo, "--model", "me/first", "--output", tmp_path / "first")  # fills the cache
    lonely = HubServer()
    lonely.http.server_close()
    changes = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {"HF_ENDPOINT": lonely.address}
    code = (
        "import sys, time; from depict_hf.cli import main\n"
        "time.sleep = lambda seconds: None  # between attempts\n"
        "status = main(['segment', sys.argv[1], '--model', 'me/first', '--output', sys.argv[2]])\n"
        "print('END', file=sys.stderr)\n"
        "sys.exit(10 * status + main(['segment', sys.argv[1], '--model', 'me/unknown', '--output', sys.argv[2] + '2']))"
    )
    command = [sys.executable, "-c", code, photo, tmp_path / "again"]
    result = subprocess.run(command, env=session.environment | changes, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert np.array_equal(label_map(tmp_path / "again"), label_map(tmp_path / "first"))
    last = result.stderr.partition("END\n")[2].strip().splitlines()
    assert [each for each in last if "cannot load the model me/unknown" in each] == last[-1:], result.stderr


def test_a_dry_run_sends_nothing(server, session, folders):
    server.requests.clear()
    answer = session.command("push", folders[1], "me/dry", "--dry-run")
    assert answer["status"] == 0 and not server.requests
    size = (folders[1] / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in answer["out"] and "\n# second\n" in answer["out"]
    assert "note: the card names no licence" in answer["out"]
    assert 'model="me/dry", trust_remote_code=True' in answer["out"]
    assert "5: sky, road, car, tree, sign." in answer["out"]


@pytest.fixture(scope="module")
def scenes(server, tmp_path_factory) -> list[str]:
    """Uploads the data set me/scenes, Parquet files whose features name the classes; returns their names."""
    import datasets
    from conftest import palette_image

    names = ["sky", "road", "car", "tree", "sign"]
    columns = {"image": datasets.Image(), "label": datasets.Image()}
    features = datasets.Features(columns | {"classes": datasets.List(datasets.ClassLabel(names=names))})
    rng = np.random.default_rng(0)
    files = {}
    for split, count in (("train", 3), ("validation", 2)):
        maps = [rng.integers(0, 5, (4, 6), np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(count)]
        photos = [PIL.Image.fromarray(np.stack([each * 50] * 3, -1)) for each in maps]
        columns = {"image": photos, "label": [palette_image(each) for each in maps], "classes": [[0, 1]] * count}
        path = tmp_path_factory.mktemp("scenes") / f"{split}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        files[f"data/{split}-00000-of-00001.parquet"] = path.read_bytes()
    server.create("me/scenes", files, kind="dataset")
    return names


def test_data_sets_by_name_with_their_class_names(session, scenes, tmp_path):
    """Fails if a model of the Hub cannot be evaluated on a data set of the Hub."""
    opened = session.run(
        "from training.data import open_data\n"
        "opened = open_data('me/scenes')\n"
        "value = [opened.class_names, {name: len(each) for name, each in opened.samples.items()}]"
    )
    assert opened[0] == scenes and opened[1]["validation"] == 2
    record = tmp_path / "record.json"
    answer = session.command("evaluate", "me/first", "me/scenes", "--split", "validation", "--output", record)
    assert answer["status"] == 0, answer
    measured = json.loads(record.read_text())
    assert list(measured["per_class_iou"]) == scenes and measured["num_images"] == 2
    missing = session.command("evaluate", "me/first", "me/nothing", "--output", tmp_path / "none.json")
    assert missing["status"] == 1 and "me/nothing" in missing["err"]


def test_one_trains_on_names_alone_and_uploads_what_came_out(server, session, scenes, photo, tmp_path):
    """Encoder and data come from the Hub, and the model goes there: as the masks of the trained folder are its own."""
    from transformers import Dinov2Backbone, Dinov2Config

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Backbone(Dinov2Config(**sizes, reshape_hidden_states=True)).save_pretrained(tmp_path / "encoder")
    server.create("me/encoder", {each.name: each.read_bytes() for each in (tmp_path / "encoder").iterdir()})
    fields = ["size=28", "crop_size=28", "window_size=28", "window_stride=14", "batch_size=2", "precision=float32"]
    steps = ["--max-steps", "6"]
    trained = session.command("train", "me/scenes", tmp_path / "out", "--from", "me/encoder", *steps, *fields)
    assert trained["status"] == 0, trained
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == dict(
        zip("01234", scenes, strict=True)
    )
    pushed = session.command("push", tmp_path / "out", "trained")
    assert pushed["status"] == 0, pushed
    for name, model in (("local", tmp_path / "out"), ("hub", "me/trained")):
        answer = session.command("segment", photo, "--model", model, "--output", tmp_path / name)
        assert answer["status"] == 0, answer
    assert (label_map(tmp_path / "local") == label_map(tmp_path / "hub")).all()
