"""A small Replicate on 127.0.0.1: the part of its published HTTP API that clients use, in front of a real Cog server.

with Gateway(server.url) as gateway:
    gateway.publish("v1")
    # REPLICATE_BASE_URL=gateway.url, REPLICATE_API_TOKEN=gateway.token

Routes, fields and codes are those of the published OpenAPI document of April 2026 and of replicate.com/docs; the bodies
of errors are those that clients' own tests and users have recorded. The gateway has one account, one model and its
versions; every version is the one Cog server behind the gateway, whatever schema it was published with. Predictions
wait in order of arrival while that server has no free place, as in Replicate's queue.

Left out, and so not tested here: cold starts, instances that come and go, the hardware's
speed; billing and spending limits; rate limits (429) and a service that fails (5xx); HTTPS, and with it that a
webhook's address has to be https; files, trainings, collections, search, readmes, examples, creating and deleting
models and versions; the deadline in `Cancel-After`, hence the status `aborted`; outputs removed after an hour, and
streams that expire; lists of models, versions, predictions and deployments; official models; a second delivery of a
webhook. The model's page is neither public nor private, and a token belongs to no account. Where the API documents a
refusal but not its answer (a deployment's name that is taken, one that is deleted while it runs), status and text are
ours.
"""

import hashlib
import json
import re
import secrets
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version as installed
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import jsonschema_rs

from cli import events
from tests.support.network import PatientServer
from tests.support.prediction import Body, Prediction, now
from tests.support.problem import (
    CHANGES,
    DEPLOYMENT,
    PREDICTION,
    VERSION_PREDICTION,
    Problem,
    check,
    invalid,
    not_found,
    read,
)

Kind = TypeVar("Kind")

MODEL = "tu-usuario/nombre-modelo"

HARDWARE = {
    "cpu": "CPU",
    "gpu-t4": "Nvidia T4 GPU",
    "gpu-l40s": "Nvidia L40S GPU",
    "gpu-l40s-2x": "2x Nvidia L40S GPU",
    "gpu-a100-large": "Nvidia A100 (80GB) GPU",
    "gpu-a100-large-2x": "2x Nvidia A100 (80GB) GPU",
    "gpu-h100": "Nvidia H100 GPU",
}

SECONDS_OFFLINE = 15 * 60
"""How long a deployment must be unused and without instances before it can be deleted."""

_MOST_SECONDS_TO_WAIT = 60


