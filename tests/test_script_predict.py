"""script/predict, script/serve and script/setup, as their user runs them."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path

import httpx
import psutil
import pytest

from cli import inputs, predict, push, schema, serve, server
from llm.errors import UserError
from llm.weights.settings import ROOT
from tests.support import words
from tests.support.client import LONG, SSE, Client
from tests.support.command import run_here
from tests.support.network import free_port
from tests.support.processes import FINALLY, Marked, until
from tests.support.project import copied

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]

QUESTION = ["-i", "pregunta=Once upon a time", "-i", "temperature=0"]
SCHEMA = schema.read(ROOT / "predict.py").schema
CRASHED = "El modelo se cerró, casi siempre por falta de memoria: cierre otros programas y repita la orden"


# of predict.py without a model
LASTING = ["-i", "pregunta=hola", "-i", "max_tokens=2048"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("home") / "project")


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without a model: what ends its processes is the same."""
    folder = copied(tmp_path_factory.mktemp("wordy") / "project")
    words.write(folder)
    return folder


@pytest.fixture
def environment(falcon_environment: dict[str, str], processes: Marked) -> dict[str, str]:
    return {**os.environ, **falcon_environment, **processes.environment}


@pytest.fixture
def script(project: Path, environment: dict[str, str], tmp_path: Path) -> Run:
    """Run script/NAME with its arguments, from a folder that is not the project's."""

    def run(name: str, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [project / "script" / name, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, **variables},
        )

    return run


def test_inputs_come_from_json_and_the_answer_goes_to_a_file(
    wordy: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    result = subprocess.run(
        [wordy / "script" / "predict", "--json", "-", "-o", "respuesta.txt"],
        input=json.dumps({**LONG, "max_tokens": 2.0}),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "La respuesta está en respuesta.txt"
    assert (tmp_path / "respuesta.txt").read_text() == "0 1 \n"


def test_inputs_come_from_pairs_and_files_too(tmp_path: Path) -> None:
    question = tmp_path / "pregunta.txt"
    question.write_text("Once upon a time")
    pairs = [f"pregunta=@{question}", "temperature=0", "max_tokens=2.0", "prompt_template={pregunta}"]
    assert inputs.from_pairs(pairs, SCHEMA) == inputs.from_json(json.dumps({**LONG, "max_tokens": 2.0}), SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-i", "uno\ndos\udcff=x"], "No hay ninguna entrada uno?dos?: las que hay son"),
        (["--json", "-"], "Lo que da --json no es JSON correcto: mire la línea 1, columna 1\n"),
        ([*QUESTION, "-o", "no/respuesta.txt"], "No se puede escribir en no/respuesta.txt: "),
    ],
)
def test_a_wrong_input_is_one_line_before_anything_starts(script: Run, arguments: list[str], line: str) -> None:
    result = script("predict", *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(line)


def one_line(call: Callable[[], object]) -> str:
    """The error that ends the command, as it is printed."""
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return f"{raised.value}\n"


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ([], 'Falta pregunta: póngala con -i pregunta="..."\n'),
        (
            ["pregunt=hola"],
            "No hay ninguna entrada pregunt: las que hay son pregunta, max_tokens, temperature, top_p, top_k, "
            "repetition_penalty, stop_sequences, seed, prompt_template\n",
        ),
        (["hola"], '-i hola no tiene valor: se escribe -i nombre="valor"\n'),
        (["pregunta="], "pregunta está vacía\n"),
        ([f"pregunta={'a' * 100_001}"], "pregunta tiene 100001 caracteres, y caben 100000\n"),
        (["pregunta=a", "max_tokens=muchos"], 'max_tokens ha de ser un número entero, y se dio "muchos"\n'),
        (["pregunta=a", "max_tokens=2.5"], "max_tokens ha de ser un número entero, y se dio 2.5\n"),
        (["pregunta=a", "max_tokens=0"], "max_tokens ha de ser 1 o más, y se dio 0\n"),
        (["pregunta=a", "max_tokens=2049"], "max_tokens ha de ser 2048 o menos, y se dio 2049\n"),
        (["pregunta=a", "temperature=0,7"], 'temperature ha de ser un número, y se dio "0,7"\n'),
        (["pregunta=a", "temperature=nan"], "temperature ha de ser un número, y se dio NaN\n"),
        (["pregunta=a", "temperature=2.1"], "temperature ha de ser 2 o menos, y se dio 2.1\n"),
        (["pregunta=a", "seed=true"], 'seed ha de ser un número entero, y se dio "true"\n'),
        (["pregunta=@no.txt"], "No se puede leer no.txt: "),
        (["pregunta=@~nadie-asi/x"], "No se puede leer ~nadie-asi/x: no existe\n"),
        (["pregunta=\udcff\udcfe"], "pregunta lleva bytes que no son UTF-8"),
    ],
)
def test_a_wrong_pair_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[str], line: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert one_line(lambda: inputs.from_pairs(pairs, SCHEMA)).startswith(line)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('{"pregunta": "a", "seed": true}', "seed ha de ser un número entero, y se dio true\n"),
        ('{"pregunta": 1}', "pregunta ha de ser un texto, y se dio 1\n"),
        ('{"pregunta": "a", "seed": null}', "seed ha de ser un número entero, y se dio null\n"),
        ('{"prompt": "a"}', "No hay ninguna entrada prompt: "),
        ('{"pregunta": ', "Lo que da --json no es JSON correcto: mire la línea 1, columna 14\n"),
        ('\ufeff{"pregunta": ""}', "pregunta está vacía\n"),
        ("marca.json", "pregunta está vacía\n"),
        ("hondo.json", "Lo que da --json lleva números demasiado largos, o demasiados corchetes\n"),
        (f'{{"seed": {"1" * 5000}}}', "Lo que da --json lleva números demasiado largos, o demasiados corchetes\n"),
        ('{"pregunta": [[1]]}', "pregunta ha de ser un texto, y se dio varios valores\n"),
        ("no.json", "No se puede leer no.json: "),
        ("n" * 300, f"No se puede leer {'n' * 300}: el nombre es demasiado largo\n"),
        ('{"pregunta": "\\ud83d"}', "pregunta lleva bytes que no son UTF-8, o medio emoji"),
    ],
)
def test_wrong_json_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("marca.json").write_text('{"pregunta": ""}', encoding="utf-8-sig")
    Path("hondo.json").write_text("[" * 200_000)
    assert one_line(lambda: inputs.from_json(source, SCHEMA)).startswith(line)


