"""A small Hugging Face hub on 127.0.0.1: the routes that the real client uses to fetch a model, and the real answers.

with Hub() as hub:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": b"..."})
    # HF_ENDPOINT=hub.endpoint; hub.requests lists the client's requests
"""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.network import PatientServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Stored with Git LFS on the hub: served from another address, known by their sha256 instead of git's hash.
_LARGE = (".bin", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".pth")


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files as a repository's."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Request:
    """A client's request."""

    method: str
    path: str
    range: str | None
    token: str | None

    @property
    def file(self) -> str | None:
        """The name of the file, None for the repository's description."""
        return self.path.partition("/resolve/")[2].partition("/")[2] or None


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = COMMIT
    branch: str = "rama/una"
    """A branch at that commit, as main."""
    gated: bool = False
    """The description is public; the files need a token with access."""
    announced: dict[str, int] = field(default_factory=dict)
    """Sizes that the hub gives instead of the true ones."""
    delivered: dict[str, bytes] = field(default_factory=dict)
    """Contents that arrive instead of the true ones."""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """The connection closes after so many bytes of the file, once for each number."""
    statuses: dict[str | None, list[int]] = field(default_factory=dict)
    """Error statuses of the first requests for a file; under None, for the description."""
    describe: Callable[[dict[str, Any]], object] = lambda body: body
    """The hub's answer, from the true description; bytes are sent as they are."""
    stall_after: dict[str | None, list[int]] = field(default_factory=dict)
    """The answer stops after so many bytes of the file, or of the description under None, once for each number."""
    ranges: bool = True
    """Whether a part of a file can be requested."""


class Hub:
    """Serves the repositories added to it until the `with` block ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, bool] = {}
        """Each known token, and whether it has access to the gated repositories."""
        self.requests: list[Request] = []
        self.stalled = threading.Event()
        self._closing = threading.Event()
        self._server = PatientServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def fetched(self) -> list[str]:
        """The requested files, in order."""
        return [request.file for request in self.requests if request.file]

    def add(self, model_id: str, files: dict[str, bytes], *, gated: bool = False) -> Repository:
        self.repositories[model_id] = Repository(files, gated=gated)
        return self.repositories[model_id]

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for_close(self) -> None:
        self.stalled.set()
        self._closing.wait()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        if path.startswith("/storage/"):
            return self._storage(path.removeprefix("/storage/"))
        if token is not None and token not in self.hub.tokens:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if path.startswith("/api/models/"):
            model_id, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            file = None
        else:
            model_id, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")

        repository = self.hub.repositories.get(model_id)
        if repository is None:
            # Without a token the hub does not say whether a private repository exists.
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if revision not in ("", "main", repository.branch, repository.commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repository.statuses.get(file):
            return self._refuse(repository.statuses[file].pop(0), None, "Not now")
        if file is None:
            return self._describe(model_id, repository)
        if repository.gated and not (token and self.hub.tokens[token]):
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to model {model_id} is restricted.")
        if file not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._resolve(model_id, repository, file)

    def _describe(self, model_id: str, repository: Repository) -> None:
        siblings = []
        for name, content in repository.files.items():
            size = repository.announced.get(name, len(content))
            sibling: dict[str, object] = {"rfilename": name, "size": size, "blobId": _git_hash(content)}
            if name.endswith(_LARGE):
                sibling["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 135}
            siblings.append(sibling)
        gated = "manual" if repository.gated else False
        body = {"id": model_id, "sha": repository.commit, "private": False, "gated": gated, "siblings": siblings}
        answer = repository.describe(body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self._stop_or_send(repository, None, 200, content, {"Content-Type": "application/json"})

    def _resolve(self, model_id: str, repository: Repository, file: str) -> None:
        content = repository.files[file]
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if file.endswith(_LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"'}
            return self._send(302, b"", {**headers, "Location": f"{self.hub.endpoint}/storage/{model_id}/{sha256}"})
        return self._deliver(repository, file, {**headers, "ETag": f'"{_git_hash(content)}"'})

    def _storage(self, key: str) -> None:
        model_id, _, sha256 = key.rpartition("/")
        repository = self.hub.repositories[model_id]
        (file,) = {name for name, body in repository.files.items() if hashlib.sha256(body).hexdigest() == sha256}
        self._deliver(repository, file, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def _deliver(self, repository: Repository, file: str, headers: dict[str, str]) -> None:
        whole = repository.delivered.get(file, repository.files[file])
        wanted = self.headers.get("Range") if repository.ranges else None
        start = int((wanted or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body, status = whole[start:], 200
        if start:
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"}
        if repository.cut_after.get(file):
            return self._send(status, body, headers, stop=repository.cut_after[file].pop(0))
        return self._stop_or_send(repository, file, status, body, headers)

    def _stop_or_send(
        self, repository: Repository, file: str | None, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        if not repository.stall_after.get(file):
            return self._send(status, body, headers)
        self._send(status, body, headers, stop=repository.stall_after[file].pop(0))
        return self.hub.wait_for_close()

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        if status == 429:
            headers |= {"Retry-After": "86400", "RateLimit": '"resolvers";r=0;t=86400'}
        self._send(status, json.dumps({"error": message}).encode(), {**headers, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:stop])
        self.wfile.flush()
        self.close_connection = stop is not None


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
