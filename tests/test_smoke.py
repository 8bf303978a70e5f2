"""script/smoke, as its user runs it and against services that are broken in one way each."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli import demo, service, smoke
from cli.hosted import Reference
from cli.service import Answer, Cog, Hosted, Service
from cli.smoke import Fault, Smoke
from llm.errors import UserError
from tests.support.client import Client
from tests.support.command import run_here
from tests.support.gateway import MODEL, Gateway
from tests.support.prediction import Body, Prediction
from tests.support.problem import Problem
from tests.support.processes import Marked
from tests.support.project import copied

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]

GOOD = ["entradas", "preguntas", "palabra a palabra", "cancelar", "entrada mala", "semilla", "8 a la vez"]
ROWS = ["arranque en frío, s", "primer texto, s", "tokens/s, una sola", "tokens/s, 8 a la vez", "tokens de entrada"]
ROWS += ["tokens de salida", "segundos de predict_time"]
PREDICTIONS = 15
"""The number of predictions that script/smoke makes."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("home") / "project")


@pytest.fixture
def script(project: Path, tmp_path: Path, falcon_environment: dict[str, str], processes: Marked) -> Run:
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [project / "script" / "smoke", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **falcon_environment, **processes.environment, **variables},
        )

    return run


def checks(output: str) -> dict[str, str]:
    """The result of each check, "bien" or "MAL" first."""
    lines = [line for line in output.splitlines() if line.startswith(("bien  ", "MAL   "))]
    return {line[6:].partition(": ")[0]: f"{line[:5].strip()} {line.partition(': ')[2]}" for line in lines}


def measured(output: str) -> dict[str, float]:
    rows = output.partition("\n\n")[2].splitlines()
    return {name.strip(): float(value.replace(",", ".")) for name, _, value in (row.rpartition(" ") for row in rows)}


# Services without a fault


def test_a_server_without_a_fault_passes(script: Run, falcon_server: Client) -> None:
    result = script("--local", falcon_server.server.url)
    assert result.returncode == 0, result.stdout + result.stderr
    results = checks(result.stdout)
    assert list(results) == [*GOOD, "lo mismo que aquí"]
    assert results["8 a la vez"] == "bien 8 respuestas; la de la semilla de antes, la misma"
    assert results["lo mismo que aquí"] == "bien 4 de 4 textos iguales, de temperatura 0 y de la semilla"
    rows = measured(result.stdout)
    assert list(rows) == ROWS and all(value >= 0 for value in rows.values())
    assert rows["arranque en frío, s"] > 0 and rows["tokens/s, 8 a la vez"] > 0
    # 4 answers of 16 tokens and 10 of 32: these weights never end by themselves
    assert rows["tokens de salida"] == 4 * 16 + 10 * 32


