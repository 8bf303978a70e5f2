"""A prediction of gateway.py: its fields in the API, and the events of its stream and its webhook."""

import hmac
import json
import re
import secrets
import threading
import time
from base64 import b32encode, b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from queue import SimpleQueue
from typing import Any

import httpx

Body = dict[str, Any]

SECONDS_BETWEEN_WEBHOOKS = 0.5
"""The least, for output and logs."""

_TERMINAL = ("succeeded", "failed", "canceled")


class Prediction:
    """The fields that the API shows, and the events so far."""

    def __init__(self, address: str, model: str, version: str, body: Body, secret: str) -> None:
        """`address` is the gateway's, `secret` signs the webhooks that the request's `body` asks for."""
        self.id = b32encode(secrets.token_bytes(16)).decode().lower().rstrip("=")
        self.key = secrets.token_hex(26)
        self.cancelled = threading.Event()
        self._began = time.time()
        url = f"{address}/v1/predictions/{self.id}"
        self._shown = {
            "id": self.id,
            "model": model,
            "version": version,
            "input": body["input"],
            "logs": "",
            "output": None,
            "data_removed": False,
            "error": None,
            "source": "api",
            "status": "starting",
            "created_at": now(),
            "urls": {
                "get": url,
                "cancel": f"{url}/cancel",
                # read without a token: the address is the secret
                "stream": f"{address}/v1/streams/{self.key}",
                "web": f"https://replicate.com/p/{self.id}",
            },
        }
        self.created = self._shown.copy()
        """The fields in the answer to a request that does not wait."""
        self._events: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._webhook = None
        if "webhook" in body:
            wanted = body.get("webhook_events_filter", ["output", "completed"])
            self._webhook = _Webhook(body["webhook"], secret, wanted)

    def shown(self) -> Body:
        """The fields as the API shows them now."""
        with self._changed:
            copied: Body = json.loads(json.dumps(self._shown))
            return copied

    def over(self) -> bool:
        return self._shown["status"] in _TERMINAL

    def wait(self, seconds: float) -> bool:
        """Whether the prediction ends within these seconds."""
        with self._changed:
            self._changed.wait_for(self.over, seconds)
            return self.over()

    def begin(self, run: Callable[["Prediction"], None]) -> None:
        self._threads = [threading.Thread(target=run, args=[self])]
        if self._webhook:
            self._threads.append(threading.Thread(target=self._webhook.deliver))
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def follow(self, name: str, data: Body) -> None:
        """Record an event of Cog's stream."""
        if name == "start":
            self._record("start", status="processing", started_at=now())
        elif name == "output":
            self._record("output", data["chunk"], output=[*(self._shown["output"] or []), data["chunk"]])
        elif name == "log":
            self._record("logs", logs=self._shown["logs"] + data["data"])
        elif name == "completed":
            metrics = {**data["metrics"], "total_time": time.time() - self._began}
            known = {key: data[key] for key in ("output", "logs", "error") if key in data}
            self.complete(data["status"], metrics=metrics, **known)

    def complete(self, status: str, **shown: Any) -> None:
        """End the prediction with this status, unless it has ended."""
        if not self.over():
            self._record("completed", status=status, completed_at=now(), **shown)

    def _record(self, event: str, text: str = "", **shown: Any) -> None:
        with self._changed:
            self._shown |= shown
            self._events.append((event, text))
            if self._webhook:
                self._webhook.offer(event, self._shown)
            self._changed.notify_all()

    def stream(self) -> Iterator[str]:
        """All events, past and future, as server-sent events."""
        for at in count():
            with self._changed:
                self._changed.wait_for(lambda at=at: len(self._events) > at)  # type: ignore[misc]
                event, text = self._events[at]
            id = f"{int(self._began)}:{at}"
            if event == "output":
                yield _server_sent_event("output", id, text)
            elif event == "completed":
                if self._shown["status"] == "failed":
                    yield _server_sent_event("error", id, json.dumps({"detail": self._shown["error"]}))
                reason = {"failed": {"reason": "error"}, "canceled": {"reason": "canceled"}}
                yield _server_sent_event("done", id, json.dumps(reason.get(self._shown["status"], {})))
                return


class _Webhook:
    """Posts a prediction's events to an address, signed as Standard Webhooks are."""

    def __init__(self, url: str, secret: str, wanted: list[str]) -> None:
        self._url, self._secret, self._wanted = url, secret, wanted
        self._bodies: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._last = 0.0

    def offer(self, event: str, shown: Body) -> None:
        """Queue the prediction's fields; output and logs that follow too soon are dropped."""
        if event in ("output", "logs"):
            if time.monotonic() - self._last < SECONDS_BETWEEN_WEBHOOKS:
                return
            self._last = time.monotonic()
        self._bodies.put((event, json.dumps(shown)))

    def deliver(self) -> None:
        """Send what is queued, and return after the last event."""
        event = ""
        while event != "completed":
            event, body = self._bodies.get()
            if event in self._wanted:
                self._send(body)

    def _send(self, body: str) -> None:
        id, timestamp = f"msg_{secrets.token_hex(12)}", str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "webhook-id": id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(self._secret, id, timestamp, body),
        }
        with suppress(httpx.HTTPError):
            httpx.post(self._url, content=body.encode(), headers=headers, timeout=30, trust_env=False)


def signature(secret: str, id: str, timestamp: str, body: str) -> str:
    """The header webhook-signature of a message."""
    key = b64decode(secret.removeprefix("whsec_"))
    return f"v1,{b64encode(hmac.digest(key, f'{id}.{timestamp}.{body}'.encode(), 'sha256')).decode()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _server_sent_event(event: str, id: str, data: str) -> str:
    lines = "".join(f"data: {line}\n" for line in re.split("\r\n|\r|\n", data))
    return f"event: {event}\nid: {id}\n{lines}\n"
