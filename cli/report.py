"""What script/bench measured -> docs/bench/: a table, the figures and a plot. Measures nothing."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rounds:
    """One figure a round. What counts is their median; the least and the most say how far to trust it."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __truediv__(self, other: "Rounds") -> "Rounds":
        """The ratio of each round: what slows the machine for a while slows both."""
        return Rounds(tuple(ours / theirs for ours, theirs in zip(self.values, other.values, strict=True)))

    def __str__(self) -> str:
        if len(self.values) == 1:
            return number(self.median)
        return f"{number(self.median)} ({number(min(self.values))} a {number(max(self.values))})"

    def figures(self) -> dict[str, Any]:
        return {"median": self.median, "min": min(self.values), "max": max(self.values), "rounds": self.values}


@dataclass(frozen=True)
class Speed:
    """Tokens a second of so many requests at once, all together."""

    requests: int
    decode: Rounds
    """Once the prompts are read."""
    whole: Rounds
    """All new tokens over all the time, the reading of the prompts included."""

    def figures(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "decode_tokens_per_second": self.decode.figures(),
            "whole_tokens_per_second": self.whole.figures(),
        }


@dataclass(frozen=True)
class Load:
    """What so many clients of the server at once saw."""

    clients: int
    speed: Rounds
    """New tokens over all the time, all clients together."""
    first_text: tuple[float, ...]
    """Seconds to the first text of every answer of every round."""
    asked: tuple[int, ...]
    """Tokens of the prompt of each of them."""
    tokens: tuple[int, ...]
    """New tokens of each of them."""

    def figures(self) -> dict[str, Any]:
        return {
            "clients": self.clients,
            "tokens_per_second": self.speed.figures(),
            "first_text_p50_s": percentile(self.first_text, 0.5),
            "first_text_p95_s": percentile(self.first_text, 0.95),
            "first_text_s": self.first_text,
            "tokens_per_prompt": statistics.mean(self.asked),
            "tokens_per_answer": statistics.mean(self.tokens),
        }


@dataclass(frozen=True)
class Machine:
    processor: str
    cores: int
    threads: int
    """That the engine computes with."""
    ram_bytes: int
    gpus: tuple[str, ...]
    system: str


@dataclass(frozen=True)
class Report:
    """All that was measured, and on what."""

    model: str
    dtype: str
    device: str
    date: str
    machine: Machine
    versions: dict[str, str]
    rounds: int
    tokens: int
    """New tokens of each request."""
    prompt_lengths: tuple[int, ...]
    rows: int
    """Requests that the engine has room for at once; the others wait."""
    generate: Speed
    """Of one request: several go one after another, at the same rate."""
    engine: tuple[Speed, ...]
    beside: Speed
    """Of one request to the engine, while another process has a core to itself."""
    server: tuple[Load, ...]
    setup: dict[str, float]
    """Seconds of each part of the predictor's setup(), in the words of its log; the last is all of it."""
    ready: float
    """Seconds from the start of the server's process until it took predictions."""
    memory: dict[str, int | None]
    """The most bytes that the engine's and the server's process had, and the engine's GPUs; None: not known."""

    @property
    def on(self) -> str:
        """What computes: the GPU's name, or the processor's."""
        return " + ".join(self.machine.gpus) if self.device != "cpu" and self.machine.gpus else self.machine.processor

    @property
    def kept(self) -> Rounds:
        """What share of its speed one request keeps beside another process."""
        return self.beside.decode / self.engine[0].decode

    def figures(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            **{
                name: value
                for name, value in vars(self).items()
                if name not in ("machine", "engine", "beside", "server")
            },
            "machine": vars(self.machine),
            "generate": self.generate.figures(),
            "engine": [
                {**speed.figures(), "decode_ratio_to_generate": (speed.decode / self.generate.decode).figures()}
                for speed in self.engine
            ],
            "beside": {**self.beside.figures(), "decode_ratio_to_quiet": self.kept.figures()},
            "server": [load.figures() for load in self.server],
        }


