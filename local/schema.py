"""predict.py's text -> what `cog build` would embed in the image: the OpenAPI schema, and the concurrency.

Cog reads predict.py as text, never runs it, and drops or changes in silence what its parser does not take. Here only
what Cog and Python read alike is accepted; the rest is an error that names the line. Knows one class, `Predictor`,
whose inputs are text, numbers and booleans. Imports neither predict.py nor cog.
"""

import ast
import io
import json
import os
import re
import tokenize
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.words import reason

Function = ast.FunctionDef | ast.AsyncFunctionDef
Schema = dict[str, Any]

TARGET = "Predictor"
# Python's name -> JSON Schema's, and the arguments of Input() that go with it, each with the types of its literal
TYPES: dict[str, tuple[str, dict[str, tuple[type, ...]]]] = {
    "str": ("string", {"default": (str,), "min_length": (int,), "max_length": (int,)}),
    "int": ("integer", {"default": (int,), "ge": (int, float), "le": (int, float)}),
    "float": ("number", {"default": (int, float), "ge": (int, float), "le": (int, float)}),
    "bool": ("boolean", {"default": (bool,)}),
}
LIMITS = {"ge": "minimum", "le": "maximum", "min_length": "minLength", "max_length": "maxLength"}
INPUT = re.compile(r"(?P<plain>\w+)|(?:\w+\.)?Optional\[(?P<optional>\w+)\]|(?P<union>\w+) \| None")
OUTPUT = re.compile(r"(?P<plain>\w+)|(?:\w+\.)?(?:Async)?(?P<joined>Concatenate)?Iterator\[(?P<of>\w+)\]")
# Cog drops a hexadecimal limit, and a sign that stands apart from its number
NUMBER = re.compile(r"[-+]?\d[\d_]*(\.\d+)?")
# Cog keeps limits as 64-bit floats, which hold every integer up to here
EXACT = 2**53


@dataclass(frozen=True)
class Interface:
    """What a predictor shows: its OpenAPI 3.0.2 document, and how many predictions it runs at once."""

    schema: Schema
    concurrency: int


