"""script/deploy, as its user runs it, against tests/support/gateway.py with the tiny falcon."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli import deploy
from tests.support import gateway as service
from tests.support.client import Client
from tests.support.command import run_here
from tests.support.gateway import MODEL, Gateway
from tests.support.prediction import Prediction
from tests.support.processes import FINALLY, Marked
from tests.support.project import copied

pytestmark = pytest.mark.slow

Deploy = Callable[..., subprocess.CompletedProcess[str]]

CREATE = ["crear", MODEL, "--hardware", "gpu-l40s"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("home") / "project")


@pytest.fixture
def gateway(falcon_server: Client) -> Iterator[Gateway]:
    with Gateway(falcon_server.server.url) as gateway:
        gateway.publish("vieja")
        gateway.publish("nueva")
        yield gateway


@pytest.fixture
def environment(gateway: Gateway, processes: Marked) -> dict[str, str]:
    return {**os.environ, **gateway.environment, **processes.environment}


@pytest.fixture
def script(project: Path, environment: dict[str, str], tmp_path: Path) -> Deploy:
    """Run script/deploy with its arguments, without a terminal, from a folder that is not the project's."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [project / "script" / "deploy", *arguments],
            input="",
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, **variables},
        )

    return run


@pytest.fixture
def run(gateway: Gateway) -> Deploy:
    """As `script`, in this process, whose constants a test can replace."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run_here(deploy.main, *arguments, variables={**gateway.environment, **variables})

    return run


def output(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def error(result: subprocess.CompletedProcess[str]) -> str:
    """The last line on stderr of a command that failed."""
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def settings(gateway: Gateway, name: str = MODEL) -> tuple[str, str, int, int]:
    release = gateway.deployments[name].release
    configuration = release["configuration"]
    return release["version"], *(configuration[key] for key in ("hardware", "min_instances", "max_instances"))


def test_the_life_of_a_deployment(script: Deploy, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script
    created = run(*CREATE, "--min", "1", "--max", "3", "--yes")
    shown = output(created)
    assert settings(gateway) == ("nueva", "gpu-l40s", 1, 3)
    for text in (MODEL, f"{MODEL}:nueva", "gpu-l40s", "1 a 3", f"https://replicate.com/deployments/{MODEL}"):
        assert re.search(rf"(^|  ){re.escape(text)}$", shown, re.MULTILINE), text
    # what costs money is said first
    cost, answered = created.stderr.split("Esperando a que conteste\n")
    assert f"Se crea {MODEL}: {MODEL}:nueva en gpu-l40s (Nvidia L40S GPU)\n" in cost
    assert "Instancias siempre encendidas: 1; con mucho trabajo, hasta 3\n" in cost and deploy.PRICING in cost
    assert re.fullmatch(r"Contestó en [\d,]+ s\n", answered)
    (prediction,) = gateway.predictions.values()
    assert prediction.shown()["status"] == "succeeded"

    assert output(run("ver", f"r8.im/{MODEL}")) == shown
    answered_again = run("esperar", MODEL, "--yes")
    assert output(answered_again) == "" and f"{deploy.PRICING}\n" in answered_again.stderr
    assert len(gateway.predictions) == 2

    off = output(run("cero", MODEL))
    assert settings(gateway) == ("nueva", "gpu-l40s", 0, 0)
    assert "0 a 0, apagado" in off and len(gateway.predictions) == 2

    refusal = error(run("borrar", MODEL, "--yes"))
    assert refusal.startswith(f"Todavía no se puede borrar: apáguelo con script/deploy cero {MODEL}, espere 15 minutos")
    assert "offline and unused for at least 15 minutes" in refusal
    monkeypatch.setattr(service, "SECONDS_OFFLINE", 0)
    assert output(run("borrar", MODEL, "--yes")) == f"{MODEL} está borrado\n"
    assert not gateway.deployments


def test_a_change_keeps_the_settings_that_it_does_not_name(run: Deploy, gateway: Gateway) -> None:
    output(run("crear", f"{MODEL}:vieja", "--hardware", "gpu-t4", "--min", "2", "--name", "otro-nombre", "--yes"))
    name = f"{gateway.owner}/otro-nombre"
    # --max is --min where it is not given
    assert settings(gateway, name) == ("vieja", "gpu-t4", 2, 2)
    changed = run("crear", MODEL, "--name", "otro-nombre", "--max", "5", "--yes")
    assert f"Se cambia {name}: {MODEL}:nueva en gpu-t4 (Nvidia T4 GPU)\n" in changed.stderr
    output(changed)
    assert settings(gateway, name) == ("nueva", "gpu-t4", 2, 5)


def test_the_command_shown_for_a_deployment_that_is_off_starts_it(run: Deploy, gateway: Gateway) -> None:
    output(run("crear", f"{MODEL}:vieja", "--hardware", "cpu", "--yes"))
    off = output(run("cero", MODEL))
    (command,) = re.findall(r"  encenderlo  script/deploy (.*)\n", off)
    assert error(run("esperar", MODEL, "--yes")) == f"{MODEL} está apagado: se enciende con script/deploy {command}"
    output(run(*command.split(), "--yes"))
    assert settings(gateway) == ("vieja", "cpu", 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["crear", "otra/otro", "--hardware", "cpu"], "Replicate no tiene otra/otro, o su token no lo ve: "),
        (["crear", f"{MODEL}:nada", "--hardware", "cpu"], f"Replicate no tiene {MODEL}:nada, o su token no lo ve: "),
        (
            ["crear", MODEL, "--hardware", "gpu-x"],
            "--hardware ha de ser una de las máquinas de Replicate: cpu (CPU), gpu-t4 (Nvidia T4 GPU), ",
        ),
        (["crear", MODEL], "--hardware ha de ser una de las máquinas de Replicate: cpu (CPU), "),
        ([*CREATE, "--max", "0"], "--max ha de ser 1 o más, y no menos que --min; para apagarlo está script/deploy"),
        ([*CREATE, "--min", "2", "--max", "1"], "--max ha de ser 1 o más, y no menos que --min; "),
        ([*CREATE, "--min", "6"], f"Replicate no acepta lo que se le pide de {MODEL}: The following errors occurred: "),
        ([*CREATE, "--name", "a/b"], f'"{MODEL.split("/")[0]}/a/b" no es un nombre de Replicate: se escribe USUARIO/'),
        (["cero", "otra/otro"], "No hay un despliegue otra/otro que su token vea: compruebe el nombre, o script/"),
        (["ver", f"{MODEL}:nueva"], f'"{MODEL}:nueva" no es un nombre de Replicate: se escribe USUARIO/NOMBRE, en '),
    ],
)
def test_a_mistake_is_one_line(run: Deploy, gateway: Gateway, arguments: list[str], message: str) -> None:
    yes = ["--yes"] if arguments[0] == "crear" else []
    assert error(run(*arguments, *yes)).startswith(message)
    assert not gateway.deployments


def test_an_unknown_action_is_one_line(run: Deploy) -> None:
    result = run("crea", MODEL)
    assert (result.returncode, result.stdout) == (2, "")
    pattern = (
        r"script/deploy no entiende la orden \(ACCIÓN no puede ser 'crea': hay .*borrar'?\): vea script/deploy --help\n"
    )
    assert re.fullmatch(pattern, result.stderr)


def test_a_deployment_of_another_model_is_not_changed(run: Deploy, gateway: Gateway) -> None:
    output(run(*CREATE, "--yes"))
    gateway.deployments[MODEL].release["model"] = "otra/otro"
    assert error(run(*CREATE, "--yes")) == f"{MODEL} ya es un despliegue de otra/otro: dé otro nombre a este con --name"
    assert len(gateway.predictions) == 1


def test_a_model_without_a_version_is_not_deployed(run: Deploy, gateway: Gateway) -> None:
    gateway.versions.clear()
    message = f"{MODEL} no tiene ninguna versión: publíquela con script/push {MODEL}"
    assert error(run(*CREATE, "--yes")) == message


def test_a_missing_token_is_one_line(run: Deploy) -> None:
    assert error(run("ver", MODEL, REPLICATE_API_TOKEN="")).startswith("Falta REPLICATE_API_TOKEN: ")


def test_nothing_is_done_without_a_yes(
    run: Deploy, gateway: Gateway, project: Path, environment: dict[str, str]
) -> None:
    assert "repita con --yes" in error(run(*CREATE))
    terminal, user = os.openpty()
    with os.fdopen(terminal, "wb", buffering=0) as keys, os.fdopen(user) as stdin:
        keys.write(b"n\n")
        command = [str(project / "script" / "deploy"), *CREATE]
        result = subprocess.run(command, stdin=stdin, capture_output=True, text=True, env=environment)
    assert error(result).endswith("No se ha hecho nada")
    assert deploy.PRICING in result.stderr and not gateway.deployments

    output(run(*CREATE, "--yes"))
    for action in ("esperar", "borrar"):
        assert "repita con --yes" in error(run(action, MODEL))
    assert MODEL in gateway.deployments and len(gateway.predictions) == 1


def hold(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no instance start."""
    monkeypatch.setattr(gateway, "_run_if_free", lambda prediction: False)


