"""script/bench: what to expect of a model on this computer, alone and with many at once.

First the engine and transformers' generate on the same weights, in turn, then the server as its clients see it.
"""

import argparse
import http.client
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy
import psutil
from tqdm import tqdm  # type: ignore[import-untyped]

from cli import demo, report, server
from cli.report import Figures
from cli.terminal import Parser, command
from llm.errors import UserError
from llm.weights import checkpoint, hub
from llm.weights.settings import ROOT, Settings
from llm.words import reason

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Linux's names of what decides how fast a processor multiplies matrices, and in which dtypes."""
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


TEXT = " ".join(QUESTIONS) * 4
"""What two questions are asked about, one after the other: some 500 tokens."""

Answer = tuple[int, int, float]
"""Tokens of the prompt, new tokens, and seconds to the first text."""


@command
def main() -> int:
    parser = Parser(
        prog="script/bench",
        description="Mide lo que da un modelo en este ordenador, en unos minutos. Mientras, que no corra nada más.",
    )
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
    hub.ensure(settings, print)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.out).close()
    except OSError as error:
        raise UserError(f"No se puede escribir en {arguments.out}: {reason(error)}") from error
    # the processes that are started load the same model
    os.environ |= {
        "MODEL_ID": settings.model_id,
        "MODEL_REVISION": settings.revision or "",
        "WEIGHTS_DIR": str(settings.weights_dir),
    }
    start = time.monotonic()
    for path in report.write(measure(settings, arguments.rounds, arguments.tokens), arguments.out):
        print(checkpoint.shown(path.resolve()))
    print(f"Medido en {(time.monotonic() - start) / 60:.0f} min")
    return 0


def _from_to(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} no es un número de {least} a {most}")
        return int(text)

    return number


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
    manifest: dict[str, Any] = {"id": folder.name, "commit": None}
    # hub.ensure() says what is wrong with a manifest
    with suppress(FileNotFoundError, ValueError):
        manifest |= json.loads((folder / checkpoint.MANIFEST).read_text())
    settings = replace(settings, model_id=manifest["id"], revision=manifest["commit"], weights_dir=folder.parent)
    if settings.folder != folder:
        raise UserError(f"--model {folder}: esa carpeta ha de llamarse {settings.folder.name}")
    return settings


def measure(settings: Settings, rounds: int, tokens: int) -> Figures:
    """Measure everything, with a bar on stderr. Raises UserError."""
    # (how many requests at once, whether another process keeps a core busy)
    engine_turns = [*((requests, False) for requests in AT_ONCE), (1, True)]
    turns: list[list[Figures]] = []
    bar = tqdm(
        total=rounds * (2 + 2 * len(AT_ONCE)),
        disable=None,
        bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed}, que no corra nada más",
    )

    def counted(what: str, measured: Iterator[Figures]) -> Iterator[Figures]:
        bar.set_description(what)
        for turn in measured:
            yield turn
            bar.update()

    with bar:
        for number in range(1, rounds + 1):
            engine = counted(f"Ronda {number} de {rounds}, el motor", contend("engine", engine_turns, tokens))
            generate = counted(f"Ronda {number} de {rounds}, generate", contend("generate", [(1, False)], tokens))
            turns.append([*engine, *generate])
        loads = [*counted("El servidor", serve(AT_ONCE * rounds, tokens))]
    *together, beside, alone = map(speed, zip(*turns, strict=True))
    facts, service = turns[-1][-2], loads[-1]
    cpu = subprocess.getoutput("LC_ALL=C lscpu || sysctl machdep.cpu.brand_string kern.hv_vmm_present")
    return {
        "model": settings.model_id,
        "dtype": facts["dtype"],
        "device": facts["device"],
        "date": date.today().isoformat(),
        "machine": {
            "processor": _processor(cpu),
            "instructions": [name for name in INSTRUCTIONS if re.search(rf"\b{name}\b", cpu)],
            "virtual": bool(re.search(r"\bhypervisor\b|hv_vmm_present: 1", cpu, re.IGNORECASE)),
            "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
            "threads": facts["threads"],
            "ram_bytes": psutil.virtual_memory().total,
            "gpus": facts["gpus"],
            "system": platform.platform(terse=True),
        },
        "versions": facts["versions"],
        "rounds": rounds,
        "tokens": tokens,
        "prompt_lengths": PROMPT_LENGTHS,
        "rows": facts["rows"],
        "generate": alone,
        "engine": [row | {"decode_ratio_to_generate": ratio(row, alone)} for row in together],
        "beside": beside | {"decode_ratio_to_quiet": ratio(beside, together[0])},
        "bandwidth": bandwidth(together[0], facts),
        "server": [load(loads[at :: len(AT_ONCE)]) for at in range(len(AT_ONCE))],
        "text": about_a_text([turn["text"] for turn in loads if "text" in turn]),
        "setup": facts["setup"],
        "ready": service["ready"],
        "memory": {"engine": facts["peak_bytes"], "server": service["peak_bytes"], "gpu": facts["gpu_bytes"]},
    }


