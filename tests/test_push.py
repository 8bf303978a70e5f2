"""script/push, as its user runs it, up to the command `cog`: a stand-in that notes what it is given."""

import json
import os
import pty
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli import schema
from cli.push import image_config
from llm.errors import UserError
from llm.weights import checkpoint
from llm.weights.settings import FALCON, FALCON_COMMIT, ROOT, Settings
from tests.support.gateway import Gateway
from tests.support.hub import Hub
from tests.support.processes import FINALLY, Marked, until
from tests.support.programs import Programs
from tests.support.project import copied
from tests.support.registry import Registry

pytestmark = pytest.mark.slow

Push = Callable[..., subprocess.CompletedProcess[str]]

NAME = "usuario/modelo"
LARGE = 11 * 2**20
"""Bytes of a file for which Cog makes a layer."""

SECRETS = [".env", ".env~", ".envrc", ".env.bak", ".env.local", ".env.swp", ".env.save", "#.env#", ".#.env", "._.env"]
SECRETS += ["env.local", "env.bak", "prod.env", "token", "token.json", "hf.token", ".netrc", "settings.py~", "a.py.swp"]


def model(weights_dir: Path, model_id: str, commit: str) -> Path:
    """A model's folder with its manifest; nothing here loads its weights."""
    settings = replace(Settings.read(), model_id=model_id, revision=None, weights_dir=weights_dir)
    with checkpoint.workspace(settings.folder) as work:
        (work / "config.json").write_text("{}")
        write_large(work / "model.safetensors")
        checkpoint.publish(work, settings, commit)
    return settings.folder


