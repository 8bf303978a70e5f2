"""script/push, as its user runs it, up to the command `cog`, which is one of ours that notes what it was given."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm import weights
from llm.settings import FALCON, FALCON_COMMIT, ROOT, Settings
from tests.hub import Hub
from tests.processes import FINALLY, Marked
from tests.project import copied

Push = Callable[..., subprocess.CompletedProcess[str]]

NAME = "r8.im/usuario/modelo"
LARGE = 11 * 2**20
"""Bytes of a file for which Cog makes a layer."""

# What it was given: its arguments, and of each file the size and where its bytes are on the disk.
COG = """\
import json, os, pathlib, sys
files = {str(p): [p.lstat().st_size, p.lstat().st_ino] for p in pathlib.Path().rglob("*") if p.is_file()}
pathlib.Path(os.environ["NOTES"]).write_text(json.dumps({"arguments": sys.argv[1:], "files": files}))
print("You are not logged in", file=sys.stderr)
sys.exit(3)
"""

SECRETS = [".env", ".env~", ".envrc", ".env.bak", ".env.local", ".env.swp", ".env.save", "#.env#", ".#.env", "._.env"]
SECRETS += ["env.local", "env.bak", "prod.env", "token", "token.json", "hf.token", ".netrc", "settings.py~", "a.py.swp"]


def model(weights_dir: Path, model_id: str, commit: str) -> Path:
    """A model's folder with its manifest. Whether it can be loaded is no matter here."""
    settings = replace(Settings.read(), model_id=model_id, revision=None, weights_dir=weights_dir)
    with weights.workspace(settings.folder) as work:
        (work / "config.json").write_text("{}")
        large(work / "model.safetensors")
        weights.publish(work, settings, commit)
    return settings.folder