class Gateway:
    """Answers until the `with` block ends, which cancels the running predictions."""

    def __init__(self, server: str, *, model: str = MODEL) -> None:
        """`server` is the address of a Cog server that is ready."""
        self.token = f"r8_{secrets.token_hex(18)}"
        self.model = model
        self.owner, self.name = model.split("/")
        self.versions: dict[str, Body] = {}
        """Newest first. Empty: the model has a page, and nothing was pushed to it."""
        self.predictions: dict[str, Prediction] = {}
        self.deployments: dict[str, _Deployment] = {}
        self.webhook_secret = f"whsec_{b64encode(secrets.token_bytes(24)).decode()}"
        self._cog = httpx.Client(base_url=server, timeout=300, trust_env=False)
        self._queue: list[Prediction] = []
        self._queue_changed = threading.Condition()
        self._server = PatientServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"gateway": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that direct Replicate's Python client to this gateway."""
        return {"REPLICATE_BASE_URL": self.url, "REPLICATE_API_TOKEN": self.token}

    def publish(self, id: str = "", schema: Body | None = None) -> str:
        """Add a version, the newest, and return its id. `schema` defaults to the Cog server's."""
        schema = schema or self._cog.get("/openapi.json").json()
        id = id or hashlib.sha256(json.dumps([schema, len(self.versions)]).encode()).hexdigest()
        created = {"id": id, "created_at": now(), "cog_version": installed("cog"), "openapi_schema": schema}
        self.versions = {id: created, **self.versions}
        return id

    def __enter__(self) -> "Gateway":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for prediction in list(self.predictions.values()):
            self._cancel(prediction)
            prediction.join()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._cog.close()

    # The routes: each returns the answer's body.

    def account(self) -> Body:
        return {"type": "user", "username": self.owner, "name": self.owner}

    def hardware(self) -> list[Body]:
        return [{"sku": sku, "name": name} for sku, name in HARDWARE.items()]

    def secret(self) -> Body:
        return {"key": self.webhook_secret}

    def get_model(self, name: str) -> Body:
        self._check_model(name)
        optional = ("description", "github_url", "paper_url", "license_url", "cover_image_url", "default_example")
        return {
            "url": f"https://replicate.com/{name}",
            "owner": self.owner,
            "name": self.name,
            "visibility": "private",
            "is_official": False,
            "run_count": len(self.predictions),
            "latest_version": next(iter(self.versions.values()), None),
            **dict.fromkeys(optional),
        }

    def get_version(self, name: str, id: str) -> Body:
        self._check_model(name)
        return _lookup(self.versions, id)

    def get_prediction(self, id: str) -> Body:
        return _lookup(self.predictions, id).shown()

    def cancel_prediction(self, id: str) -> Body:
        prediction = _lookup(self.predictions, id)
        self._cancel(prediction)
        return prediction.shown()

    def predict(self, body: Body) -> Prediction:
        """A prediction of the version that the body names: ID or OWNER/NAME:ID."""
        check(body, VERSION_PREDICTION)
        name, colon, id = body["version"].rpartition(":")
        if id not in self.versions or (colon and name != self.model):
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "The specified version does not exist (or perhaps you don't have permission to use it?)",
                title="Invalid version or not permitted",
            )
        return self._start(body, VERSION_PREDICTION, id)

    def predict_deployed(self, name: str, body: Body) -> Prediction:
        deployment = _lookup(self.deployments, name)
        deployment.used = time.monotonic()
        return self._start(body, PREDICTION, deployment.release["version"])

    def get_deployment(self, name: str) -> Body:
        return _lookup(self.deployments, name).shown()

    def create_deployment(self, body: Body) -> Body:
        self._check_deployment(body, DEPLOYMENT)
        name = f"{self.owner}/{body['name']}"
        if name in self.deployments:
            raise invalid({"/name": "A deployment with that name already exists."})
        self.deployments[name] = _Deployment(name, self.account(), body)
        return self.deployments[name].shown()

    def update_deployment(self, name: str, body: Body) -> Body:
        deployment = _lookup(self.deployments, name)
        self._check_deployment(body, CHANGES)
        deployment.change(body)
        return deployment.shown()

    def delete_deployment(self, name: str) -> None:
        if not _lookup(self.deployments, name).offline():
            raise Problem(
                HTTPStatus.BAD_REQUEST,
                "You can only delete deployments that have been offline and unused for at least 15 minutes.",
            )
        del self.deployments[name]

    def stream(self, key: str) -> Iterator[str]:
        """The events of the prediction that has this key in its address, from the first to the last, as they come."""
        prediction = _lookup({prediction.key: prediction for prediction in list(self.predictions.values())}, key)
        return prediction.stream()

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise not_found()

    def _check_deployment(self, body: Body, schema: Body) -> None:
        errors = {
            "".join(f"/{part}" for part in error.instance_path): error.message
            for error in jsonschema_rs.Draft7Validator(schema).iter_errors(body)
        }
        if not errors:
            if body.get("model", self.model) != self.model:
                errors["/model"] = "The specified model does not exist."
            if "version" in body and body["version"] not in self.versions:
                errors["/version"] = "The specified version does not exist."
            if "hardware" in body and body["hardware"] not in HARDWARE:
                options = ", ".join(sorted(HARDWARE))
                errors["/hardware"] = f"{body['hardware']} is not a valid hardware SKU. Your options are: {options}."
        if errors:
            raise invalid(errors)

    # How a prediction runs

    def _start(self, body: Body, schema: Body, version: str) -> Prediction:
        inputs = self.versions[version]["openapi_schema"]["components"]["schemas"]["Input"]
        check(body, {**schema, "properties": {**schema["properties"], "input": inputs}})
        prediction = Prediction(self.url, self.model, version, body, self.webhook_secret)
        self.predictions[prediction.id] = prediction
        with self._queue_changed:
            self._queue.append(prediction)
        prediction.begin(self._run)
        return prediction

    def _run(self, prediction: Prediction) -> None:
        try:
            with self._queue_changed:
                self._queue_changed.wait_for(lambda: self._queue[0] is prediction or prediction.cancelled.is_set())
            while not prediction.cancelled.is_set() and not self._run_if_free(prediction):
                # other clients may hold the server's places: asking again is the only way to know
                prediction.cancelled.wait(0.05)
        except httpx.HTTPError as error:
            prediction.complete("failed", error=f"Prediction interrupted; please retry ({error})")
        else:
            prediction.complete("canceled")
        finally:
            self._leave_queue(prediction)

    def _run_if_free(self, prediction: Prediction) -> bool:
        """Whether the server had a free place; if so, the prediction has run to its end."""
        headers = {"Accept": "text/event-stream"}
        body = {"input": prediction.shown()["input"]}
        with self._cog.stream("PUT", f"/predictions/{prediction.id}", json=body, headers=headers) as response:
            if response.status_code == HTTPStatus.CONFLICT:
                return False
            self._leave_queue(prediction)
            if response.status_code != HTTPStatus.OK:
                prediction.complete("failed", error=response.read().decode())
                return True
            for name, data in events.read(response.iter_bytes()):
                prediction.follow(name, data)
        if not prediction.over():
            raise httpx.RemoteProtocolError("the model's server closed its stream")
        return True

    def _leave_queue(self, prediction: Prediction) -> None:
        with self._queue_changed:
            if prediction in self._queue:
                self._queue.remove(prediction)
            self._queue_changed.notify_all()

    def _cancel(self, prediction: Prediction) -> None:
        """Cancel the prediction, queued or running, and return when it is over."""
        prediction.cancelled.set()
        with self._queue_changed:
            self._queue_changed.notify_all()
        while not prediction.wait(0.05):
            # 404 before the server knows the prediction and after its end; where the server has gone, _run fails it
            with suppress(httpx.TransportError):
                self._cog.post(f"/predictions/{prediction.id}/cancel")


