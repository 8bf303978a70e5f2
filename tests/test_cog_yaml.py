"""cog.yaml, requirements.txt and .dockerignore, against the rules of the tool that reads them, which need not be here.

The rules are of replicate/cog, pkg/config: data/config_schema_v1.0.json, validate.go, env.go, torch_compatibility.json;
and pkg/dockerfile/base.go.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pathspec import GitIgnoreSpec

from cli import schema, server
from llm.weights.settings import FALCON, ROOT, Settings

# the keys that this project uses, and their types; any other is an error
ALLOWED: dict[str, Any] = {
    "build": {"gpu": bool, "cuda": str, "python_version": str, "python_requirements": str, "sdk_version": str},
    "environment": list,
    "predict": str,
}
# pkg/config/env.go
RESERVED = [
    *("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED"),
    *("R8_*", "REPLICATE_*", "CUDA_*", "NVIDIA_*", "NV_*", "PGET_*", "KUBERNETES_*"),
    *("HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER"),
]
# pkg/config/torch_compatibility.json, its rows for torch 2.11.0: each CUDA with each Python has a prebuilt base image
CUDAS, PYTHONS = {"12.6", "12.8", "12.9", "13.0"}, {"3.10", "3.11", "3.12", "3.13", "3.14"}
PREBUILT = {(cuda, python, "2.11.0") for cuda in CUDAS for python in PYTHONS}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return pinned(ROOT / "requirements.txt")


def pinned(path: Path) -> dict[str, str]:
    """Each package's version. As Cog reads them: a line is a package, a comment, or empty."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines), lines
    return dict(line.split("==") for line in lines)


def wrong(value: Any, allowed: Any, name: str = "cog.yaml") -> list[str]:
    """The keys and values in `value` that `allowed` does not allow."""
    if not isinstance(allowed, dict):
        return [] if type(value) is allowed else [f"{name}: {value!r}"]
    if not isinstance(value, dict):
        return [f"{name}: {value!r}"]
    return [
        error
        for key in value
        for error in (wrong(value[key], allowed[key], key) if key in allowed else [f"{name}: {key}"])
    ]


def reserved(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in RESERVED)


def test_cog_yaml_has_only_known_keys_and_types(config: dict[str, Any]) -> None:
    assert wrong(config, ALLOWED) == []
    assert config["build"]["gpu"] is True
    assert config["predict"] == f"predict.py:{schema.TARGET}"
    # predict.py's decorator sets it
    assert "concurrency" not in config


def test_a_wrong_key_or_type_is_found() -> None:
    # YAML reads a version without quotes as a number: 3.10 would be 3.1
    assert wrong({"build": {"python_version": 3.13, "gpus": True}, "predict": "p"}, ALLOWED) == [
        "python_version: 3.13",
        "build: gpus",
    ]


def test_the_pins_are_a_triple_with_a_prebuilt_base_image(config: dict[str, Any], pins: dict[str, str]) -> None:
    build = config["build"]
    assert build["python_requirements"] == "requirements.txt"
    assert (build["cuda"], build["python_version"], pins["torch"]) in PREBUILT


def test_the_runtime_packages_are_pinned(config: dict[str, Any], pins: dict[str, str]) -> None:
    assert set(pins) >= {"cog", "torch", "transformers", "accelerate", "huggingface-hub", "python-dotenv"}
    # cog build installs sdk_version and leaves out the line in requirements.txt
    assert config["build"]["sdk_version"] == pins["cog"]


def test_the_environment_has_no_reserved_name_and_no_token(config: dict[str, Any]) -> None:
    variables = dict(line.split("=", 1) for line in config["environment"])
    assert not any(reserved(name) for name in variables)
    assert not any("TOKEN" in name for name in variables)
    assert variables["MODEL_ID"] == FALCON
    # as the server has on one's own computer
    assert server.LIBRARIES.items() <= variables.items()


