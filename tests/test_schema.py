"""Our schema of predict.py is the one that `cog build` writes, and Cog's server takes it."""

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from cli import schema, server
from llm.engine.scheduler import MOST_ROWS
from llm.errors import UserError
from llm.weights.settings import ROOT
from tests.support.client import Client

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

# what Cog's own generator, compiled, writes for TINY, but for its version
COG_WRITES = r"""
{"components":{"schemas":{"Input":{"properties":{"pregunta":{"description":"Un texto: \u003cñ\u003e \u0026 «100 %».",
"maxLength":9,"minLength":2,"title":"Pregunta","type":"string","x-order":0},"max_tokens":{"default":4,"maximum":8,
"minimum":1,"title":"Max Tokens","type":"integer","x-order":1},"top_p":{"default":0.95,"description":"Entre \"0\" y 1",
"maximum":1.5,"minimum":0,"title":"Top P","type":"number","x-order":2},"seed":{"default":null,"nullable":true,
"title":"Seed","type":"integer","x-order":3},"sufijo":{"default":".","description":"Al final","nullable":true,
"title":"Sufijo","type":"string","x-order":4},"eco":{"default":false,"title":"Eco","type":"boolean","x-order":5}},
"required":["pregunta"],"title":"Input","type":"object"},"Output":{"items":{"type":"string"},"title":"Output",
"type":"array","x-cog-array-display":"concatenate","x-cog-array-type":"iterator"},
"PredictionRequest":{"properties":{"id":{"title":"Id","type":"string"},"input":{"$ref":"#/components/schemas/Input"}},
"title":"PredictionRequest","type":"object"},"PredictionResponse":{"properties":{"completed_at":{"format":"date-time",
"title":"Completed At","type":"string"},"created_at":{"format":"date-time","title":"Created At","type":"string"},
"error":{"title":"Error","type":"string"},"id":{"title":"Id","type":"string"},
"input":{"$ref":"#/components/schemas/Input"},"logs":{"title":"Logs","type":"string"},"metrics":{"title":"Metrics",
"type":"object"},"output":{"$ref":"#/components/schemas/Output"},"started_at":{"format":"date-time",
"title":"Started At","type":"string"},"status":{"title":"Status","type":"string"},"version":{"title":"Version",
"type":"string"}},"title":"PredictionResponse","type":"object"},"Status":{"description":"An enumeration.",
"enum":["starting","processing","succeeded","canceled","failed"],"title":"Status","type":"string"},
"HTTPValidationError":{"properties":{"detail":{"items":{"$ref":"#/components/schemas/ValidationError"},"title":"Detail",
"type":"array"}},"title":"HTTPValidationError","type":"object"},
"ValidationError":{"properties":{"loc":{"items":{"anyOf":[{"type":"string"},{"type":"integer"}]},"title":"Location",
"type":"array"},"msg":{"title":"Message","type":"string"},"type":{"title":"Error Type","type":"string"}},
"required":["loc","msg","type"],"title":"ValidationError","type":"object"}}},"info":{"title":"Cog","version":"VERSION"},
"openapi":"3.0.2","paths":{"/":{"get":{"operationId":"root__get",
"responses":{"200":{"content":{"application/json":{"schema":{}}},"description":"Successful Response"}},
"summary":"Root"}},"/health-check":{"get":{"operationId":"healthcheck_health_check_get",
"responses":{"200":{"content":{"application/json":{"schema":{}}},"description":"Successful Response"}},
"summary":"Healthcheck"}},"/predictions":{"post":{"description":"Run a single prediction on the model",
"operationId":"predict_predictions_post",
"requestBody":{"content":{"application/json":{"schema":{"$ref":"#/components/schemas/PredictionRequest"}}}},
"responses":{"200":{"content":{"application/json":{"schema":{"$ref":"#/components/schemas/PredictionResponse"}}},
"description":"Successful Response"},
"422":{"content":{"application/json":{"schema":{"$ref":"#/components/schemas/HTTPValidationError"}}},
"description":"Validation Error"}},"summary":"Predict","x-cog-streaming":true}},
"/predictions/{prediction_id}/cancel":{"post":{"operationId":"cancel_predictions__prediction_id__cancel_post",
"parameters":[{"in":"path","name":"prediction_id","required":true,"schema":{"title":"Prediction Id","type":"string"}}],
"responses":{"200":{"content":{"application/json":{"schema":{}}},"description":"Successful Response"},
"422":{"content":{"application/json":{"schema":{"$ref":"#/components/schemas/HTTPValidationError"}}},
"description":"Validation Error"}},"summary":"Cancel"}}}}
"""
EXPECTED = json.loads(COG_WRITES.replace("VERSION", version("cog")))

