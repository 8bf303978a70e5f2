"""predict.py's text -> what `cog build` would embed in the image: the OpenAPI schema, and the concurrency.

Cog parses predict.py as text, and silently drops or changes what its parser does not know. This module takes only what
Cog and Python read alike, and refuses anything else with its line. It imports neither predict.py nor cog.
"""

import ast
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from llm.errors import UserError
from llm.words import reason

Schema = dict[str, Any]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Positioned = ast.stmt | ast.expr | ast.arg | ast.keyword

TARGET = "Predictor"
# the part of the document that is the same for every predictor
DOCUMENT = Path(__file__).with_name("openapi.json").read_text(encoding="utf-8")
# Literals. Cog takes a string as it stands between its quotes, and a number unchanged up to 15 digits.
TEXT = r"""(?P<quote>'''|\"""|'|")(?:(?!(?P=quote))[^\\])*(?P=quote)|r(?P<mark>['"])(?:(?!(?P=mark)).)*(?P=mark)"""
LENGTH, WHOLE, NUMBER = r"\d[\d_]{0,14}", r"[-+]?\d[\d_]{0,14}", r"[-+]?\d[\d_]{0,14}(\.\d+)?"
# an input's type -> JSON Schema's, and the arguments of its Input() with what each may be
TYPES = {
    "str": ("string", {"description": TEXT, "default": TEXT, "min_length": LENGTH, "max_length": LENGTH}),
    "int": ("integer", {"description": TEXT, "default": WHOLE, "ge": NUMBER, "le": NUMBER}),
    "float": ("number", {"description": TEXT, "default": NUMBER, "ge": NUMBER, "le": NUMBER}),
    "bool": ("boolean", {"description": TEXT, "default": "True|False"}),
}
LITERAL = 'True o False, un número de hasta 15 cifras, "un texto" de una pieza y sin \\, o None si es Optional'
LIMITS = {"ge": "minimum", "le": "maximum", "min_length": "minLength", "max_length": "maxLength"}
INPUT = re.compile(rf"((?:typing\.)?Optional\[\s*)?({'|'.join(TYPES)})(\s*\]|\s*\|\s*None)?")
OUTPUT = re.compile(r"(?:cog\.)?(?:Async)?ConcatenateIterator\[\s*str\s*\]")
DECORATOR = re.compile(r"(?:(cog)\.)?(?:(streaming)|(concurrent)\(\s*max\s*=\s*([1-9][\d_]{0,14}),?\s*\))")


class Interface(NamedTuple):
    """A predictor's OpenAPI 3.0.2 document, and how many predictions it runs at once."""

    schema: Schema
    concurrency: int


def read(path: Path) -> Interface:
    """The interface of the class `Predictor` in the file `path`. Raises UserError for what Cog reads otherwise."""
    try:
        return _Source(path.name, path.read_text(encoding="utf-8")).interface()
    except OSError as error:
        raise UserError(f"No se puede leer {path}: {reason(error)}. ¿Está en la carpeta del proyecto?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} no está en UTF-8: guárdelo con esa codificación.") from error
    except SyntaxError as error:
        raise UserError(f"{path.name}, línea {error.lineno}: no es Python correcto ({error.msg}).") from error


def write(interface: Interface, folder: Path) -> Path:
    """Put the schema where Cog's server reads it, .cog/openapi_schema.json, whole or not at all. Raises UserError."""
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
        raise UserError(f"No se puede escribir {target}: {reason(error)}. Revise permisos y espacio.") from error
    return target


