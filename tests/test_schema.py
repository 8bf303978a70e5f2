"""What `cog build` would make of predict.py, and that Cog's server takes ours for it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from llm.errors import UserError
from local import schema

ROOT = Path(__file__).parent.parent

TINY = """\
from typing import Optional

import cog
from cog import AsyncConcatenateIterator, BasePredictor, Input, streaming


class Predictor(BasePredictor):
    @streaming
    @cog.concurrent(max=3)
    async def predict(
        self,
        pregunta: str = Input(description="Un texto: <ñ> & «100 %».", min_length=2, max_length=9),
        max_tokens: int = Input(default=4, ge=1, le=8),
        top_p: float = Input(description='Entre "0" y 1', default=0.95, ge=0, le=1.5),
        seed: Optional[int] = Input(default=None),
        sufijo: str | None = Input(description="Al final", default="."),
        eco: bool = False,
    ) -> AsyncConcatenateIterator[str]:
        for _ in range(int(max_tokens)):
            yield pregunta
        yield sufijo or ""
        yield repr((max_tokens, top_p, seed, sufijo, eco))
"""

# what the generator in Cog's own source, compiled, writes for TINY
COG_WRITES = r"""
{
 "components": {
  "schemas": {
   "Input": {
    "properties": {
     "pregunta": {
      "description": "Un texto: <ñ> & «100 %».",
      "maxLength": 9,
      "minLength": 2,
      "title": "Pregunta",
      "type": "string",
      "x-order": 0
     },
     "max_tokens": {"default": 4, "maximum": 8, "minimum": 1, "title": "Max Tokens", "type": "integer", "x-order": 1},
     "top_p": {
      "default": 0.95,
      "description": "Entre \"0\" y 1",
      "maximum": 1.5,
      "minimum": 0,
      "title": "Top P",
      "type": "number",
      "x-order": 2
     },
     "seed": {"default": null, "nullable": true, "title": "Seed", "type": "integer", "x-order": 3},
     "sufijo": {
      "default": ".",
      "description": "Al final",
      "nullable": true,
      "title": "Sufijo",
      "type": "string",
      "x-order": 4
     },
     "eco": {"default": false, "title": "Eco", "type": "boolean", "x-order": 5}
    },
    "required": ["pregunta"],
    "title": "Input",
    "type": "object"
   },
   "Output": {
    "items": {"type": "string"},
    "title": "Output",
    "type": "array",
    "x-cog-array-display": "concatenate",
    "x-cog-array-type": "iterator"
   },
   "PredictionRequest": {
    "properties": {"id": {"title": "Id", "type": "string"}, "input": {"$ref": "#/components/schemas/Input"}},
    "title": "PredictionRequest",
    "type": "object"
   },
   "PredictionResponse": {
    "properties": {
     "completed_at": {"format": "date-time", "title": "Completed At", "type": "string"},
     "created_at": {"format": "date-time", "title": "Created At", "type": "string"},
     "error": {"title": "Error", "type": "string"},
     "id": {"title": "Id", "type": "string"},
     "input": {"$ref": "#/components/schemas/Input"},
     "logs": {"title": "Logs", "type": "string"},
     "metrics": {"title": "Metrics", "type": "object"},
     "output": {"$ref": "#/components/schemas/Output"},
     "started_at": {"format": "date-time", "title": "Started At", "type": "string"},
     "status": {"title": "Status", "type": "string"},
     "version": {"title": "Version", "type": "string"}
    },
    "title": "PredictionResponse",
    "type": "object"
   },
   "Status": {
    "description": "An enumeration.",
    "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
    "title": "Status",
    "type": "string"
   },
   "HTTPValidationError": {
    "properties": {
     "detail": {"items": {"$ref": "#/components/schemas/ValidationError"}, "title": "Detail", "type": "array"}
    },
    "title": "HTTPValidationError",
    "type": "object"
   },
   "ValidationError": {
    "properties": {
     "loc": {"items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "title": "Location", "type": "array"},
     "msg": {"title": "Message", "type": "string"},
     "type": {"title": "Error Type", "type": "string"}
    },
    "required": ["loc", "msg", "type"],
    "title": "ValidationError",
    "type": "object"
   }
  }
 },
 "info": {"title": "Cog", "version": "VERSION"},
 "openapi": "3.0.2",
 "paths": {
  "/": {
   "get": {
    "operationId": "root__get",
    "responses": {"200": {"content": {"application/json": {"schema": {}}}, "description": "Successful Response"}},
    "summary": "Root"
   }
  },
  "/health-check": {
   "get": {
    "operationId": "healthcheck_health_check_get",
    "responses": {"200": {"content": {"application/json": {"schema": {}}}, "description": "Successful Response"}},
    "summary": "Healthcheck"
   }
  },
  "/predictions": {
   "post": {
    "description": "Run a single prediction on the model",
    "operationId": "predict_predictions_post",
    "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}},
    "responses": {
     "200": {
      "content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionResponse"}}},
      "description": "Successful Response"
     },
     "422": {
      "content": {"application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}},
      "description": "Validation Error"
     }
    },
    "summary": "Predict",
    "x-cog-streaming": true
   }
  },
  "/predictions/{prediction_id}/cancel": {
   "post": {
    "operationId": "cancel_predictions__prediction_id__cancel_post",
    "parameters": [
     {
      "in": "path",
      "name": "prediction_id",
      "required": true,
      "schema": {"title": "Prediction Id", "type": "string"}
     }
    ],
    "responses": {
     "200": {"content": {"application/json": {"schema": {}}}, "description": "Successful Response"},
     "422": {
      "content": {"application/json": {"schema": {"$ref": "#/components/schemas/HTTPValidationError"}}},
      "description": "Validation Error"
     }
    },
    "summary": "Cancel"
   }
  }
 }
}
"""


# {} is what stands after its only input's name, in line 11
FRAME = """\
from typing import Optional