def large(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(LARGE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project as its user has it by now: .venv, a demo and an unfinished model, secrets, caches."""
    folder = copied(tmp_path / "project")
    large(folder / ".venv" / "bin" / "ruff")
    large(folder / ".venv" / "lib" / "torch" / "libtorch.so")
    (folder / ".env").write_text("HUGGINGFACE_HUB_TOKEN=hf_secreto\nMODEL_ID=otra/cosa\nMODEL_REVISION=rama\n")
    large(folder / ".mypy_cache" / "3.13" / "cache.db")
    large(folder / ".git" / "objects" / "pack")
    model(folder / "weights", "HuggingFaceTB/SmolLM2-135M-Instruct", "rueda")
    large(folder / "weights" / ".otro.partial" / "model.safetensors")
    return folder


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """What `cog` wrote down, once it has run."""
    return tmp_path / "notes.json"


@pytest.fixture
def push(project: Path, notes: Path, tmp_path: Path) -> Push:
    """Run script/push with its arguments, from a folder that is not the project's."""
    cog = tmp_path / "bin" / "cog"
    cog.parent.mkdir()
    cog.write_text(f"#!{sys.executable}\n{COG}")
    cog.chmod(0o755)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        mine = {name: value for name, value in os.environ.items() if name not in ("WEIGHTS_DIR", "HF_TOKEN")}
        path = os.pathsep.join([str(cog.parent), os.environ["PATH"]])
        environment = {**mine, "PATH": path, "NOTES": str(notes), "HF_ENDPOINT": "http://127.0.0.1:1", **variables}
        command = [str(project / "script" / "push"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def pushed(notes: Path) -> tuple[list[str], dict[str, Any]]:
    content = json.loads(notes.read_text())
    return content["arguments"], content["files"]


def test_cog_gets_what_the_image_needs_and_nothing_else(project: Path, push: Push, notes: Path) -> None:
    falcon = model(project / "weights", FALCON, FALCON_COMMIT)
    (project / "mi_modulo.py").write_text("")
    result = push(NAME, "--no-cache", "--progress", "plain")

    arguments, files = pushed(notes)
    assert arguments == ["push", "--separate-weights", NAME, "--no-cache", "--progress", "plain"]
    code = {f"llm/{path.name}" for path in (ROOT / "llm").glob("*.py")}
    texts = {"config.json", "model.safetensors", "manifest.json"}
    expected = {".dockerignore", "cog.yaml", "predict.py", "requirements.txt", "mi_modulo.py"}
    assert files.keys() == expected | code | {f"weights/falcon-rw-1b/{name}" for name in texts}
    # the weights are not copied
    weight = (falcon / "model.safetensors").stat()
    assert files["weights/falcon-rw-1b/model.safetensors"] == [weight.st_size, weight.st_ino]
    # what cog says, and its exit status, are its own
    assert (result.returncode, result.stderr) == (3, "You are not logged in\n")
    assert f"Publicando weights/falcon-rw-1b ({FALCON}, {FALCON_COMMIT[:7]}) en {NAME}" in result.stdout
    assert sorted(path.name for path in (project / "weights").iterdir()) == [
        ".otro.partial",
        "falcon-rw-1b",
        "smollm2-135m-instruct",
    ]


def test_another_model_which_is_fetched_first(project: Path, push: Push, notes: Path) -> None:
    for name, before, after in (
        ("cog.yaml", FALCON, "org/Otro"),
        (".dockerignore", "!weights/falcon-rw-1b", "!weights/otro"),
    ):
        text = (project / name).read_text()
        assert before in text
        (project / name).write_text(text.replace(before, after))
    with Hub() as hub:
        hub.add("org/Otro", {"config.json": b"{}", "model.safetensors": bytes(LARGE)})
        hub.tokens["hf_secreto"] = True
        # in the project, and not named in .dockerignore
        result = push(NAME, HF_ENDPOINT=hub.endpoint, WEIGHTS_DIR="modelos")
    assert result.returncode == 3, result.stderr
    _, files = pushed(notes)
    assert {Path(file).parts[:2] for file in files if file.startswith(("weights", "modelos"))} == {("weights", "otro")}
    assert (project / "modelos" / "otro" / "model.safetensors").is_file()
    assert "hf_secreto" not in result.stdout + result.stderr


def test_a_link_to_weights_of_the_users_own_is_followed(project: Path, push: Push, notes: Path, tmp_path: Path) -> None:
    falcon = model(project / "weights", FALCON, FALCON_COMMIT)
    (falcon / "manifest.json").unlink()
    elsewhere = tmp_path / "blob"
    shutil.move(falcon / "model.safetensors", elsewhere)
    (falcon / "model.safetensors").symlink_to(elsewhere)
    push(NAME)
    _, files = pushed(notes)
    assert files["weights/falcon-rw-1b/model.safetensors"] == [LARGE, elsewhere.stat().st_ino]


def test_what_editors_and_tools_leave_of_secrets_stays_here(project: Path, push: Push, notes: Path) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    secrets = {f"{folder}{name}" for folder in ("", "llm/") for name in SECRETS}
    for name in secrets:
        (project / name).write_text("HF_TOKEN=hf_secreto\n" if name == ".env" else "hf_secreto")
    (project / "llm" / "env.py").write_text("")
    assert push(NAME).returncode == 3
    _, files = pushed(notes)
    assert not secrets & files.keys() and "llm/env.py" in files

    shutil.rmtree(project / ".git")
    subprocess.run(["git", "init", "--quiet", project], check=True)
    offered = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not secrets & set(offered) and {".env.example", "llm/env.py"} <= {*offered}


def test_what_is_no_file_is_passed_over(project: Path, push: Push, notes: Path) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    (project / ".#predict.py").symlink_to("ana@portatil.1234:1700000000")
    (project / "roto.py").symlink_to("no")
    os.mkfifo(project / "llm" / "tubo")
    (project / "datos").mkdir()
    (project / "datos" / "vuelta").symlink_to(".")
    result = push(NAME)
    assert result.returncode == 3
    _, files = pushed(notes)
    assert "predict.py" in files and not {".#predict.py", "roto.py", "llm/tubo"} & files.keys()
    left_out = [line for line in result.stdout.splitlines() if line.startswith("Se deja fuera")]
    why = "no es un archivo, o es un enlace que no lleva a ninguno"
    assert sorted(left_out) == [f"Se deja fuera {name}: {why}" for name in ("datos/vuelta", "llm/tubo", "roto.py")]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_what_cannot_be_copied_is_named(project: Path, push: Push, notes: Path) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    # a file that no one can read whole
    (project / "raro").symlink_to("/proc/self/mem")
    refused(push(NAME), notes, "No se puede copiar raro: corrija sus permisos o quítelo de la carpeta")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_cog_and_leaves_nothing(
    project: Path, push: Push, notes: Path, tmp_path: Path, processes: Marked, number: signal.Signals, status: int
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    cog = tmp_path / "bin" / "cog"
    cog.write_text(cog.read_text().replace("sys.exit(3)", "import time; time.sleep(600)"))
    with ThreadPoolExecutor() as pool:
        result = pool.submit(push, NAME, **processes.environment)
        while not notes.exists():
            assert not result.done(), result.result()
        (command,) = processes.alive("cli.push")
        command.send_signal(number)
        assert result.result(FINALLY).returncode == status
    assert not list((project / "weights").glob(".push-*"))
    assert not processes.alive()


def refused(result: subprocess.CompletedProcess[str], notes: Path, line: str) -> None:
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and line in result.stderr
    assert not notes.exists()


def test_altered_weights_are_not_pushed(project: Path, push: Push, notes: Path) -> None:
    falcon = model(project / "weights", FALCON, FALCON_COMMIT)
    weight = falcon / "model.safetensors"
    stat = weight.stat()
    with weight.open("r+b") as file:
        file.write(b"x")
    # as a copy that keeps the times would have it
    os.utime(weight, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(push(NAME), notes, "weights/falcon-rw-1b/model.safetensors está alterado")


def test_weights_that_cannot_be_fetched(push: Push, notes: Path) -> None:
    refused(push(NAME), notes, "Sin conexión con 127.0.0.1: compruebe la red y repita")


def test_a_model_that_dockerignore_leaves_out(project: Path, push: Push, notes: Path) -> None:
    text = (project / "cog.yaml").read_text()
    (project / "cog.yaml").write_text(text.replace(FALCON, "org/Otro"))
    refused(push(NAME), notes, ".dockerignore no deja pasar weights/otro, el modelo de cog.yaml")


def test_a_cog_yaml_that_is_none(project: Path, push: Push, notes: Path) -> None:
    (project / "cog.yaml").write_text("environment:\n  - MODEL_ID\n")
    refused(push(NAME), notes, "cog.yaml no se entiende")


@pytest.mark.parametrize(
    "name", ["../x", ";rm", "", " ", "x", "a/b c", "A/b", "r8.im/a", "r8.im/a/b/c", "a/-b", "a/b\n", "a/b:c1"]
)
def test_a_name_that_is_none(push: Push, notes: Path, name: str) -> None:
    refused(push(name), notes, "no es un nombre de Replicate: se escribe USUARIO/NOMBRE, en minúsculas")


def test_a_name_without_the_registry(project: Path, push: Push, notes: Path) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    push("usuario/modelo")
    arguments, _ = pushed(notes)
    assert arguments == ["push", "--separate-weights", NAME]


def test_without_cog(push: Push, notes: Path) -> None:
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if not Path(folder, "cog").exists())
    refused(push(NAME, PATH=path), notes, "Falta cog: instálelo")


def test_without_a_name(push: Push, notes: Path) -> None:
    result = push()
    assert result.returncode == 2
    assert result.stderr.startswith("script/push no entiende la orden") and result.stderr.count("\n") == 1
    assert not notes.exists()
