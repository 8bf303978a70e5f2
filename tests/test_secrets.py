"""A token, wherever a user puts it, goes to the hub and nowhere else."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import project, words
from tests.support.gateway import Gateway
from tests.support.hub import Hub, files_of
from tests.support.network import free_port
from tests.support.processes import FINALLY, Marked
from tests.support.programs import Programs
from tests.support.registry import Registry

pytestmark = pytest.mark.slow

# random, for this file is searched too
GOOD, NO_ACCESS, WRONG, REPLICATE = TOKENS = [f"hf_{uuid.uuid4().hex}" for _ in range(4)]
MODEL = "prueba/falcon-rw-1b"

# Keeps a copy of what it is to publish.
COG = """\
import os, pathlib, shutil, sys
if sys.argv[1:] == ["--version"]:
    print("cog version 0.23.1")
    sys.exit()
shutil.copytree(pathlib.Path(), os.environ["PUBLISHED"])
print(*sys.argv)
"""


class Home:
    """A user's folder with the project. All commands write below it, their output included."""

    def __init__(self, folder: Path, registry: str, variables: dict[str, str]) -> None:
        self.folder = folder
        self.project = project.copied(folder / "project")
        self.outputs = folder / "outputs"
        programs = Programs(folder / "programs", registry)
        programs.write("cog", f"#!{sys.executable}\n{COG}")
        for path in (self.outputs, folder / "home", folder / "tmp"):
            path.mkdir()
        unset = dict.fromkeys(("MODEL_REVISION", "DTYPE", "WEIGHTS_DIR", "HF_HUB_OFFLINE", "HF_HOME"), "")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in unset},
            **programs.environment,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "PUBLISHED": str(folder / "published"),
            "NO_PROXY": "127.0.0.1",
            "MODEL_ID": MODEL,
            **variables,
        }

    def dotenv(self, text: str) -> None:
        (self.project / ".env").write_text(text)

    def start(self, *command: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start script/NAME with its arguments; its output goes to a file of its own."""
        path = self.outputs / f"{len(list(self.outputs.iterdir()))}"
        with path.open("wb") as output:
            return subprocess.Popen(
                [self.project / "script" / command[0], *command[1:]],
                cwd=self.folder,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, *command: str, **variables: str) -> int:
        return self.start(*command, **variables).wait(FINALLY)

    def written(self) -> Iterator[Path]:
        """Each file but .env itself."""
        return (path for path in self.folder.rglob("*") if path.is_file() and path != self.project / ".env")


@pytest.fixture
def hub(falcon: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.tokens = {GOOD: True, NO_ACCESS: False}
        hub.add(MODEL, files_of(falcon), gated=True)
        yield hub


def test_a_token_is_in_nothing_that_is_written(hub: Hub, registry: Registry, tmp_path: Path, processes: Marked) -> None:
    home = Home(tmp_path, registry.host, {"HF_ENDPOINT": hub.endpoint, **processes.environment})
    repository = hub.repositories[MODEL]

    # all that the hub may answer to a token
    home.dotenv(f"HUGGINGFACE_HUB_TOKEN={WRONG}\nREPLICATE_API_TOKEN={REPLICATE}\n")
    assert home.run("weights") == 1
    assert home.run("weights", HUGGINGFACE_HUB_TOKEN=NO_ACCESS) == 1
    home.dotenv(f"HUGGINGFACE_HUB_TOKEN={GOOD}\nREPLICATE_API_TOKEN={REPLICATE}\n")
    repository.statuses[None] = [429]
    assert home.run("weights") == 1
    repository.describe = lambda body: []
    assert home.run("weights", HF_DEBUG="1") == 1
    repository.describe = lambda body: body
    repository.delivered["model.safetensors"] = b"x"
    assert home.run("weights") == 1
    repository.delivered.clear()
    # an invalid token, and a line of .env that cannot be parsed
    assert home.run("weights", HUGGINGFACE_HUB_TOKEN=f"{GOOD} {GOOD}") == 1
    home.dotenv(f'HUGGINGFACE_HUB_TOKEN="{GOOD}\n')
    assert home.run("weights") == 1

    # a download with the token, after a cut
    home.dotenv(f"HUGGINGFACE_HUB_TOKEN={GOOD}\nREPLICATE_API_TOKEN={REPLICATE}\n")
    repository.cut_after["model.safetensors"] = [100_000]
    assert home.run("weights", HF_TOKEN=NO_ACCESS) == 0
    assert {request.token for request in hub.requests if request.path.startswith("/storage/")} <= {GOOD}

    # predictions, good and bad; for the first a model would do no more than for those of the server below
    predictor = home.project / "predict.py"
    ours = predictor.read_text()
    predictor.write_text(words.source())
    assert home.run("predict", "-i", "pregunta=Once", "-i", "max_tokens=2", "-o", "respuesta.txt") == 0
    predictor.write_text(ours)
    assert home.run("predict", "-i", "pregunta=Once", "-i", "seed=x") == 1
    port = free_port()
    server = home.start("serve", "--port", str(port), HF_TOKEN=NO_ACCESS, COG_LOG_LEVEL="debug")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=FINALLY) as http:
        while b"curl" not in b"".join(path.read_bytes() for path in home.outputs.iterdir()):
            assert server.poll() is None
            time.sleep(0.1)
        answers = [http.get(path) for path in ("/", "/health-check", "/openapi.json")]
        for inputs in ({"pregunta": "Once", "max_tokens": 2}, {"pregunta": "Once", "prompt_template": "x"}, {}):
            answers.append(http.post("/predictions", json={"input": inputs}))
    (home.outputs / "answers").write_text("\n".join(f"{answer.headers}\n{answer.text}" for answer in answers))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 200, 422]
    server.terminate()
    server.wait(FINALLY)

    # a push
    (home.project / "weights" / "falcon-rw-1b" / "manifest.json").unlink()
    for name in (".env~", "token.json", "llm/.env.bak"):
        (home.project / name).write_text(GOOD)
    with Gateway("http://127.0.0.1:1", model="usuario/modelo") as gateway:
        assert home.run("push", "usuario/modelo", REPLICATE_BASE_URL=gateway.url) == 1
        gateway.token = REPLICATE
        assert home.run("push", "usuario/modelo", REPLICATE_BASE_URL=gateway.url) == 0
    assert (home.folder / "published" / "predict.py").is_file()
    for name in (".env~", "token.json", "llm/.env.bak"):
        (home.project / name).unlink()

    assert not [path for path in home.written() if any(token.encode() in path.read_bytes() for token in TOKENS)]
