"""A small image registry on 127.0.0.1: the part of Docker's protocol that precedes a push.

Written from the specifications of the distribution project: the challenge of /v2/, tokens with a scope, the beginning
of an upload, manifests. What Replicate's registry does beyond them is unknown.
"""

import json
import re
import secrets
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, Any, dict[str, str]]
"""A status, a body that becomes JSON, and headers."""

USER, SECRET = "usuario", "secreto"
BASE = "cuda12.8-python3.13-torch2.11.0"


class Registry:
    """Answers until the `with` block ends."""

    def __init__(self) -> None:
        self.models = {"usuario/modelo", "usuario/otro"}
        self.bases = {BASE}
        self.password = SECRET
        self.scheme = "Bearer"
        """Bearer or Basic."""
        self.fails: dict[str, int] = {}
        """The status that replaces a good answer, by a part of the path."""
        self.uploads: set[str] = set()
        """Uploads that were begun and not cancelled."""
        self._tokens: dict[str, str] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.host = f"127.0.0.1:{self._http.server_port}"

        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "Registry":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive():
            self._http.shutdown()
        self._http.server_close()

    @property
    def login(self) -> dict[str, str]:
        """The entry of Docker's configuration that `cog login` writes."""
        return {"auth": b64encode(f"{USER}:{SECRET}".encode()).decode()}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, headers = self.answer(urlsplit(self.path).path)
                content = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                self.do_GET()

            def do_DELETE(self) -> None:
                registry.uploads.remove(self.path)
                self.send_response(204)
                self.end_headers()

            def answer(self, path: str) -> Answer:
                for part, status in registry.fails.items():
                    if part in path:
                        return status, {}, {}
                if path == "/token":
                    return self.token()
                if upload := re.fullmatch(r"/v2/(.+)/blobs/uploads/", path):
                    return self.upload(upload[1])
                if manifest := re.fullmatch(r"/v2/cog-base/manifests/(.+)", path):
                    exists = self.allowed("repository:cog-base:pull") and manifest[1] in registry.bases
                    return 200 if exists else 404, {}, {}
                assert path == "/v2/"
                if registry.scheme == "Basic" and self.allowed(""):
                    return 200, {}, {}
                challenge = f'{registry.scheme} realm="http://{registry.host}/token",service="{registry.host}"'
                return 401, {}, {"WWW-Authenticate": challenge}

            def token(self) -> Answer:
                if not self.authenticated():
                    return 401, {"details": "incorrect username or password"}, {}
                token = secrets.token_hex()
                query = parse_qs(urlsplit(self.path).query)
                assert query["service"] == [registry.host]
                registry._tokens[token] = query["scope"][0]
                return 200, {"token": token}, {}

            def upload(self, model: str) -> Answer:
                if not self.allowed(f"repository:{model}:pull,push"):
                    return 401, {"errors": [{"code": "UNAUTHORIZED"}]}, {}
                if model not in registry.models:
                    return 404, {"errors": [{"code": "NAME_UNKNOWN"}]}, {}
                location = f"/v2/{model}/blobs/uploads/{secrets.token_hex()}"
                registry.uploads.add(location)
                return 202, None, {"Location": location}

            def authenticated(self) -> bool:
                expected = b64encode(f"{USER}:{registry.password}".encode()).decode()
                return self.headers.get("Authorization") == f"Basic {expected}"

            def allowed(self, scope: str) -> bool:
                if registry.scheme == "Basic":
                    return self.authenticated()
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                return registry._tokens.get(token) == scope

            def log_message(self, *_: object) -> None:
                pass

        return Handler