def write(report: Report, folder: Path, name: str) -> list[Path]:
    """Write NAME.md, NAME.json and NAME.png. Returns where they are."""
    table, figures, image = (folder / f"{name}.{kind}" for kind in ("md", "json", "png"))
    figures.write_text(json.dumps(report.figures(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(report, image)
    table.write_text(markdown(report, image.name), encoding="utf-8")
    return [table, figures, image]


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def number(value: float) -> str:
    """With about three digits, as in Spanish."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{decimals}f}".replace(".", ",")


def markdown(report: Report, image: str) -> str:
    """The table that a user reads."""
    machine = report.machine
    alone = report.generate
    engine = [[str(s.requests), str(s.decode), str(s.whole), str(s.decode / alone.decode)] for s in report.engine]
    server = [
        [
            str(load.clients),
            str(load.speed),
            number(percentile(load.first_text, 0.5)),
            number(percentile(load.first_text, 0.95)),
            number(statistics.mean(load.asked)),
            number(statistics.mean(load.tokens)),
        ]
        for load in report.server
    ]
    memory = {
        "engine": "El motor, en su proceso",
        "server": "El servidor, el proceso del modelo",
        "gpu": "GPU, el motor",
    }
    facts = {
        "Procesador": f"{machine.processor}, {machine.cores} núcleos, {machine.threads} hilos",
        "RAM": f"{number(machine.ram_bytes / 1e9)} GB",
        "GPU": ", ".join(machine.gpus) or "ninguna",
        "Sistema": machine.system,
        **report.versions,
    }
    parts = [
        f"# {report.model} en {report.on}",
        f"Medido con `script/bench` el {report.date}, en {report.dtype}; rondas: {report.rounds}; tokens nuevos por "
        f"petición, siempre el más probable: {report.tokens}. Cada ritmo es la mediana de las rondas, con el menor y "
        "el mayor.",
        f"![Tokens por segundo y espera hasta el primer texto]({image})",
        "## El motor y generate",
        f"Sin servidor, por turnos y con los mismos pesos; preguntas de {min(report.prompt_lengths)} a "
        f"{max(report.prompt_lengths)} tokens; sitio para {report.rows} peticiones a la vez. `generate`, de "
        "transformers, atiende las peticiones una tras otra: con varias, su ritmo es el de una, el único que se mide y "
        "con el que se compara cada fila, ronda a ronda.",
        _table(
            ["Peticiones a la vez", "Tokens/s, leídas las preguntas", "Tokens/s en total", "Veces `generate`"],
            [["1, con `generate`", str(alone.decode), str(alone.whole), ""], *engine],
        ),
        f"Mientras otro proceso ocupa del todo un núcleo, una petición sola va a {report.beside.decode} tokens/s, "
        f"leída la pregunta: {report.kept} veces su ritmo.",
        "## El servidor",
        "Clientes que preguntan a la vez, por HTTP: tokens por segundo en total, entre todos, y segundos hasta el "
        "primer texto, la mediana (p50) y lo que no superan 95 respuestas de cada 100 (p95).",
        _table(["Clientes", "Tokens/s en total", "p50, s", "p95, s", "Tokens por pregunta", "Tokens nuevos"], server),
        "## El arranque del servidor",
        "Lo que dice su registro, y al final desde que se arranca su proceso hasta que admite preguntas.",
        _table(
            ["Parte", "Segundos"],
            [[part, number(seconds)] for part, seconds in {**report.setup, "READY": report.ready}.items()],
        ),
        "## La memoria, como mucho",
        _table(
            ["Proceso", "GB"],
            [[memory[who], number(size / 1e9)] for who, size in report.memory.items() if size is not None],
        ),
        "## La máquina",
        _table(["", ""], [[name, value] for name, value in facts.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)] if all(head) else ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def plot(report: Report, path: Path) -> None:
    """Tokens a second, and seconds to the first text, against how many ask at once."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(f"{report.model}, {report.dtype}, en {report.on}")
    rate, wait = figure.subplots(1, 2)

    at_once = [speed.requests for speed in report.engine]
    for label, rounds, style in (
        ("motor, leídas las preguntas", [speed.decode for speed in report.engine], "o-"),
        ("motor, en total", [speed.whole for speed in report.engine], "^-"),
        ("servidor, en total", [load.speed for load in report.server], "s-"),
        ("generate, una tras otra", [report.generate.decode] * len(at_once), "--"),
    ):
        medians = [r.median for r in rounds]
        below = [r.median - min(r.values) for r in rounds]
        above = [max(r.values) - r.median for r in rounds]
        rate.errorbar(at_once, medians, yerr=[below, above], fmt=style, capsize=3, label=label)
    rate.set_ylabel("tokens por segundo")

    for label, share, style in (("mediana (p50)", 0.5, "o-"), ("95 de cada 100 (p95)", 0.95, "s-")):
        waits = [percentile(load.first_text, share) for load in report.server]
        wait.plot([load.clients for load in report.server], waits, style, label=label)
    wait.set_ylabel("segundos hasta el primer texto")

    for axes in (rate, wait):
        axes.set_xscale("log", base=2)
        axes.set_xticks(at_once, [str(n) for n in at_once])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("peticiones o clientes a la vez" if axes is rate else "clientes a la vez")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace(".", ",")))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=140)