def test_an_impossible_file_for_the_answer_is_one_line() -> None:
    with ExitStack() as stack:
        line = one_line(lambda: stack.enter_context(predict._output("~nadie-asi/x")))
    assert line == "No se puede escribir en ~nadie-asi/x: no existe\n"


def test_a_closed_stdin_is_one_line(project: Path, environment: dict[str, str]) -> None:
    command = f"{shlex.quote(str(project))}/script/predict --json - <&-"
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "No se puede leer -: está cerrado\n")


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("predict", ["hola"], "sobra hola"),
        ("predict", ["uno\ndos"], "sobra uno?dos"),
        ("predict", ["-i"], "-i/--input va con un valor"),
        ("predict", ["--demo=3"], "--demo va sin valor, y se dio '3'"),
        ("predict", [*QUESTION, "--json", "x"], "--json no va con -i/--input"),
        ("serve", ["--port", "x"], "--port no puede ser 'x'"),
        ("weights", ["extra"], "sobra extra"),
        ("bench", ["extra"], "sobra extra"),
        ("audit", ["extra"], "sobra extra"),
        ("push", [], "falta USUARIO/NOMBRE"),
    ],
)
def test_wrong_arguments_are_one_line(name: str, arguments: list[str], reason: str) -> None:
    result = run_here(import_module(f"cli.{name}").main, *arguments, variables={})
    line = f"script/{name} no entiende la orden ({reason}): vea script/{name} --help\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


def test_help_is_in_spanish() -> None:
    lines = run_here(push.main, "--help", variables={}).stdout.splitlines()
    assert lines[0].startswith("uso: script/push")
    assert {"argumentos:", "opciones:", "  -h, --help      muestra esta ayuda"} <= {*lines}


