"""script/bench, as its user runs it, on a tiny falcon with few tokens: what it writes, never how fast it was."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import bench, report
from cli.contenders import busy_core
from cli.report import shown
from cli.server import LIBRARIES
from llm.errors import UserError
from llm.weights.settings import ROOT, Settings
from tests.support.processes import FINALLY, Marked

pytestmark = pytest.mark.slow

ROUNDS, TOKENS = 1, 6


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, set up with this Python."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("llm", "cli"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("script", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "predict.py", folder)
    shutil.copy(ROOT / "script" / "bench", folder / "script")
    for name, does in (("script/setup", ""), (".venv/bin/python", f'exec {shlex.quote(sys.executable)} "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def written(project: Path, falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files that script/bench says it wrote."""
    numbers = ["--rounds", str(ROUNDS), "--tokens", str(TOKENS)]
    run = subprocess.run(
        [project / "script" / "bench", "--model", falcon, *numbers],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        # --model overrides the settings
        env={**os.environ, "MODEL_ID": "no-esta", "DTYPE": "float32"},
    )
    assert (run.returncode, run.stderr) == (0, "")
    *paths, last = run.stdout.splitlines()
    assert last.startswith("Medido en ")
    assert sorted((project / "docs" / "bench").iterdir()) == sorted(project / path for path in paths)
    return [project / path for path in paths]


@pytest.fixture(scope="module")
def figures(written: list[Path]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(written[1].read_text())
    return content


def test_the_files_are_named_after_the_model_and_the_processor(written: list[Path]) -> None:
    assert [path.suffix for path in written] == [".md", ".json", ".png"]
    (name,) = {path.stem for path in written}
    assert re.fullmatch(r"falcon-rw-1b-[a-z0-9]+(-[a-z0-9]+)*", name)


def test_the_figures_name_the_model_the_machine_and_the_versions(figures: dict[str, Any]) -> None:
    assert (figures["model"], figures["dtype"], figures["device"]) == ("falcon-rw-1b", "float32", "cpu")
    assert (figures["rounds"], figures["tokens"]) == (ROUNDS, TOKENS)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", figures["date"])
    assert figures["versions"]["torch"] == torch.__version__
    assert set(figures["versions"]) == {"python", "torch", "transformers", "cog"}
    machine = figures["machine"]
    if sys.platform == "linux":
        cpuinfo = Path("/proc/cpuinfo").read_text()
        assert machine["virtual"] == ("hypervisor" in cpuinfo)
        assert machine["instructions"] and set(machine["instructions"]) <= set(cpuinfo.split())
        assert ("avx512_bf16" in machine["instructions"]) == ("avx512_bf16" in cpuinfo)
    assert machine["processor"] and machine["system"] and machine["gpus"] == []
    assert machine["cores"] >= 1 and machine["threads"] >= 1
    assert machine["ram_bytes"] == psutil.virtual_memory().total


def assert_each_figure_has_a_value_for_each_round(figures: dict[str, Any], rounds: int) -> None:
    assert [speed["requests"] for speed in figures["engine"]] == list(bench.AT_ONCE)
    assert [load["clients"] for load in figures["server"]] == list(bench.AT_ONCE)
    names = ["decode_tokens_per_second", "whole_tokens_per_second"]
    spreads = [figures["generate"][name] for name in names]
    spreads += [speed[name] for speed in figures["engine"] for name in [*names, "decode_ratio_to_generate"]]
    spreads += [figures["beside"][name] for name in [*names, "decode_ratio_to_quiet"]]
    spreads += [load["tokens_per_second"] for load in figures["server"]]
    texts = [figures["text"][name] for name in ("first_s", "second_s", "second_ratio_to_first")]
    for spread in [*spreads, *texts]:
        assert len(spread["rounds"]) == rounds and all(map(math.isfinite, spread["rounds"]))
        assert spread["min"] <= spread["median"] <= spread["max"]
    assert all(spread["min"] > 0 for spread in texts)


def test_each_figure_has_a_value(figures: dict[str, Any]) -> None:
    assert_each_figure_has_a_value_for_each_round(figures, ROUNDS)


def test_a_second_round_is_kept_apart_from_the_first(monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]) -> None:
    """Everything takes twice as long in it."""
    rounds = 0
    names = ("dtype", "device", "versions", "rows", "setup")
    facts = {name: figures[name] for name in names} | {"threads": 1, "gpus": [], "copied_bytes_per_second": None}

    def contend(name: str, turns: list[tuple[int, bool]], tokens: int) -> Iterator[dict[str, Any]]:
        nonlocal rounds
        rounds += name == "engine"
        for requests, _ in turns:
            times = {"first": (requests, 1.0 * rounds), "whole": (requests * tokens, 2.0 * rounds)}
            yield facts | times | {"requests": requests, "peak_bytes": 1, "gpu_bytes": None}

    def serve(turns: Sequence[int], tokens: int) -> Iterator[dict[str, Any]]:
        for number, clients in enumerate(turns):
            seconds = 1.0 + number // len(bench.AT_ONCE)
            turn = {"answers": [(9, tokens, 0.1)] * clients, "seconds": seconds, "ready": 1.0, "peak_bytes": 1}
            yield turn | ({"text": [(300, 1, 4 * seconds), (300, 1, seconds)]} if clients == 1 else {})

    monkeypatch.setattr(bench, "contend", contend)
    monkeypatch.setattr(bench, "serve", serve)
    both = bench.measure(Settings.read(), 2, TOKENS)
    assert_each_figure_has_a_value_for_each_round(both, 2)
    for load in both["server"]:
        assert load["tokens_per_second"]["rounds"] == [load["clients"] * TOKENS, load["clients"] * TOKENS / 2]
    for speed in both["engine"]:
        assert speed["whole_tokens_per_second"]["rounds"] == [speed["requests"] * TOKENS / at for at in (2, 4)]
        assert speed["decode_ratio_to_generate"]["rounds"] == [speed["requests"]] * 2
    assert both["text"]["second_ratio_to_first"]["rounds"] == [0.25, 0.25]


