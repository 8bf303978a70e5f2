"""The HTTP contract, on the real server with the real predictor and a tiny falcon."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from cli import predict, schema, server, service
from llm.errors import UserError
from llm.weights.settings import ROOT
from tests.support import words
from tests.support.client import LONG, SHORT, Client
from tests.support.processes import Marked

METRICS = {
    "input_token_count",
    "cached_token_count",
    "output_token_count",
    "time_to_first_token",
    "tokens_per_second",
    "queue_time",
    "finish_reason",
}


def test_openapi_is_the_schema_of_predict_py(falcon_server: Client) -> None:
    assert falcon_server.get("/openapi.json") == schema.read(ROOT / "predict.py").schema


def test_the_answer_streams_and_a_cancel_ends_it(falcon_server: Client) -> None:
    with falcon_server.stream(**LONG) as events:
        names = []
        for name, data in events:
            names.append(name)
            if name == "start":
                prediction = data["id"]
            # an async generator: Cog would send nothing before its end
            if name == "output" and names.count("output") == 3:
                assert falcon_server.cancel(prediction)
    assert names[0] == "start" and names[-1] == "completed"
    assert data["status"] == "canceled"
    # Cog says "canceled" even where nothing stopped the generation
    assert 3 <= names.count("output") < 1000


def test_a_second_question_about_a_text_counts_its_cached_tokens(falcon_server: Client) -> None:
    text = " ".join(map(str, range(100, 300)))
    first, second = (
        falcon_server.predict(pregunta=f"{text} {question}", prompt_template="{pregunta}", max_tokens=2).json()
        for question in ("one", "two and three")
    )
    read, cached = (second["metrics"][name] for name in ("input_token_count", "cached_token_count"))
    assert first["metrics"]["cached_token_count"] == 0
    assert cached % 64 == 0 and read - 64 - 4 < cached < read
    assert f"{read} tokens de entrada, {cached} ya leídos, 2 de salida" in second["logs"]


def test_a_client_that_leaves_frees_its_place(falcon_server: Client) -> None:
    concurrency = schema.read(ROOT / "predict.py").concurrency
    with falcon_server.stream(**LONG) as first:
        # as long as the others and begun before them: it would end first
        first_id = next(data["id"] for name, data in first if name == "start")
        with ExitStack() as clients:
            others = [clients.enter_context(falcon_server.stream(**LONG)) for _ in range(concurrency - 1)]
            for events in others:
                assert any(name == "output" for name, _ in events)
            assert falcon_server.predict_if_free(**SHORT).status_code == httpx.codes.CONFLICT
            assert falcon_server.get("/health-check")["status"] == "BUSY"
        assert falcon_server.predict(**SHORT).json()["status"] == "succeeded"
        # still running: so the others were cancelled
        assert falcon_server.cancel(first_id)
    while falcon_server.get("/health-check")["status"] != "READY":
        continue


def test_a_streamed_prediction_is_the_whole_one(falcon_server: Client) -> None:
    with falcon_server.stream(**SHORT) as events:
        streamed = list(events)
    whole = falcon_server.predict(**SHORT).json()

    text = "".join(data["chunk"] for name, data in streamed if name == "output")
    assert text == "".join(whole["output"]) != ""
    for end in (whole, streamed[-1][1]):
        assert end["status"] == "succeeded"
        assert end["metrics"].keys() == METRICS | {"predict_time"}
        assert (end["metrics"]["output_token_count"], end["metrics"]["finish_reason"]) == (8, "length")
        (log,) = end["logs"].splitlines()
        assert "semilla" in log and "Once" not in log


def test_the_same_seed_gives_the_same_text(falcon_server: Client) -> None:
    drawn = {**SHORT, "temperature": 2.0, "top_k": 0, "max_tokens": 16}
    answers = (falcon_server.predict(**drawn, seed=seed).json()["output"] for seed in (1, 1, 2))
    first, second, third = map("".join, answers)
    assert first == second != third


def test_a_whole_float_is_an_integer(falcon_server: Client) -> None:
    whole = falcon_server.predict(**{**SHORT, "max_tokens": 2.0, "top_k": 3.0, "seed": 7.0}).json()
    assert whole["metrics"]["output_token_count"] == 2, whole


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({}, "pregunta"),
        ({"pregunta": ""}, "pregunta"),
        ({"pregunta": "a" * 100_001}, "pregunta"),
        ({"pregunta": 1}, "pregunta"),
        ({"pregunta": "a", "max_tokens": 2.5}, "max_tokens"),
        ({"pregunta": "a", "max_tokens": "2"}, "max_tokens"),
        ({"pregunta": "a", "temperature": 2.1}, "temperature"),
        ({"pregunta": "a", "seed": True}, "seed"),
        ({"pregunta": "a", "seed": None}, "seed"),
        ({"pregunta": "a", "stop_sequences": ["a"]}, "stop_sequences"),
        ({"pregunta": "a", "prompt_template": 1}, "prompt_template"),
    ],
)
def test_what_the_schema_forbids_is_422_with_the_field(
    falcon_server: Client, inputs: dict[str, Any], field: str
) -> None:
    answer = falcon_server.predict(**inputs)
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert [detail["loc"] for detail in answer.json()["detail"]] == [["body", "input", field]]


def test_invalid_json_is_400(falcon_server: Client) -> None:
    answer = falcon_server.post("/predictions", '{"input": {"pregunta": "a", "temperature": NaN}}')
    assert answer.status_code == httpx.codes.BAD_REQUEST


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt_template": "sin sitio"}, "prompt_template debe contener {pregunta}"),
        ({"pregunta": "a " * 2300}, "tokens y el modelo admite 2048 en total"),
    ],
)
def test_what_the_predictor_refuses_fails_with_its_line(
    falcon_server: Client, inputs: dict[str, Any], message: str
) -> None:
    whole = falcon_server.predict(**{**SHORT, **inputs}).json()
    assert whole["status"] == "failed"
    assert message in server.error_text(whole["error"])
    with falcon_server.stream(**{**SHORT, **inputs}) as events:
        *_, (name, end) = events
    assert (name, end["status"], end["error"]) == ("completed", "failed", whole["error"])
    assert "Traceback" not in json.dumps([whole, end])


def test_the_setup_log_says_what_was_loaded(falcon_server: Client, falcon: Path) -> None:
    setup = falcon_server.get("/health-check")["setup"]
    assert setup["status"] == "succeeded"
    assert falcon.name in setup["logs"] and "Sin verificar" in setup["logs"]


def predictor(folder: Path, setup: str) -> Path:
    """Put a predictor into the folder whose setup() is this statement, without a model to load."""
    lines = [
        "import time",
        "from cog import AsyncConcatenateIterator, BasePredictor",
        "from llm.errors import UserError",
        "class Predictor(BasePredictor):",
        "    def setup(self) -> None:",
        f"        {setup}",
        "    async def predict(self) -> AsyncConcatenateIterator[str]:",
        "        yield ''",
    ]
    (folder / "predict.py").write_text("\n".join(lines))
    return folder


def test_a_setup_that_fails_is_one_line_in_the_health_check(tmp_path: Path) -> None:
    folder = predictor(tmp_path, "raise UserError('vacio no es un modelo')")
    with server.running(folder=folder, environment={"PYTHONPATH": str(ROOT)}) as running:
        with pytest.raises(UserError, match=r"^vacio no es un modelo$"):
            running.wait_until_ready()
        health = running.health()
    assert health["status"] == "SETUP_FAILED"
    assert health["setup"]["logs"].endswith("UserError: vacio no es un modelo")
    assert "\n" not in health["setup"]["logs"]


def test_the_last_line_of_setup_is_logged_even_when_it_comes_late() -> None:
    log: list[server.Line] = []
    events = [
        {"fields": {"message": "Caché", "source": "Stdout"}, "target": "coglet::setup"},
        {"fields": {"message": "Loading weights", "source": "Stderr"}, "target": "coglet::setup"},
        {"fields": {"message": "Setup complete, now accepting requests"}, "target": "coglet"},
        {"fields": {"message": "Listo"}, "target": "coglet::user"},
        {"fields": {"message": "Setup complete"}, "target": "coglet::worker_bridge"},
    ]
    # Cog's order when its two processes are quick, which no test can provoke
    program = f"print({json.dumps(chr(10).join(map(json.dumps, events)))})"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, encoding="utf-8") as process:
        running = server.Server(process, log.append)
        with pytest.raises(UserError, match=r"Setup complete$"):
            running.wait()
    assert [(line.text, line.ours) for line in log] == [("Caché", True), ("Loading weights", False), ("Listo", True)]


def test_this_computer_is_reached_without_the_environments_proxy(
    falcon_server: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        # nobody listens on port 1
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert falcon_server.server.health()["status"] in ("READY", "BUSY")
    inputs: dict[str, Any] = SHORT
    running = service.Cog(falcon_server.server.url)
    assert running.ask(**inputs).text == running.stream(**inputs).text
    output = io.StringIO()
    for name, data in predict._events(falcon_server.server, SHORT):
        output.write(data["chunk"] if name == "output" else "")
    assert output.getvalue() == running.ask(**inputs).text


# Limits of the system, reported before anything loads


@pytest.fixture
def descriptors() -> Iterator[Callable[[int, int], None]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft, hard: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
def test_a_low_limit_of_open_files_is_raised(descriptors: Callable[[int, int], None], tmp_path: Path) -> None:
    concurrency = schema.read(ROOT / "predict.py").concurrency
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    descriptors(64, hard)
    with server.running(folder=tmp_path, environment=words.write(tmp_path)) as running:
        # the streams' descriptors are this process's
        descriptors(1024, hard)
        running.wait_until_ready()
        client = Client(running)
        with ExitStack() as clients:
            for events in [clients.enter_context(client.stream(**LONG)) for _ in range(concurrency)]:
                assert any(name == "output" for name, _ in events)


def test_too_low_a_limit_of_open_files_is_reported(falcon_environment: dict[str, str]) -> None:
    run = subprocess.run(
        ["bash", "-c", 'ulimit -n 64; exec "$0" "$@"', sys.executable, "-m", "cli.predict", "-i", "pregunta=a"],
        cwd=ROOT,
        env={**os.environ, **falcon_environment},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        "El límite de archivos abiertos es 64 y el servidor necesita 128: suba el de su usuario, o abra otra terminal "
        "si lo bajó con ulimit -n\n"
    )


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's are not."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("foreign", ["coglet", "coglet/predictions"])
def test_cogs_folder_of_another_user_is_reported(shared_folder: Path, foreign: str) -> None:
    (shared_folder / foreign).mkdir(parents=True)
    (shared_folder / foreign).chmod(0o555)
    predictions = shared_folder / "coglet" / "predictions"
    project = shared_folder / "project"
    project.mkdir()
    project.chmod(0o777)
    shutil.copy(ROOT / "predict.py", project)
    # root may write anywhere
    program = (
        "import os; from pathlib import Path; from cli import server\n"
        f"server._PREDICTIONS = Path({str(predictions)!r})\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        f"with server.running(folder=Path({str(project)!r})): print('started')"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1] == (
        f"llm.errors.UserError: No se puede escribir en {predictions}, falta permiso, y Cog no usa otra carpeta: si la "
        f"dejó otro usuario, pídale que la borre, o sudo rm -r {predictions.parent}"
    )


@pytest.mark.parametrize("chosen", [None, "7"])
def test_threads_spin_for_a_bounded_time_or_the_one_that_the_user_chose(
    processes: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if chosen:
        monkeypatch.setenv("GOMP_SPINCOUNT", chosen)
    with server.running(folder=tmp_path, environment=words.write(tmp_path) | processes.environment):
        (process,) = processes.alive("cog.server.http")
        assert process.environ()["GOMP_SPINCOUNT"] == (chosen or server.LIBRARIES["GOMP_SPINCOUNT"])


@pytest.mark.parametrize(
    ("command", "message"), [("_run_worker", "falta de memoria"), ("cog.server.http", "por su cuenta")]
)
def test_a_process_that_dies_in_setup_is_reported(
    processes: Marked, tmp_path: Path, command: str, message: str
) -> None:
    folder = predictor(tmp_path, "print('Cargando'); time.sleep(600)")
    environment = {**processes.environment, "PYTHONPATH": str(ROOT)}

    def kill(_: server.Line) -> None:
        for process in processes.alive(command):
            process.kill()

    with (
        server.running(folder=folder, environment=environment, log=kill) as running,
        pytest.raises(UserError, match=message),
    ):
        running.wait_until_ready()