@pytest.mark.parametrize("name", ["audit", "bench", "deploy", "predict", "push", "serve", "setup", "smoke", "weights"])
def test_a_script_finds_its_project(project: Path, environment: dict[str, str], tmp_path: Path, name: str) -> None:
    (tmp_path / "orden").symlink_to(project / "script" / name)
    (tmp_path / "otra").symlink_to("orden")
    result = subprocess.run(["./otra", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("" if name == "setup" else f"uso: script/{name} ")


@pytest.mark.parametrize("name", ["predict", "setup"])
def test_a_script_ignores_cdpath(project: Path, environment: dict[str, str], tmp_path: Path, name: str) -> None:
    # with CDPATH, cd looks elsewhere first and prints its target
    (tmp_path / "script").mkdir()
    environment["CDPATH"] = f"{tmp_path}:."
    command = [f"script/{name}", "--help"]
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"MODEL_ID": "vacio"}, "vacio no es un modelo"),
        # nobody listens on port 1
        ({"MODEL_ID": "org/nombre", "HF_ENDPOINT": "http://127.0.0.1:1"}, "--demo"),
    ],
)
def test_a_model_that_cannot_load_ends_in_one_line(
    script: Run, tmp_path: Path, variables: dict[str, str], line: str
) -> None:
    (tmp_path / "vacio").mkdir()
    result = script("predict", *QUESTION, WEIGHTS_DIR=str(tmp_path), **variables)
    assert (result.returncode, result.stdout) == (1, "")
    *_, last = result.stderr.splitlines()
    assert line in last
    assert "Traceback" not in result.stderr


def test_a_terminal_shows_the_seconds_of_loading_and_then_its_error(
    environment: dict[str, str], tmp_path: Path
) -> None:
    project = copied(tmp_path / "project")
    fails = words.source().replace(words.SETUP, "time.sleep(0.3); raise UserError('no cabe: elija otro')")
    (project / "predict.py").write_text(fails)
    terminal, end = os.openpty()
    command: list[str | Path] = [project / "script" / "predict", *QUESTION]
    shown = ""
    with (
        os.fdopen(terminal, "rb", buffering=0) as screen,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=end) as process,
    ):
        os.close(end)
        # reading from a closed terminal is an error
        with suppress(OSError):
            while part := screen.read(4096):
                shown += part.decode()
        output, _ = process.communicate()
    assert (process.returncode, output) == (1, b"")
    assert re.search(r"\rCargando el modelo: \d+ s", shown.replace("\x1b[K", ""))
    # the error replaces the line that counts
    last = shown.rstrip().rpartition("\r\x1b[K")[2]
    assert last == "no cabe: elija otro"
    assert "Traceback" not in shown and "Setup failed" not in shown


@pytest.fixture
def started_server(falcon_server: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' functions take the server that all tests share for the one that they started."""
    monkeypatch.setattr(server, "running", lambda **_: nullcontext(falcon_server.server))


@pytest.mark.usefixtures("started_server")
def test_a_prediction_that_fails_is_an_error() -> None:
    output = io.StringIO()
    values = {"pregunta": "Once upon a time", "prompt_template": "sin sitio"}
    line = one_line(lambda: predict.predict(values, output, environment={}))
    assert line == "prompt_template debe contener {pregunta}\n"
    assert output.getvalue().strip() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.usefixtures("started_server")
def test_an_output_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "No se puede escribir en la salida: el disco está lleno\n"
    with open("/dev/full", "w") as full:
        assert one_line(lambda: predict.predict({**LONG, "max_tokens": 2}, full, environment={})) == line
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert one_line(lambda: serve.serve(0, environment={})) == line


ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]