def _processor(cpu: str) -> str:
    """The processor's name, with its family and model if `cpu` has them: a virtual machine may name only a brand.

    `cpu` is what lscpu or sysctl printed.
    """
    fields = dict(re.findall(r"^ *([^:\n]+): *(.+)", cpu, re.MULTILINE))
    name = fields.get("Model name") or fields.get("machdep.cpu.brand_string") or platform.processor()
    design = f" (familia {fields['CPU family']}, modelo {fields['Model']})" if "CPU family" in fields else ""
    return (name or platform.machine()) + design


def contend(name: str, turns: list[tuple[int, bool]], tokens: int) -> Iterator[Figures]:
    """Run one of cli.contenders in a process of its own; yield the figures of each turn. Raises UserError."""
    order = json.dumps({"name": name, "turns": turns, "lengths": PROMPT_LENGTHS, "tokens": tokens})
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            [sys.executable, "-m", "cli.contenders", order],
            cwd=ROOT,
            # generate runs with the libraries' own defaults
            env={**(server.LIBRARIES if name == "engine" else {}), **os.environ},
            # the process ends when this pipe is closed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # so that a Ctrl-C reaches this process alone
            start_new_session=True,
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for _ in turns:
                if not (line := process.stdout.readline()):
                    log.seek(0)
                    *_, last = ["nada", *filter(str.strip, log)]
                    raise UserError(
                        "El proceso que se medía se cerró, casi siempre por falta de memoria: cierre otros programas o "
                        f"pruebe el modelo de muestra con --demo. Lo último que dijo: {last.strip()}"
                    )
                turn: Figures = json.loads(line)
                if "error" in turn:
                    raise UserError(turn["error"])
                yield turn
        finally:
            process.kill()


def speed(turns: Sequence[Figures]) -> Figures:
    """Tokens per second of the same requests in each turn: while decoding, and over the whole request.

    A turn runs them twice, for one token each and for all their tokens. The first run is the prefill; the rest of the
    second one is decoding.
    """
    times = [(*turn["first"], *turn["whole"]) for turn in turns]
    return {
        "requests": turns[0]["requests"],
        "decode_tokens_per_second": spread(
            [(tokens - first) / (seconds - prefill) for first, prefill, tokens, seconds in times]
        ),
        "whole_tokens_per_second": spread([tokens / seconds for _, _, tokens, seconds in times]),
    }


def spread(rounds: list[float]) -> Figures:
    """A figure that was measured in each round: its median, and how far to trust it, the least and the most."""
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": rounds}


def ratio(ours: Figures, theirs: Figures) -> Figures:
    """How much faster our decoding is than theirs, round by round: what slows the machine for a while slows both."""
    decode = (row["decode_tokens_per_second"]["rounds"] for row in (ours, theirs))
    return spread([mine / other for mine, other in zip(*decode, strict=True)])


def bandwidth(alone: Figures, facts: Figures) -> Figures | None:
    """What one request reads of the weights each second, as a share of what a GPU's memory gives; None on a CPU."""
    if not facts["copied_bytes_per_second"]:
        return None
    read = spread([steps * facts["step_bytes"] for steps in alone["decode_tokens_per_second"]["rounds"]])
    shares = spread([rate / facts["copied_bytes_per_second"] for rate in read["rounds"]])
    return {"read": read, "copied": facts["copied_bytes_per_second"], "share": shares}