def read(path: Path) -> Interface:
    """The interface of the class `Predictor` in the file `path`.

    Raises UserError where the file cannot be read, and for all that `cog build` would refuse, drop or change.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except OSError as error:
        raise UserError(f"No se puede leer {path}: {reason(error)}. ¿Está en la carpeta del proyecto?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} no está en UTF-8: guárdelo con esa codificación.") from error
    except SyntaxError as error:
        raise UserError(f"{path.name}, línea {error.lineno}: no es Python correcto ({error.msg}).") from error
    return _Source(path.name, text, tree).interface()


def write(interface: Interface, folder: Path) -> Path:
    """Put the schema where Cog's server reads it, folder/.cog/openapi_schema.json, whole or not at all.

    Raises UserError where it cannot be written.
    """
    target = folder / ".cog" / "openapi_schema.json"
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(exist_ok=True)
        try:
            unfinished.write_text(json.dumps(interface.schema, ensure_ascii=False), encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"No se puede escribir {target}: {reason(error)}. revise permisos y espacio.") from error
    return target


class _Source:
    """The predictor's file: its name, its text, its tree."""

    def __init__(self, name: str, text: str, tree: ast.Module) -> None:
        self.name, self.text, self.tree = name, text, tree
        # Cog knows a name by the imports at the top level alone: `concurrent` -> `cog.concurrent`
        self.imports: dict[str, str] = {}
        for node in tree.body:
            if isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def interface(self) -> Interface:
        function = self._function()
        self._check_parentheses(function)
        streaming, concurrency = self._decorators(function)
        output = self._output(function, streaming)
        parameters = self._parameters(function)
        properties: Schema = {}
        for order, (parameter, value) in enumerate(parameters):
            properties[parameter.arg] = {**self._input(parameter, value), "x-order": order}
        inputs = _object("Input", properties)
        if required := [name for name, prop in properties.items() if not {"default", "nullable"} & prop.keys()]:
            inputs["required"] = required
        return Interface(_document(inputs, output, streaming), concurrency)

    def _error(self, where: ast.stmt | ast.expr | ast.arg | ast.keyword | int, message: str) -> UserError:
        line = where if isinstance(where, int) else where.lineno
        return UserError(f"{self.name}, línea {line}: {message}.")

    def _segment(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def _function(self) -> Function:
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == TARGET:
                methods = {f.name: f for f in node.body if isinstance(f, Function)}
                # where both are there Cog takes run()
                if function := methods.get("run") or methods.get("predict"):
                    return function
                raise self._error(node, f"a la clase {TARGET} le falta el método predict()")
        raise self._error(1, f"falta la clase {TARGET}, la que cog.yaml nombra en predict:")

    def _check_parentheses(self, function: Function) -> None:
        """Refuse a value in parentheses of its own, where Cog sees none: Python's tree does not show them."""
        start = min(node.lineno for node in (function, *function.decorator_list)), 0
        end = function.body[0].lineno, function.body[0].col_offset
        before = ""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            if token.string == "(" and before in ("=", ":", "->", "[", ",", "|", "@") and start <= token.start < end:
                raise self._error(token.start[0], "cog build no lee lo que va entre paréntesis; quítelos")
            before = token.string

    def _decorators(self, function: Function) -> tuple[bool, int]:
        """Whether it streams, and its concurrency."""
        streaming, concurrency = False, 1
        for decorator in reversed(function.decorator_list):  # of two that say the same, Cog takes the upper
            call = decorator if isinstance(decorator, ast.Call) else None
            text = self._segment(call.func if call else decorator)
            head, dot, rest = text.partition(".")
            name = self.imports.get(head, "?") + dot + rest
            if name == "cog.streaming":
                streaming = True
            elif name == "cog.concurrent":
                concurrency = self._concurrency(call) if call and (call.args or call.keywords) else 1
                if concurrency > 1 and isinstance(function, ast.FunctionDef):
                    raise self._error(decorator, f"con max={concurrency} el método tiene que ser async def")
            elif text.split(".")[-1].strip() in ("streaming", "concurrent"):
                raise self._error(
                    decorator, f"cog build no ve que {text} es de cog; pon import cog arriba y @cog. aquí"
                )
        return streaming, concurrency

    def _concurrency(self, call: ast.Call) -> int:
        value = self._literal(call.keywords[0].value) if [k.arg for k in call.keywords] == ["max"] else None
        if call.args or not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(call, "@concurrent solo admite max= y un número entero, de 1 en adelante")
        return value

    def _output(self, function: Function, streaming: bool) -> Schema:
        text = ast.unparse(function.returns) if function.returns else "ninguno"
        match = OUTPUT.fullmatch(text)
        of = match and (match["plain"] or match["of"])
        if not match or of not in TYPES or (match["joined"] and of != "str") or (streaming and match["plain"]):
            where = function.returns or function
            raise self._error(where, f"el tipo de salida {text} no sirve; use AsyncConcatenateIterator[str]")
        element = {"type": TYPES[of][0]}
        if match["plain"]:
            return {"title": "Output", **element}
        output = {"title": "Output", "type": "array", "items": element, "x-cog-array-type": "iterator"}
        return output | ({"x-cog-array-display": "concatenate"} if match["joined"] else {})

    def _parameters(self, function: Function) -> list[tuple[ast.arg, ast.expr | None]]:
        """Each input, and what stands after its `=`."""
        a = function.args
        if a.vararg or a.kwonlyargs or a.kwarg or not a.args or a.args[0].arg != "self":
            raise self._error(function, f"{function.name}() solo admite self y las entradas, sin * ni /")
        values = [*[None] * (len(a.args) - len(a.defaults)), *a.defaults]
        return list(zip(a.args, values, strict=True))[1:]

    def _input(self, parameter: ast.arg, value: ast.expr | None) -> Schema:
        name = parameter.arg
        if not all(part[:1].isascii() for part in name.split("_")):
            raise self._error(parameter, f"cog build estropea el título de {name}; empiece cada palabra sin ñ ni tilde")
        text = ast.unparse(parameter.annotation) if parameter.annotation else "ninguno"
        match = INPUT.fullmatch(text)
        of = match and (match["plain"] or match["optional"] or match["union"])
        if not match or of not in TYPES:
            raise self._error(parameter, f"el tipo de {name}, {text}, no sirve; use {', '.join(TYPES)} u Optional[...]")
        nullable = not match["plain"]
        json_type, arguments = TYPES[of]
        arguments = {**arguments, "description": (str,)}
        if nullable:
            arguments["default"] += (type(None),)

        prop: Schema = {"title": _title(name), "type": json_type, **({"nullable": True} if nullable else {})}
        for key, node in self._arguments(name, value).items():
            if key not in arguments:
                raise self._error(node, f"{name}: Input() no admite aquí {key}=; admite {', '.join(arguments)}")
            literal = self._literal(node)
            if type(literal) not in arguments[key]:
                hint = f"; use Optional[{text}]" if (key, literal) == ("default", None) else ""
                raise self._error(node, f"{name}: {key}={literal!r} no vale para el tipo {text}{hint}")
            prop[LIMITS.get(key, key)] = literal
        if (bounds := _bounds(prop)) != sorted(bounds):
            raise self._error(parameter, f"{name}: default= y los límites no encajan; están en este orden: {bounds}")
        return prop

    def _arguments(self, name: str, value: ast.expr | None) -> dict[str, ast.expr]:
        """The arguments of its Input(), or its bare default."""
        if not isinstance(value, ast.Call):
            return {"default": value} if value else {}
        called = self._segment(value.func)
        if called != "Input" and self.imports.get(called) != "cog.Input":
            raise self._error(value, f"{name}: cog build no ejecuta {called}(); use Input(), con from cog import Input")
        if value.args or any(keyword.arg is None for keyword in value.keywords):
            raise self._error(value, f"{name}: cog build no ve los argumentos de Input() sin nombre; escriba default=")
        return {str(keyword.arg): keyword.value for keyword in value.keywords}

    def _literal(self, node: ast.expr) -> str | int | float | bool | None:
        """The value of a literal that Cog reads from the text as Python does."""
        text = self._segment(node)
        if NUMBER.fullmatch(text):
            if abs(float(text)) > EXACT:
                raise self._error(node, f"{text} no llega exacto a cog build, que admite hasta {EXACT}")
            return float(text) if "." in text else int(text)
        if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool)):
            return node.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value == _as_cog_reads(text):
                return node.value
            raise self._error(
                node, 'cog build lee mal este texto; que sea uno solo entre "comillas", sin \\ ni prefijos'
            )
        raise self._error(node, f'aquí va un literal, como "hola" o 0.5, y no {" ".join(text.split())}')