@contextmanager
def started(environment: dict[str, str], *command: Path | str) -> Iterator["subprocess.Popen[str]"]:
    """A running command, terminated at the end of the block."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture
def answering(wordy: Path, environment: dict[str, str], processes: Marked) -> Iterator["subprocess.Popen[str]"]:
    """script/predict in the middle of a long answer."""
    with started(environment, wordy / "script" / "predict", *LASTING) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        # the command, the server and its worker
        assert len(processes.alive()) >= 3
        yield process


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_a_signal_ends_all_processes(
    answering: "subprocess.Popen[str]", processes: Marked, number: signal.Signals, status: int
) -> None:
    answering.send_signal(number)
    _, errors = answering.communicate(timeout=FINALLY)
    assert answering.returncode == status
    assert "primer texto" not in errors and "Traceback" not in errors
    assert not psutil.wait_procs(processes.alive(), timeout=FINALLY)[1]


@pytest.mark.parametrize(
    ("command", "line"),
    [("_run_worker", CRASHED), ("cog.server.http", "El servidor de Cog se cerró")],
    ids=["worker", "server"],
)
def test_a_process_that_dies_is_reported(
    answering: "subprocess.Popen[str]", processes: Marked, command: str, line: str
) -> None:
    (process,) = processes.alive(command)
    process.kill()
    _, errors = answering.communicate(timeout=FINALLY)
    assert answering.returncode == 1
    assert errors.splitlines()[-1].startswith(line) and "Traceback" not in errors
    assert not psutil.wait_procs(processes.alive(), timeout=FINALLY)[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("where", "shown", "line"),
    [
        ("-o /dev/full", True, "No se pudo escribir en /dev/full, y la respuesta está arriba: el disco está lleno"),
        (">&-", False, "La salida está cerrada: quite >&-, o dé un archivo con -o"),
    ],
)
def test_an_answer_that_cannot_be_written_is_reported(
    wordy: Path, environment: dict[str, str], where: str, shown: bool, line: str
) -> None:
    command = shlex.join([str(wordy / "script" / "predict"), "-i", "pregunta=hola", "-i", "max_tokens=2"])
    result = subprocess.run(["bash", "-c", f"{command} {where}"], env=environment, capture_output=True, text=True)
    assert (result.returncode, bool(result.stdout.strip())) == (1, shown)
    assert result.stderr.splitlines()[-1] == line and "Traceback" not in result.stderr


def test_a_reader_that_leaves_ends_all_processes(answering: "subprocess.Popen[str]", processes: Marked) -> None:
    assert answering.stdout is not None and answering.stderr is not None
    answering.stdout.close()
    errors = answering.stderr.read()
    assert answering.wait(FINALLY) == 141
    assert "Traceback" not in errors and "Broken" not in errors
    assert not psutil.wait_procs(processes.alive(), timeout=FINALLY)[1]


@pytest.mark.parametrize(("number", "status"), ENDS)
def test_a_signal_while_loading_ends_all_processes(
    wordy: Path,
    environment: dict[str, str],
    processes: Marked,
    tmp_path: Path,
    number: signal.Signals,
    status: int,
) -> None:
    output = tmp_path / "respuesta.txt"
    with started(environment, wordy / "script" / "predict", *LASTING, "-o", str(output)) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "Cargando el modelo\n"
        until(lambda: processes.alive("_run_worker") or process.poll() is not None)
        workers = processes.alive("_run_worker")
        # as if deep in a load: a suspended worker does not end with its server
        workers[0].suspend()
        process.send_signal(number)
        process.communicate(timeout=FINALLY)
    assert process.returncode == status
    assert not output.exists()
    assert not psutil.wait_procs(processes.alive(), timeout=FINALLY)[1]


# script/setup runs .venv/bin/python too, to check .venv
@pytest.mark.parametrize("code", [".venv/bin/python", "llm/__init__.py"])
def test_ctrl_c_before_the_command_has_begun_is_one_line(tmp_path: Path, processes: Marked, code: str) -> None:
    project = copied(tmp_path / "project")
    program = f"#!{sys.executable}\nimport time\nprint(flush=True)\ntime.sleep(600)\n"
    (project / code).write_text(program)
    with started({**os.environ, **processes.environment}, project / "script" / "predict", *QUESTION) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        # as a terminal does: to the whole group
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=FINALLY)
    assert (process.returncode, errors.strip()) == (130, "Interrumpido")


def client(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=FINALLY, trust_env=False)


def test_serve_ends_when_its_worker_dies(wordy: Path, environment: dict[str, str], processes: Marked) -> None:
    port = free_port()
    inputs = {"pregunta": "hola", "max_tokens": 2048}
    with started(environment, wordy / "script" / "serve", "--port", str(port)) as process, ExitStack() as clients:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Listo en")
        http = clients.enter_context(client(port))
        answers = []
        for _ in range(8):
            answer = clients.enter_context(http.stream("POST", "/predictions", json={"input": inputs}, headers=SSE))
            answers.append(lines := answer.iter_lines())
            assert "event: output" in lines
        (worker,) = processes.alive("_run_worker")
        worker.kill()
        for lines in answers:
            *_, end, _ = lines
            assert '"status":"failed"' in end
        _, log = process.communicate(timeout=FINALLY)
    assert (process.returncode, log.splitlines()[-1]) == (1, CRASHED)
    assert not processes.alive()


UNHEALTHY = """