def test_the_clients_of_the_server_get_their_tokens(figures: dict[str, Any]) -> None:
    for load in figures["server"]:
        assert len(load["first_text_s"]) == ROUNDS * load["clients"]
        assert load["tokens_per_answer"] == TOKENS
        # the template's few shots are part of each prompt
        assert load["tokens_per_prompt"] > 50
        first_text = sorted(load["first_text_s"])
        p50, p95 = (first_text[math.ceil(share * len(first_text)) - 1] for share in (0.5, 0.95))
        assert 0 < load["first_text_p50_s"] == p50 <= p95 == load["first_text_p95_s"]


def test_setup_and_memory_are_measured(figures: dict[str, Any]) -> None:
    assert {"load", "warm_up"} <= figures["setup"].keys() <= {"load", "pack", "warm_up"}
    assert all(0 < seconds < 60 for seconds in (*figures["setup"].values(), figures["ready"]))
    assert figures["memory"]["gpu"] is None
    if sys.platform == "linux":
        # a process with torch and transformers; the server's other one, without them, has 40 MB
        assert min(figures["memory"]["engine"], figures["memory"]["server"]) > 200e6


def test_the_table_shows_the_figures(written: list[Path], figures: dict[str, Any]) -> None:
    table, _, image = written
    text = table.read_text()
    assert text.startswith("# falcon-rw-1b en ")
    assert f"]({image.name})" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert all(cell for row in rows if row[0].isdigit() for cell in row)
    engine = [row for row in rows if row[0].isdigit() and len(row) == 4]
    server = [row for row in rows if row[0].isdigit() and len(row) == 6]
    for row, speed in zip(engine, figures["engine"], strict=True):
        assert row[0] == str(speed["requests"])
        assert row[3] == shown(speed["decode_ratio_to_generate"])
    for row, load in zip(server, figures["server"], strict=True):
        assert row[2:4] == [shown(load["first_text_p50_s"]), shown(load["first_text_p95_s"])]
    assert ["Cargar los pesos", shown(figures["setup"]["load"])] in rows
    assert ["READY", shown(figures["ready"])] in rows
    assert ["cog", figures["versions"]["cog"]] in rows
    assert f": {shown(figures['beside']['decode_ratio_to_quiet'])} veces su ritmo." in text
    assert f": {shown(figures['text']['second_ratio_to_first'])} veces." in text


def test_a_second_question_about_a_text_is_timed_against_the_first(figures: dict[str, Any]) -> None:
    assert figures["text"]["tokens"] > 300


def test_the_plot_is_an_image(written: list[Path]) -> None:
    content = written[2].read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert width > height > 400


def test_rates_and_ratios_are_medians_of_the_rounds() -> None:
    # 2 requests: 2 tokens in 1 s and 20 in 4 s, then 20 in 7 s
    ours, theirs = (
        bench.speed([{"requests": 2, "first": (2, 1.0), "whole": (20, seconds)} for seconds in rounds])
        for rounds in ([4.0, 7.0, 3.0], [7.0, 19.0, 4.0])
    )
    assert ours["whole_tokens_per_second"]["median"] == 5.0
    assert ours["decode_tokens_per_second"] == {"median": 6.0, "min": 3.0, "max": 9.0, "rounds": [6.0, 3.0, 9.0]}
    # not the ratio of the medians
    assert bench.ratio(ours, theirs) == {"median": 2.0, "min": 1.5, "max": 3.0, "rounds": [2.0, 3.0, 1.5]}
    assert shown(bench.spread([20.0, 9.0, 24.0])) == "20,0 (9,00 a 24,0)"
    assert shown(bench.spread([128.4])) == "128"


