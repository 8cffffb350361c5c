"""A small server that speaks the protocol of the Hugging Face Hub, over HTTP on this machine, and keeps what it gets.

It has what huggingface_hub, transformers and datasets ask for when they create, read, tag and commit to repositories of
models and data sets, with files in the commit itself, in large file storage (LFS) in one piece, and in several. A
commit is all or nothing, as there. Faults can be ordered for any operation.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Who they belong to; whoever has no token may read what is public.
TOKENS = {"hf_me": "me", "hf_you": "you"}
# Files from this size on, and weights of any size, go to large file storage, and from the second on in parts.
LFS_BYTES, PART_BYTES = 100_000, 40_000


@dataclass
class Repository:
    """Files by name of each commit, and the commits that branches and tags name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision) or self.tags[revision]]


@dataclass
class Fault:
    """What is answered instead, so many times: a status with headers and a message, or the connection is cut."""

    status: int | None
    times: int
    headers: dict[str, str]
    message: str


class HubServer:
    """Runs from `start` to `stop`; `address` is what `HF_ENDPOINT` is set to."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.held: dict[str, tuple[threading.Event, threading.Event]] = {}
        self.requests: list[str] = []
        self.multipart = True
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def create(
        self, name: str, files: dict[str, bytes] | None = None, kind: str = "model", private=False
    ) -> Repository:
        made = self.repositories[kind, name] = Repository(private)
        made.commit({".gitattributes": b""} | (files or {}))
        return made

    def fail(self, operation: str, status: int | None, times: int = 10**6, message: str = "", **headers: str) -> None:
        """Have an operation answered by a status, or by a cut connection (None)."""
        self.faults[operation] = Fault(status, times, {k.replace("_", "-"): v for k, v in headers.items()}, message)

    @contextmanager
    def holding(self, operation: str) -> Iterator[Callable[[], bool]]:
        """Have the next request of an operation wait until the context ends; gives what waits for it to arrive."""
        arrived, released = threading.Event(), threading.Event()
        self.held[operation] = (arrived, released)
        try:
            yield lambda: arrived.wait(120)
        finally:
            self.held.pop(operation, None)
            released.set()


_ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    ("refs", "GET", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/refs"),
    ("branch", "POST", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)"),
    ("unbranch", "DELETE", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)"),
    ("tag", "POST", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)"),
    ("tree", "GET", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?"),
    ("paths", "POST", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)"),
    ("info", "GET", r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"),
    ("batch", "POST", r"/(?:(?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?"),
    ("complete", "POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete"),
    ("verify", "POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify"),
    ("resolve", "GET", r"/(?:(?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
]
_WRITING = ("preupload", "commit", "branch", "unbranch", "tag", "batch")


class _Answer(Exception):
    """Ends a request with a status, JSON and headers."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        method = "GET" if self.command == "HEAD" else self.command
        body = self._body()
        for operation, its_method, pattern in _ROUTES:
            found = re.fullmatch(pattern, unquote(address.path) if operation == "resolve" else address.path)
            if found and method == its_method:
                break
        else:
            return self._send(404, {"error": f"no such address: {self.command} {address.path}"})
        parts = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        self.hub.requests.append(f"{self.command} {operation} {parts.get('name', '')}".strip())
        waiting = self.hub.held.pop(operation, None)
        if waiting:
            waiting[0].set()
            waiting[1].wait(120)
        fault = self.hub.faults.get(operation)
        if fault and fault.times:
            fault.times -= 1
            if fault.status is None:
                self.close_connection = True
                self.connection.close()
                return None
            return self._send(fault.status, {"error": fault.message}, **fault.headers)
        try:
            with self.hub.lock:
                if operation in _WRITING:
                    self._may_write(parts["name"])
                getattr(self, f"_{operation}")(body, **parts)
        except _Answer as answer:
            self._send(answer.status, answer.body, **answer.headers)
        return None

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise _Answer(401, {"error": "Invalid credentials in Authorization header"})
        return TOKENS.get(token)

    def _may_write(self, name: str) -> None:
        user = self._user()
        if user is None:
            raise _Answer(401, {"error": "Invalid username or password."})
        if name.partition("/")[0] != user:
            raise _Answer(403, {"error": f"You don't have the rights to write to {name}"})

    def _repository(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and self._user() != name.partition("/")[0]):
            status = 404 if self._user() else 401
            raise _Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.find(revision)
        if oid is None:
            raise _Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return oid

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        user = self._user()
        if user is None:
            raise _Answer(401, {"error": "Invalid username or password."})
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or user}/{asked['name']}"
        answer = {"url": f"{self.hub.address}/{name}", "name": name}
        if (kind, name) in self.hub.repositories:
            raise _Answer(409, answer | {"error": "You already created this model repo"})
        if name.partition("/")[0] != user:
            raise _Answer(403, {"error": f"You don't have the rights to create a {kind} under this namespace"})
        self.hub.create(name, kind=kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._send(200, answer)

    def _yaml(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        bad = text.startswith("---\n") and "\n---\n" not in text
        self._send(400 if bad else 200, {"errors": [{"message": "no end"}] if bad else [], "warnings": []})

    def _preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        files = repository.commits[self._commit_of(repository, revision)]
        answers = []
        for each in json.loads(body)["files"]:
            large = each["size"] >= LFS_BYTES or each["path"].endswith((".safetensors", ".parquet"))
            held = files.get(each["path"])
            oid = None if held is None else hashlib.sha256(held).hexdigest() if large else _git_hash(held)
            mode = "lfs" if large else "regular"
            answers.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def _batch(self, body: bytes, name: str, kind: str = "model") -> None:
        self._repository(kind, name)
        answers = []
        for each in json.loads(body)["objects"]:
            address = f"{self.hub.address}/lfs/{each['oid']}"
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                verify = {"href": f"{address}/verify", "header": {}}
                upload: dict[str, Any] = {"href": address, "header": {}}
                if self.hub.multipart and each["size"] > PART_BYTES:
                    count = -(-each["size"] // PART_BYTES)
                    parts = {str(index): f"{address}/{index}" for index in range(1, count + 1)}
                    upload = {"href": f"{address}/complete", "header": {"chunk_size": str(PART_BYTES)} | parts}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        transfer = "multipart" if self.hub.multipart else "basic"
        self._send(200, {"transfer": transfer, "objects": answers})

    def _put(self, body: bytes, oid: str, part: str | None = None) -> None:
        if part is not None:
            self.hub.parts[oid, int(part)] = body
        else:
            self._store(oid, body)
        self._send(200, {}, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def _complete(self, body: bytes, oid: str) -> None:
        numbers = [each["partNumber"] for each in json.loads(body)["parts"]]
        self._store(oid, b"".join(self.hub.parts.pop((oid, number)) for number in sorted(numbers)))
        self._send(200, {})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Answer(400, {"error": "the content is not that of its checksum"})
        self.hub.objects[oid] = content

    def _verify(self, body: bytes, oid: str) -> None:
        stored = self.hub.objects.get(oid)
        right = stored is not None and len(stored) == json.loads(body)["size"]
        self._send(200 if right else 404, {})

    def _commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        if revision not in repository.branches:
            raise _Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        files = dict(repository.files(revision))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                parent = value.get("parentCommit")
                if parent and parent != repository.branches[revision]:
                    raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Answer(400, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"})
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, revision)
        self._send(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid})

    def _refs(self, body: bytes, kind: str, name: str) -> None:
        repository = self._repository(kind, name)
        lists = {
            key: [{"name": each, "ref": f"refs/{ref}/{each}", "targetCommit": oid} for each, oid in found.items()]
            for key, ref, found in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        self._send(200, lists | {"converts": []})

    def _branch(self, body: bytes, kind: str, name: str, branch: str) -> None:
        repository = self._repository(kind, name)
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        if branch in repository.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = self._commit_of(repository, start)
        self._send(200, {})

    def _unbranch(self, body: bytes, kind: str, name: str, branch: str) -> None:
        del self._repository(kind, name).branches[branch]
        self._send(200, {})

    def _tag(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            raise _Answer(409, {"error": "Tag reference exists already"})
        repository.tags[tag] = self._commit_of(repository, revision)
        self._send(200, {})

    def _entries(self, repository: Repository, commit: str) -> dict[str, dict]:
        entries: dict[str, dict] = {}
        for path, content in repository.commits[commit].items():
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            if path in repository.large:
                entries[path]["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 1,
                }
            for depth in range(1, path.count("/") + 1):
                folder = "/".join(path.split("/")[:depth])
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _git_hash(folder.encode())}
        return entries

    def _tree(self, body: bytes, kind: str, name: str, revision: str, path: str = "") -> None:
        repository = self._repository(kind, name)
        entries = self._entries(repository, self._commit_of(repository, revision))
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        start = f"{path}/" if path else ""
        inside = [each for each in entries.values() if each["path"].startswith(start)]
        found = [each for each in inside if deep or "/" not in each["path"][len(start) :]]
        if path and not found:
            raise _Answer(404, {"error": f"{path} does not exist"}, X_Error_Code="EntryNotFound")
        self._send(200, found)

    def _paths(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        entries = self._entries(repository, self._commit_of(repository, revision))
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        self._send(200, [entries[each] for each in asked if each in entries])

    def _info(self, body: bytes, kind: str, name: str, revision: str = "main") -> None:
        repository = self._repository(kind, name)
        oid = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        self._send(200, {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def _resolve(self, body: bytes, name: str, revision: str, path: str, kind: str = "model") -> None:
        repository = self._repository(kind, name)
        oid = self._commit_of(repository, revision)
        headers = {"X-Repo-Commit": oid}
        content = repository.commits[oid].get(path)
        if content is None:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        if path in repository.large:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        etag = f'"{_git_hash(content)}"'
        headers |= {"ETag": etag, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if wanted:
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            content, status = content[start : end + 1], 206
        self._send(status, content, **headers)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