async def healthcheck(self: Predictor) -> bool:
    if lost:
        raise UserError("El motor se detuvo (fuera): hay que reiniciar el servidor")
    return True


lost = []
Predictor.healthcheck = healthcheck
"""


def test_serve_ends_when_its_health_check_fails(tmp_path: Path, environment: dict[str, str]) -> None:
    """As predict.py's does once the engine is lost: tests/test_faults.py."""
    project = copied(tmp_path / "project")
    fails = words.source().replace("        return words()", "        lost.append(True)\n        return words()")
    (project / "predict.py").write_text(fails + UNHEALTHY)
    port = free_port()
    with started(environment, project / "script" / "serve", "--port", str(port)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Listo en")
        with client(port) as http:
            inputs = {"pregunta": "hola", "max_tokens": 1}
            assert http.post("/predictions", json={"input": inputs}).json()["status"] == "succeeded"
        _, log = process.communicate(timeout=FINALLY)
    line = "El motor se detuvo (fuera): hay que reiniciar el servidor"
    assert (process.returncode, log.splitlines()[-1]) == (1, line)


def test_serve_prints_a_command_that_works(project: Path, environment: dict[str, str], processes: Marked) -> None:
    port = free_port()
    serve = (str(project / "script" / "serve"), "--port", str(port))
    with started(environment, *serve) as process:
        assert process.stdout is not None
        listening, _, *command = (process.stdout.readline() for _ in range(4))
        assert f"http://127.0.0.1:{port}" in listening

        answer = subprocess.run(["bash", "-c", "".join(command)], capture_output=True, text=True, check=True).stdout
        assert answer.startswith("event: start") and '"status":"succeeded"' in answer

        prediction = uuid.uuid4().hex
        with client(port) as http:
            http.put(f"/predictions/{prediction}", json={"input": {"pregunta": "hola", "max_tokens": 2}})
        folder = Path("/tmp/coglet/predictions", prediction)
        assert folder.is_dir()

        second = subprocess.run(serve, env=environment, capture_output=True, text=True)
        assert second.returncode == 1
        assert (
            second.stderr == f"El puerto {port} está ocupado: cierre el programa que lo usa o elija otro con --port\n"
        )

        # in the middle of an answer
        with (
            client(port) as http,
            suppress(httpx.TransportError),
            http.stream("POST", "/predictions", json={"input": LONG}, headers=SSE) as stream,
        ):
            lines = stream.iter_lines()
            assert "event: output" in lines
            process.send_signal(signal.SIGINT)
            assert not any('"status":"succeeded"' in line for line in lines)
        _, log = process.communicate(timeout=FINALLY)
    assert process.returncode == 0
    assert "tokens de entrada" in log and "Deprecat" not in log and "Traceback" not in log
    assert not folder.exists()
    assert not psutil.wait_procs(processes.alive(), timeout=FINALLY)[1]


@pytest.fixture
def bare(project: Path, tmp_path: Path) -> Path:
    """The project's copy before its first command, with a folder for PATH that holds no Python."""
    folder = tmp_path / "bare"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns(".venv", ".cog"))
    (folder / "bin").mkdir()
    for name in ("bash", "cat", "chmod", "cksum", "dirname", "env", "grep", "mkdir", "readlink", "rm"):
        tool = shutil.which(name)
        assert tool is not None
        (folder / "bin" / name).symlink_to(tool)
    return folder


def write_python(path: Path, version: str | None, install: str = "true") -> None:
    """A Python that only prints its version, makes a .venv of itself, and runs `install` for cli/install.py.

    Without a version, it fails as pyenv's does for a version that is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
case "$*" in
  *"-m venv"*) rm -rf .venv && mkdir -p .venv/lib .venv/bin && cat "$0" >.venv/bin/python && chmod +x .venv/bin/python;;
  *"import pip"*) [ -d "${{0%/bin/*}}/lib" ];;
  *"cli/install.py"*) {install};;
  *) {f"echo {version}" if version else "exit 127"};;
esac
"""
    )
    path.chmod(0o755)