def write_large(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(LARGE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project in use: .venv, a demo and an unfinished model, secrets, caches."""
    folder = copied(tmp_path / "project")
    write_large(folder / ".venv" / "bin" / "ruff")
    write_large(folder / ".venv" / "lib" / "torch" / "libtorch.so")
    (folder / ".env").write_text("HUGGINGFACE_HUB_TOKEN=hf_secreto\nMODEL_ID=otra/cosa\nMODEL_REVISION=rama\n")
    write_large(folder / ".mypy_cache" / "3.13" / "cache.db")
    write_large(folder / ".git" / "objects" / "pack")
    model(folder / "weights", "HuggingFaceTB/SmolLM2-135M-Instruct", "rueda")
    write_large(folder / "weights" / ".otro.partial" / "model.safetensors")
    return folder


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """The notes of `cog`, once it has run."""
    return tmp_path / "notes.json"


@pytest.fixture
def image(registry: Registry) -> str:
    """The name that cog is given."""
    return f"{registry.host}/{NAME}"


@pytest.fixture
def programs(tmp_path: Path, registry: Registry) -> Programs:
    return Programs(tmp_path / "programs", registry.host)


@pytest.fixture
def environment(programs: Programs, notes: Path) -> dict[str, str]:
    """Variables that give script/push those programs and none of the developer's settings."""
    own = ("WEIGHTS_DIR", "HF_TOKEN", "REPLICATE_API_TOKEN", "GIT_DIR")
    return {
        **{name: value for name, value in os.environ.items() if name not in own},
        **programs.environment,
        "NOTES": str(notes),
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }


@pytest.fixture
def push(project: Path, environment: dict[str, str], tmp_path: Path) -> Push:
    """Run script/push with its arguments, from a folder that is not the project's."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(project / "script" / "push"), *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


def staged(project: Path) -> Path:
    return project / "weights" / ".push"


def read_notes(notes: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(notes.read_text())
    return content


def pushed(notes: Path) -> tuple[list[str], dict[str, Any]]:
    content = read_notes(notes)
    return content["arguments"], content["files"]


def test_cog_gets_what_the_image_needs_and_nothing_else(
    project: Path, push: Push, notes: Path, image: str, registry: Registry
) -> None:
    falcon = model(project / "weights", FALCON, FALCON_COMMIT)
    (project / "mi_modulo.py").write_text("")
    result = push(NAME, "--no-cache", "--progress", "plain")

    arguments, files = pushed(notes)
    assert arguments == ["push", "--separate-weights", image, "--no-cache", "--progress", "plain"]
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llm").rglob("*.py")}
    texts = {"config.json", "model.safetensors", "manifest.json"}
    expected = {".dockerignore", "cog.yaml", "predict.py", "requirements.txt", "mi_modulo.py"}
    assert files.keys() == expected | code | {f"weights/falcon-rw-1b/{name}" for name in texts}
    # the weights are not copied
    weight = (falcon / "model.safetensors").stat()
    assert files["weights/falcon-rw-1b/model.safetensors"] == [weight.st_size, weight.st_ino]
    # cog's message and exit status are passed on
    assert result.returncode == 3 and result.stderr.startswith("You are not logged in\n")
    assert f"Publicando weights/falcon-rw-1b ({FALCON}, {FALCON_COMMIT[:7]}) en {image}" in result.stdout
    assert not registry.uploads and "Aviso" not in result.stdout
    assert sorted(path.name for path in (project / "weights").iterdir()) == [
        ".otro.partial",
        ".push",
        "falcon-rw-1b",
        "smollm2-135m-instruct",
    ]
    assert [path.name for path in staged(project).iterdir()] == [".cog"]


def test_another_model_has_to_be_fetched_first(
    project: Path, push: Push, notes: Path, environment: dict[str, str]
) -> None:
    for name, before, after in (
        ("cog.yaml", FALCON, "org/Otro"),
        (".dockerignore", "!weights/falcon-rw-1b", "!weights/otro"),
    ):
        text = (project / name).read_text()
        assert before in text
        (project / name).write_text(text.replace(before, after))
    with Hub() as hub:
        hub.add("org/Otro", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(LARGE)})
        hub.tokens["hf_secreto"] = True
        # in the project, and not named in .dockerignore
        variables = {"HF_ENDPOINT": hub.endpoint, "WEIGHTS_DIR": "modelos"}
        result = push(NAME, **variables)
        remedy = "MODEL_ID=org/Otro MODEL_REVISION='' script/weights"
        assert_refused(result, notes, f"Faltan los pesos de org/Otro: {remedy}")
        subprocess.run(remedy, shell=True, check=True, cwd=project, env={**environment, **variables})
        result = push(NAME, **variables)
    assert result.returncode == 3, result.stderr
    _, files = pushed(notes)
    assert {Path(file).parts[:2] for file in files if file.startswith(("weights", "modelos"))} == {("weights", "otro")}
    assert "hf_secreto" not in result.stdout + result.stderr


def test_a_link_to_the_users_own_weights_is_followed(project: Path, push: Push, notes: Path, tmp_path: Path) -> None:
    falcon = model(project / "weights", FALCON, FALCON_COMMIT)
    (falcon / "manifest.json").unlink()
    elsewhere = tmp_path / "blob"
    shutil.move(falcon / "model.safetensors", elsewhere)
    (falcon / "model.safetensors").symlink_to(elsewhere)
    (falcon / "tokenizer.json").write_text("{}")
    push(NAME)
    _, files = pushed(notes)
    assert files["weights/falcon-rw-1b/model.safetensors"] == [LARGE, elsewhere.stat().st_ino]


def test_secrets_what_is_no_file_and_what_a_killed_push_left_are_not_pushed(
    project: Path, push: Push, notes: Path
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    # secrets, and their copies by editors
    secrets = {f"{folder}{name}" for folder in ("", "llm/") for name in SECRETS}
    for name in secrets:
        (project / name).write_text("HF_TOKEN=hf_secreto\n" if name == ".env" else "hf_secreto")
    (project / "llm" / "env.py").write_text("")
    # pipes and broken links
    (project / ".#predict.py").symlink_to("ana@portatil.1234:1700000000")
    (project / "roto.py").symlink_to("no")
    os.mkfifo(project / "llm" / "tubo")
    (project / "datos").mkdir()
    (project / "datos" / "vuelta").symlink_to(".")
    # the rest of a push that was killed
    old = {"viejo.py", "llm/viejo.py"}
    (staged(project) / "llm").mkdir(parents=True)
    for name in old:
        (staged(project) / name).touch()

    result = push(NAME)
    assert result.returncode == 3
    _, files = pushed(notes)
    assert {"predict.py", "llm/env.py"} <= files.keys()
    assert not (secrets | old | {".#predict.py", "roto.py", "llm/tubo"}) & files.keys()
    left_out = [line for line in result.stdout.splitlines() if line.startswith("Se deja fuera")]
    why = "no es un archivo, o es un enlace que no lleva a ninguno"
    assert sorted(left_out) == [f"Se deja fuera {name}: {why}" for name in ("datos/vuelta", "llm/tubo", "roto.py")]


def test_git_ignores_secrets_and_their_copies_by_editors(project: Path) -> None:
    secrets = {f"{folder}{name}" for folder in ("", "llm/") for name in SECRETS}
    for name in secrets | {"llm/env.py"}:
        (project / name).touch()
    shutil.rmtree(project / ".git")
    subprocess.run(["git", "init", "--quiet", project], check=True)
    untracked = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not secrets & set(untracked) and {".env.example", "llm/env.py"} <= {*untracked}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_file_that_cannot_be_copied_is_named(project: Path, push: Push, notes: Path) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    # a file that no one can read whole
    (project / "raro").symlink_to("/proc/self/mem")
    assert_refused(push(NAME), notes, "No se puede copiar raro: corrija sus permisos o quítelo de la carpeta")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_cog_and_leaves_nothing(
    project: Path, push: Push, notes: Path, programs: Programs, processes: Marked, number: signal.Signals, status: int
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    programs.write("cog", programs.read("cog").replace("sys.exit(3)", "import time; time.sleep(600)"))
    with ThreadPoolExecutor() as pool:
        result = pool.submit(push, NAME, **processes.environment)
        until(lambda: notes.exists() or result.done())
        assert not result.done(), result.result()
        (command,) = processes.alive("cli.push")
        command.send_signal(number)
        assert result.result(FINALLY).returncode == status
    assert [path.name for path in staged(project).iterdir()] == [".cog"]
    assert not processes.alive()


def assert_refused(result: subprocess.CompletedProcess[str], notes: Path, line: str) -> None:
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and line in result.stderr
    assert not notes.exists()


def test_altered_weights_are_not_pushed(project: Path, push: Push, notes: Path) -> None:
    falcon = model(project / "weights", FALCON, FALCON_COMMIT)
    weight = falcon / "model.safetensors"
    stat = weight.stat()
    with weight.open("r+b") as file:
        file.write(b"x")
    # as in a copy that keeps the times
    os.utime(weight, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_refused(push(NAME), notes, "weights/falcon-rw-1b/model.safetensors está alterado")


def test_missing_weights_are_refused_with_the_remedy(push: Push, notes: Path) -> None:
    # .env names another model
    line = f"Faltan los pesos de {FALCON}: MODEL_ID={FALCON} MODEL_REVISION='' script/weights"
    assert_refused(push(NAME), notes, line)
    assert_refused(push(NAME, MODEL_ID="", MODEL_REVISION=""), notes, f"Faltan los pesos de {FALCON}: script/weights")


def test_a_model_that_dockerignore_leaves_out_is_refused(project: Path, push: Push, notes: Path) -> None:
    text = (project / "cog.yaml").read_text()
    (project / "cog.yaml").write_text(text.replace(FALCON, "org/Otro"))
    model(project / "weights", "org/Otro", "rueda")
    assert_refused(push(NAME), notes, ".dockerignore no deja pasar weights/otro, el modelo de cog.yaml")


def test_a_broken_cog_yaml_is_refused(project: Path, push: Push, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "cog.yaml").write_text("environment:\n  - MODEL_ID\n")
    assert_refused(push(NAME), notes, "cog.yaml no se entiende")
    monkeypatch.setattr("cli.push.ROOT", project)
    for text in ("build: {}\n", "- a\n", "a: [\n"):
        (project / "cog.yaml").write_text(text)
        with pytest.raises(UserError, match=r"^cog\.yaml no se entiende"):
            image_config()


def test_an_invalid_name_is_refused(push: Push, notes: Path) -> None:
    assert_refused(push("a/b c"), notes, "no es un nombre de Replicate: se escribe USUARIO/NOMBRE, en minúsculas")


def test_a_name_may_have_its_registry(project: Path, push: Push, notes: Path, image: str) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    # nobody listens where the environment says
    push(image, COG_REGISTRY_HOST="127.0.0.1:1")
    assert pushed(notes)[0] == ["push", "--separate-weights", image]


# The checks before


def error_lines(result: subprocess.CompletedProcess[str], notes: Path) -> list[str]:
    """The errors of a push that did not run cog."""
    assert result.returncode == 1 and not notes.exists()
    return result.stderr.splitlines()


def test_all_that_is_missing_is_named_at_once(
    project: Path, push: Push, notes: Path, programs: Programs, registry: Registry
) -> None:
    for name in ("cog", "docker"):
        (programs.folder / name).unlink()
    programs.login({})
    text = (project / "predict.py").read_text()
    (project / "predict.py").write_text(text.replace("default=128", "default=2 * 64"))
    for path in (path for folder in os.get_exec_path() for path in Path(folder).glob("*")):
        if path.name not in ("cog", "docker") and not os.path.lexists(programs.folder / path.name):
            (programs.folder / path.name).symlink_to(path)
    *missing, schema_error = error_lines(push(NAME, "--dry-run", PATH=str(programs.folder)), notes)
    assert [line.rpartition(": ")[0] for line in missing] == [
        "Falta cog",
        "Falta Docker",
        f"No ha entrado en {registry.host}",
        f"Faltan los pesos de {FALCON}",
    ]
    assert schema_error.startswith("predict.py, línea ") and "2 * 64" in schema_error
    assert not staged(project).exists()


def test_a_dry_run_lists_what_would_be_pushed(
    project: Path, push: Push, notes: Path, image: str, registry: Registry
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    (project / "datos").mkdir()
    (project / "datos" / "tabla.csv").write_bytes(bytes(2_000_000))
    result = push(NAME, "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    no_token, total, *entries, last = result.stdout.splitlines()
    assert no_token == "Sin REPLICATE_API_TOKEN en .env no se compara con la versión publicada"
    assert total.startswith(f"Lo que va a {image}, 13,")
    sizes = {name: size.strip() for size, _, name in (entry.rpartition("  ") for entry in entries)}
    assert (sizes["weights"], sizes["datos"]) == ("11,5 MB", "2,0 MB")
    assert sizes.keys() == {".dockerignore", "cog.yaml", "datos", "llm", "predict.py", "requirements.txt", "weights"}
    assert last == "No falta nada: script/push usuario/modelo"
    assert not registry.uploads
    assert not notes.exists() and not list(staged(project).iterdir())


def test_uncommitted_files_are_a_warning(project: Path, push: Push, notes: Path) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    shutil.rmtree(project / ".git")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=Ana", "-c", "user.email=ana@example.com"]
        subprocess.run(["git", *identity, *arguments], cwd=project, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "--message", "Todo")
    assert "Aviso" not in push(NAME).stdout
    git("mv", "LICENSE", "LICENCIA")
    (project / "predict.py").write_text((project / "predict.py").read_text() + "\n")
    for number in range(3):
        (project / f"año {number}.py").touch()
    warning = "Aviso: no está en git tal como es aquí: LICENCIA, LICENSE, predict.py, año 0.py, año 1.py y 1 más\n"
    assert warning in push(NAME).stdout
    assert notes.exists()


# The registry, and the environment of cog


def test_a_model_that_the_registry_lacks_is_refused(project: Path, push: Push, notes: Path, registry: Registry) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    registry.models.clear()
    assert_refused(
        push(NAME, "--dry-run"), notes, f"{registry.host} no tiene usuario/modelo, o la cuenta con que entró"
    )


def test_a_missing_base_image_is_a_warning(project: Path, push: Push, notes: Path, registry: Registry) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    registry.bases.clear()
    warning = f"Aviso: {registry.host} no tiene la imagen base cog-base:cuda12.8-python3.13-torch2.11.0, y sin ella"
    assert warning in push(NAME).stdout and notes.exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("", "No se publicó, y Cog dice arriba por qué: con «authorization failed», repita cog login; con «repo"),
        ("models.clear()", "no tiene usuario/modelo, o la cuenta con que entró no puede publicar en él: créelo"),
    ],
)
def test_a_failed_push_is_explained(
    project: Path, push: Push, notes: Path, programs: Programs, registry: Registry, change: str, line: str
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    go_on = notes.with_name("go on")
    os.mkfifo(go_on)
    programs.write("cog", programs.read("cog").replace("sys.exit(3)", f"open({str(go_on)!r}).read(); sys.exit(3)"))
    with ThreadPoolExecutor() as pool:
        result = pool.submit(push, NAME)
        until(lambda: notes.exists() or result.done())
        assert not result.done(), result.result()
        exec(f"registry.{change}" if change else "")
        go_on.write_text("")
        errors = result.result(FINALLY).stderr.splitlines()
    assert result.result().returncode == 3
    assert errors[0] == "You are not logged in" and line in errors[1] and len(errors) == 2


def test_cog_runs_with_our_coglet_and_without_model_variables(
    project: Path, push: Push, notes: Path, registry: Registry
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    names = (
        "COG_MODEL",
        "COG_MODEL_REGISTRY",
        "COG_MODEL_REPO",
        "COG_MODEL_TAG",
        "COG_OPENAPI_SCHEMA",
        "COG_SDK_WHEEL",
    )
    push(NAME, **dict.fromkeys((*names, "COGLET_WHEEL"), "otro"), COG_NO_COLOR="1")
    variables = read_notes(notes)["variables"]
    assert not variables.keys() & {*names}
    # the coglet that this project pins
    assert f"coglet=={variables['COGLET_WHEEL'].removeprefix('pypi:')}" in (ROOT / "requirements.txt").read_text()
    assert (variables["COG_REGISTRY_HOST"], variables["COG_NO_COLOR"]) == (registry.host, "1")


def test_the_commit_is_the_projects_wherever_the_weights_are(
    project: Path, push: Push, notes: Path, tmp_path: Path
) -> None:
    shutil.rmtree(project / ".git")
    model(tmp_path / "otra", FALCON, FALCON_COMMIT)

    def git(folder: Path, *arguments: str) -> str:
        identity = ["-c", "user.name=Ana", "-c", "user.email=ana@example.com"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    unset = {"GITHUB_SHA": "", "GITHUB_REF_NAME": ""}
    weights_dir = str(tmp_path / "otra")
    for folder in (project, tmp_path / "otra"):
        git(folder, "init")
    push(NAME, WEIGHTS_DIR=weights_dir, **unset)
    # no commit yet
    assert read_notes(notes)["variables"]["GITHUB_SHA"] == ""

    for folder in (project, tmp_path / "otra"):
        git(folder, "commit", "--allow-empty", "--message", folder.name)
    git(project, "tag", "v1")
    push(NAME, WEIGHTS_DIR=weights_dir, **unset)
    assert weights_dir in read_notes(notes)["folder"]
    variables = read_notes(notes)["variables"]
    assert (variables["GITHUB_SHA"], variables["GITHUB_REF_NAME"]) == (git(project, "rev-parse", "HEAD"), "v1")

    # the variables of GitHub's machines win
    push(NAME, WEIGHTS_DIR=weights_dir, GITHUB_SHA="abc", GITHUB_REF_NAME="main")
    assert read_notes(notes)["variables"]["GITHUB_SHA"] == "abc"


# The folder that is kept between pushes


def test_unchanged_weights_are_not_built_again(project: Path, push: Push, notes: Path) -> None:
    falcon = model(project / "weights", FALCON, FALCON_COMMIT)
    push(NAME)
    first = read_notes(notes)
    (project / "nuevo.py").touch()
    push(NAME)
    second = read_notes(notes)
    assert (first["built"], second["built"]) == (True, False)
    assert first["folder"] == second["folder"] == str(staged(project)) and "nuevo.py" in second["files"]

    (falcon / "manifest.json").unlink()
    (falcon / "config.json").write_text("{ }")
    (falcon / "tokenizer.json").write_text("{}")
    (project / "nuevo.py").unlink()
    push(NAME)
    third = read_notes(notes)
    assert third["built"] and "nuevo.py" not in third["files"]


def test_weights_whose_image_is_missing_are_built_again(
    project: Path, push: Push, notes: Path, programs: Programs
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)

    def builds(name: str = NAME) -> bool:
        push(name)
        assert read_notes(notes)["image"]
        return bool(read_notes(notes)["built"])

    assert builds()
    (image,) = programs.images.iterdir()
    image.unlink()
    assert builds()
    # of another folder
    image.write_text("sha256:otra")
    assert builds()
    assert builds("usuario/otro")
    # removed during a push
    cog = programs.read("cog")
    programs.write("cog", cog.replace("sys.exit(3)", "image.unlink()"))
    assert push(NAME).returncode == 0
    programs.write("cog", cog)
    assert builds()


def test_a_second_push_at_once_is_refused(
    project: Path, push: Push, notes: Path, programs: Programs, tmp_path: Path
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    go_on = tmp_path / "go on"
    os.mkfifo(go_on)
    cog = programs.read("cog")
    programs.write("cog", cog.replace("sys.exit(3)", f"open({str(go_on)!r}).read()"))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(push, NAME)
        until(lambda: notes.exists() or first.done())
        assert not first.done(), first.result()
        programs.write("cog", cog)
        second = push(NAME)
        go_on.write_text("")
        assert first.result(FINALLY).returncode == 0
    assert (second.returncode, second.stderr.splitlines()) == (
        1,
        ["Ya hay otro script/push en marcha: espere a que acabe"],
    )
    assert "predict.py" in read_notes(notes)["files"]


# The published version


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """A Replicate without a server: its versions are only read."""
    with Gateway("http://127.0.0.1:1", model="usuario/modelo") as gateway:
        yield gateway


def publish(gateway: Gateway, **limits: Any) -> None:
    """Publish a version that differs from the project's in the limits of max_tokens."""
    interface = schema.read(ROOT / "predict.py").schema
    interface["components"]["schemas"]["Input"]["properties"]["max_tokens"].update(limits)
    gateway.publish(schema=interface)


BROKEN = ["Deja de valer para quien usa la versión publicada:", "  max_tokens: el máximo era 4096 y será 2048"]


def test_a_version_that_breaks_no_caller_is_pushed(project: Path, push: Push, notes: Path, gateway: Gateway) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    publish(gateway, maximum=4096)
    publish(gateway, maximum=1024)
    result = push(NAME, **gateway.environment)
    assert result.stderr.startswith("You are not logged in\n") and notes.exists()
    assert "no se compara" not in result.stdout and gateway.token not in result.stdout


def test_without_a_terminal_what_breaks_a_caller_is_not_pushed(
    project: Path, push: Push, notes: Path, gateway: Gateway, image: str
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    publish(gateway, maximum=4096)
    *warning, refusal = error_lines(push(NAME, **gateway.environment), notes)
    assert warning == BROKEN
    assert refusal == "Sin terminal donde preguntarle no se sigue: si está de acuerdo, repita con --yes"

    dry = push(NAME, "--dry-run", **gateway.environment)
    assert (dry.returncode, dry.stdout.splitlines()[-3:-1]) == (0, BROKEN) and not notes.exists()

    assert push(NAME, "--yes", "--no-cache", **gateway.environment).stderr.splitlines()[:2] == BROKEN
    assert pushed(notes)[0] == ["push", "--separate-weights", image, "--no-cache"]


@pytest.mark.parametrize(("answer", "goes_on"), [("s", True), ("", False)])
def test_the_user_is_asked_about_what_breaks_a_caller(
    project: Path,
    environment: dict[str, str],
    notes: Path,
    gateway: Gateway,
    answer: str,
    goes_on: bool,
) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    publish(gateway, maximum=4096)
    master, terminal = pty.openpty()
    os.write(master, f"{answer}\n".encode())
    result = subprocess.run(
        [project / "script" / "push", NAME],
        env={**environment, **gateway.environment},
        stdin=terminal,
        capture_output=True,
        text=True,
    )
    for end in (master, terminal):
        os.close(end)
    assert result.stderr.splitlines()[:2] == BROKEN and notes.exists() == goes_on
    assert result.returncode == (3 if goes_on else 1)


def test_a_first_version_is_pushed_without_comparison(project: Path, push: Push, notes: Path, gateway: Gateway) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    assert push(NAME, **gateway.environment).returncode == 3 and notes.exists()


def test_a_model_that_replicate_lacks_is_refused(project: Path, push: Push, notes: Path, gateway: Gateway) -> None:
    model(project / "weights", FALCON, FALCON_COMMIT)
    line = "Replicate no tiene usuario/otro, o su token no lo ve: créelo en https://replicate.com/create, o compruebe"
    assert_refused(push("usuario/otro", **gateway.environment), notes, line)