def _as_cog_reads(literal: str) -> str | None:
    """What stands between the first quote and the last, as it stands."""
    if literal.startswith(('"""', "'''")):
        return literal[3:-3]
    if literal.startswith(('"', "'")):
        return literal[1:-1]
    return literal[2:-1] if literal.startswith(('r"', "r'")) else None


def _bounds(prop: Schema) -> list[float]:
    """Lower limit, default and upper limit, as far as they are there: numbers, or lengths of text."""
    default = prop.get("default")
    size = len(default) if isinstance(default, str) else default
    values = [0 if prop["type"] == "string" else None, prop.get("minimum"), prop.get("minLength"), size]
    return [value for value in (*values, prop.get("maximum"), prop.get("maxLength")) if value is not None]


def _title(name: str) -> str:
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _field(name: str, json_type: str = "string") -> Schema:
    return {"title": _title(name), "type": json_type}


def _object(title: str, properties: Schema) -> Schema:
    return {"title": title, "type": "object", "properties": properties}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: Schema, description: str | None = None) -> Schema:
    content = {"content": {"application/json": {"schema": schema}}}
    return {**content, "description": description} if description else content


def _document(inputs: Schema, output: Schema, streaming: bool) -> Schema:
    """What every predictor's document holds, around what is this one's own."""
    done, invalid = "Successful Response", {"422": _content(_ref("HTTPValidationError"), "Validation Error")}
    predict = {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": _content(_ref("PredictionRequest")),
        "responses": {"200": _content(_ref("PredictionResponse"), done), **invalid},
        **({"x-cog-streaming": True} if streaming else {}),
    }
    cancel = {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [{"required": True, "schema": _field("prediction_id"), "name": "prediction_id", "in": "path"}],
        "responses": {"200": _content({}, done), **invalid},
    }
    root = {"summary": "Root", "operationId": "root__get", "responses": {"200": _content({}, done)}}
    health = {**root, "summary": "Healthcheck", "operationId": "healthcheck_health_check_get"}
    response = {
        "input": _ref("Input"),
        "output": _ref("Output"),
        **{name: _field(name) for name in ("id", "version", "status", "error", "logs")},
        **{name: {**_field(name), "format": "date-time"} for name in ("created_at", "started_at", "completed_at")},
        "metrics": _field("metrics", "object"),
    }
    error = {
        "loc": {**_field("location", "array"), "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        "msg": _field("message"),
        "type": _field("error_type"),
    }
    statuses = ["starting", "processing", "succeeded", "canceled", "failed"]
    components = {
        "Input": inputs,
        "Output": output,
        "PredictionRequest": _object("PredictionRequest", {"id": _field("id"), "input": _ref("Input")}),
        "PredictionResponse": _object("PredictionResponse", response),
        "Status": {**_field("status"), "description": "An enumeration.", "enum": statuses},
        "HTTPValidationError": _object(
            "HTTPValidationError", {"detail": {**_field("detail", "array"), "items": _ref("ValidationError")}}
        ),
        "ValidationError": {**_object("ValidationError", error), "required": list(error)},
    }
    return {
        "openapi": "3.0.2",
        # the command line writes its own version, which is released together with the package's
        "info": {"title": "Cog", "version": version("cog")},
        "paths": {
            "/": {"get": root},
            "/health-check": {"get": health},
            "/predictions": {"post": predict},
            "/predictions/{prediction_id}/cancel": {"post": cancel},
        },
        "components": {"schemas": components},
    }