def setup(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(folder / "bin"), **variables}
    return subprocess.run([folder / "script" / "setup"], env=environment, capture_output=True, text=True)


def test_setup_names_a_python_that_is_too_old(bare: Path) -> None:
    write_python(bare / "bin/python3", "3.9.18")
    write_python(bare / "bin/python3.13", None)
    result = setup(bare)
    assert result.returncode == 1
    assert result.stderr == (
        "Hace falta Python 3.11, 3.12 o 3.13, y python3 es 3.9.18: instale uno, o repita con PYTHON=/ruta/a/python "
        "delante\n"
    )
    assert not (bare / ".venv").exists()


def test_setup_skips_unsuitable_pythons(bare: Path) -> None:
    write_python(bare / "bin/python3", "3.14.0")
    write_python(bare / "bin/python3.13", None)
    write_python(bare / "bin/python3.12", "3.12.1")
    result = setup(bare)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("Preparando .venv con Python 3.12.1")
    # a second time there is nothing to do
    assert setup(bare).stderr == ""


def test_setup_takes_the_python_of_the_environment(bare: Path) -> None:
    write_python(bare / "bin/python3", "3.12.1")
    write_python(bare / "bin/otro", "3.8.2")
    result = setup(bare, PYTHON="otro")
    assert result.returncode == 1
    assert "y otro es 3.8.2" in result.stderr


def test_a_failed_installation_is_repeated(bare: Path) -> None:
    write_python(bare / "bin/python3", "3.12.1", install="echo no network >&2; exit 1")
    for _ in range(2):
        result = setup(bare)
        assert (result.returncode, result.stderr.splitlines()[1:]) == (1, ["no network"])


def test_an_incomplete_venv_is_made_again(bare: Path) -> None:
    write_python(bare / "bin/python3", "3.12.1")
    # as an interruption before pip is installed leaves it
    write_python(bare / ".venv/bin/python", "3.12.1", install="echo No module named pip; exit 1")
    assert setup(bare).returncode == 0
    assert setup(bare).stderr == ""
    (bare / ".venv/lib").rmdir()
    assert setup(bare).stderr.startswith("Preparando .venv con Python 3.12.1")
    assert setup(bare).stderr == ""


def test_a_venv_is_kept_when_the_requirements_change(bare: Path) -> None:
    write_python(bare / "bin/python3", "3.12.1")
    assert setup(bare).returncode == 0
    (bare / ".venv/lib/torch").touch()
    (bare / "requirements-dev.txt").write_text("cog==1\n")
    assert setup(bare).stderr.startswith("Preparando .venv con Python 3.12.1")
    assert (bare / ".venv/lib/torch").exists()


def test_a_clone_with_windows_line_ends_has_the_same_files(project: Path, tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    shutil.copytree(project, origin, ignore=shutil.ignore_patterns(".venv", ".cog"))
    (origin / "imagen.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    identity = ["-c", "user.name=Ana", "-c", "user.email=ana@example.com"]
    for arguments in (["init"], ["add", "--force", "."], [*identity, "commit", "--message", "Todo"]):
        subprocess.run(["git", *arguments], cwd=origin, check=True, capture_output=True)
    command = ["git", "clone", "-c", "core.autocrlf=true", str(origin), str(clone)]
    subprocess.run(command, check=True, capture_output=True)
    files = [path.relative_to(clone) for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert Path("script/setup") in files and Path("imagen.png") in files
    assert [file for file in files if (clone / file).read_bytes() != (origin / file).read_bytes()] == []


@pytest.mark.parametrize("link", [False, True])
def test_a_venv_that_is_no_folder_is_named(bare: Path, link: bool) -> None:
    write_python(bare / "bin/python3", "3.12.1")
    (bare / ".venv").symlink_to("no") if link else (bare / ".venv").touch()
    result = setup(bare)
    assert (result.returncode, result.stderr) == (
        1,
        ".venv no es una carpeta: bórrelo o cámbiele el nombre, y repita\n",
    )