def test_a_version_without_a_fault_passes(script: Run, falcon_server: Client, tmp_path: Path) -> None:
    with Gateway(falcon_server.server.url) as gateway:
        version = gateway.publish()
        newer = gateway.publish(schema={**gateway.versions[version]["openapi_schema"], "info": {"title": "Otra"}})
        # without weights here: the test above compares
        variables = {**gateway.environment, "REPLICATE_POLL_INTERVAL": "0.05", "WEIGHTS_DIR": str(tmp_path)}
        unconfirmed = script(MODEL, **variables)
        assert (unconfirmed.returncode, unconfirmed.stdout, gateway.predictions) == (1, "", {})
        cost, way_out = unconfirmed.stderr.splitlines()
        assert cost.startswith(f"Se harán {PREDICTIONS} predicciones cortas en {MODEL}:{newer}. Replicate cobra")
        assert way_out.endswith("repita con --yes")

        result = script(f"r8.im/{MODEL}:{version}", "--yes", **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        results = checks(result.stdout)
        assert list(results) == [*GOOD, "lo mismo que aquí"]
        assert results["lo mismo que aquí"].startswith("bien sin comparar: este ordenador no tiene los pesos: ")
        assert {prediction.shown()["version"] for prediction in gateway.predictions.values()} == {version}
        assert len(gateway.predictions) == PREDICTIONS
        billed = sum(prediction.shown()["metrics"]["predict_time"] for prediction in gateway.predictions.values())
    rows = measured(result.stdout)
    assert list(rows) == ROWS
    assert rows["segundos de predict_time"] == pytest.approx(billed, abs=0.06)
    assert gateway.token not in result.stdout + result.stderr


def test_demo_compares_with_the_embedded_model(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS_DIR", str(demo_folder.parent))
    for local in (True, False):
        assert smoke._here(True, local) == {"MODEL_ID": demo.MODEL_ID, "MODEL_REVISION": demo.WHEEL}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "script/smoke no entiende la orden"),
        ([MODEL, "--local", "http://127.0.0.1:5000"], "script/smoke no entiende la orden"),
        (["Usuario/x"], '"Usuario/x" no es un nombre de Replicate: se escribe USUARIO/NOMBRE o USUARIO/NOMBRE:VERSIÓN'),
        ([MODEL], "Falta REPLICATE_API_TOKEN: cópielo de"),
        (["--local", "http://127.0.0.1:1"], "Sin conexión con http://127.0.0.1:1: compruebe que el servidor está en"),
        (["--local", "127.0.0.1:1"], "127.0.0.1:1 no es una dirección: se escribe http://127.0.0.1:5000"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    result = run_here(smoke.main, *arguments, variables={"REPLICATE_API_TOKEN": ""})
    assert result.returncode == (2 if "entiende" in line else 1)
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith(line)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("otra/otro", "Replicate no tiene otra/otro, o su token no lo ve"),
        (f"{MODEL}:otra", f"Replicate no tiene {MODEL}:otra, o su token no lo ve"),
        (MODEL, f"En {MODEL} no hay nada publicado todavía: publíquelo con script/push {MODEL}"),
    ],
)
def test_a_missing_version_is_named(
    falcon_server: Client, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    with Gateway(falcon_server.server.url) as empty:
        for variable, value in empty.environment.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(UserError) as raised:
            Hosted(Reference.parse(name, versioned=True))
    assert str(raised.value).startswith(line)


def test_a_server_that_is_not_cogs_is_refused() -> None:
    with Gateway("http://127.0.0.1:1") as other, pytest.raises(UserError, match=f"{other.url} contestó 404: "):
        Cog(other.url)


# Broken on Replicate


class Short(Gateway):
    """Answers in 8 tokens, so that these tests are fast; a prediction to be cancelled stays long."""

    def predict(self, body: Body) -> Prediction:
        given = body["input"]
        return super().predict({**body, "input": {**given, "max_tokens": self.tokens(given["max_tokens"])}})

    def tokens(self, requested: int) -> int:
        return requested if requested > 32 else 8


class LosesPieces(Short):
    def stream(self, key: str) -> Iterator[str]:
        # the first: a short answer may come in two pieces
        lost = False
        for event in super().stream(key):
            if lost or not event.startswith("event: output"):
                yield event
            else:
                lost = True


class AllAtOnce(Short):
    def stream(self, key: str) -> Iterator[str]:
        events = super().stream(key)
        first = [*islice(events, 8)]
        pieces = [event for event in first if event.startswith("event: output")]
        texts = [piece.partition("\ndata: ")[2].removesuffix("\n\n") for piece in pieces]
        yield f"event: output\nid: 1\ndata: {''.join(texts)}\n\n"
        yield from (event for event in first if event not in pieces)
        yield from events


class NoStream(Short):
    def stream(self, key: str) -> Iterator[str]:
        raise Problem(HTTPStatus.NOT_FOUND, "No stream.")


class IgnoresCancels(Short):
    def tokens(self, requested: int) -> int:
        return 8

    def cancel_prediction(self, id: str) -> Body:
        return self.predictions[id].shown()


class TakesAnything(Short):
    def predict(self, body: Body) -> Prediction:
        given = body["input"]
        return super().predict({**body, "input": {**given, "temperature": min(given.get("temperature", 1), 2)}})


class DoesNotSayWhy(Short):
    def predict(self, body: Body) -> Prediction:
        try:
            return super().predict(body)
        except Problem as problem:
            raise Problem(problem.status, "Input validation failed") from problem


class ForgetsSeeds(Short):
    def predict(self, body: Body) -> Prediction:
        return super().predict({**body, "input": {key: body["input"][key] for key in body["input"] if key != "seed"}})


class Throttles(Short):
    def predict(self, body: Body) -> Prediction:
        # the first seven come one after another; of the simultaneous ones two may read the same count
        if len(self.predictions) >= 10:
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, "Request was throttled.")
        return super().predict(body)


class Talkative(Short):
    def tokens(self, requested: int) -> int:
        return requested + 1