import cog
from cog import AsyncConcatenateIterator, BasePredictor, Input

N = 5


class Predictor(BasePredictor):
    @cog.streaming
    async def predict(self, entrada: {}) -> AsyncConcatenateIterator[str]:
        yield ""
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "predict.py"


def test_is_the_document_that_cog_writes(source: Path) -> None:
    source.write_text(TINY, encoding="utf-8")
    interface = schema.read(source)
    expected = json.loads(COG_WRITES.replace("VERSION", version("cog")))
    assert interface == schema.Interface(expected, concurrency=3)
    # a comparison of dicts is blind to their order
    of = [list(document["components"]["schemas"]["Input"]["properties"]) for document in (interface.schema, expected)]
    assert of[0] == of[1]


def test_the_predictor_of_this_project() -> None:
    interface = schema.read(ROOT / "predict.py")
    assert interface.concurrency == 32
    assert interface.schema["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    schemas = interface.schema["components"]["schemas"]
    assert schemas["Output"] == {
        "title": "Output",
        "type": "array",
        "items": {"type": "string"},
        "x-cog-array-type": "iterator",
        "x-cog-array-display": "concatenate",
    }
    assert schemas["Input"]["required"] == ["pregunta"]
    inputs = schemas["Input"]["properties"]
    assert all(prop.pop("description") for prop in inputs.values())

    def number(title: str, json_type: str, default: float, low: float, high: float) -> dict[str, object]:
        return {"title": title, "type": json_type, "default": default, "minimum": low, "maximum": high}

    optional: dict[str, object] = {"default": None, "nullable": True}
    expected: dict[str, dict[str, object]] = {
        "pregunta": {"title": "Pregunta", "type": "string", "minLength": 1, "maxLength": 100000},
        "max_tokens": number("Max Tokens", "integer", 128, 1, 2048),
        "temperature": number("Temperature", "number", 0.7, 0, 2),
        "top_p": number("Top P", "number", 0.95, 0, 1),
        "top_k": number("Top K", "integer", 50, 0, 1000),
        "repetition_penalty": number("Repetition Penalty", "number", 1.1, 1, 2),
        "stop_sequences": {"title": "Stop Sequences", "type": "string", **optional},
        "seed": {"title": "Seed", "type": "integer", **optional},
        "prompt_template": {"title": "Prompt Template", "type": "string", **optional},
    }
    assert inputs == {name: {**prop, "x-order": order} for order, (name, prop) in enumerate(expected.items())}
    assert list(inputs) == list(expected)


@pytest.mark.parametrize(
    ("parameter", "prop"),
    [
        ("str", {"type": "string"}),
        ('str = "a"', {"type": "string", "default": "a"}),
        ("typing.Optional[bool] = None", {"type": "boolean", "default": None, "nullable": True}),
        ("Optional[int]", {"type": "integer", "nullable": True}),
        ('str = Input(description=r"\\d+")', {"type": "string", "description": r"\d+"}),
        ('str = Input(description="""a "b" c""")', {"type": "string", "description": 'a "b" c'}),
        (
            "int = Input(default=-3, ge=-1_000, le=+5)",
            {"type": "integer", "default": -3, "minimum": -1000, "maximum": 5},
        ),
        ("float = Input(default=1, le=2.50)", {"type": "number", "default": 1, "maximum": 2.5}),
    ],
)
def test_takes_what_cog_and_python_read_alike(source: Path, parameter: str, prop: dict[str, object]) -> None:
    source.write_text(FRAME.format(parameter))
    interface = schema.read(source)
    inputs = interface.schema["components"]["schemas"]["Input"]
    assert inputs["properties"] == {"entrada": {"title": "Entrada", "x-order": 0, **prop}}
    assert ("required" in inputs) == (not {"default", "nullable"} & prop.keys())
    assert interface.concurrency == 1


@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        # Cog would take these for another text
        ('str = Input(description="a" "b")', "lee mal este texto"),
        ('str = Input(description="a\\nb")', "lee mal este texto"),
        ("str = Input(description='don\\'t')", "lee mal este texto"),
        ('str = Input(description=u"a")', "lee mal este texto"),
        ('str = Input(description=r"""a""")', "lee mal este texto"),
        ('str = Input(default="a\\tb")', "lee mal este texto"),
        # these it would drop, and with them what they say
        ('str = Input(description=f"{N}")', 'y no f"{N}"'),
        ('str = Input(description="a" + "b")', 'y no "a" + "b"'),
        ('str = Input(description=("a"))', "paréntesis"),
        ('str = Input(description=(  # nota\n        "a"))', "paréntesis"),
        ("int = Input(ge=N)", "y no N"),
        ("int = Input(le=2 * 3)", "y no 2 * 3"),
        ("int = Input(ge=0x10)", "y no 0x10"),
        ("int = Input(ge=- 5)", "y no - 5"),
        ("int = Input(le=18446744073709551616)", "hasta 9007199254740992"),
        ("int = Input(5)", "sin nombre"),
        ('int = Input(**{"default": 5})', "sin nombre"),
        ("int = Input(gt=1)", "no admite aquí gt="),
        ("int = Input(default=int())", "y no int()"),
        ("int = Input(default=None)", "use Optional[int]"),
        # these it refuses, or Python or the server would
        ("list = Input(default_factory=list)", "el tipo de entrada, list, no sirve"),
        ("int = Input(default_factory=int)", "no admite aquí default_factory="),
        ("int = (Input(default=5))", "paréntesis"),
        ("Optional[(int)]", "paréntesis"),
        ("int = cog.Input(default=5)", "from cog import Input"),
        ("int | str", "el tipo de entrada, int | str, no sirve"),
        ("Path", "el tipo de entrada, Path, no sirve"),
        ("int = Input(default=9, ge=1, le=8)", "[1, 9, 8]"),
        ("int = Input(ge=8, le=1)", "[8, 1]"),
        ('str = Input(default="abc", max_length=2)', "[0, 3, 2]"),
        ("str = Input(min_length=-1)", "[0, -1]"),
        ('int = Input(default="a")', "default='a' no vale para el tipo int"),
        ("int = Input(default=True)", "default=True no vale para el tipo int"),
        ("int = Input(ge=True)", "ge=True no vale para el tipo int"),
        ("str = Input(description=None)", "description=None no vale"),
        ("str = Input(ge=1)", "no admite aquí ge="),
        ("str = Input(max_length=1.5)", "max_length=1.5 no vale"),
    ],
)
def test_refuses_an_input_that_cog_would_not_take_as_it_stands(source: Path, parameter: str, says: str) -> None:
    source.write_text(FRAME.format(parameter))
    _refused(source, 11, says)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        (" -> AsyncConcatenateIterator[str]", "", 11, "el tipo de salida ninguno no sirve"),
        ("AsyncConcatenateIterator[str]:", "AsyncConcatenateIterator[int]:", 11, "el tipo de salida"),
        ("AsyncConcatenateIterator[str]:", "AsyncConcatenateIterator:", 11, "el tipo de salida"),
        ("AsyncConcatenateIterator[str]:", "AsyncIterator[Path]:", 11, "el tipo de salida"),
        ("AsyncConcatenateIterator[str]:", "Optional[str]:", 11, "el tipo de salida"),
        ("AsyncConcatenateIterator[str]:", "str:", 11, "el tipo de salida"),
        ("AsyncConcatenateIterator[str]:", "(AsyncConcatenateIterator[str]):", 11, "paréntesis"),
        ("self, entrada: int", "self, entrada", 11, "el tipo de entrada, ninguno, no sirve"),
        ("self, ", "self, *, ", 11, "solo admite self y las entradas"),
        ("self, ", "self, /, ", 11, "solo admite self y las entradas"),
        ("entrada: int", "*entrada: int", 11, "solo admite self y las entradas"),
        ("entrada: int", "**entrada: int", 11, "solo admite self y las entradas"),
        ("self, entrada: int", "entrada: int", 11, "solo admite self y las entradas"),
        ("entrada", "número_único", 11, "estropea el título de número_único"),
        ("@cog.streaming", "@cog.concurrent(max=N)", 10, "y no N"),
        ("@cog.streaming", "@cog.concurrent(4)", 10, "solo admite max="),
        ("@cog.streaming", "@cog.concurrent(max=0)", 10, "solo admite max="),
        ("@cog.streaming", "@cog.concurrent(max=True)", 10, "solo admite max="),
        ("@cog.streaming\n    async def", "@cog.streaming\n    @cog.concurrent(max=2)\n    def", 11, "async def"),
        ("@cog.streaming", "@streaming", 10, "no ve que streaming es de cog"),
        ("import cog\n", "if True:\n    import cog\n", 11, "no ve que cog.streaming es de cog"),
        ("predict(", "responder(", 9, "le falta el método predict()"),
        ("Predictor(", "Modelo(", 1, "falta la clase Predictor"),
        ("async def", "asinc def", 11, "no es Python correcto"),
    ],
)
def test_refuses_a_predictor_that_cog_would_not_take_as_it_stands(
    source: Path, old: str, new: str, line: int, says: str
) -> None:
    text = FRAME.format("int")
    assert old in text
    source.write_text(text.replace(old, new, 1), encoding="utf-8")
    _refused(source, line, says)


