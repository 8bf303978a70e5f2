""".ci/image and .ci/registry, with a fake python and uv: each makes its environment once. What workflows may use."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm.weights.settings import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that both read, and a script/test that prints its arguments."""
    for name in (".ci/image", ".ci/registry", "cog.yaml", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    program(tmp_path / "script" / "test", 'echo "$@"')
    return tmp_path


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def python(path: Path, version: str) -> None:
    """A python that prints its version, and makes an environment whose python adds its arguments to the file pip."""
    create = """mkdir -p .venv-image/bin && cd .venv-image/bin && echo 'echo "$@" >>pip' >python && chmod +x python"""
    program(path, f'case "$*" in *"-m venv"*) {create};; *) echo {version};; esac')


def image(checkout: Path) -> subprocess.CompletedProcess[str]:
    # as pyenv's shims for versions that are not installed: first on PATH, and they fail
    for name in ("python3", "python3.13"):
        if not (checkout / "bin" / name).exists():
            program(checkout / "bin" / name, "exit 127")
    environment = {"PATH": f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(checkout)}
    return subprocess.run([checkout / ".ci" / "image"], env=environment, capture_output=True, text=True)


def test_without_the_images_python_one_line_says_that_nothing_was_tested(checkout: Path) -> None:
    python(checkout / "bin" / "python3", "3.12")
    run = image(checkout)
    assert (run.returncode, run.stdout) == (0, "")
    assert run.stderr == "Los paquetes de la imagen no se han probado: falta Python 3.13\n"


@pytest.mark.parametrize("place", ["bin/python3.13", "bin/python3", ".pyenv/versions/3.13.7/bin/python"])
def test_the_images_environment_is_made_once_for_each_requirements_txt(checkout: Path, place: str) -> None:
    python(checkout / place, "3.13")
    for _ in range(2):
        run = image(checkout)
        assert (run.returncode, run.stdout) == (0, "tests/image.py\n"), run.stderr
    with (checkout / "requirements.txt").open("a") as file:
        file.write("# otra\n")
    assert image(checkout).returncode == 0
    notes = (checkout / "pip").read_text().splitlines()
    assert [note.split()[:3] for note in notes] == [["-m", "pip", "install"]] * 2


def test_a_failed_installation_is_repeated(checkout: Path) -> None:
    python(checkout / "bin" / "python3", "3.13")
    assert image(checkout).returncode == 0
    pip, requirements = checkout / "pip", checkout / "requirements.txt"
    pinned = requirements.read_text()
    requirements.write_text("otra\n")
    # the fake pip cannot write, and fails
    pip.unlink()
    pip.mkdir()
    assert image(checkout).returncode != 0
    pip.rmdir()
    requirements.write_text(pinned)
    assert image(checkout).returncode == 0
    assert pip.read_text()


WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_a_workflow_pins_each_action_by_commit_and_names_its_version(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)] == []


def test_the_publishing_workflow_uses_no_cache() -> None:
    text = (ROOT / ".github" / "workflows" / "push.yml").read_text()
    assert not re.search(r"actions/cache|^ +cache", text, re.MULTILINE)


def test_ci_run_ends_with_the_registrys_torch() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == ".ci/registry"


def registry(checkout: Path, installed: str, fetched: str = "2.13.0") -> subprocess.CompletedProcess[str]:
    """Run .ci/registry with these versions of torch in .venv and in uv's environment. The file notes has uv's calls."""
    program(checkout / "script" / "setup", "true")
    for folder, torch in ((".venv", installed), ("made", fetched)):
        # answers the question for torch's version, and prints all other arguments
        check = f"""*version*torch*) exec {sys.executable} -c 'import sys; sys.exit("+" in "{torch}")'"""
        program(checkout / folder / "bin" / "python", f'case "$*" in {check};; *) echo "$@";; esac')
    uv = """echo "$1 $2" >>notes
case $1 in venv) rm -rf .venv-registry && cp -r made .venv-registry;; pip) [ ! -e fails ];; esac"""
    program(checkout / ".venv" / "bin" / "uv", uv)
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run([checkout / ".ci" / "registry"], env=environment, capture_output=True, text=True)


def test_the_registrys_torch_is_not_installed_where_venv_has_it(checkout: Path) -> None:
    run = registry(checkout, installed="2.13.0")
    assert (run.returncode, run.stdout) == (0, "")
    assert run.stderr == "El torch de .venv es el del registro de paquetes: ya se ha probado con él\n"
    assert not (checkout / "notes").exists()


def test_the_environment_of_the_registrys_torch_is_made_once_for_each_requirements_dev_txt(checkout: Path) -> None:
    for changed in (False, False, True):
        if changed:
            with (checkout / "requirements-dev.txt").open("a") as file:
                file.write("# otra\n")
        run = registry(checkout, installed="2.13.0+cpu")
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("-m pytest ") and run.stdout.endswith(" -m not slow or interpreted\n")
    assert (checkout / "notes").read_text().splitlines() == ["venv --no-config", "pip install"] * 2


def test_an_environment_with_another_torch_is_an_error(checkout: Path) -> None:
    for _ in range(2):
        run = registry(checkout, installed="2.13.0+cpu", fetched="2.13.0+cpu")
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.endswith("no es el del registro de paquetes: quite las variables UV_… del entorno y repita\n")


def test_a_failed_installation_of_the_registrys_torch_is_repeated(checkout: Path) -> None:
    (checkout / "fails").touch()
    assert registry(checkout, installed="2.13.0+cpu").returncode != 0
    (checkout / "fails").unlink()
    assert registry(checkout, installed="2.13.0+cpu").returncode == 0
