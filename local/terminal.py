"""What a command shows while it works: lines on stderr, and one that counts the seconds where that is a terminal."""

import argparse
import sys
import threading
from typing import NoReturn

from local.server import Line


class Parser(argparse.ArgumentParser):
    """Arguments whose mistakes end in one Spanish line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog} no entiende la orden ({message}): vea {self.prog} --help\n")


class Loading:
    """The model is loading: `tick` with the seconds so far, `show` for each line of the log, `done` at the end."""

    def __init__(self) -> None:
        self._counts = sys.stderr.isatty()
        self._seconds = 0.0
        # the log comes from another thread
        self._lock = threading.Lock()
        self._write("Cargando el modelo")

    def show(self, line: Line) -> None:
        with self._lock:
            self._write(line.text)

    def tick(self, seconds: float) -> None:
        self._seconds = seconds
        if self._counts:
            with self._lock:
                print(f"\r\x1b[KCargando el modelo: {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        with self._lock:
            self._write(f"En marcha en {decimal(self._seconds)} s")

    def _write(self, text: str) -> None:
        # over the line that counts
        start = "\r\x1b[K" if self._counts else ""
        print(f"{start}{text}", file=sys.stderr, flush=True)


def decimal(number: float) -> str:
    """With one decimal, as in Spanish."""
    return f"{number:.1f}".replace(".", ",")