def test_cog_predict_answers_as_the_image_whatever_dotenv_says(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It mounts the project's folder, .env included, over the image's."""
    for name in os.environ.keys() & {"MODEL_REVISION", "WEIGHTS_DIR", "DTYPE", "HF_TOKEN", "HUGGINGFACE_HUB_TOKEN"}:
        monkeypatch.delenv(name)
    for line in config["environment"]:
        monkeypatch.setenv(*line.split("=", 1))
    image = Settings.read(tmp_path)
    names = re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE)
    (tmp_path / ".env").write_text("".join(f"{name}=otra\n" for name in names))
    assert "WEIGHTS_DIR" in names and Settings.read(tmp_path) == image
    (tmp_path / ".env").write_text("esto no es una línea")
    assert Settings.read(tmp_path) == image


def test_cog_predict_leaves_no_bytecode(config: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(ROOT / "llm" / "errors.py", tmp_path)
    environment = dict(line.split("=", 1) for line in config["environment"])
    subprocess.run([sys.executable, "-c", "import errors"], cwd=tmp_path, env=environment, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["errors.py"]


def test_the_documents_name_the_pinned_coglet(pins: dict[str, str]) -> None:
    for name in ("cog.yaml", "README.en.md", "docs/cog.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"COGLET_WHEEL=pypi:([\d.]*\d)", text)) == {pins["coglet"]}, name


def test_a_reserved_name_is_found() -> None:
    assert reserved("HF_ENDPOINT") and reserved("CUDA_VISIBLE_DEVICES")
    assert not reserved("MODEL_ID") and not reserved("HF_HOME")


# pathspec, as git, matches a pattern without a slash at any depth; Docker, at the top unless it begins with **/.
# A leading slash means the top to both.
def docker(patterns: str) -> GitIgnoreSpec:
    lines = [line for line in patterns.splitlines() if line and not line.startswith("#")]
    return GitIgnoreSpec.from_lines(re.sub(r"^(!?)(?!\*\*/)/?", r"\1/", line) for line in lines)


@pytest.fixture(scope="module")
def ignored() -> GitIgnoreSpec:
    return docker((ROOT / ".dockerignore").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".env.example",
        ".git/config",
        ".gitattributes",
        ".venv/bin/python",
        ".venv-image/bin/python",
        ".venv-registry/bin/python",
        ".ci/run",
        "tests/test_engine.py",
        "cli/server.py",
        "script/predict",
        "deploy/compose.yaml",
        "docs/bench/table.md",
        "examples/answer.py",
        "examples/javascript/node_modules/replicate/index.js",
        "README.md",
        "README.en.md",
        "llm/__pycache__/engine.cpython-313.pyc",
        ".pytest_cache/README.md",
        ".ruff_cache/x",
        ".mypy_cache/x",
        ".hypothesis/constants/x",
        "requirements.in",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        ".github/workflows/ci.yml",
        "weights/.push/predict.py",
        "weights/README.md",
        "weights/smollm2-135m-instruct/model.safetensors",
        "weights/otro/config.json",
        "weights/.falcon-rw-1b.partial/pytorch_model.bin.part",
    ],
)
def test_dockerignore_keeps_a_file_out_of_the_image(ignored: GitIgnoreSpec, path: str) -> None:
    assert ignored.match_file(path)


def test_the_image_holds_the_code_and_its_model(ignored: GitIgnoreSpec, config: dict[str, Any]) -> None:
    name = dict(line.split("=", 1) for line in config["environment"])["MODEL_ID"].split("/")[-1].lower()
    model = [f"weights/{name}/{file}" for file in ("config.json", "model.safetensors", "manifest.json")]
    code = [path.relative_to(ROOT).as_posix() for path in (ROOT / "llm").rglob("*.py")]
    # .cog: where cog build puts the schema, which the server reads
    held = ["predict.py", "cog.yaml", "requirements.txt", ".cog/openapi_schema.json", *code, *model]
    assert [path for path in held if ignored.match_file(path)] == []
    assert len(code) > 5


def test_dockers_patterns_are_read_as_docker_does() -> None:
    # unlike git: a name without a slash stands at the top, and a folder's exception goes over its parent's exclusion
    spec = docker("cli\n**/*.pyc\nweights/*\n!weights/uno\n")
    assert spec.match_file("cli/server.py") and not spec.match_file("llm/cli/x.py")
    assert spec.match_file("llm/x.pyc")
    assert spec.match_file("weights/dos/a.bin") and not spec.match_file("weights/uno/a/b.bin")
