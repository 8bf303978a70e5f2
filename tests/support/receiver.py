"""A server on 127.0.0.1 that receives webhooks."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

Headers = dict[str, str]


class Receiver:
    """Receives what is posted to `url` until the `with` block ends; `answer` chooses the status."""

    def __init__(self, answer: Callable[[Headers, str], int] = lambda headers, body: 200) -> None:
        self.answer = answer
        self.got: list[tuple[Headers, str]] = []
        """Headers and body of each webhook."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"receiver": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    receiver: Receiver

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        headers, body = dict(self.headers), self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.receiver.got.append((headers, body))
        self.send_response(self.receiver.answer(headers, body))
        self.send_header("Content-Length", "0")
        self.end_headers()