class Fails(Short):
    def predict(self, body: Body) -> Prediction:
        return super().predict({**body, "input": {**body["input"], "prompt_template": "sin sitio"}})


class Silent(Short):
    def get_prediction(self, id: str) -> Body:
        return {**super().get_prediction(id), "output": [" "]}


class CountsNothing(Short):
    def get_prediction(self, id: str) -> Body:
        return {**super().get_prediction(id), "metrics": {"predict_time": 1}}


@pytest.fixture
def hosted(falcon_server: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[Gateway]], Hosted]]:
    """The version that was pushed to a Replicate of this kind."""
    monkeypatch.setenv("REPLICATE_POLL_INTERVAL", "0.02")
    opened: list[Gateway] = []

    def open(kind: type[Gateway]) -> Hosted:
        gateway = kind(falcon_server.server.url).__enter__()
        opened.append(gateway)
        gateway.publish()
        for name, value in gateway.environment.items():
            monkeypatch.setenv(name, value)
        return Hosted(Reference.parse(MODEL))

    yield open
    for gateway in opened:
        gateway.__exit__(None, None, None)


def no_weights_here() -> dict[str, str]:
    raise UserError("este ordenador no tiene los pesos")


def failed_checks(service: Service, output: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The failed checks, which the command's error names too."""
    with pytest.raises(UserError) as raised:
        smoke.run(Smoke(service, no_weights_here))
    faults = {name: text[4:] for name, text in checks(output.readouterr().out).items() if text.startswith("MAL ")}
    assert str(raised.value) == f"{service.name} no está como debe: {', '.join(faults)}"
    return faults


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (LosesPieces, "palabra a palabra", "llegó «"),
        (AllAtOnce, "palabra a palabra", "llegó de una vez, y no palabra a palabra"),
        (IgnoresCancels, "cancelar", "se canceló al primer trozo y acabó en succeeded, con "),
        (TakesAnything, "entrada mala", "aceptó temperature=99, que pasa del máximo, y acabó en succeeded"),
        (DoesNotSayWhy, "entrada mala", "rechaza temperature=99 sin nombrarla: "),
        (ForgetsSeeds, "semilla", "la misma dio «"),
        (Throttles, "8 a la vez", "Demasiadas peticiones para su cuenta de Replicate"),
        (Talkative, "preguntas", "la respuesta a «What is the capital of France?» pasa de max_tokens=16"),
        (Fails, "preguntas", "«What is the capital of France?» acabó en failed: prompt_template debe contener {pregu"),
        (Silent, "preguntas", "la respuesta a «What is the capital of France?» está vacía"),
        (CountsNothing, "preguntas", "la respuesta a «What is the capital of France?» no trae la métrica input_token"),
    ],
)
def test_each_fault_of_a_service_fails_its_check(
    hosted: Callable[[type[Gateway]], Hosted],
    capsys: pytest.CaptureFixture[str],
    kind: type[Gateway],
    check: str,
    message: str,
) -> None:
    faults = failed_checks(hosted(kind), capsys)
    assert list(faults) == [check]
    assert faults[check].startswith(message)


def test_without_a_stream_the_checks_that_need_one_fail(
    hosted: Callable[[type[Gateway]], Hosted], capsys: pytest.CaptureFixture[str]
) -> None:
    faults = failed_checks(hosted(NoStream), capsys)
    assert list(faults) == ["palabra a palabra", "cancelar"]
    assert all("no emite la respuesta palabra a palabra" in text for text in faults.values())


def test_other_inputs_fail_their_check(
    hosted: Callable[[type[Gateway]], Hosted], capsys: pytest.CaptureFixture[str]
) -> None:
    other = hosted(Short)
    other.inputs = (other.inputs - {"seed"}) | {"semilla"}
    faults = failed_checks(other, capsys)
    assert faults == {"entradas": "no son las de predict.py, no coinciden seed, semilla: contesta otra versión"}


