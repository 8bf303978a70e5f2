"""Starts the genuine Cog server with our predictor, as the image does but without Docker, waits for it and stops it.

Knows the process, its log and its health; nothing of predictions.
"""

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EADDRINUSE
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NoReturn

from cli import schema
from llm.errors import UserError
from llm.weights.settings import ROOT
from llm.words import reason

HOST = "127.0.0.1"
LIBRARIES = {"GOMP_SPINCOUNT": "10000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "THP_MEM_ALLOC_ENABLE": "1"}
"""Variables that libraries below torch read once, when they load. cog.yaml sets the same ones.

GOMP_SPINCOUNT, which only GNU's OpenMP knows: how many turns a thread spins for the others before it sleeps. With the
default of 300,000 a step almost stands still beside a program that occupies one of its cores. The cache of oneDNN: for
how many shapes it keeps generated code. A step needs about ten; with the default of 1,024 the cache grows to 0.2 GB.
"""

_LISTENING = re.compile(r"Starting coglet server on .*:(\d+)")
# Cog's errors of a worker that is gone: to a client that waits, to a later client, and in the health check
_CRASHED = ("Worker crashed", "Failed to send", "healthcheck channel closed")
# target and message of the log's line that follows all that setup() printed; it comes a little after READY
_SETUP_OVER = ("coglet::worker_bridge", "Setup complete")
# where Cog makes a folder for each prediction, whatever TMPDIR says
_PREDICTIONS = Path("/tmp/coglet/predictions")
# Cog's worker moves its output to descriptor 101; its server needs 45, and one a connection. With fewer both hang.
_OPEN_FILES = 128
_SECONDS_FOR_THE_LOG = 2
_SECONDS_TO_STOP = 5
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_BETWEEN_CHECKS = 1


@dataclass(frozen=True)
class Line:
    """A line of the predictor's log."""

    text: str
    ours: bool
    """Whether it was printed on stdout: libraries print on stderr, in English."""
    prediction: bool
    """Whether it was printed after setup()."""


@contextmanager
def running(
    *,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    log: Callable[[Line], None] = lambda line: None,
    folder: Path = ROOT,
    python: Path = Path(sys.executable),
) -> Iterator["Server"]:
    """Start the server; at the end of the block, also by an error or a signal, stop it and all that it started.

    Port 0 takes a free port. `environment` overrides this process's variables. `log` is called from another thread.
    `folder` holds predict.py, and `python` runs it.
    SIGTERM and SIGHUP, which would end this process at once, become SystemExit. Raises UserError.
    """
    interface = schema.read(folder / "predict.py")
    schema.write(interface, folder)
    if port:
        _refuse_if_taken(port)
    _allow_open_files()
    _refuse_if_not_writable(_PREDICTIONS)
    variables = {
        # Cog calls Predictor and predict() deprecated at each start.
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
        **LIBRARIES,
        **os.environ,
        "COG_MAX_CONCURRENCY": str(interface.concurrency),
        **(environment or {}),
        "COG_PREDICT_TYPE_STUB": f"predict.py:{schema.TARGET}",
        "PORT": str(port),
        # 2 would strip the docstrings, without which transformers has no models.
        "PYTHONOPTIMIZE": "",
        # The server starts its worker as `python`: it has to be this one, which has Cog.
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)]),
        # _read() parses the log as JSON.
        "LOG_FORMAT": "json",
        "COG_LOG_LEVEL": "info",
    }
    variables.pop("RUST_LOG", None)
    with signals_as_exits(), _group() as group:
        process = subprocess.Popen(
            [python, "-m", "cog.server.http", "--host", HOST],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=group,
            encoding="utf-8",
            errors="replace",
        )
        server = Server(process, log)
        try:
            yield server
        finally:
            _stop(process, group)
            server._remove_folders()