def serve(turns: Sequence[int], tokens: int) -> Iterator[Figures]:
    """Start the server; yield what its clients see in each turn, which is a number of clients. Raises UserError."""
    start = time.perf_counter()
    with (
        # the pool waits for its threads, which end with the server: so the server has to stop first
        ThreadPoolExecutor(max(turns)) as pool,
        server.running() as running,
    ):
        running.wait_until_ready()
        ready = time.perf_counter() - start
        ask(running.port, QUESTIONS[0], tokens)
        for clients in turns:
            questions = islice(cycle(QUESTIONS), clients)
            start = time.perf_counter()
            answers = list(pool.map(lambda question: ask(running.port, question, tokens), questions))
            seconds = time.perf_counter() - start
            # the model's process is the largest of those that the server started
            peak = max(_peak_bytes(process.pid) for process in psutil.Process().children(recursive=True)) or None
            turn: Figures = {"answers": answers, "seconds": seconds, "ready": ready, "peak_bytes": peak}
            if clients == 1:
                # a number that no round has had: nothing of it has been read
                text = f"{time.time_ns()} {TEXT}"
                turn["text"] = [ask(running.port, f"{text} {question}", 1) for question in QUESTIONS[:2]]
            yield turn


def load(turns: list[Figures]) -> Figures:
    """The figures of one number of clients, from all its rounds."""
    asked, made, first_text = zip(*(answer for turn in turns for answer in turn["answers"]), strict=True)
    p50, p95 = numpy.percentile(first_text, [50, 95], method="inverted_cdf").tolist()
    return {
        "clients": len(turns[0]["answers"]),
        "tokens_per_second": spread([sum(made for _, made, _ in turn["answers"]) / turn["seconds"] for turn in turns]),
        "first_text_p50_s": p50,
        "first_text_p95_s": p95,
        "first_text_s": first_text,
        "tokens_per_prompt": statistics.fmean(asked),
        "tokens_per_answer": statistics.fmean(made),
    }


def about_a_text(rounds: list[list[Answer]]) -> Figures:
    """The figures of two questions about one text: seconds to the first text of each, and their ratio."""
    return {
        "tokens": statistics.fmean(answer[0] for answers in rounds for answer in answers),
        "first_s": spread([first for (_, _, first), _ in rounds]),
        "second_s": spread([second for _, (_, _, second) in rounds]),
        "second_ratio_to_first": spread([second / first for (_, _, first), (_, _, second) in rounds]),
    }


def ask(port: int, question: str, tokens: int) -> Answer:
    """Stream one prediction. Repeats the request while no place is free, as a queue before the server would."""
    body = json.dumps({"input": {"pregunta": question, "max_tokens": tokens, "temperature": 0}})
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    received, first = b"", 0.0
    start = time.perf_counter()
    connection = http.client.HTTPConnection(server.HOST, port)
    try:
        while True:
            connection.request("POST", "/predictions", body, headers)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.CONFLICT:
                break
            response.read()
            time.sleep(0.05)
        # bytes, not cli.events: with many clients of a GPU, parsing every event would take longer than making it
        while piece := response.read1(1 << 16):
            received += piece
            if not first and b"event: output" in received:
                first = time.perf_counter() - start
    except (ConnectionError, http.client.HTTPException) as error:
        raise UserError(
            "El servidor se cerró mientras respondía, casi siempre por falta de memoria: cierre otros programas o "
            "pruebe el modelo de muestra con --demo"
        ) from error
    # the end of an empty answer counts as its first text
    first = first or time.perf_counter() - start
    # a refusal is JSON too, but no stream of events
    prediction = json.loads(received.rpartition(b"event: completed\ndata: ")[2])
    if prediction.get("status") != "succeeded":
        raise UserError(server.error_text(prediction.get("error", "La predicción no se completó: repita la orden")))
    metrics = prediction["metrics"]
    return metrics["input_token_count"], metrics["output_token_count"], first


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has had; 0 if it has ended, or the system is not Linux."""
    with suppress(OSError):
        if peak := re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return int(peak[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
