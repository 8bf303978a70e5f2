"""What script/bench measured -> docs/bench/: a table, the figures and a plot. Measures nothing.

The figures are one dictionary, which bench.measure makes and NAME.json holds; {"median", "min", "max", "rounds"} is a
figure that was measured in each round.
"""

import json
import re
from pathlib import Path
from typing import Any

_PARTS = {
    "load": "Cargar los pesos",
    "pack": "Ordenarlos para el procesador",
    "kernels": "Probar los kernels",
    "warm_up": "Primeros tokens de prueba",
    "capture": "Capturar los grafos CUDA",
}

Figures = dict[str, Any]


def write(figures: Figures, folder: Path) -> list[Path]:
    """Write NAME.md, NAME.json and NAME.png, named after the model and its device. Returns where they are."""
    plain = re.sub(r"\((R|TM)\)", "", f"{figures['model'].split('/')[-1]} {_on(figures)}", flags=re.IGNORECASE)
    name = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    table, content, image = (folder / f"{name}.{kind}" for kind in ("md", "json", "png"))
    content.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(figures, image)
    table.write_text(markdown(figures, image.name), encoding="utf-8")
    return [table, content, image]


def _on(figures: Figures) -> str:
    machine = figures["machine"]
    return " + ".join(machine["gpus"]) if figures["device"] != "cpu" and machine["gpus"] else str(machine["processor"])


def shown(figure: Any) -> str:
    """A figure in Spanish: a float with about three digits, what was measured in each round with its least and most."""
    if isinstance(figure, dict):
        median, least, most = (shown(figure[key]) for key in ("median", "min", "max"))
        return median if len(figure["rounds"]) == 1 else f"{median} ({least} a {most})"
    if isinstance(figure, float):
        decimals = 0 if abs(figure) >= 100 else 1 if abs(figure) >= 10 else 2
        return f"{figure:.{decimals}f}".replace(".", ",")
    return str(figure)