def test_a_prediction_that_does_not_end_is_cancelled(
    hosted: Callable[[type[Gateway]], Hosted], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateways: list[Gateway] = []

    class Recorded(Short):
        def predict(self, body: Body) -> Prediction:
            gateways.append(self)
            return super().predict(body)

    endless = hosted(Recorded)
    monkeypatch.setattr(service, "_SECONDS_TO_END", 0)
    with pytest.raises(UserError, match="Tras 0 minutos una predicción sigue en "):
        endless.ask(**smoke.ENDLESS)
    (prediction,) = gateways[0].predictions.values()
    assert prediction.shown()["status"] == "canceled"


# Broken at a server


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for inputs in (*smoke.QUESTIONS, smoke.DRAWN):
        monkeypatch.setitem(inputs, "max_tokens", 8)


class ChangesText(Cog):
    """Answers the third request with the same seed with another text."""

    requested = 0

    def ask(self, **inputs: Any) -> Answer:
        if inputs.get("seed") == smoke.DRAWN["seed"]:
            self.requested += 1
            inputs["seed"] += self.requested > 2
        return super().ask(**inputs)


@pytest.mark.usefixtures("few_tokens")
def test_another_text_beside_other_requests_is_a_fault(falcon_server: Client) -> None:
    broken = ChangesText(falcon_server.server.url)
    run = Smoke(broken, no_weights_here)
    assert smoke.seed(run) == "dos veces el mismo texto"
    with pytest.raises(Fault, match="con la semilla de antes dio otro texto"):
        smoke.company(run)
    # outside float32 on a CPU that is no fault
    for precision in ("bfloat16 en cpu", "float32 en cuda:0", None):
        broken.precision = precision
        assert "otra: fuera de float32 en cpu puede pasar, y no es un fallo" in smoke.company(run)


class Altered(Cog):
    """Adds something before or after each text, and tokens to each prompt."""

    before, after, more = "", "", 0

    def ask(self, **inputs: Any) -> Answer:
        answer = super().ask(**inputs)
        metrics = answer.metrics | {"input_token_count": answer.metrics["input_token_count"] + self.more}
        return replace(answer, text=f"{self.before}{answer.text}{self.after}", metrics=metrics)


@pytest.mark.usefixtures("few_tokens")
def test_the_texts_are_compared_with_this_computers(falcon_server: Client) -> None:
    remote, local = Cog(falcon_server.server.url), Altered(falcon_server.server.url)
    run = Smoke(remote, no_weights_here)
    smoke.questions(run)
    smoke.seed(run)
    assert smoke.compared(run, local) == "4 de 4 textos iguales, de temperatura 0 y de la semilla"
    local.after = " más"
    with pytest.raises(Fault, match=r"0 de 4 textos iguales, .*, y los dos calculan en float32 en cpu"):
        smoke.compared(run, local)
    for precision in ("bfloat16 en cuda:0", None):
        remote.precision = precision
        note = f"otro modo (allí, {precision or 'no se sabe'}; aquí, float32 en cpu)"
        assert note in smoke.compared(run, local)
    local.before = "Otra cosa: "
    with pytest.raises(Fault, match="y ninguno empieza igual: no son los mismos pesos"):
        smoke.compared(run, local)
    local.more = 3
    with pytest.raises(Fault, match=r"son \d+ tokens allí y \d+ aquí: es otro modelo o plantilla"):
        smoke.compared(run, local)


def test_without_local_weights_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL_ID", "MODEL_REVISION"):
        # smoke sets them to cog.yaml's; monkeypatch then restores them
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path))
    for local in (True, False):
        with pytest.raises(UserError, match="este ordenador no tiene los pesos: descárguelos con script/weights"):
            smoke._here(False, local)


def test_a_stream_that_is_cut_is_reported(falcon_server: Client) -> None:
    known = {path: falcon_server.get(path) for path in ("/health-check", "/openapi.json")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(json.dumps(known[self.path]))

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer('event: output\ndata: {"chunk": "Par", "index": 0}\n\n')

        def answer(self, content: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            with pytest.raises(UserError, match="cerró la respuesta antes de acabarla: mire su registro"):
                Cog(f"http://127.0.0.1:{server.server_address[1]}").stream(**smoke.ENDLESS)
        finally:
            server.shutdown()
            thread.join()


def test_a_server_without_a_free_place_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cog may answer 409 with places free, to one of two simultaneous requests."""
    statuses = iter([409, 409, 200])
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda *_: httpx.Response(next(statuses)))
    with httpx.Client(transport=service._Queue()) as http:
        assert http.post("http://127.0.0.1/predictions").status_code == httpx.codes.OK


def test_an_answer_that_took_no_time_has_no_speed() -> None:
    answer = Answer("succeeded", "a", "", {"output_token_count": 1}, 0.0, 5.0, 5.0, [], None)
    assert smoke._speed([answer]) == smoke._speed([]) == "-"
    assert smoke._speed([replace(answer, ended=5.5)]) == "2,0"
