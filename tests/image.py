"""The server's contract and the logits, with the image's packages over a folder that holds the image's files.

.ci/image makes the environment and runs this file; `script/test` alone does not.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import server, staging
from llm.devices import linear
from llm.weights.settings import ROOT
from tests.support import logits
from tests.support.client import Client
from tests.test_server import (  # noqa: F401
    test_a_client_that_leaves_frees_its_place,
    test_a_streamed_prediction_is_the_whole_one,
    test_a_whole_float_is_an_integer,
    test_invalid_json_is_400,
    test_openapi_is_the_schema_of_predict_py,
    test_the_answer_streams_and_a_cancel_ends_it,
    test_the_same_seed_gives_the_same_text,
    test_the_setup_log_says_what_was_loaded,
    test_what_the_predictor_refuses_fails_with_its_line,
    test_what_the_schema_forbids_is_422_with_the_field,
)

PYTHON = ROOT / ".venv-image" / "bin" / "python"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def image(falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that .dockerignore lets into the image, and a tiny falcon in its model's place."""
    folder = tmp_path_factory.mktemp("image")
    staging.stage(folder, staging.dockerignore())
    shutil.copytree(falcon, folder / "weights" / falcon.name)
    return folder


@pytest.fixture(scope="module")
def falcon_server(image: Path, config: dict[str, Any]) -> Iterator[Client]:
    """Replaces conftest.py's server in the tests of test_server.py."""
    # the developer's environment may set these
    unset = {"MODEL_REVISION": "", "WEIGHTS_DIR": "", "DTYPE": ""}
    environment = unset | dict(line.split("=", 1) for line in config["environment"])
    with server.running(python=PYTHON, folder=image, environment=environment) as running:
        running.wait_until_ready()
        yield Client(running)


def test_the_server_runs_cog_yamls_python_and_coglet(falcon_server: Client, config: dict[str, Any]) -> None:
    version = falcon_server.get("/health-check")["version"]
    assert version["python"].startswith(config["build"]["python_version"] + ".")
    assert version["coglet"] == config["build"]["sdk_version"]


def test_logits_are_as_near_to_float32_as_those_of_transformers(image: Path, bfloat16_folder: Path) -> None:
    result = run("logits.py", image, bfloat16_folder)
    assert len(result["distances"]) == len(logits.CASES) / (1 if linear.BFloat16Linear.is_fast() else 2)
    assert max(result["distances"]) < logits.MOST


@pytest.mark.skipif(not linear.layout(chosen=None), reason="there is no packed layout for this processor")
def test_tokens_and_logits_are_batch_invariant(image: Path, bfloat16_folder: Path) -> None:
    result = run("company.py", image, bfloat16_folder)
    if not result["batch_invariant"]:
        pytest.skip("this processor is not batch-invariant, and setup says so")
    assert result["tokens"] == result["logits"] == result["requests"] > 0


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_every_kernel_compiles_for_a_gpu(capability: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    # in another process: here it interprets
    environment.pop("TRITON_INTERPRET", None)
    command = [str(PYTHON), "-m", "tests.support.compile_kernels", str(capability)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def run(program: str, image: Path, *arguments: Path) -> Any:
    """What a program of tests/support prints in the image's environment, whose torch has to be the locked one."""
    process = subprocess.run(
        [PYTHON, ROOT / "tests" / "support" / program, *arguments],
        env={**os.environ, "PYTHONPATH": str(image)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert f"torch=={result['torch'].partition('+')[0]}" in (ROOT / "requirements.txt").read_text().splitlines()
    return result