class Server:
    """A server that running() started."""

    def __init__(self, process: subprocess.Popen[str], log: Callable[[Line], None]) -> None:
        self._process = process
        self._log = log
        self._port = 0
        self._last_line = ""
        self._predictions: set[str] = set()
        self._setup_over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def port(self) -> int:
        """The port on which the server listens; 0 until that is known."""
        return self._port

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def wait_until_ready(self, tick: Callable[[float], None] = lambda seconds: None) -> None:
        """Return when the server takes predictions and setup()'s log has come; call `tick` with the seconds so far.

        Raises UserError, with the predictor's own line where its setup() failed.
        """
        start = time.monotonic()
        while (health := self._look())["status"] == "STARTING":
            tick(time.monotonic() - start)
            self._setup_over.wait(_SECONDS_BETWEEN_LOOKS)
        if health["status"] == "SETUP_FAILED":
            raise _setup_error(health["setup"]["logs"])
        self._setup_over.wait(_SECONDS_FOR_THE_LOG)

    def wait(self) -> NoReturn:
        """Wait until the server ends by itself or can answer no more, then raise UserError."""
        while not (error := _unhealthy(self._look())):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_SECONDS_BETWEEN_CHECKS)
        raise UserError(error_text(error))

    def health(self) -> dict[str, Any]:
        """What /health-check answers."""
        connection = http.client.HTTPConnection(HOST, self._port)
        try:
            connection.request("GET", "/health-check")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
        finally:
            connection.close()

    def _remove_folders(self) -> None:
        """After the server has stopped, remove the folders of its predictions; one with files in it stays."""
        self._reader.join(timeout=1)
        for prediction in self._predictions:
            for folder in ("inputs", "outputs", "."):
                with suppress(OSError):
                    (_PREDICTIONS / prediction / folder).rmdir()

    def _look(self) -> dict[str, Any]:
        if self._process.poll() is not None:
            raise self._ended()
        # without a connection the server is ending: the next look sees that it has ended
        with suppress(ConnectionError):
            if self._port:
                return self.health()
        return {"status": "STARTING"}

    def _ended(self) -> UserError:
        # for the last lines, though not for long: a worker that outlives the server holds the log open
        self._reader.join(timeout=1)
        return UserError(
            f"El servidor de Cog se cerró por su cuenta, repita la orden. Lo último que dijo: {self._last_line}"
        )

    def _read(self) -> None:
        """Read the log line by line, until the process and all its children have ended."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            try:
                event = json.loads(text)
            except ValueError:
                # a line of Python's own, before the server logs or as it crashes
                event = {"target": "", "fields": {"message": text.rstrip()}}
            message, source = event["fields"]["message"], event["fields"].get("source")
            self._last_line = message
            # clients choose ids, and one with a slash would lead to another folder
            if "/" not in (prediction := event["fields"].get("prediction_id", "/")):
                self._predictions.add(prediction)
            if listening := _LISTENING.fullmatch(message):
                self._port = int(listening[1])
            if (event["target"], message) == _SETUP_OVER:
                self._setup_over.set()
            # setup()'s last lines may reach the server after setup() has ended, and then have no source
            if source or (event["target"] == "coglet::user" and not self._setup_over.is_set()):
                self._log(Line(message, source != "Stderr", self._setup_over.is_set()))


def error_text(error: str) -> str:
    """An error of Cog's in Spanish: the line of the predictor's UserError, or what a crash of the worker means."""
    _, name, text = error.partition("UserError: ")
    if name:
        return text
    if any(words in error for words in _CRASHED):
        return "El modelo se cerró, casi siempre por falta de memoria: cierre otros programas y repita la orden"
    return error


def _unhealthy(health: dict[str, Any]) -> str:
    """Why the server can answer no more; empty if it can."""
    error = str(health.get("user_healthcheck_error") or "")
    # a worker that is only slow, or slept with the computer, will answer again
    return "" if "timed out" in error else error


def _setup_error(logs: str) -> UserError:
    if logs == "worker crashed":
        return UserError(
            "El modelo se cerró mientras cargaba, casi siempre por falta de memoria: cierre otros programas o pruebe "
            "el modelo de muestra con --demo"
        )
    text = error_text(logs)
    if text == logs:
        return UserError(f"El modelo no pudo cargar: {logs.rpartition('): ')[2]}")
    return UserError(text)


def _refuse_if_taken(port: int) -> None:
    with socket.socket() as probe:
        # like the server, takes a port that was just closed for free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError as error:
            raise UserError(f"El puerto {port} es del sistema: elija otro, de 1024 en adelante, con --port") from error
        except OSError as error:
            if error.errno != EADDRINUSE:
                raise
            raise UserError(
                f"El puerto {port} está ocupado: cierre el programa que lo usa o elija otro con --port"
            ) from error


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < _OPEN_FILES:
        raise UserError(
            f"El límite de archivos abiertos es {hard} y el servidor necesita {_OPEN_FILES}: suba el de su usuario, "
            "o abra otra terminal si lo bajó con ulimit -n"
        )
    if soft < _OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, hard))


def _refuse_if_not_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"No se puede escribir en {folder}, {reason(error)}, y Cog no usa otra carpeta: si la dejó otro usuario, "
            f"pídale que la borre, o sudo rm -r {folder.parent}"
        ) from error


@contextmanager
def _group() -> Iterator[int]:
    """The id of a group of processes that a Ctrl-C does not reach, and that ends with this process, even by kill -9.

    Its first process, a shell, waits for the end of a pipe from here and kills the group: a worker in setup() would
    not see that its server is gone.
    """
    with subprocess.Popen(["/bin/sh", "-c", "read _; kill -KILL 0"], stdin=subprocess.PIPE, process_group=0) as shell:
        yield shell.pid


def _stop(process: subprocess.Popen[str], group: int) -> None:
    # The signal goes to the whole group: the server alone would wait for its streams, and leave a worker in setup().
    # macOS raises PermissionError for a group that has only just ended.
    try:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_STOP)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        process.wait()


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP, which would end this process at once, into SystemExit: open blocks then clean up."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can set handlers, and has to do so itself.
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            # SIGHUP stays ignored behind nohup
            if handler is not signal.SIG_IGN:
                signal.signal(number, leave)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
