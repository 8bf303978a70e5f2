"""The image in Docker: what cog build puts into it, and how it serves, alone and behind deploy/compose.yaml.

`script/test -m docker` runs these, and a plain script/test none of them. They need Docker's engine, and the command cog
or, with --image, an image that exists.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli import events, schema, server
from llm.weights.settings import ROOT
from tests.support.client import SHORT, SSE
from tests.support.processes import FINALLY
from tests.support.project import copied

# the first build may download a base image of several GB
pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
    pytest.skip("la imagen no se ha probado: Docker no está instalado o no está en marcha", allow_module_level=True)

LONG = {**SHORT, "max_tokens": 2000}
SECRET = "hf_prueba"


def docker(*arguments: str | Path) -> str:
    """What docker prints. It has to succeed."""
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def project(falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as its user has it: a model to deploy, another one, a secret, and files that commands leave."""
    folder = copied(tmp_path_factory.mktemp("docker") / "project")
    for name in (falcon.name, "otro"):
        shutil.copytree(falcon, folder / "weights" / name)
    # at this size Cog gives weights a layer of their own
    assert (folder / "weights" / falcon.name / "model.safetensors").stat().st_size > 10 * 2**20
    (folder / ".env").write_text(f"HUGGINGFACE_HUB_TOKEN={SECRET}\n")
    (folder / "llm" / "__pycache__").mkdir()
    (folder / "llm" / "__pycache__" / "words.cpython-313.pyc").touch()
    return folder


@pytest.fixture(scope="module")
def cog() -> str:
    if shutil.which("cog") is None:
        pytest.skip("cog build y cog predict no se han probado: la orden cog no está instalada")
    return "cog"


@pytest.fixture(scope="module")
def built(cog: str, project: Path) -> Iterator[str]:
    """The image that cog build makes."""
    name = f"falcon-rw-1b-{uuid.uuid4().hex}"
    run = subprocess.run([cog, "build", "-t", name], cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    yield name
    docker("image", "rm", "--force", name)


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> str:
    given: str | None = request.config.getoption("image")
    name: str = given or request.getfixturevalue("built")
    return name


# What cog makes and runs


def test_the_schema_in_the_label_is_ours(built: str) -> None:
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", built))
    theirs, ours = json.loads(labels["run.cog.openapi_schema"]), schema.read(ROOT / "predict.py").schema
    for document in (theirs, ours):
        # of the command in one, of the package in the other
        del document["info"]["version"]
    assert theirs == ours


def predict(cog: str, project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([cog, "predict", *arguments], cwd=project, capture_output=True, text=True)


def test_cog_predict_prints_the_pieces_of_the_answer(cog: str, project: Path) -> None:
    inputs = [word for name, value in SHORT.items() for word in ("-i", f"{name}={value}")]
    run = predict(cog, project, *inputs)
    assert run.returncode == 0, run.stderr
    pieces = json.loads(run.stdout)
    assert pieces and all(isinstance(piece, str) for piece in pieces)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-i", "pregunta=a", "-i", "temperature=3"], "temperature"),
        (["-i", "pregunta=a", "-i", "nada=1"], "nada"),
        ([], "pregunta"),
    ],
)
def test_cog_predict_refuses_bad_inputs(cog: str, project: Path, arguments: list[str], named: str) -> None:
    run = predict(cog, project, *arguments)
    assert run.returncode == 1
    assert named in run.stderr + run.stdout


# The image


def inside(image: str, source: str) -> Any:
    """The JSON that a Python program prints in a container of its own."""
    return json.loads(docker("run", "--rm", "--network", "none", image, "python", "-c", source))


def test_the_image_holds_the_program_and_its_model(image: str, project: Path, falcon: Path) -> None:
    held = inside(
        image, "import json, pathlib; print(json.dumps([str(p) for p in pathlib.Path('.').rglob('*') if p.is_file()]))"
    )
    code = [path.relative_to(ROOT).as_posix() for path in (ROOT / "llm").rglob("*.py")]
    model = [f"weights/{falcon.name}/{path.name}" for path in falcon.iterdir()]
    # .cog aside, which cog build fills
    assert {path for path in held if not path.startswith(".cog/")} == {
        "cog.yaml",
        "predict.py",
        "requirements.txt",
        *code,
        *model,
    }
    assert ".cog/openapi_schema.json" in held
    assert SECRET not in docker("image", "history", "--no-trunc", image)


def ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health-check", trust_env=False).json()["status"] == "READY")
    except (httpx.TransportError, ValueError):
        return False


def wait(condition: Callable[[], bool], seconds: float = FINALLY) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.1)


