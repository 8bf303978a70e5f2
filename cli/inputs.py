"""What the user typed -> the inputs of a prediction, checked against the schema before anything is started."""

import json
import math
import os
import re
from typing import Any

from llm.errors import UserError
from llm.words import reason

Properties = dict[str, dict[str, Any]]
"""Each input's name and its part of the schema."""

_TYPES = {"string": "un texto", "integer": "un número entero", "number": "un número", "boolean": "true o false"}

# Surrogates: Python decodes to them a byte that is not UTF-8, and half an emoji in JSON. The server refuses both.
_NO_TEXT = re.compile("[\ud800-\udfff]")


def from_pairs(pairs: list[str], schema: dict[str, Any]) -> dict[str, Any]:
    """The inputs of name=value arguments; name=@file takes the file's text. Raises UserError."""
    properties = _properties(schema)
    inputs = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f'-i {pair} no tiene valor: se escribe -i nombre="valor"')
        _refuse_unknown(name, properties)
        if text.startswith("@"):
            text = _read(text[1:])
        inputs[name] = _converted(text, properties[name])
    return _checked(inputs, schema)


def from_json(source: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a JSON object: in a file, in `-` for stdin, or in `source` itself. Raises UserError."""
    source = source.removeprefix("\ufeff")
    text = source if source.lstrip().startswith("{") else _read(source.removeprefix("@"))
    try:
        inputs = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"la línea {error.lineno}, columna {error.colno}"
        raise UserError(f"Lo que da --json no es JSON correcto: mire {where}") from error
    except (ValueError, RecursionError) as error:
        raise UserError("Lo que da --json lleva números demasiado largos, o demasiados corchetes") from error
    if not isinstance(inputs, dict):
        raise UserError('Lo que da --json ha de ser un objeto, como {"pregunta": "..."}')
    for name in inputs:
        _refuse_unknown(name, _properties(schema))
    return _checked(inputs, schema)


def _properties(schema: dict[str, Any]) -> Properties:
    properties: Properties = schema["components"]["schemas"]["Input"]["properties"]
    return properties


def _refuse_unknown(name: str, properties: Properties) -> None:
    if name not in properties:
        raise UserError(f"No hay ninguna entrada {name}: las que hay son {', '.join(properties)}")


def _read(path: str) -> str:
    try:
        # descriptor 0, for sys.stdin may be None, and accepts what is not UTF-8
        file = 0 if path == "-" else os.path.expanduser(path)
        with open(file, encoding="utf-8-sig", closefd=path != "-") as stream:
            return stream.read()
    except OSError as error:
        raise UserError(f"No se puede leer {path}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} no está en UTF-8: guárdelo con esa codificación") from error


def _converted(text: str, schema: dict[str, Any]) -> Any:
    """The text as a value of the input's type. If it is none, the text itself, which _checked() refuses."""
    kind = schema.get("type", "")
    if kind == "boolean" and text in ("true", "false"):
        return text == "true"
    for type_ in {"integer": (int, float), "number": (float,)}.get(kind, ()):
        try:
            return type_(text)
        except ValueError:
            continue
    return text


def _checked(inputs: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for name in schema["components"]["schemas"]["Input"].get("required", []):
        if name not in inputs:
            raise UserError(f'Falta {name}: póngala con -i {name}="..."')
    for name, value in inputs.items():
        if wrong := _wrong(value, _properties(schema)[name]):
            raise UserError(f"{name} {wrong}")
    return inputs


def _wrong(value: Any, schema: dict[str, Any]) -> str | None:
    """Why the server would refuse the value with a 422, in Spanish; None if it would not."""
    kind = schema.get("type", "")
    if kind in _TYPES and not _has_type(value, kind):
        given = "varios valores" if isinstance(value, list | dict) else json.dumps(value, ensure_ascii=False)
        return f"ha de ser {_TYPES[kind]}, y se dio {given}"
    if isinstance(value, str):
        if _NO_TEXT.search(value):
            return "lleva bytes que no son UTF-8, o medio emoji: escríbala de nuevo"
        if len(value) < schema.get("minLength", 0):
            return "está vacía" if not value else f"ha de tener al menos {schema['minLength']} caracteres"
        if len(value) > schema.get("maxLength", math.inf):
            return f"tiene {len(value)} caracteres, y caben {schema['maxLength']}"
    elif "minimum" in schema and value < schema["minimum"]:
        return f"ha de ser {schema['minimum']} o más, y se dio {value}"
    elif "maximum" in schema and value > schema["maximum"]:
        return f"ha de ser {schema['maximum']} o menos, y se dio {value}"
    return None


def _has_type(value: Any, kind: str) -> bool:
    """Whether the value is of a type of JSON Schema, where true is not a number and 2.0 is an integer."""
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if kind == "string":
        return isinstance(value, str)
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return finite and (kind == "number" or value == int(value))