class _Deployment:
    def __init__(self, name: str, account: Body, body: Body) -> None:
        self.owner, self.name = name.split("/")
        self.used = time.monotonic()
        """When it last had instances or a prediction, by time.monotonic()."""
        self._account = account
        self.release: Body = {"number": 0, "model": body["model"], "configuration": {}}
        self.change(body)

    def change(self, body: Body) -> None:
        """A new release, with these changes."""
        if not self._scaled_to_zero():
            self.used = time.monotonic()
        configuration = {key: body[key] for key in ("hardware", "min_instances", "max_instances") if key in body}
        self.release = {
            **self.release,
            "number": self.release["number"] + 1,
            "version": body.get("version", self.release.get("version")),
            "created_at": now(),
            "created_by": self._account,
            "configuration": {**self.release["configuration"], **configuration},
        }

    def offline(self) -> bool:
        return self._scaled_to_zero() and time.monotonic() - self.used >= SECONDS_OFFLINE

    def _scaled_to_zero(self) -> bool:
        return bool(self.release["configuration"].get("min_instances") == 0)

    def shown(self) -> Body:
        return {"owner": self.owner, "name": self.name, "current_release": self.release}


def _lookup(things: dict[str, Kind], name: str) -> Kind:
    if name not in things:
        raise not_found()
    return things[name]


_OWNED = r"(?P<name>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/account", Gateway.account),
    ("GET", "/hardware", Gateway.hardware),
    ("GET", "/webhooks/default/secret", Gateway.secret),
    ("GET", f"/models/{_OWNED}", Gateway.get_model),
    ("GET", f"/models/{_OWNED}/versions/(?P<id>[^/]+)", Gateway.get_version),
    ("POST", "/predictions", Gateway.predict),
    ("GET", "/predictions/(?P<id>[^/]+)", Gateway.get_prediction),
    ("POST", "/predictions/(?P<id>[^/]+)/cancel", Gateway.cancel_prediction),
    ("POST", "/deployments", Gateway.create_deployment),
    ("GET", f"/deployments/{_OWNED}", Gateway.get_deployment),
    ("PATCH", f"/deployments/{_OWNED}", Gateway.update_deployment),
    ("DELETE", f"/deployments/{_OWNED}", Gateway.delete_deployment),
    ("POST", f"/deployments/{_OWNED}/predictions", Gateway.predict_deployed),
    ("GET", "/streams/(?P<key>[^/]+)", Gateway.stream),
]
_WITH_BODY = {Gateway.predict, Gateway.predict_deployed, Gateway.create_deployment, Gateway.update_deployment}


class _Handler(BaseHTTPRequestHandler):
    gateway: Gateway
    protocol_version = "HTTP/1.1"
    # otherwise each small piece of a stream waits until the one before is acknowledged
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        # read even before an error: unread bytes would be taken for the next request
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            route, match = self._route()
            if route is not Gateway.stream:
                self._check_token()
            arguments = match.groupdict()
            if route in _WITH_BODY:
                arguments["body"] = read(content)
            # by name: tests override these methods in subclasses
            answer = getattr(self.gateway, route.__name__)(**arguments)
        except Problem as problem:
            self._send(problem.status, problem.body, "application/problem+json")
            return
        if route is Gateway.stream:
            self._stream(answer)
        elif isinstance(answer, Prediction):
            self._send_created(answer)
        elif answer is None:
            self._send(HTTPStatus.NO_CONTENT)
        else:
            self._send(HTTPStatus.OK, answer)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def _route(self) -> tuple[Callable[..., Any], re.Match[str]]:
        path = urlsplit(self.path).path
        for method, pattern, route in _ROUTES:
            if method == self.command and (match := re.fullmatch(f"/v1{pattern}", path)):
                return route, match
        raise not_found()

    def _check_token(self) -> None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if token != self.gateway.token or kind not in ("Bearer", "Token"):
            valid = "a valid" if token else "an"
            raise Problem(
                HTTPStatus.UNAUTHORIZED, f"You did not pass {valid} authentication token", title="Unauthenticated"
            )

    def _send_created(self, prediction: Prediction) -> None:
        status, shown = HTTPStatus.CREATED, prediction.created
        headers = {"Location": shown["urls"]["get"]}
        if preference := re.fullmatch(r"wait(?:=(\d+))?", self.headers.get("Prefer", "")):
            headers["Preference-Applied"] = preference[0]
            seconds = min(int(preference[1] or _MOST_SECONDS_TO_WAIT), _MOST_SECONDS_TO_WAIT)
            if not prediction.wait(seconds):
                status = HTTPStatus.ACCEPTED
            shown = prediction.shown()
        self._send(status, shown, **headers)

    def _send(self, status: HTTPStatus, body: Any = None, kind: str = "application/json", **headers: str) -> None:
        content = b"" if status == HTTPStatus.NO_CONTENT else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, pieces: Iterator[str]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in pieces:
                self.wfile.write(piece.encode())
        except ConnectionError:
            # the client has left; the prediction goes on
            self.close_connection = True