@pytest.fixture
def container(image: str) -> Iterator[str]:
    """A container that the README's command started, on a port of its own."""
    command = re.findall(r"^docker run .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[-1]
    program, *arguments, _ = shlex.split(command.replace(":5001:", "::"))
    assert program == "docker"
    id = docker(*arguments, image)
    try:
        yield id
    finally:
        docker("rm", "--force", id)


def address(container: str) -> str:
    """The URL of the server, once it is ready. Docker has to publish it on one address alone."""
    (published,) = docker("port", container, "5000").splitlines()
    assert published.startswith(f"{server.HOST}:")
    url = f"http://{published}"
    wait(lambda: ready(url), FINALLY * 5)
    return url


def test_smoke_passes_on_the_container(container: str, project: Path, falcon_environment: dict[str, str]) -> None:
    run = subprocess.run(
        [project / "script" / "smoke", "--local", address(container)],
        capture_output=True,
        text=True,
        # as in the image, which sets no dtype
        env={**os.environ, **falcon_environment, "DTYPE": ""},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MAL" not in run.stdout


def test_docker_stop_lets_a_stream_end(container: str) -> None:
    url = address(container)
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream(
            "POST", f"{url}/predictions", json={"input": LONG}, headers=SSE, timeout=FINALLY, trust_env=False
        ) as stream,
    ):
        stream_events = events.read(stream.iter_bytes())
        assert next(name for name, _ in stream_events if name == "output")
        stop = pool.submit(docker, "stop", container)
        # the server takes no more requests
        wait(lambda: not ready(url))
        assert not stop.done()
        *pieces, (name, end) = stream_events
        assert len(pieces) > 1 and (name, end["status"]) == ("completed", "succeeded")
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"


# compose.yaml


class Site:
    """HAProxy in front of two servers, as compose.yaml starts them."""

    def __init__(self, image: str, folder: Path) -> None:
        shutil.copytree(ROOT / "deploy", folder)
        path = folder / "compose.yaml"
        text = path.read_text(encoding="utf-8")
        for ours, another in (("image: falcon-rw-1b", f"image: {image}"), ("127.0.0.1:5000:", "127.0.0.1::")):
            assert text.count(ours) == 1
            text = text.replace(ours, another)
        path.write_text(text, encoding="utf-8")
        self._compose = ("compose", "-f", path, "-p", f"prueba-{uuid.uuid4().hex}", "--profile", "cpu")

    def run(self, *arguments: str) -> str:
        return docker(*self._compose, *arguments)

    def servers(self) -> list[str]:
        """The ids of the servers' containers."""
        return self.run("ps", "--all", "--quiet", "cpu").split()

    def url(self) -> str:
        return f"http://{self.run('port', 'proxy', '5000')}"


@pytest.fixture(scope="module")
def site(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(image, tmp_path_factory.mktemp("compose") / "deploy")
    try:
        site.run("up", "--detach", "--scale", "cpu=2", "--wait", "--wait-timeout", "600")
        yield site
    finally:
        site.run("down", "--timeout", "10")


def healthy(container: str) -> bool:
    return docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy"


def end_of(url: str, max_tokens: int, begun: threading.Semaphore) -> str:
    """How a prediction ends for the client that streams it. `begun` counts those that have some text."""
    body = {"input": {**LONG, "max_tokens": max_tokens}}
    try:
        with httpx.stream(
            "POST", f"{url}/predictions", json=body, headers=SSE, timeout=FINALLY * 5, trust_env=False
        ) as response:
            if response.status_code != httpx.codes.OK:
                return str(response.status_code)
            end = ""
            for name, data in events.read(response.iter_bytes()):
                if name == "output" and not end:
                    begun.release()
                    end = "cut"
                end = str(data["status"]) if name == "completed" else end
            return end
    except (httpx.RemoteProtocolError, httpx.ReadError):
        return "cut"


def test_two_servers_answer_96_clients(site: Site) -> None:
    assert len(site.servers()) == 2 and all(map(healthy, site.servers()))
    url = site.url()
    assert url.startswith(f"http://{server.HOST}:")
    with ThreadPoolExecutor(96) as clients:
        for _ in range(2):
            ends = list(clients.map(lambda _: end_of(url, 8, threading.Semaphore()), range(96)))
            assert set(ends) == {"succeeded"}


def test_a_server_is_confined(site: Site) -> None:
    program = """
import json, pathlib, socket
def works(what):
    try:
        what()
    except OSError:
        return False
    return True
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/1/status").read_text().splitlines())
print(json.dumps({
    "privileges": [int(status[name], 16) for name in ("CapEff", "CapBnd")],
    "gains none": status["NoNewPrivs"].strip(),
    "writes beside the program": works(pathlib.Path("/src/x").touch),
    "writes in /tmp": works(pathlib.Path("/tmp/x").touch),
    "knows other names": works(lambda: socket.getaddrinfo("huggingface.co", 443)),
    "reaches other machines": works(lambda: socket.create_connection(("1.1.1.1", 443), 3)),
}))
"""
    for container in site.servers():
        assert json.loads(docker("exec", container, "python", "-c", program)) == {
            "privileges": [0, 0],
            "gains none": "1",
            "writes beside the program": False,
            "writes in /tmp": True,
            "knows other names": False,
            "reaches other machines": False,
        }


def test_a_killed_server_costs_only_what_it_ran_and_a_stopped_one_nothing(site: Site) -> None:
    killed, stopped = site.servers()
    url, begun = site.url(), threading.Semaphore(0)
    with ThreadPoolExecutor(96) as clients:

        def start(max_tokens: int) -> list[Any]:
            futures = [clients.submit(end_of, url, max_tokens, begun) for _ in range(96)]
            # on both servers
            for _ in range(48):
                assert begun.acquire(timeout=FINALLY)
            return futures

        running = start(200)
        docker("kill", killed)
        ends = [future.result() for future in running]
        # what ran on the killed server, and what HAProxy gave it while it died
        assert 0 < ends.count("cut") <= 32 <= ends.count("succeeded")
        assert set(ends) <= {"succeeded", "cut", "502"}
        assert end_of(url, 8, begun) == "succeeded"

        docker("start", killed)
        wait(lambda: healthy(killed), FINALLY * 5)
        # HAProxy has to find the server too
        wait(lambda: served(site, 2))

        running = start(200)
        docker("stop", stopped)
        assert {future.result() for future in running} == {"succeeded"}
        assert docker("inspect", "--format", "{{.State.ExitCode}}", stopped) == "0"


def served(site: Site, servers: int) -> bool:
    """Whether HAProxy counts so many active servers, in its metrics. A server's container may ask for them."""
    source = "import urllib.request; print(urllib.request.urlopen('http://proxy:8404/metrics').read().decode())"
    text = docker("exec", site.servers()[0], "python", "-c", source)
    return f'\nhaproxy_backend_active_servers{{proxy="predictions"}} {servers}\n' in text
