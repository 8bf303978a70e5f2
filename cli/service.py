"""A model on Replicate, or at a Cog server's address, behind one interface: ask, stream, cancel."""

import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from cli import events, hosted
from cli.hosted import Reference, Refused
from cli.server import error_text
from llm.errors import UserError

if TYPE_CHECKING:
    from replicate.prediction import Prediction

TERMINAL = ("succeeded", "failed", "canceled")

_MOST_QUOTED = 300
_SECONDS_TO_ANSWER = 300
_SECONDS_BEFORE_ANOTHER_TRY = 0.05
_SECONDS_TO_END = 1800
"""How long a prediction may take, with the start of its machine."""


@dataclass(frozen=True)
class Answer:
    """A prediction that has ended. `asked`, `begun` and `ended` are seconds since the epoch, by one clock."""

    status: str
    text: str
    error: str
    metrics: dict[str, Any]
    asked: float
    begun: float
    ended: float
    pieces: Sequence[str]
    """The text's pieces in order, if the prediction was streamed."""
    first_text: float | None
    """Seconds until the first piece arrived; None without one."""


class Service(Protocol):
    """Each call raises Refused for an input that is not valid, and UserError if no answer comes."""

    name: str
    inputs: set[str]
    """The names of the model's inputs."""
    seconds_to_start: float | None
    """How long setup() took; None: not known."""
    precision: str | None
    """The model's dtype and device, as "float32 en cpu"; None: not known."""

    def ask(self, **inputs: Any) -> Answer: ...

    def stream(self, *, cancel: bool = False, **inputs: Any) -> Answer:
        """Read the answer as it grows; with `cancel`, cancel the prediction at its first piece."""


class Hosted:
    """A version on Replicate."""

    seconds_to_start: float | None = None
    precision: str | None = None

    def __init__(self, reference: Reference) -> None:
        """A reference without a version stands for the newest. Raises UserError."""
        model, self.name = reference.model, ":".join(filter(None, [reference.model, reference.version]))
        self._client = hosted.client(seconds=_SECONDS_TO_ANSWER)
        with hosted.explained(self.name):
            published = self._client.models.get(model)
            version = published.versions.get(reference.version) if reference.version else published.latest_version
        if version is None:
            raise UserError(f"En {model} no hay nada publicado todavía: publíquelo con script/push {model}")
        self.name = f"{model}:{version.id}"
        self.inputs = _inputs(version.openapi_schema)
        self._version = version.id

    def ask(self, **inputs: Any) -> Answer:
        with self._running(inputs) as prediction:
            return self._ended(prediction)

    def stream(self, *, cancel: bool = False, **inputs: Any) -> Answer:
        pieces, first, start = [], None, time.monotonic()
        with self._running(inputs) as prediction:
            for piece in self._pieces(prediction):
                if first is None:
                    first = time.monotonic() - start
                    if cancel:
                        prediction.cancel()
                pieces.append(piece)
            return self._ended(prediction, pieces, first)

    def _pieces(self, prediction: "Prediction") -> Iterator[str]:
        try:
            yield from filter(None, map(str, prediction.stream()))
        except RuntimeError:
            # the prediction failed, and holds its error too
            return
        except ValueError as error:
            raise UserError(f"{self.name} no emite la respuesta palabra a palabra: {error}") from error

    @contextmanager
    def _running(self, inputs: dict[str, Any]) -> Iterator["Prediction"]:
        """Create a prediction; cancel it if the block raises, for it would go on and cost money."""
        with hosted.explained(self.name):
            prediction = self._client.predictions.create(version=self._version, input=inputs, stream=True)
            try:
                yield prediction
            except BaseException:
                prediction.cancel()
                raise

    def _ended(self, prediction: "Prediction", pieces: Sequence[str] = (), first: float | None = None) -> Answer:
        end = time.monotonic() + _SECONDS_TO_END
        prediction.reload()
        while prediction.status not in TERMINAL:
            if time.monotonic() > end:
                raise UserError(
                    f"Tras {_SECONDS_TO_END // 60} minutos una predicción sigue en {prediction.status}: mire por qué "
                    f"en https://replicate.com/p/{prediction.id}"
                )
            time.sleep(self._client.poll_interval)
            prediction.reload()
        asked, ended = _seconds(prediction.created_at), _seconds(prediction.completed_at)
        return Answer(
            status=prediction.status,
            text="".join(prediction.output or []),
            error=error_text(prediction.error or ""),
            metrics=prediction.metrics or {},
            asked=asked,
            # a prediction that was cancelled in the queue never started
            begun=_seconds(prediction.started_at) if prediction.started_at else ended,
            ended=ended,
            pieces=pieces,
            first_text=first,
        )


