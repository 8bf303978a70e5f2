"""The changes of a schema that would break a caller, and the line that names each."""

from typing import Any

import pytest

from cli import changes, schema
from llm.weights.settings import ROOT

Input = dict[str, Any]

TEXT: Input = {"type": "string", "x-order": 0, "description": "El texto."}
NUMBER: Input = {"type": "number", "x-order": 1}
TOKENS: Input = {"type": "integer", "minimum": 1, "maximum": 2048, "x-order": 2}
CHUNKS: Input = {
    "type": "array",
    "items": {"type": "string"},
    "x-cog-array-type": "iterator",
    "x-cog-array-display": "concatenate",
}


def choices(*values: Any) -> Input:
    return {"enum": [*values], "type": "string"}


def document(
    inputs: dict[str, Input], *, required: tuple[str, ...] = (), output: Input = CHUNKS, streams: bool = True
) -> Input:
    """A schema as `cog build` writes it: an input with choices has a component of its own."""
    properties: Input = {}
    components: Input = {"Output": output}
    for name, prop in inputs.items():
        properties[name] = prop
        if "enum" in prop:
            components[name] = prop
            properties[name] = {"allOf": [{"$ref": f"#/components/schemas/{name}"}], "x-order": 5}
    components["Input"] = {"type": "object", "properties": properties, "required": [*required]}
    post = {"x-cog-streaming": True} if streams else {}
    return {"components": {"schemas": components}, "paths": {"/predictions": {"post": post}}}


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (TOKENS, {**TOKENS, "maximum": 512}, ["a: el máximo era 2048 y será 512"]),
        (TOKENS, {**TOKENS, "minimum": 2}, ["a: el mínimo era 1 y será 2"]),
        (TOKENS, {**TOKENS, "maximum": 4096, "minimum": 0}, []),
        (TOKENS, {"type": "integer"}, []),
        ({**NUMBER, "maximum": 2}, {**NUMBER, "maximum": 0.5}, ["a: el máximo era 2 y será 0,5"]),
        (NUMBER, {**NUMBER, "maximum": 2.0}, ["a: no tenía máximo y será 2"]),
        (TEXT, {**TEXT, "minLength": 1}, ["a: no tenía mínimo de caracteres y será 1"]),
        (
            {**TEXT, "maxLength": 100000},
            {**TEXT, "maxLength": 5000},
            ["a: el máximo de caracteres era 100000 y será 5000"],
        ),
        (TOKENS, {**TOKENS, "type": "number"}, []),
        ({**TOKENS, "type": "number"}, {**TOKENS, "maximum": 9}, ["a: era número y será entero"]),
        (TEXT, {"type": "boolean"}, ["a: era texto y será sí o no"]),
        ({"type": "string", "format": "uri"}, TEXT, ["a: era archivo y será texto"]),
        ({"type": "array", "items": {"type": "string"}}, TEXT, ["a: era lista de texto y será texto"]),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, TEXT, ["a: era entero o texto y será texto"]),
        (choices("uno", "dos", "tres"), choices("uno", "cuatro"), ['a: dejará de admitir "dos", "tres"']),
        (choices("uno"), choices("dos", "uno"), []),
        (choices("uno"), TEXT, []),
        (TEXT, choices("uno", "dos"), ['a: solo admitirá "uno", "dos"']),
        # Cog takes null in neither, whatever the schema says
        ({**TEXT, "nullable": True}, TEXT, []),
        ({**TEXT, "default": "x", "title": "A"}, {**TEXT, "default": "y", "title": "Á"}, []),
    ],
)
def test_an_input_that_takes_fewer_values_is_named(before: Input, after: Input, lines: list[str]) -> None:
    assert changes.breaking(document({"a": before}), document({"a": after})) == lines


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (document({"a": TEXT, "b": TOKENS}), document({"b": TOKENS}), ["a: desaparece"]),
        (document({"a": TEXT}), document({"a": TEXT, "b": TOKENS}), []),
        (document({"a": TEXT}), document({"b": {**TEXT, "x-order": 3}}), ["a: desaparece (¿ahora es b?)"]),
        (document({"a": NUMBER}), document({"b": {**NUMBER, "minimum": 1}}), ["a: desaparece (¿ahora es b?)"]),
        (document({"a": TEXT}), document({"b": {**TOKENS, "x-order": 0}}), ["a: desaparece"]),
        (document({"a": NUMBER}), document({"b": {**NUMBER, "x-order": 3}}), ["a: desaparece"]),
        (document({}), document({"a": TEXT, "b": TEXT}, required=("a",)), ["a: es nueva y obligatoria"]),
        (document({"a": TEXT}), document({"a": TEXT}, required=("a",)), ["a: pasa a ser obligatoria"]),
        (document({"a": TEXT}, required=("a",)), document({"a": TEXT}), []),
    ],
)
def test_an_input_that_goes_or_becomes_required_is_named(before: Input, after: Input, lines: list[str]) -> None:
    assert changes.breaking(before, after) == lines


ITERATOR: Input = {key: value for key, value in CHUNKS.items() if key != "x-cog-array-display"}


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (CHUNKS, {"type": "string"}, "la salida: era texto a trozos y será texto"),
        (ITERATOR, CHUNKS, "la salida: era texto, uno tras otro y será texto a trozos"),
        ({"type": "object"}, CHUNKS, "la salida: era objeto y será texto a trozos"),
        ({"type": "array", "items": {"type": "string", "format": "uri"}}, CHUNKS, "la salida: era lista de archivo"),
        ({}, CHUNKS, "la salida: era cualquier cosa y será texto a trozos"),
    ],
)
def test_an_output_of_another_type_is_named(before: Input, after: Input, line: str) -> None:
    (named,) = changes.breaking(document({}, output=before), document({}, output=after))
    assert named.startswith(line)


def test_an_output_that_no_longer_streams_is_named() -> None:
    lines = ["la salida: ya no se podrá leer a medida que llega"]
    assert changes.breaking(document({}), document({}, streams=False)) == lines
    assert changes.breaking(document({}, streams=False), document({})) == []


def test_an_unchanged_schema_breaks_nothing() -> None:
    ours = schema.read(ROOT / "predict.py").schema
    assert changes.breaking(ours, ours) == []
    # a version pushed before Cog wrote schemas
    assert changes.breaking({}, ours) == [
        "pregunta: es nueva y obligatoria",
        "la salida: era cualquier cosa y será texto a trozos",
    ]
