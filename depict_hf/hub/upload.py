"""A checked folder to the Hugging Face Hub in one commit, so that no repository ever holds half a model that loads."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from ..weight_files import one_line
from .folder import Prepared, prepared

# What `from_pretrained` may look at before, or together with, the weights of a folder.
_READ_WITH_A_MODEL = re.compile(
    r"[^/]*\.(safetensors|bin|pt|pth|h5|msgpack|index\.json)|adapter_config\.json|processor_config\.json"
    r"|video_preprocessor_config\.json"
)
# Modules whose errors are those of a connection, whichever of them a release of huggingface_hub uses.
_CONNECTION = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket", "ssl")


class UploadError(OSError):
    """An upload that the Hub, or the way to it, did not let happen; says what to do, in one line."""

    def __str__(self) -> str:
        return str(self.args[0])


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    overwrite: bool = False,
    note: str | None = None,
) -> str:
    """Check a model's folder and upload it in one commit: see `prepared` and `upload`, which this is both of."""
    with prepared(folder, note, repository) as ready:
        return upload(ready, repository, private=private, revision=revision, tag=tag, overwrite=overwrite)


def claim(repository: str, private: bool = False) -> str:
    """Create a repository where there is none, and see that a model of ours may go there; nothing is uploaded.

    Returns:
        Its whole name, with the user's where that was left out.

    Raises:
        UploadError: If the Hub refuses, or the repository holds something else.
    """
    with _explained(repository):
        api = HfApi()
        name = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        _conflicts(api, name, None, {"config.json", "model.safetensors"}, overwrite=False)
        return name


def upload(
    ready: Prepared,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    overwrite: bool = False,
) -> str:
    """Upload what was prepared in one commit, which the Hub makes whole or not at all.

    `upload_folder` of huggingface_hub is not used, as it makes several commits of large or slow uploads, and neither
    is `push_to_hub` of transformers, which writes a card of its own over the folder's.

    Args:
        ready: From `prepared`.
        repository: `USER/NAME`, or `NAME` for one of the user's own; created where there is none.
        private: Whether nobody else may see it. Asked of a repository that is public, it is refused.
        revision: Branch; by default the main one. A new one gets into being with its commit.
        tag: Name for the commit, which must not be taken.
        overwrite: Whether another model in the repository is replaced.

    Returns:
        Address of the commit.

    Raises:
        UploadError: If the Hub refuses, cannot be reached, or the repository holds another model; or if all was
            uploaded but the tag could not be made.
    """
    with _explained(repository):
        api = HfApi()
        name = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        main = api.repo_info(name)
        if private and not main.private:
            raise UploadError(
                f"{name} is public, but --private was asked for; make it private in its settings on the Hub, or leave "
                "--private out."
            )
        refs = api.list_repo_refs(name) if revision or tag else None
        if refs and tag in [each.name for each in refs.tags]:
            raise UploadError(f"{name} has a tag {tag} already; take another name for this one.")
        new_branch = bool(refs and revision and revision not in [each.name for each in refs.branches])
        known = None if new_branch else revision
        stale = _conflicts(api, name, known, set(ready.files), overwrite)
        parent = (api.repo_info(name, revision=known) if known else main).sha
        additions = [
            CommitOperationAdd(path_in_repo=each, path_or_fileobj=str(path)) for each, path in ready.files.items()
        ]
        # Before the branch is there: until its commit, it holds what the main one does.
        api.preupload_lfs_files(name, additions, revision=known, free_memory=False)
        if new_branch:
            api.create_branch(name, branch=str(revision), revision=parent)
        try:
            commit = api.create_commit(
                name,
                [*additions, *(CommitOperationDelete(each, is_folder=False) for each in stale)],
                commit_message=f"Upload {_what(ready)} with depict-hf",
                revision=revision,
                parent_commit=parent,
            )
        except BaseException:
            if new_branch:
                api.delete_branch(name, branch=str(revision))
            raise
    if tag:
        try:
            with _explained(repository):
                api.create_tag(name, tag=tag, revision=commit.oid)
        except UploadError as error:
            raise UploadError(f"Uploaded as {commit.commit_url}, but without the tag {tag}: {error}") from error
    return str(commit.commit_url)


def _what(ready: Prepared) -> str:
    config = json.loads(ready.files["config.json"].read_text(encoding="utf-8"))
    return f"a model of {len(config.get('id2label', ()))} classes"


def _conflicts(api: HfApi, name: str, revision: str | None, own: set[str], overwrite: bool) -> list[str]:
    """Find what a repository holds of another model, beside which, or over which, ours would not be what loads.

    Returns:
        Files to delete with the commit.

    Raises:
        UploadError: If there are any, and nothing is to be overwritten.
    """
    held = api.list_repo_files(name, revision=revision)
    stale = [each for each in held if each not in own and _READ_WITH_A_MODEL.fullmatch(each)]
    other = None
    if "config.json" in held:
        path = api.hf_hub_download(name, "config.json", revision=revision)
        try:
            other = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):  # no settings of a model, whatever else
            other = "unreadable"
    if not overwrite and (stale or other not in (None, "depict")):
        what = f"a model of the type {other}" if other not in (None, "depict") else f"weights of another: {stale[0]}"
        raise UploadError(f"{name} exists and holds {what}; choose another name, or add --overwrite to replace it.")
    return stale


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what goes wrong on the way to the Hub into an `UploadError`; other errors pass.

    What huggingface_hub logs of its retries is kept off standard error, and so are its bars where nobody watches.
    """
    verbosity, bars = get_verbosity(), not are_progress_bars_disabled()
    set_verbosity_error()
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except UploadError:
        raise
    except Exception as error:
        reason = _reason(error, repository)
        if reason is None:
            raise
        raise UploadError(f"{repository} was not uploaded: {reason}") from error
    finally:
        set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _reason(error: BaseException, repository: str) -> str | None:
    """Say in a few words why, and what to do; None if it has nothing to do with the Hub."""
    chain = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return "HF_HUB_OFFLINE is set, so that nothing is sent; unset it."
    if any(isinstance(each, LocalTokenNotFoundError) for each in chain):
        return "nobody is logged in here; log in with `hf auth login`, or set HF_TOKEN."
    for each in chain:
        if isinstance(each, HfHubHTTPError) and each.response is not None:
            return _refusal(each, repository)
    for each in chain:
        if type(each).__module__.partition(".")[0] in _CONNECTION or isinstance(each, (ConnectionError, TimeoutError)):
            return f"the connection to {constants.ENDPOINT} failed ({one_line(each, 200)}); try again."
    # Of huggingface_hub itself: a name that no repository can have, metadata that the Hub refuses, errors in LFS.
    if isinstance(error, ValueError):
        return one_line(error, 300)
    return None


def _refusal(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code
    said = one_line(error.server_message or "", 200)
    said = f" ({said})" if said else ""
    if status == 401:
        return f"the Hub does not know who asks{said}; log in with `hf auth login`, or set HF_TOKEN to a valid token."
    if status == 403:
        return f"no permission to write to {repository}{said}; take a name of your own, or a token that may write."
    if status == 404:
        return f"the Hub does not find it{said}; check the name, and that the token may see it."
    if status in (409, 412):
        return f"it was changed meanwhile, or is being changed{said}; look at it, and push again."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"too many requests{said}; push again in {f'{wait} seconds' if wait else 'some minutes'}."
    if status >= 500:
        return f"the Hub failed with status {status}{said}; try again later."
    return f"the Hub refused with status {status}{said}."
