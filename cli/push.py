"""script/push: `cog push --separate-weights` of a clean folder, with what the image needs and nothing else.

Cog gives a layer to every folder with large files that it finds, without a look at .dockerignore: in this tree also to
.venv and to other models, which Docker then does not see, and the push stops.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml
from pathspec import GitIgnoreSpec

from cli.hosted import Reference
from cli.terminal import Parser, command
from llm import hub, weights
from llm.errors import UserError
from llm.settings import ROOT, Settings
from llm.words import reason

_SECONDS_TO_STOP = 5


@command
def main() -> int:
    parser = Parser(prog="script/push", description="Publica el modelo en Replicate, con los pesos en su propia capa.")
    parser.add_argument("name", metavar="r8.im/USUARIO/NOMBRE", help="dónde se publica")
    parser.add_argument(
        "options",
        metavar="...",
        nargs=argparse.REMAINDER,
        help="más opciones de cog push, como --no-cache; sus archivos, con la ruta entera",
    )
    arguments = parser.parse_args()
    return push(arguments.name, arguments.options)


def push(name: str, options: list[str]) -> int:
    """Push the image to `name`; return what cog returned. Raises UserError for what can be told before."""
    name = f"r8.im/{Reference.parse(name).model}"
    if shutil.which("cog") is None:
        raise UserError(
            "Falta cog: instálelo con brew install replicate/tap/cog (macOS) o con "
            "sh <(curl -fsSL https://cog.run/install.sh) (Linux), y repita"
        )
    settings = image_settings()
    left_out = dockerignore()
    place = Path("weights", settings.folder.name)
    if left_out(place):
        raise UserError(
            f".dockerignore no deja pasar {place}, el modelo de cog.yaml: cambie su última línea por !{place}, "
            "o MODEL_ID en cog.yaml"
        )
    model = hub.ensure(settings, thorough=True)
    try:
        # beside the weights, where a link to them can be
        with tempfile.TemporaryDirectory(prefix=".push-", dir=settings.weights_dir) as directory:
            folder = Path(directory)
            stage(folder, lambda path: left_out(path) or ROOT / path == settings.weights_dir)
            shutil.copytree(model.folder, folder / place, copy_function=_link)
            print(f"Publicando {model.origin} en {name}", flush=True)
            return _run(["cog", "push", "--separate-weights", name, *options], folder)
    except shutil.Error as error:
        # what did not work, file by file
        source, *_ = error.args[0][0]
        raise UserError(
            f"No se puede copiar {weights.shown(Path(source))}: corrija sus permisos o quítelo de la carpeta"
        ) from error
    except OSError as error:
        where = weights.shown(settings.weights_dir)
        raise UserError(f"No se puede preparar la copia en {where}: {reason(error)}") from error


def _run(command: list[str], folder: Path) -> int:
    """The exit status of a command run in `folder`; it ends with this process."""
    with subprocess.Popen(command, cwd=folder) as process:
        try:
            return process.wait()
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_STOP)
            process.kill()


def image_settings() -> Settings:
    """The settings of the model that the image will load: cog.yaml names it, and .env does not go there."""
    try:
        config = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
        variables = dict(line.split("=", 1) for line in config.get("environment") or [])
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise UserError("cog.yaml no se entiende: en environment, cada línea es - NOMBRE=valor") from error
    for name in ("MODEL_ID", "MODEL_REVISION"):
        # empty, it also hides what .env says
        os.environ[name] = variables.get(name, "")
    return Settings.read()


def dockerignore() -> Callable[[Path], bool]:
    """Whether Docker leaves a path of the project out of the image."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    # Docker's rules start at the project's folder; git's, without a slash, would match anywhere.
    rules = [re.sub(r"^(!?)/?", r"\1/", line) for line in lines if line.strip() and not line.startswith("#")]
    return GitIgnoreSpec.from_lines(rules).match_file


def stage(folder: Path, left_out: Callable[[Path], bool]) -> None:
    """Copy the project into a folder, without the weights and what is `left_out`."""

    def passed_over(directory: str, names: list[str]) -> set[str]:
        paths = [Path(directory, name).relative_to(ROOT) for name in names]
        # Cog makes its own .cog, and the weights come apart
        ignored = {path.name for path in paths if left_out(path) or path.parts[0] in (".cog", "weights")}
        for path in paths:
            if path.name not in ignored and not _can_be_copied(ROOT / path):
                print(f"Se deja fuera {weights.shown(path)}: no es un archivo, o es un enlace que no lleva a ninguno")
                ignored.add(path.name)
        return ignored

    shutil.copytree(ROOT, folder, ignore=passed_over, dirs_exist_ok=True)
    shutil.copy2(ROOT / ".dockerignore", folder)


def _can_be_copied(path: Path) -> bool:
    if path.is_dir():
        # a link to a folder that it is in has no end
        return not path.parent.resolve().is_relative_to(path.resolve())
    return path.is_file()


def _link(source: str, target: str) -> None:
    try:
        # of the file itself: the hub's cache holds its files as symbolic links
        os.link(os.path.realpath(source), target)
    except OSError:
        # another file system, or one without links; if the disk is what is wrong, copying says so
        shutil.copy2(source, target)


if __name__ == "__main__":
    sys.exit(main())
