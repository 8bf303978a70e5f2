"""What a command shows while it works: lines on stderr, and one that counts the seconds where that is a terminal."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TextIO

from cli.server import Line, signals_as_exits
from llm.errors import UserError
from llm.words import decimal, one_line, reason

# moves a terminal to the beginning of the line, and erases the line
_EMPTY_LINE = "\r\x1b[K"

_SPANISH = {
    "usage: ": "uso: ",
    "options": "opciones",
    "positional arguments": "argumentos",
    "show this help message and exit": "muestra esta ayuda",
    "argument %(argument_name)s: %(message)s": "%(argument_name)s %(message)s",
    "unrecognized arguments: %s": "sobra %s",
    "the following arguments are required: %s": "falta %s",
    "expected one argument": "va con un valor",
    "ignored explicit argument %r": "va sin valor, y se dio %r",
    "not allowed with argument %s": "no va con %s",
    "invalid %(type)s value: %(value)r": "no puede ser %(value)r",
    "invalid choice: %(value)r (choose from %(choices)s)": "no puede ser %(value)r: hay %(choices)s",
    "ambiguous option: %(option)s could match %(matches)s": "%(option)s puede ser %(matches)s",
}
# argparse's texts pass through gettext, which would need a compiled catalogue in a folder of its own.
argparse._ = lambda text: _SPANISH.get(text, text)  # type: ignore[attr-defined]


class Parser(argparse.ArgumentParser):
    """Arguments whose mistakes end in one Spanish line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog} no entiende la orden ({one_line(message)}): vea {self.prog} --help\n")


def command(main: Callable[[], int]) -> Callable[[], int]:
    """Decorate a command's main(), which then returns an exit status instead of raising.

    1 after a UserError, whose line is printed; 130 after a Ctrl-C; 141 where nobody reads the output any more.
    SIGTERM and SIGHUP become SystemExit, so that the blocks that are open clean up.
    """

    def run() -> int:
        # the handler of cli/__init__.py was for the imports
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with signals_as_exits():
                return main()
        except UserError as error:
            # the message may quote what the user typed, line ends included
            print(one_line(str(error)), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrumpido", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # the reader of the output, perhaps `head`, has closed it
            return 141

    return run


def write(text: str, output: TextIO) -> None:
    """Write at once. Raises BrokenPipeError if nobody reads the output any more, UserError if it cannot be written."""
    try:
        print(text, end="", file=output, flush=True)
    except OSError as error:
        # else Python, which flushes the output at its end, would report the error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"No se puede escribir en la salida: {reason(error)}") from error


def agree(plan: str, *, yes: bool) -> None:
    """Print what is about to happen, and ask the user unless `yes`, the option --yes. Raises UserError for a no."""
    print(plan, file=sys.stderr)
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError("Sin terminal donde preguntarle no se sigue: si está de acuerdo, repita con --yes")
    print("¿Sigo? [s/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("s", "si", "sí"):
        raise UserError("No se ha hecho nada")


class Loading:
    """A block in which the user waits, for a model to load or to answer. It prints what it does and how long it took.

    In a terminal, tick() shows the seconds so far; show() prints a line of the log.
    """

    def __init__(self, doing: str = "Cargando el modelo", done: str = "En marcha") -> None:
        self._doing = doing
        self._done = done
        self._counts = sys.stderr.isatty()
        self._seconds = 0.0
        # the log comes from another thread
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._write(self._doing)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._write(f"{self._done} en {decimal(self._seconds)} s")
        elif self._counts:
            print(_EMPTY_LINE, end="", file=sys.stderr)

    def tick(self, seconds: float) -> None:
        self._seconds = seconds
        if self._counts:
            with self._lock:
                print(f"{_EMPTY_LINE}{self._doing}: {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    def show(self, line: Line) -> None:
        self._write(line.text)

    def _write(self, text: str) -> None:
        with self._lock:
            print(f"{_EMPTY_LINE if self._counts else ''}{text}", file=sys.stderr, flush=True)
