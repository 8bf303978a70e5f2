"""The message of each error of Replicate's client, over Replicate's stand-in and over a server that only refuses."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from replicate.client import Client as Replicate

from cli import hosted
from cli.hosted import Reference, Refused
from cli.terminal import agree
from llm.errors import UserError
from llm.weights import settings
from tests.support.client import Client
from tests.support.gateway import MODEL, Gateway

pytestmark = pytest.mark.slow

OTHERS = "otra/otro"
SHORT = {"pregunta": "Once", "max_tokens": 1}


@pytest.fixture(scope="module")
def gateway(falcon_server: Client) -> Iterator[Gateway]:
    with Gateway(falcon_server.server.url) as gateway:
        gateway.publish("v1")
        yield gateway


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Replicate]:
    """The client of a user with these environment variables."""

    def client(**variables: str) -> Replicate:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return hosted.client()

    return client


def message(call: Callable[[], Any], name: str = MODEL) -> str:
    with pytest.raises(UserError) as raised, hosted.explained(name):
        call()
    assert "\n" not in str(raised.value)
    # an error that another input may avoid has a type of its own
    assert isinstance(raised.value, Refused) == ("no acepta" in str(raised.value))
    return str(raised.value)


@pytest.mark.parametrize("text", [MODEL, f"r8.im/{MODEL}", f"{MODEL}:v1", f"r8.im/{MODEL}:v1"])
def test_a_name_may_have_a_registry_and_a_version(text: str) -> None:
    reference = Reference.parse(text, versioned=True)
    assert (reference.model, reference.version) == (MODEL, "v1" if "v1" in text else None)


@pytest.mark.parametrize("text", ["", " ", "x", "a/b/c", "A/b", "a/-b", "a/b c", "a/b\n", "../x", ";rm", "otro.io/a/b"])
def test_a_malformed_name_is_refused_with_a_version_or_without(text: str) -> None:
    for versioned in (True, False):
        with pytest.raises(UserError, match="se escribe USUARIO/NOMBRE"):
            Reference.parse(text, versioned=versioned)


@pytest.mark.parametrize("text", ["a/b:", "a/b:v-1", "a/b:v1:v2", "a/b:v1\n", "r8.im/a", "r8.im/a/b/c"])
def test_a_malformed_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="se escribe USUARIO/NOMBRE o USUARIO/NOMBRE:VERSIÓN, en minúsculas"):
        Reference.parse(text, versioned=True)
    with pytest.raises(UserError, match="se escribe USUARIO/NOMBRE, en minúsculas"):
        Reference.parse("a/b:v1")


def test_a_valid_request_is_answered(connect: Callable[..., Replicate], gateway: Gateway) -> None:
    with hosted.explained(MODEL):
        assert connect(**gateway.environment).models.get(MODEL).latest_version


def test_the_token_comes_from_the_env_file_too(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, gateway: Gateway
) -> None:
    monkeypatch.delenv("REPLICATE_API_TOKEN", raising=False)
    monkeypatch.setenv("REPLICATE_BASE_URL", gateway.url)
    read = settings.values
    monkeypatch.setattr(settings, "values", lambda: read(tmp_path))
    with pytest.raises(UserError, match="Falta REPLICATE_API_TOKEN: cópielo de https://replicate"):
        hosted.client()
    (tmp_path / ".env").write_text(f"REPLICATE_API_TOKEN={gateway.token}\n")
    assert hosted.client().models.get(MODEL).latest_version


def test_a_malformed_token_is_refused_and_not_shown(connect: Callable[..., Replicate]) -> None:
    with pytest.raises(UserError, match="lleva espacios o letras que un token no tiene") as raised:
        connect(REPLICATE_API_TOKEN="r8_secreto r8_secreto")
    assert "secreto" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda client: client.models.get(OTHERS), f"Replicate no tiene {OTHERS}, o su token no lo ve"),
        (
            lambda client: client.predictions.create(version="v2", input=SHORT),
            f"Replicate no acepta lo que se le pide de {OTHERS}: The specified version does not exist",
        ),
        (
            lambda client: client.predictions.create(version="v1", input={**SHORT, "seed": "x", "top_k": -1}),
            "- input.seed: Invalid type. Expected: integer, given: string - input.top_k: Must be greater than or",
        ),
    ],
)
def test_what_the_service_refuses_is_one_line(
    connect: Callable[..., Replicate], gateway: Gateway, call: Callable[[Replicate], Any], expected: str
) -> None:
    client = connect(**gateway.environment)
    assert expected in message(lambda: call(client), OTHERS)


def test_an_unknown_token_is_refused_and_not_shown(connect: Callable[..., Replicate], gateway: Gateway) -> None:
    client = connect(**{**gateway.environment, "REPLICATE_API_TOKEN": "r8_otro"})
    text = message(lambda: client.models.get(MODEL))
    assert text.startswith("Replicate no reconoce su REPLICATE_API_TOKEN: cópielo") and "r8_otro" not in text


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    """The address of a service that answers /NUMBER with that code, and its own page to anything else."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = self.path.rpartition("/")[2]
            self.send_response(int(status) if status.isdigit() else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"detail": "Why\nnot."}).encode() if status.isdigit() else b"<html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, f"Replicate no acepta lo que se le pide de {MODEL}: Why not."),
        (402, f"Replicate pide saldo o una forma de pago: póngalos en {hosted.BILLING} (Why not.)"),
        (403, f"Su token no da acceso a {MODEL}: use el de la cuenta a la que pertenece (Why not.)"),
        (409, f"Replicate no hizo lo que se le pidió de {MODEL} (409): Why not."),
        (429, "Demasiadas peticiones para su cuenta de Replicate: espere y repita (Why not.)"),
        (500, f"Replicate falla (500): mire {hosted.STATUS} y repita"),
        (503, f"Replicate falla (503): mire {hosted.STATUS} y repita"),
    ],
)
def test_a_status_is_explained(connect: Callable[..., Replicate], refusing: str, status: int, expected: str) -> None:
    client = connect(REPLICATE_BASE_URL=refusing, REPLICATE_API_TOKEN="r8_x")
    assert message(lambda: client.predictions.cancel(f"../../{status}#")) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:1", "Sin conexión con 127.0.0.1: compruebe la red y repita"),
        ("127.0.0.1:1", "REPLICATE_BASE_URL no es una dirección: se escribe https://..., o se deja vacía"),
        ("http://a:b", "REPLICATE_BASE_URL no es una dirección: se escribe https://..., o se deja vacía"),
        ("{refusing}", "No es Replicate quien contesta: compruebe REPLICATE_BASE_URL y la red"),
    ],
)
def test_an_address_that_is_not_replicates_is_one_line(
    connect: Callable[..., Replicate], refusing: str, address: str, expected: str
) -> None:
    client = connect(REPLICATE_BASE_URL=address.format(refusing=refusing), REPLICATE_API_TOKEN="r8_x")
    assert message(lambda: client.predictions.cancel("uno")) == expected


def test_without_a_terminal_only_yes_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    agree("Esto cuesta dinero", yes=True)
    with pytest.raises(UserError, match="repita con --yes"):
        agree("Esto cuesta dinero", yes=False)
    assert capsys.readouterr().err == "Esto cuesta dinero\n" * 2


@pytest.mark.parametrize(("typed", "goes_on"), [("s\n", True), (" Sí\n", True), ("n\n", False), ("\n", False)])
def test_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch, typed: str, goes_on: bool) -> None:
    terminal, user = os.openpty()
    with os.fdopen(user) as stdin, os.fdopen(terminal, "wb", buffering=0) as keys:
        monkeypatch.setattr("sys.stdin", stdin)
        keys.write(typed.encode())
        if goes_on:
            agree("Esto cuesta dinero", yes=False)
        else:
            with pytest.raises(UserError, match="No se ha hecho nada"):
                agree("Esto cuesta dinero", yes=False)
