"""script/bench: what to expect of a model on this computer, alone and with many at once.

First the engine and transformers' generate on the same weights, in turn, then the server as its clients see it.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm  # type: ignore[import-untyped]

from cli import demo, report, server
from cli.contenders import Contender, Run, contending
from cli.report import Load, Machine, Report, Rounds, Speed
from cli.terminal import Parser, command
from llm import hub, weights
from llm.errors import UserError
from llm.settings import ROOT, Settings
from llm.words import reason

AT_ONCE = (1, 2, 4, 8, 16, 32)
PROMPT_LENGTHS = (17, 32, 5, 60, 41, 9, 25, 33)
QUESTIONS = (
    "How is bread made? Explain every step.",
    "Tell me a long story about a lighthouse and the woman who keeps it.",
    "Why is the sky blue?",
    "Describe the life of a river, from the mountain where it is born to the sea, with all that lives along it.",
    "Explica cómo funciona un molino de agua.",
    "What should somebody see who spends a week in Lima?",
    "Write the diary of a cat.",
    "Which inventions changed the way people travel, and how?",
)

_PART = re.compile(r"(.+) en ([\d.,]+) s")
_SECONDS_BEFORE_ANOTHER_TRY = 0.05


@command
def main() -> int:
    parser = Parser(prog="script/bench", description="Mide lo que da un modelo en este ordenador, en unos minutos.")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--demo", action="store_true", help="el modelo de muestra, que no necesita Hugging Face")
    model.add_argument("--model", type=Path, metavar="CARPETA", help="un modelo que ya está en esa carpeta")
    parser.add_argument("--rounds", type=_from_to(1, 100), default=3, metavar="N", help="rondas (3)")
    parser.add_argument("--tokens", type=_from_to(2, 2048), default=64, metavar="N", help="tokens por respuesta (64)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "bench", metavar="CARPETA", help="dónde escribe (docs/bench)"
    )
    arguments = parser.parse_args()
    settings = _settings(arguments.demo, arguments.model)
    hub.ensure(settings)
    _make_writable(arguments.out)
    start = time.monotonic()
    measured = measure(settings, arguments.rounds, arguments.tokens)
    name = f"{settings.folder.name}-{_slug(measured.on)}"
    for path in report.write(measured, arguments.out, name):
        print(weights.shown(path.resolve()))
    print(f"Medido en {(time.monotonic() - start) / 60:.0f} min")
    return 0


def measure(settings: Settings, rounds: int, tokens: int) -> Report:
    """Measure everything, with a bar on stderr. Raises UserError."""
    environment = {
        "MODEL_ID": settings.model_id,
        "MODEL_REVISION": settings.revision or "",
        "WEIGHTS_DIR": str(settings.weights_dir),
    }
    steps = (rounds + 1) * (1 + len(AT_ONCE)) + rounds + 1 + rounds * len(AT_ONCE)
    with tqdm(total=steps, unit="", disable=None, bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed}") as bar:
        contest = _contest(environment, rounds, tokens, bar)
        service = _serve(environment, rounds, tokens, bar)
    facts = contest.facts
    return Report(
        model=settings.model_id,
        dtype=facts["dtype"],
        device=facts["device"],
        date=date.today().isoformat(),
        machine=Machine(
            processor=_processor(),
            cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            threads=facts["threads"],
            ram_bytes=psutil.virtual_memory().total,
            gpus=tuple(facts["gpus"]),
            system=platform.platform(terse=True),
        ),
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "cog")},
        },
        rounds=rounds,
        tokens=tokens,
        prompt_lengths=PROMPT_LENGTHS,
        rows=facts["rows"],
        generate=contest.generate,
        engine=contest.engine,
        beside=contest.beside,
        server=service.loads,
        setup=service.setup,
        ready=service.ready,
        memory={"engine": contest.peak_bytes, "server": service.peak_bytes, "gpu": contest.gpu_bytes},
    )


@dataclass(frozen=True)
class Contest:
    """How the engine and generate did, what the engine says of itself, and the most memory that it used."""

    generate: Speed
    engine: tuple[Speed, ...]
    beside: Speed
    facts: dict[str, Any]
    peak_bytes: int | None
    gpu_bytes: int | None


def _contest(environment: dict[str, str], rounds: int, tokens: int, bar: tqdm) -> Contest:
    bar.set_description("Cargando generate")
    with contending("generate", environment) as generate:
        # before the engine loads, which gives its cache the memory that it finds free
        generate.generate([[0] * max(PROMPT_LENGTHS)], 4)
        bar.update()
        bar.set_description("Cargando el motor")
        with contending("engine", environment) as engine:
            if max(PROMPT_LENGTHS) + tokens > engine.facts["context"]:
                raise UserError(f"--tokens {tokens} no cabe: el modelo admite {engine.facts['context']} en total")
            prompts = _prompts(engine.facts["vocabulary"])
            for requests in AT_ONCE:
                engine.generate(prompts[:requests], 4)
                bar.update()
            alone: list[tuple[float, float]] = []
            beside: list[tuple[float, float]] = []
            together: dict[int, list[tuple[float, float]]] = {requests: [] for requests in AT_ONCE}
            for number in range(1, rounds + 1):
                bar.set_description(f"Ronda {number} de {rounds}, generate")
                alone.append(_timed(generate, prompts[:1], tokens))
                bar.update()
                for requests in AT_ONCE:
                    bar.set_description(f"Ronda {number} de {rounds}, motor con {requests}")
                    together[requests].append(_timed(engine, prompts[:requests], tokens))
                    bar.update()
                bar.set_description(f"Ronda {number} de {rounds}, motor junto a otro proceso")
                with busy_core():
                    beside.append(_timed(engine, prompts[:1], tokens))
                bar.update()
            return Contest(
                _speed(1, alone),
                tuple(_speed(requests, rates) for requests, rates in together.items()),
                _speed(1, beside),
                engine.facts,
                _peak_bytes(engine.pid),
                engine.gpu_bytes,
            )


@contextmanager
def busy_core() -> Iterator[None]:
    """Beside a process that only counts, on one core. Should this one be killed, it ends too."""
    counts = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    # a Ctrl-C reaches the command alone, which ends this one
    with subprocess.Popen([sys.executable, "-c", counts], start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


def _timed(contender: Contender, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    return rates(contender.generate(prompts, 1), contender.generate(prompts, tokens))


def rates(first: Run, whole: Run) -> tuple[float, float]:
    """Tokens a second, decoding and in all, of the same requests for one token each and for all of them.

    The time of one token is that of reading the prompt: without it, what is left is decoding.
    """
    return (whole.tokens - first.tokens) / (whole.seconds - first.seconds), whole.tokens / whole.seconds


def _speed(requests: int, rounds: list[tuple[float, float]]) -> Speed:
    decode, whole = zip(*rounds, strict=True)
    return Speed(requests, Rounds(decode), Rounds(whole))


def _prompts(vocabulary: int) -> list[list[int]]:
    """Ids of nothing in particular: how fast they are read does not depend on what they say."""
    chosen = random.Random(1)
    lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(max(AT_ONCE))]
    return [[chosen.randrange(vocabulary) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Answer:
    """What a client of the server saw: tokens of the prompt, new tokens, and seconds to the first text."""

    asked: int
    tokens: int
    first_text: float


@dataclass(frozen=True)
class Service:
    """What the server's clients saw, how it started, in seconds, and the most memory that its model's process used."""

    loads: tuple[Load, ...]
    setup: dict[str, float]
    ready: float
    peak_bytes: int | None


def _serve(environment: dict[str, str], rounds: int, tokens: int, bar: tqdm) -> Service:
    log: list[server.Line] = []
    speeds: dict[int, list[float]] = {clients: [] for clients in AT_ONCE}
    answers: dict[int, list[Answer]] = {clients: [] for clients in AT_ONCE}
    bar.set_description("Arrancando el servidor")
    start = time.perf_counter()
    with (
        # it waits for its threads, which end when the server does: so that one stops first
        ThreadPoolExecutor(max(AT_ONCE)) as pool,
        server.running(environment=environment, log=log.append) as running,
    ):
        running.wait_until_ready()
        ready = time.perf_counter() - start
        ask(running.port, QUESTIONS[0], tokens)
        bar.update()
        for number in range(1, rounds + 1):
            for clients in AT_ONCE:
                bar.set_description(f"Ronda {number} de {rounds}, servidor con {clients}")
                questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(clients)]
                start = time.perf_counter()
                together = list(pool.map(lambda question: ask(running.port, question, tokens), questions))
                seconds = time.perf_counter() - start
                speeds[clients].append(sum(answer.tokens for answer in together) / seconds)
                answers[clients] += together
                bar.update()
        # the model's process is the largest of those that the server started
        sizes = [_peak_bytes(process.pid) for process in psutil.Process().children(recursive=True)]
    loads = tuple(
        Load(
            clients,
            Rounds(tuple(speeds[clients])),
            tuple(answer.first_text for answer in answers[clients]),
            tuple(answer.asked for answer in answers[clients]),
            tuple(answer.tokens for answer in answers[clients]),
        )
        for clients in AT_ONCE
    )
    setup = setup_parts(line.text for line in log if line.ours and not line.prediction)
    return Service(loads, setup, ready, max((size for size in sizes if size is not None), default=None))


def ask(port: int, question: str, tokens: int) -> Answer:
    """One prediction, streamed. While no place is free it tries again, as a queue before the server would."""
    inputs = {"pregunta": question, "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    first: float | None = None
    received = b""
    start = time.perf_counter()
    try:
        while True:
            connection = http.client.HTTPConnection(server.HOST, port)
            connection.request("POST", "/predictions", json.dumps({"input": inputs}), headers)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.CONFLICT:
                break
            connection.close()
            time.sleep(_SECONDS_BEFORE_ANOTHER_TRY)
        # in whatever pieces it comes: with many clients of a GPU, parsing every event would take longer than making it
        while piece := response.read1(1 << 16):
            received += piece
            if first is None and b"event: output" in received:
                first = time.perf_counter() - start
    except (ConnectionError, http.client.HTTPException) as error:
        raise UserError("El servidor se cerró mientras respondía, casi siempre por falta de memoria") from error
    whole = time.perf_counter() - start
    if response.status != http.HTTPStatus.OK:
        raise UserError(f"El servidor no aceptó la pregunta: {received.decode()}")
    _, _, end = received.decode().rpartition("event: completed\ndata: ")
    prediction = json.loads(end)
    if prediction["status"] != "succeeded":
        raise UserError(server.error_text(prediction.get("error", "La predicción se canceló: repita la orden")))
    metrics = prediction["metrics"]
    # an answer may be empty: then its first text is its end
    return Answer(metrics["input_token_count"], metrics["output_token_count"], whole if first is None else first)


def setup_parts(lines: Iterable[str]) -> dict[str, float]:
    """The parts of setup() that its log gives the seconds of."""
    matches = (_PART.fullmatch(line) for line in lines)
    return {match[1]: float(match[2].replace(",", ".")) for match in matches if match}


def _peak_bytes(pid: int) -> int | None:
    """The most memory that a process has had. None where it has ended, or the system is not Linux."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found[1].strip()
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def _slug(name: str) -> str:
    plain = re.sub(r"\((R|TM)\)", "", name, flags=re.IGNORECASE).lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _settings(wants_demo: bool, folder: Path | None) -> Settings:
    """The settings of the model to measure. Raises UserError."""
    settings = Settings.read()
    if wants_demo:
        return replace(demo.ensure(settings), revision=demo.WHEEL)
    if folder is None:
        return settings
    if not folder.is_dir():
        raise UserError(f"--model {folder}: ahí no hay ninguna carpeta")
    folder = folder.resolve()
    made: dict[str, Any] = {"id": folder.name, "commit": None}
    # what is wrong with a manifest, hub.ensure says
    with suppress(FileNotFoundError, ValueError):
        made |= json.loads((folder / weights.MANIFEST).read_text())
    settings = replace(settings, model_id=made["id"], revision=made["commit"], weights_dir=folder.parent)
    if settings.folder != folder:
        raise UserError(f"--model {folder}: esa carpeta ha de llamarse {settings.folder.name}")
    return settings


def _make_writable(folder: Path) -> None:
    """Before anything is measured. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"No se puede escribir en {folder}: {reason(error)}") from error


def _from_to(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} no es un número de {least} a {most}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