# {} is the type and default of its only input, in line 11
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


def test_the_schema_is_the_one_that_cog_writes(source: Path) -> None:
    source.write_text(TINY, encoding="utf-8")
    interface = schema.read(source)
    assert interface == schema.Interface(EXPECTED, concurrency=3)
    # a comparison of dicts is blind to their order
    orders = [
        list(document["components"]["schemas"]["Input"]["properties"]) for document in (interface.schema, EXPECTED)
    ]
    assert orders[0] == orders[1]


def test_the_schema_of_this_project_has_its_inputs() -> None:
    interface = schema.read(ROOT / "predict.py")
    assert interface.concurrency == MOST_ROWS
    components = EXPECTED["components"]["schemas"] | {"Input": interface.schema["components"]["schemas"]["Input"]}
    assert interface.schema == EXPECTED | {"components": {"schemas": components}}
    assert components["Input"]["required"] == ["pregunta"]
    inputs = components["Input"]["properties"]
    assert all(prop.pop("description") for prop in inputs.values())
    optional: dict[str, object] = {"default": None, "nullable": True}
    expected: dict[str, dict[str, object]] = {
        "pregunta": {"type": "string", "minLength": 1, "maxLength": 100000},
        "max_tokens": {"type": "integer", "default": 128, "minimum": 1, "maximum": 2048},
        "temperature": {"type": "number", "default": 0.7, "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "default": 0.95, "minimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "default": 50, "minimum": 0, "maximum": 1000},
        "repetition_penalty": {"type": "number", "default": 1.1, "minimum": 1, "maximum": 2},
        "stop_sequences": {"type": "string", "maxLength": 1000, **optional},
        "seed": {"type": "integer", **optional},
        "prompt_template": {"type": "string", "maxLength": 1000000, **optional},
    }
    for order, (name, prop) in enumerate(expected.items()):
        prop |= {"title": name.replace("_", " ").title(), "x-order": order}
    assert inputs == expected
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
        ("int = Input(default=-3, ge=-1_0)", {"type": "integer", "default": -3, "minimum": -10}),
        ("float = Input(default=1, le=2.50)", {"type": "number", "default": 1, "maximum": 2.5}),
    ],
)
def test_what_cog_and_python_read_alike_is_accepted(source: Path, parameter: str, prop: dict[str, object]) -> None:
    source.write_text(FRAME.format(parameter))
    interface = schema.read(source)
    inputs = interface.schema["components"]["schemas"]["Input"]
    assert inputs["properties"] == {"entrada": {"title": "Entrada", "x-order": 0, **prop}}
    assert ("required" in inputs) == (not {"default", "nullable"} & prop.keys())
    assert interface.concurrency == 1


def test_of_two_definitions_the_one_that_cog_takes_counts(source: Path) -> None:
    text = FRAME.format("int").replace("@cog.streaming", "@cog.concurrent(max=3)\n    @cog.concurrent(max=2)")
    _, _, other = FRAME.format("str").partition("(BasePredictor):\n")
    source.write_text(text.replace("predict", "run") + other.replace("entrada", "otra"))
    interface = schema.read(source)
    assert interface.concurrency == 3
    assert list(interface.schema["components"]["schemas"]["Input"]["properties"]) == ["entrada"]
    assert "x-cog-streaming" not in interface.schema["paths"]["/predictions"]["post"]


