"""The errors of gateway.py: the schemas of request bodies, and the API's answers to invalid ones."""

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import jsonschema_rs

Body = dict[str, Any]

# Request bodies, as published.
PREDICTION: Body = {
    "type": "object",
    "required": ["input"],
    "additionalProperties": False,
    "properties": {
        "input": {"type": "object"},
        "stream": {"type": "boolean"},
        "webhook": {"type": "string"},
        "webhook_events_filter": {"type": "array", "items": {"enum": ["start", "output", "logs", "completed"]}},
    },
}
VERSION_PREDICTION: Body = {
    **PREDICTION,
    "required": ["version", "input"],
    "properties": {"version": {"type": "string"}, **PREDICTION["properties"]},
}
CHANGES: Body = {
    "type": "object",
    "properties": {
        "version": {"type": "string"},
        "hardware": {"type": "string"},
        "min_instances": {"type": "integer", "minimum": 0, "maximum": 5},
        "max_instances": {"type": "integer", "minimum": 0, "maximum": 20},
    },
}
DEPLOYMENT: Body = {
    "type": "object",
    "required": ["name", "model", "version", "hardware", "min_instances", "max_instances"],
    "properties": {"name": {"type": "string"}, "model": {"type": "string"}, **CHANGES["properties"]},
}


class Problem(Exception):
    """An error that the API answers with."""

    def __init__(self, status: HTTPStatus, detail: str, **more: Any) -> None:
        self.status = status
        self.body = {"detail": detail, "status": status.value, **more}


def not_found() -> Problem:
    return Problem(HTTPStatus.NOT_FOUND, "The requested resource could not be found.")


def invalid(errors: dict[str, str]) -> Problem:
    """The validation error of the deployments' routes: each fault by its JSON pointer."""
    lines = "".join(f"\n- {pointer.strip('/')}: {detail}" for pointer, detail in errors.items())
    listed = [{"pointer": pointer, "detail": detail} for pointer, detail in errors.items()]
    detail = f"The following errors occurred:{lines}"
    return Problem(HTTPStatus.BAD_REQUEST, detail, title="Validation failed", errors=listed)


def check(body: Any, schema: Body) -> None:
    """Raise Problem with each invalid field, as the predictions' routes do."""
    errors = jsonschema_rs.Draft7Validator(schema).iter_errors(body)
    if fields := [field for error in errors for field in _invalid_fields(error)]:
        detail = "".join(
            f"- {field['field']}{': ' if field['field'] else ''}{field['description']}\n" for field in fields
        )
        title = "Input validation failed"
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, title=title, invalid_fields=fields)


def _invalid_fields(error: jsonschema_rs.ValidationError) -> Iterator[Body]:
    """Each fault in the words of gojsonschema, which Replicate uses."""
    path, value = [str(part) for part in error.instance_path], error.kind.value
    type, descriptions = {
        "required": lambda: ("required", [f"{value} is required"]),
        "additionalProperties": lambda: (
            "additional_property_not_allowed",
            [f"Additional property {property} is not allowed" for property in value],
        ),
        "type": lambda: ("invalid_type", [f"Invalid type. Expected: {value[0]}, given: {_type(error.instance)}"]),
        "enum": lambda: ("enum", [f"{path[-1]} must be one of the following: {', '.join(map(json.dumps, value))}"]),
        "minimum": lambda: ("number_gte", [f"Must be greater than or equal to {value}"]),
        "maximum": lambda: ("number_lte", [f"Must be less than or equal to {value}"]),
        "minLength": lambda: ("string_gte", [f"String length must be greater than or equal to {value}"]),
        "maxLength": lambda: ("string_lte", [f"String length must be less than or equal to {value}"]),
    }[error.kind.name]()
    for description in descriptions:
        yield {"type": type, "field": ".".join(path), "description": description}


def _type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"The request's body is not JSON: {error}") from error