def _refused(source: Path, line: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        schema.read(source)
    assert str(caught.value).startswith(f"predict.py, línea {line}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_the_line_of_the_value(source: Path) -> None:
    source.write_text(FRAME.format("int = Input(\n        default=5,\n        le=N,\n    )"))
    _refused(source, 13, "y no N")


def test_refuses_a_file_that_is_not_there_or_not_text(source: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"No se puede leer {source}: no existe.")):
        schema.read(source)
    source.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"predict\.py no está en UTF-8"):
        schema.read(source)


def test_writes_the_file_whole_or_not_at_all(source: Path, tmp_path: Path) -> None:
    source.write_text(TINY, encoding="utf-8")
    interface = schema.read(source)
    written = schema.write(interface, tmp_path)
    assert written == tmp_path / ".cog" / "openapi_schema.json"
    assert json.loads(written.read_text(encoding="utf-8")) == interface.schema

    inode = written.stat().st_ino
    schema.write(interface, tmp_path)
    assert written.stat().st_ino != inode, "another file took its place at once, instead of growing in it"
    assert list(written.parent.iterdir()) == [written]

    written.unlink()
    written.mkdir()
    with pytest.raises(UserError, match=re.escape(f"No se puede escribir {written}: ")):
        schema.write(interface, tmp_path)
    assert list(written.parent.iterdir()) == [written]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Cog's own server with TINY and our schema for it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "predict.py").write_text(TINY, encoding="utf-8")
    schema.write(schema.read(folder / "predict.py"), folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                _wait_until_ready(client, process, folder / "log")
                yield client
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    status, deadline = "", time.monotonic() + 120
    while status != "READY":
        assert process.poll() is None and time.monotonic() < deadline and "FAILED" not in status, log.read_text()
        time.sleep(0.05)
        try:
            status = client.get("/health-check").json()["status"]
        except httpx.TransportError:
            status = "not listening yet"


def test_the_server_takes_the_file(server: httpx.Client) -> None:
    assert server.get("/openapi.json").json() == json.loads(COG_WRITES.replace("VERSION", version("cog")))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({}, "pregunta"),
        ({"pregunta": "a"}, "pregunta"),
        ({"pregunta": "0123456789"}, "pregunta"),
        ({"pregunta": "hola", "max_tokens": 9}, "max_tokens"),
        ({"pregunta": "hola", "max_tokens": "4"}, "max_tokens"),
        ({"pregunta": "hola", "top_p": 1.6}, "top_p"),
        ({"pregunta": "hola", "seed": "x"}, "seed"),
    ],
)
def test_the_server_refuses_by_it(server: httpx.Client, wrong: dict[str, object], field: str) -> None:
    response = server.post("/predictions", json={"input": wrong})
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["detail"]] == [["body", "input", field]]


def test_the_server_streams_by_it(server: httpx.Client) -> None:
    response = server.post(
        "/predictions", json={"input": {"pregunta": "hola", "max_tokens": 2}}, headers={"Accept": "text/event-stream"}
    )
    assert response.status_code == 200
    chunks = re.findall(r"event: output\ndata: (.*)", response.text.replace("\r\n", "\n"))
    assert [json.loads(chunk)["chunk"] for chunk in chunks] == ["hola", "hola", ".", "(2, 0.95, None, '.', False)"]
