"""The programs of examples/, unmodified and as a user runs them, against the gateway.

Those in JavaScript need node, and `npm ci` in a copy of their folder, which fetches the npm package `replicate` that
package-lock.json names. Where node is missing, or that package cannot be fetched, they are skipped with a line.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli import server
from llm.weights.settings import ROOT
from tests.support import words
from tests.support.gateway import MODEL, Gateway
from tests.support.network import free_port
from tests.support.prediction import signature
from tests.support.processes import FINALLY
from tests.support.receiver import Headers, Receiver

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
JAVASCRIPT = EXAMPLES / "javascript"
QUESTION = "Dime un producto de limpieza que blanquee la ropa"
PYTHON = sorted(path.name for path in EXAMPLES.glob("*.py"))
NODE = sorted(path.name for path in JAVASCRIPT.glob("*.js"))

# The JavaScript client has no setting for the service's address.
REDIRECT = """\
const { fetch } = globalThis;
const here = (address) => String(address).replace("https://api.replicate.com", process.env.REPLICATE_BASE_URL);
globalThis.fetch = (address, options) => fetch(here(address), options);
"""

Answer = Callable[[str], str]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A stand-in for Replicate to which a predictor with our inputs, and without a model, was pushed."""
    folder = tmp_path_factory.mktemp("words")
    with server.running(folder=folder, environment=words.write(folder)) as running:
        running.wait_until_ready()
        with Gateway(running.url) as gateway:
            gateway.publish()
            yield gateway


@pytest.fixture
def folder(tmp_path: Path, gateway: Gateway) -> Path:
    """A copy of examples/, with the token in .env beside it."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / ".env").write_text(f"REPLICATE_API_TOKEN={gateway.token}\n")
    return tmp_path / "examples"


@pytest.fixture
def environment(gateway: Gateway) -> dict[str, str]:
    variables = {**os.environ, "REPLICATE_BASE_URL": gateway.url}
    variables.pop("REPLICATE_API_TOKEN", None)
    return variables


@pytest.fixture
def answer(gateway: Gateway) -> Answer:
    """The service's answer to a question that the test asked once."""
    before = set(gateway.predictions)

    def answer(question: str) -> str:
        asked = [prediction.shown() for id, prediction in gateway.predictions.items() if id not in before]
        (text,) = ("".join(shown["output"]) for shown in asked if shown["input"]["pregunta"] == question)
        assert text
        return text

    return answer


def printed(command: list[Any], environment: dict[str, str], folder: Path) -> str:
    """What the command prints. It has to succeed."""
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["answer.py", "stream.py"])
def test_an_answer_in_python(folder: Path, environment: dict[str, str], answer: Answer, name: str) -> None:
    assert printed([sys.executable, folder / name], environment, folder) == f"{answer(QUESTION)}\n"


def test_many_answers_at_once(folder: Path, environment: dict[str, str], answer: Answer) -> None:
    questions = constant("many.py", "QUESTIONS")
    assert questions[0] == QUESTION
    shown = printed([sys.executable, folder / "many.py"], environment, folder)
    assert shown == "".join(f"{question}\n{answer(question)}\n\n" for question in questions)


def test_a_webhook_is_checked(folder: Path, environment: dict[str, str], gateway: Gateway, answer: Answer) -> None:
    port = free_port()
    forged: list[int] = []

    def post(headers: Headers, body: str) -> int:
        sent = {name: headers[name] for name in headers if name.startswith(("webhook-", "Content-"))}
        return httpx.post(f"http://127.0.0.1:{port}", headers=sent, content=body.encode(), trust_env=False).status_code

    def tunnel(headers: Headers, body: str) -> int:
        unsigned = {name: value for name, value in headers.items() if name != "webhook-signature"}
        timestamp = str(int(headers["webhook-timestamp"]) - 301)
        signed = signature(gateway.webhook_secret, headers["webhook-id"], timestamp, body)
        old = {**headers, "webhook-timestamp": timestamp, "webhook-signature": signed}
        forged.extend([post(headers, body.replace("a", "e")), post(unsigned, body), post(old, body)])
        return post(headers, body)

    with Receiver(tunnel) as receiver:
        result = subprocess.run(
            [sys.executable, folder / "webhook.py", receiver.url],
            env={**environment, "PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=4 * FINALLY,
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"Esperando la respuesta en el puerto {port}\n{answer(QUESTION)}\n"
    assert forged == [403, 403, 403]


def test_the_webhook_example_asks_for_its_address() -> None:
    result = subprocess.run([sys.executable, EXAMPLES / "webhook.py"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "Falta la dirección en la que Replicate encuentra este ordenador, https://…\n"


def test_an_answer_with_curl(folder: Path, environment: dict[str, str], gateway: Gateway, answer: Answer) -> None:
    refused = subprocess.run([folder / "curl.sh"], env=environment, capture_output=True, text=True)
    assert refused.returncode and "export REPLICATE_API_TOKEN=r8_..." in refused.stderr
    shown = json.loads(printed([folder / "curl.sh"], {**environment, **gateway.environment}, folder))
    assert shown["status"] == "succeeded" and "".join(shown["output"]) == answer(QUESTION)


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `npm ci` makes of package-lock.json."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("Los ejemplos en JavaScript no se han probado: falta node")
    folder = tmp_path_factory.mktemp("javascript")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(JAVASCRIPT / name, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    # files that disagree, or a package with another checksum, are no fault of the network
    if result.returncode and not {"EUSAGE", "EINTEGRITY"} & set(result.stderr.split()):
        pytest.skip("Los ejemplos en JavaScript no se han probado: npm ci no trae el paquete replicate")
    assert result.returncode == 0, result.stderr
    return folder / "node_modules"


@pytest.mark.parametrize("name", NODE)
def test_an_answer_in_javascript(
    folder: Path, environment: dict[str, str], node_modules: Path, answer: Answer, tmp_path: Path, name: str
) -> None:
    (tmp_path / "redirect.cjs").write_text(REDIRECT)
    (folder / "javascript" / "node_modules").symlink_to(node_modules)
    variables = {**environment, "NODE_OPTIONS": f"--require {tmp_path / 'redirect.cjs'}"}
    shown = printed(["node", "--env-file=../../.env", name], variables, folder / "javascript")
    assert shown == f"{answer(QUESTION)}\n"


def test_package_lock_matches_package_json_and_names_no_registry() -> None:
    package, lock = (json.loads((JAVASCRIPT / name).read_text()) for name in ("package.json", "package-lock.json"))
    root, *packages = lock["packages"].values()
    assert root["dependencies"] == package["dependencies"]
    assert packages and all(entry["integrity"] and "resolved" not in entry for entry in packages)


def test_every_example_is_tested_and_calls_the_same_model() -> None:
    assert PYTHON == ["answer.py", "many.py", "stream.py", "webhook.py"]
    assert {constant(name, "MODEL") for name in PYTHON} == {MODEL}
    assert f"model={MODEL}\n" in (EXAMPLES / "curl.sh").read_text()
    for name in NODE:
        assert json.dumps(MODEL.split("/")).strip("[]") in (JAVASCRIPT / name).read_text()


def constant(name: str, variable: str) -> Any:
    for node in ast.parse((EXAMPLES / name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            return ast.literal_eval(node.value)
    raise AssertionError(variable)