class _Queue(httpx.HTTPTransport):
    """Repeats a request while Cog answers 409: it has no queue, and may refuse one of two that arrive together."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        end = time.monotonic() + _SECONDS_TO_ANSWER
        while (response := super().handle_request(request)).status_code == httpx.codes.CONFLICT:
            if time.monotonic() > end:
                break
            response.close()
            time.sleep(_SECONDS_BEFORE_ANOTHER_TRY)
        return response


class Cog:
    """A Cog server, of script/serve or in a container."""

    def __init__(self, url: str) -> None:
        """Raises UserError unless the server is ready."""
        self.name = url
        self._http = httpx.Client(base_url=url, timeout=_SECONDS_TO_ANSWER, trust_env=False, transport=_Queue())
        health = self._get("/health-check")
        if health.get("status") not in ("READY", "BUSY"):
            raise UserError(
                f"El servidor de {url} no está listo, sino {health.get('status')}: espere o mire su registro"
            )
        setup = health["setup"]
        self.seconds_to_start: float | None = _seconds(setup["completed_at"]) - _seconds(setup["started_at"])
        line = re.search(r"Modelo: .* en (\w+)$(?s:.*?)Cargado en (.+?)(?: con \d+ hilos)? en ", setup["logs"], re.M)
        self.precision = f"{line[1]} en {line[2]}" if line else None
        self.inputs = _inputs(self._get("/openapi.json"))

    def ask(self, **inputs: Any) -> Answer:
        asked = time.time()
        with self._explained():
            response = self._http.post("/predictions", json={"input": inputs})
            self._check(response)
            return _answer(response.json(), asked)

    def stream(self, *, cancel: bool = False, **inputs: Any) -> Answer:
        pieces, first, asked = [], None, time.time()
        path, headers = f"/predictions/{uuid.uuid4().hex}", {"Accept": "text/event-stream"}
        with (
            self._explained(),
            self._http.stream("PUT", path, json={"input": inputs}, headers=headers) as response,
        ):
            self._check(response)
            for name, data in events.read(response.iter_bytes()):
                if name == "output":
                    if first is None:
                        first = time.time() - asked
                        if cancel:
                            self._http.post(f"{path}/cancel")
                    pieces.append(data["chunk"])
                elif name == "completed":
                    return _answer(data, asked, pieces, first)
        raise UserError(f"{self.name} cerró la respuesta antes de acabarla: mire su registro")

    def _get(self, path: str) -> dict[str, Any]:
        with self._explained():
            response = self._http.get(path)
            self._check(response)
            body: dict[str, Any] = response.json()
            return body

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(f"{self.name} no es una dirección: se escribe http://127.0.0.1:5000") from error
        except httpx.TimeoutException as error:
            raise UserError(f"{self.name} no contesta: mire su registro") from error
        except httpx.TransportError as error:
            raise UserError(f"Sin conexión con {self.name}: compruebe que el servidor está en marcha") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"Lo que contesta en {self.name} no es un servidor de Cog: compruebe la dirección"
            ) from error

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == httpx.codes.OK:
            return
        reply = " ".join(response.read().decode(errors="replace").split())[:_MOST_QUOTED]
        if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            raise Refused(f"{self.name} no acepta las entradas: {reply}")
        raise UserError(f"{self.name} contestó {response.status_code}: {reply or 'nada más'}")


def _answer(prediction: dict[str, Any], asked: float, pieces: Sequence[str] = (), first: float | None = None) -> Answer:
    """The answer in a prediction's JSON. Cog has no queue: the prediction began when it was asked for."""
    return Answer(
        status=prediction["status"],
        text="".join(prediction.get("output") or []),
        error=error_text(prediction.get("error") or ""),
        metrics=prediction.get("metrics") or {},
        asked=asked,
        begun=asked,
        ended=time.time(),
        pieces=pieces,
        first_text=first,
    )


def _inputs(schema: dict[str, Any]) -> set[str]:
    return set(schema["components"]["schemas"]["Input"]["properties"])


def _seconds(moment: str | None) -> float:
    """An ISO 8601 moment as seconds since the epoch."""
    return datetime.fromisoformat(moment or "").timestamp()
