"""An HTTP client of the running server."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from cli import events
from cli.events import Event
from cli.server import Server

GREEDY = {"temperature": 0, "repetition_penalty": 1, "prompt_template": "{pregunta}"}
LONG = {"pregunta": "Once upon a time", "temperature": 0, "max_tokens": 2048, "prompt_template": "{pregunta}"}
"""Inputs whose answer takes seconds."""
SHORT = {**LONG, "max_tokens": 8}
SSE = {"Accept": "text/event-stream"}
"""The headers that ask for a stream."""
_SECONDS_BETWEEN = 0.005
"""Before a request that found no place is repeated."""


class Client:
    """Repeats a request that Cog refuses with 409: Cog frees a place a moment after the answer, and may refuse one of
    two simultaneous requests."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._http = httpx.Client(base_url=server.url, timeout=120, trust_env=False)

    def get(self, path: str) -> Any:
        return self._http.get(path).json()

    def post(self, path: str, content: str | bytes) -> httpx.Response:
        return self._http.post(path, content=content, headers={"Content-Type": "application/json"})

    def predict(self, **inputs: Any) -> httpx.Response:
        """The prediction, once it is over."""
        while (response := self.predict_if_free(**inputs)).status_code == httpx.codes.CONFLICT:
            time.sleep(_SECONDS_BETWEEN)
        return response

    def predict_if_free(self, **inputs: Any) -> httpx.Response:
        """The prediction, or Cog's 409 where no place is free."""
        return self.post("/predictions", json.dumps({"input": inputs}))

    def cancel(self, prediction: str) -> bool:
        """Whether the prediction was running."""
        # without a body: the server answers before it reads one, and may then close the connection before the next call
        return self._http.post(f"/predictions/{prediction}/cancel").status_code == httpx.codes.OK

    @contextmanager
    def stream(self, **inputs: Any) -> Iterator[Iterator[Event]]:
        """The prediction's events as they come: name, data. The connection closes at the end of the block."""
        headers = {"Content-Type": "application/json", **SSE}
        while True:
            with self._http.stream("POST", "/predictions", json={"input": inputs}, headers=headers) as response:
                if response.status_code != httpx.codes.CONFLICT:
                    assert response.status_code == httpx.codes.OK, response.read()
                    yield events.read(response.iter_bytes())
                    return
            time.sleep(_SECONDS_BETWEEN)