def test_an_interrupted_wait_cancels_its_prediction(
    gateway: Gateway, project: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(gateway, monkeypatch)
    terminal, end = os.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        command = [str(project / "script" / "deploy"), *CREATE, "--yes"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=end, env=environment)
        os.close(end)
        shown = ""
        deadline = time.monotonic() + FINALLY
        while not re.search(r"\r\x1b\[KEsperando a que conteste: \d+ s", shown):
            assert time.monotonic() < deadline, shown
            shown += screen.read(10_000).decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(FINALLY) == 130
    (prediction,) = gateway.predictions.values()
    assert prediction.shown()["status"] == "canceled"


def test_a_deployment_that_does_not_answer_in_time_is_one_line(
    run: Deploy, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(gateway, monkeypatch)
    monkeypatch.setattr(deploy, "SECONDS_TO_ANSWER", 0.1)
    result = run(*CREATE, "--yes")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert f"{MODEL} no contestó en " in last and last.endswith(f"repita script/deploy esperar {MODEL}")
    (prediction,) = gateway.predictions.values()
    assert prediction.shown()["status"] == "canceled"


def test_a_deployment_that_fails_is_one_line(run: Deploy, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(prediction: Prediction) -> bool:
        prediction.complete("failed", error="Setup failed\nMemoryError")
        return True

    monkeypatch.setattr(gateway, "_run_if_free", fail)
    result = run(*CREATE, "--yes")
    assert result.returncode == 1
    message = f"{MODEL} no contesta, acabó en failed: Setup failed MemoryError; mire https://replicate.com/deployments/{MODEL}"
    assert result.stderr.splitlines()[-1] == message