def markdown(figures: Figures, image: str) -> str:
    """The table that a user reads."""
    alone, beside, machine, memory = (figures[key] for key in ("generate", "beside", "machine", "memory"))
    text = figures["text"]
    speed = ("decode_tokens_per_second", "whole_tokens_per_second")
    load = ("clients", "tokens_per_second", "first_text_p50_s", "first_text_p95_s")
    tokens = ("tokens_per_prompt", "tokens_per_answer")
    sizes = {
        "El motor, en su proceso": memory["engine"],
        "El servidor, el proceso del modelo": memory["server"],
        "GPU, el motor": memory["gpu"],
    }
    parts = [
        f"# {figures['model']} en {_on(figures)}",
        f"Medido con `script/bench` el {figures['date']}, en {figures['dtype']}; rondas: {figures['rounds']}; tokens "
        f"nuevos por petición, siempre el más probable: {figures['tokens']}. Cada ritmo es la mediana de las rondas, "
        "con el menor y el mayor. Mientras se mide no debe correr nada más en el ordenador.",
        f"![Tokens por segundo y espera hasta el primer texto]({image})",
        "## El motor y generate",
        f"Sin servidor, por turnos y con los mismos pesos; preguntas de {min(figures['prompt_lengths'])} a "
        f"{max(figures['prompt_lengths'])} tokens; sitio para {figures['rows']} peticiones a la vez. `generate`, de "
        "transformers, atiende las peticiones una tras otra: con varias, su ritmo es el de una, el único que se mide y "
        "con el que se compara cada fila, ronda a ronda.",
        _table(
            ["Peticiones a la vez", "Tokens/s, leídas las preguntas", "Tokens/s en total", "Veces `generate`"],
            ["1, con `generate`", *(alone[key] for key in speed), ""],
            *([row[key] for key in ("requests", *speed, "decode_ratio_to_generate")] for row in figures["engine"]),
        ),
        f"Mientras otro proceso ocupa del todo un núcleo, una petición sola va a {shown(beside[speed[0]])} tokens/s, "
        f"leída la pregunta: {shown(beside['decode_ratio_to_quiet'])} veces su ritmo.",
        *_bandwidth(figures["bandwidth"]),
        "## El servidor",
        "Clientes que preguntan a la vez, por HTTP: tokens por segundo en total, entre todos, y segundos hasta el "
        "primer texto, la mediana (p50) y lo que no superan 95 respuestas de cada 100 (p95).",
        _table(
            ["Clientes", "Tokens/s en total", "p50, s", "p95, s", "Tokens por pregunta", "Tokens nuevos"],
            *([row[key] for key in (*load, *tokens)] for row in figures["server"]),
        ),
        f"Una pregunta de {round(text['tokens'])} tokens tarda {shown(text['first_s'])} s en empezar su respuesta; la "
        f"siguiente sobre el mismo texto, que ya está leído, {shown(text['second_s'])} s: "
        f"{shown(text['second_ratio_to_first'])} veces.",
        "## El arranque del servidor",
        "Lo que tarda cada parte en el motor, medido sin servidor, y desde que arranca el servidor hasta que admite "
        "preguntas.",
        _table(
            ["Parte", "Segundos"],
            *([_PARTS.get(part, part), seconds] for part, seconds in figures["setup"].items()),
            ["READY", figures["ready"]],
        ),
        "## La memoria, como mucho",
        _table(["Proceso", "GB"], *([who, size / 1e9] for who, size in sizes.items() if size is not None)),
        "## La máquina",
        _table(
            ["", ""],
            ["Procesador", f"{machine['processor']}, {machine['cores']} núcleos, {machine['threads']} hilos"],
            ["Instrucciones", ", ".join(machine["instructions"]) or "no se sabe"],
            ["RAM", f"{shown(machine['ram_bytes'] / 1e9)} GB"],
            ["GPU", ", ".join(machine["gpus"]) or "ninguna"],
            ["Máquina virtual", "sí" if machine["virtual"] else "no, que se sepa"],
            ["Sistema", machine["system"]],
            *figures["versions"].items(),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _bandwidth(figures: Figures | None) -> list[str]:
    if figures is None:
        return []
    read, copied, share = figures["read"]["median"] / 1e9, figures["copied"] / 1e9, figures["share"]["median"]
    return [
        f"Una petición sola, leída la pregunta, lee los pesos a {shown(read)} GB/s: el {100 * share:.0f} % de lo "
        f"que da la memoria de la GPU al copiar, {shown(copied)} GB/s."
    ]


def _table(head: list[str], *rows: Any) -> str:
    rule = ["---", *["---:" if all(head) else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(shown, cells))} |" for cells in [head, rule, *rows])


def plot(figures: Figures, path: Path) -> None:
    """Tokens a second, and seconds to the first text, against how many ask at once."""
    # takes half a second, for which no wrong argument waits
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(f"{figures['model']}, {figures['dtype']}, en {_on(figures)}")
    rate, wait = figure.subplots(1, 2)
    engine, server = figures["engine"], figures["server"]
    at_once = [row["requests"] for row in engine]

    for label, rows, key, style in (
        ("motor, leídas las preguntas", engine, "decode_tokens_per_second", "o-"),
        ("motor, en total", engine, "whole_tokens_per_second", "^-"),
        ("servidor, en total", server, "tokens_per_second", "s-"),
        ("generate, una tras otra", [figures["generate"]] * len(at_once), "decode_tokens_per_second", "--"),
    ):
        spreads = [row[key] for row in rows]
        medians = [spread["median"] for spread in spreads]
        errors = [[abs(spread["median"] - spread[end]) for spread in spreads] for end in ("min", "max")]
        rate.errorbar(at_once, medians, yerr=errors, fmt=style, capsize=3, label=label)
    for label, key, style in (
        ("mediana (p50)", "first_text_p50_s", "o-"),
        ("95 de cada 100 (p95)", "first_text_p95_s", "s-"),
    ):
        wait.plot(at_once, [row[key] for row in server], style, label=label)

    for axes, across, up in (
        (rate, "peticiones o clientes a la vez", "tokens por segundo"),
        (wait, "clientes a la vez", "segundos hasta el primer texto"),
    ):
        axes.set(xlabel=across, ylabel=up, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(at_once, map(str, at_once), minor=False)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace(".", ","))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=140)