def test_on_a_gpu_the_share_of_its_memory_that_one_request_uses_is_shown(figures: dict[str, Any]) -> None:
    assert figures["bandwidth"] is None, "a CPU's tables have none"
    alone = {"decode_tokens_per_second": bench.spread([400.0, 500.0, 450.0])}
    shares = bench.bandwidth(alone, {"step_bytes": 2_000_000_000, "copied_bytes_per_second": 4e12})
    assert shares is not None and shares["share"]["rounds"] == pytest.approx([0.2, 0.25, 0.225])
    shown = report.markdown(figures | {"bandwidth": shares}, "plot.png")
    assert "lee los pesos a 900 GB/s: el 22 % de lo que da la memoria de la GPU al copiar, 4000 GB/s" in shown


def test_the_busy_process_takes_a_core_and_ends(tmp_path: Path) -> None:
    before = psutil.Process().children()
    with busy_core():
        (process,) = [child for child in psutil.Process().children() if child not in before]
        while process.cpu_times().user < 0.5:
            assert process.is_running()
    assert not process.is_running()


def test_the_busy_process_ends_with_the_bench(processes: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in processes.environment.items():
        monkeypatch.setenv(name, value)
    # a new process would import torch first
    if (parent := os.fork()) == 0:
        with busy_core():
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(parent, 0)[1]) == signal.SIGKILL
    assert not psutil.wait_procs(processes.alive(), timeout=FINALLY)[1]


@pytest.fixture
def ending(falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings name a falcon whose greedy text would always end at its first token."""
    folder = tmp_path / "falcon"
    shutil.copytree(falcon, folder)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    with torch.no_grad():
        network.transformer.ln_f.weight.zero_()
        network.transformer.ln_f.bias.copy_(network.get_output_embeddings().weight[end])
    network.generation_config.eos_token_id = end
    assert network.generate(torch.tensor([[6]]), do_sample=False, max_new_tokens=3).tolist() == [[6, end]]
    network.save_pretrained(folder)
    for name, value in (("MODEL_ID", folder.name), ("WEIGHTS_DIR", str(tmp_path)), ("DTYPE", "float32")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("ending")
def test_the_engine_computes_every_token_and_its_death_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    turns = bench.contend("engine", [(2, False)] * 1000, TOKENS)
    turn = next(turns)
    assert (turn["first"][0], turn["whole"][0]) == (2, 2 * TOKENS)
    (process,) = (child for child in psutil.Process().children() if "cli.contenders" in child.cmdline())
    assert process.environ()["GOMP_SPINCOUNT"] == LIBRARIES["GOMP_SPINCOUNT"]
    process.kill()
    with pytest.raises(UserError, match=r"El proceso .* se cerró, casi siempre por falta de memoria"):
        list(turns)
    assert not process.is_running()


@pytest.mark.usefixtures("ending")
def test_generate_computes_every_token_without_our_settings_and_ends_with_the_bench(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    popen, started = subprocess.Popen, list[Any]()

    def noted(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    turn = next(turns := bench.contend("generate", [(2, False)] * 1000, TOKENS))
    assert (turn["first"][0], turn["whole"][0]) == (2, 2 * TOKENS)
    (process,) = started
    assert "GOMP_SPINCOUNT" not in psutil.Process(process.pid).environ()
    # as where the bench has been killed
    process.stdin.close()
    assert process.wait(FINALLY) == 0
    with pytest.raises(UserError):
        next(turns)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["--model", "no-esta"], 1, "--model no-esta: ahí no hay ninguna carpeta"),
        (["--model", "copia"], 1, "esa carpeta ha de llamarse otro"),
        (["--model", "Vacía"], 1, "no es un modelo, le falta config.json"),
        (["--out", "archivo"], 1, "No se puede escribir en archivo: "),
        (["--rounds", "0"], 2, "0 no es un número de 1 a 100"),
        (["--tokens", "muchos"], 2, "muchos no es un número de 2 a 2048"),
        (["--tokens", "2048"], 1, "--tokens 2048 no cabe: el modelo admite 2048 en total, pida menos"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    project: Path,
    falcon_environment: dict[str, str],
    processes: Marked,
    tmp_path: Path,
    arguments: list[str],
    status: int,
    line: str,
) -> None:
    for name in ("copia", "Vacía"):
        (tmp_path / name).mkdir()
    (tmp_path / "copia" / "manifest.json").write_text('{"id": "org/Otro", "revision": null, "commit": "v1"}')
    (tmp_path / "archivo").touch()
    run = subprocess.run(
        [project / "script" / "bench", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **falcon_environment, **processes.environment},
    )
    assert (run.returncode, run.stdout) == (status, "")
    assert line in run.stderr and run.stderr.count("\n") == 1
    assert not processes.alive()


def test_ctrl_c_leaves_nothing_running(
    project: Path, falcon_environment: dict[str, str], processes: Marked, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [project / "script" / "bench", "--rounds", "1", "--tokens", "2", "--out", tmp_path],
        env={**os.environ, **falcon_environment, **processes.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not processes.alive("cli.contenders"):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=FINALLY)
    assert (process.returncode, output, errors) == (130, "", "\nInterrumpido\n")
    assert not psutil.wait_procs(processes.alive(), timeout=FINALLY)[1]
    assert not any(tmp_path.iterdir())