# what Cog, Python or the server would misread, drop or refuse: {} is each of these
UNLISTED = {
    "str = Input(description={})": ['"a" "b"', r'"a\nb"', r"'don\'t'", 'u"a"', 'f"{N}"', '("a")', "N", "None"],
    "str = Input(default={})": ['r"""a"""', r'"a\tb"', '"a" + "b"', 'f"a"', "5", '"abc", max_length=2'],
    "str = Input({})": ["min_length=-1", "max_length=1.5", "ge=1", 'choices=["a"]'],
    "int = Input(default={})": ["None", "True", '"a"', "1.5", "int()", "(5)", "9, ge=1, le=8"],
    "int = Input(ge={})": ["N", "2 * 3", "0x10", "- 5", "True", "8, le=1", "9007199254740993", "18446744073709551616"],
    "int = Input({})": ["default_factory=int", "gt=1", "5", "*N", '**{"default": 5}'],
    "int = {}": ["N", "None", "(5)", "(Input(default=5))", "cog.Input(default=5)"],
    "{}": ["list", "Path", "x.int", "int | str", "Union[int, None]", "(int)", "Optional[(int)]", "bool = Input(ge=0)"],
}
PARAMETERS = ["entrada: int", *(f"self, {one}: int" for one in ("*, a", "/, a", "*a", "**a", "número_único"))]
OUTPUTS = ["AsyncConcatenateIterator[int]", "AsyncConcatenateIterator", "AsyncIterator[Path]", "Optional[str]", "str"]
DECORATORS = ["streaming", "cog.concurrent(4)", *(f"cog.concurrent(max={most})" for most in ("N", "0", "True", "(2)"))]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        *(("int", frame.format(one), 11) for frame, all_ in UNLISTED.items() for one in all_),
        *(("-> AsyncConcatenateIterator[str]", f"-> {one}", 11) for one in OUTPUTS),
        *(("self, entrada: int", one, 11) for one in PARAMETERS),
        *(("cog.streaming", one, 10) for one in DECORATORS),
        ("entrada: int", "entrada", 11),
        (" -> AsyncConcatenateIterator[str]", "", 11),
        ("AsyncConcatenateIterator[str]:", "(AsyncConcatenateIterator[str]):", 11),
        ("@cog.streaming\n    async def", "@cog.concurrent(max=2)\n    def", 11),
        ("import cog\n", "if True:\n    import cog\n", 11),
        ("int", "int = Input(\n        default=5,\n        le=N,\n    )", 13),
    ],
)
def test_anything_else_is_refused_with_its_line_and_a_way_out(source: Path, old: str, new: str, line: int) -> None:
    text = FRAME.format("int")
    assert old in text
    source.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        schema.read(source)
    assert re.fullmatch(rf"predict\.py, línea {line}: «.+» no se admite aquí; se admite .+\.", str(caught.value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No se puede leer .+: no existe"),
        (b"\xff", r"predict\.py no está en UTF-8"),
        (b"asinc def predict(): 0", r"predict\.py, línea 1: no es Python correcto"),
        (b"class Predictor:\n    def responder(self): 0", r"A predict\.py le falta la clase Predictor"),
        (b"class Modelo:\n    def predict(self): 0", r"A predict\.py le falta la clase Predictor"),
    ],
)
def test_a_file_without_a_predictor_is_refused(source: Path, content: bytes | None, message: str) -> None:
    if content:
        source.write_bytes(content)
    with pytest.raises(UserError, match=message):
        schema.read(source)


def test_the_schema_is_written_whole_or_not_at_all(source: Path, tmp_path: Path) -> None:
    source.write_text(TINY, encoding="utf-8")
    interface = schema.read(source)
    written = schema.write(interface, tmp_path)
    assert written == tmp_path / ".cog" / "openapi_schema.json"
    assert json.loads(written.read_text(encoding="utf-8")) == interface.schema

    inode = written.stat().st_ino
    schema.write(interface, tmp_path)
    assert written.stat().st_ino != inode, "the file is replaced at once, not written in place"
    assert list(written.parent.iterdir()) == [written]

    written.unlink()
    written.mkdir()
    with pytest.raises(UserError, match=re.escape(f"No se puede escribir {written}: ")):
        schema.write(interface, tmp_path)
    assert list(written.parent.iterdir()) == [written]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Cog's own server with TINY and our schema for it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "predict.py").write_text(TINY, encoding="utf-8")
    with server.running(folder=folder) as running:
        running.wait_until_ready()
        yield Client(running)


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
def test_the_server_refuses_what_the_schema_forbids(client: Client, wrong: dict[str, object], field: str) -> None:
    response = client.predict(**wrong)
    assert response.status_code == 422
    assert [error["loc"] for error in response.json()["detail"]] == [["body", "input", field]]


def test_the_server_streams_as_the_schema_says(client: Client) -> None:
    with client.stream(pregunta="hola", max_tokens=2) as events:
        chunks = [data["chunk"] for name, data in events if name == "output"]
    assert chunks == ["hola", "hola", ".", "(2, 0.95, None, '.', False)"]