class _Source:
    """A predictor's file: Python's syntax tree, and the source text of each node, which is what Cog parses."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.tree = name, ast.parse(text)
        # the tree counts in bytes
        self._lines = [f"{line}\n".encode() for line in text.split("\n")]

    def interface(self) -> Interface:
        classes = [node for node in self.tree.body if isinstance(node, ast.ClassDef) and node.name == TARGET]
        methods = {node.name: node for node in classes[0].body if isinstance(node, Function)} if classes else {}
        # Cog takes run() if the class has both
        if not (function := methods.get("run") or methods.get("predict")):
            raise UserError(f"A {self.name} le falta la clase {TARGET}, la de cog.yaml, con un método predict().")
        streaming, concurrency = self._decorators(function)
        given = function.args
        if given.vararg or given.kwonlyargs or given.kwarg or [arg.arg for arg in given.args[:1]] != ["self"]:
            raise self._refusal(function, "self y entradas, sin * ni /")
        if not OUTPUT.fullmatch(self._text(function.returns)):
            raise self._refusal(function.returns or function, "-> AsyncConcatenateIterator[str]")
        values = [*[None] * (len(given.args) - len(given.defaults)), *given.defaults]
        document = json.loads(DOCUMENT)
        # `cog build` writes the version of its program; the package is released with the same one
        document["info"]["version"] = version("cog")
        inputs, required = document["components"]["schemas"]["Input"], []
        for order, (parameter, value) in enumerate(zip(given.args[1:], values[1:], strict=True)):
            prop = self._input(parameter, value)
            inputs["properties"][parameter.arg] = {**prop, "x-order": order}
            if not {"default", "nullable"} & prop.keys():
                required.append(parameter.arg)
        if required:
            inputs["required"] = required
        if streaming:
            document["paths"]["/predictions"]["post"]["x-cog-streaming"] = True
        return Interface(document, concurrency)

    def _text(self, node: ast.expr | None) -> str:
        """The source text that Cog parses; empty for a node in parentheses, which Python's tree leaves out."""
        if not node:
            return ""
        before = ast.Pass(lineno=1, col_offset=0, end_lineno=node.lineno, end_col_offset=node.col_offset)
        bare = self._segment(before).rstrip().endswith(("=", ":", ">", "@"))
        return self._segment(node) if bare else ""

    def _segment(self, node: Positioned) -> str:
        """As ast.get_source_segment(), which would split the whole text for each node."""
        assert node.end_lineno is not None
        *lines, last = self._lines[node.lineno - 1 : node.end_lineno]
        segment = b"".join([*lines, last[: node.end_col_offset]])
        return segment[node.col_offset :].decode()

    def _refusal(self, node: Positioned, listed: str) -> UserError:
        text = shorten(self._segment(node), 60, placeholder="…")
        return UserError(f"{self.name}, línea {node.lineno}: «{text}» no se admite aquí; se admite {listed}.")

    def _decorators(self, function: Function) -> tuple[bool, int]:
        """Whether the function streams, and how many predictions run at once."""
        streaming, concurrency = False, 1
        # Cog looks only at imports at the top level
        names = ", ".join(re.findall(r"^(?:from cog )?import (.+)$", ast.unparse(self.tree), re.MULTILINE)).split(", ")
        for decorator in reversed(function.decorator_list):  # of two equal decorators Cog takes the upper one
            match = DECORATOR.fullmatch(self._text(decorator))
            if not match or (match[1] or match[2] or match[3]) not in names:
                raise self._refusal(decorator, "@cog.streaming y @cog.concurrent(max=8), con import cog")
            streaming, concurrency = streaming or bool(match[2]), int(match[4] or concurrency)
        if concurrency > 1 and isinstance(function, ast.FunctionDef):
            raise self._refusal(function, f"async def con max={concurrency}")
        return streaming, concurrency

    def _input(self, parameter: ast.arg, value: ast.expr | None) -> Schema:
        name, match = parameter.arg, INPUT.fullmatch(self._text(parameter.annotation))
        if not match or not all(part[:1].isascii() for part in name.split("_")):
            raise self._refusal(
                parameter, f"nombre (sin ñ ni tilde inicial): {', '.join(TYPES)} u Optional[uno de ellos]"
            )
        json_type, listed = TYPES[match[2]]
        prop: Schema = {"title": " ".join(part[:1].upper() + part[1:] for part in name.split("_")), "type": json_type}
        if match[1] or match[3]:
            prop["nullable"] = True
            listed = {**listed, "default": f"{listed['default']}|None"}
        if isinstance(value, ast.Call) and self._text(value.func) == "Input" and not value.args:
            keywords = value.keywords
        else:
            keywords = [ast.copy_location(ast.keyword("default", value), value)] if value else []
        for keyword in keywords:
            if keyword.arg not in listed or not re.fullmatch(listed[keyword.arg], self._text(keyword.value)):
                raise self._refusal(keyword, f"Input() con {'=, '.join(listed)}=, y como valores {LITERAL}")
            prop[LIMITS.get(keyword.arg, keyword.arg)] = ast.literal_eval(keyword.value)
        default = prop.get("default")
        size = len(default) if isinstance(default, str) else default
        bounds = [prop.get("minimum"), prop.get("minLength"), size, prop.get("maximum"), prop.get("maxLength")]
        if (known := [bound for bound in bounds if bound is not None]) != sorted(known):
            raise self._refusal(parameter, "default= dentro de sus límites, y estos en orden")
        return prop
