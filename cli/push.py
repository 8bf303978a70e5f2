"""script/push: checks all that a push needs and what would break for callers, then `cog push --separate-weights`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from cli import changes, hosted, prerequisites, registry, schema, staging
from cli.hosted import Reference
from cli.schema import Schema
from cli.terminal import Parser, agree, command
from llm.errors import UserError
from llm.weights import checkpoint
from llm.weights.settings import ROOT, Settings, values
from llm.words import about, one_line

_TOKEN = "REPLICATE_API_TOKEN"
_MOST_SHOWN = 5
_SECONDS_TO_STOP = 5

# Cog's own variable for the registry.
_REGISTRY = "COG_REGISTRY_HOST"
_REPLICATE = "r8.im"
# A model's name behind its registry: Replicate's, or one on this computer.
_NAMED = re.compile(r"(r8\.im|127\.0\.0\.1:\d+)/(.*)", re.DOTALL)
# With one of these cog would push to another name, or with another interface or server than this project's.
_NOT_COGS = (
    "COG_MODEL",
    "COG_MODEL_REGISTRY",
    "COG_MODEL_REPO",
    "COG_MODEL_TAG",
    "COG_OPENAPI_SCHEMA",
    "COG_SDK_WHEEL",
)
_BASE = "cog-base"


class Image(NamedTuple):
    """What cog.yaml and requirements.txt say of the image."""

    settings: Settings
    cog: str
    coglet: str | None
    """Its version in requirements.txt, which cog itself does not read."""
    base: str | None
    """The tag of Cog's base image; None where cog.yaml leaves it to Cog."""


@command
def main() -> int:
    parser = Parser(
        prog="script/push",
        usage="script/push [--dry-run] [--yes] USUARIO/NOMBRE [...]",
        description="Publica el modelo en Replicate, con los pesos en su propia capa, si está todo lo que hace falta.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="USUARIO/NOMBRE", help="dónde se publica; puede llevar r8.im/ delante")
    parser.add_argument("--dry-run", action="store_true", help="no publica: dice qué falta y qué se publicaría")
    parser.add_argument("--yes", action="store_true", help="no pregunta, aunque cambie algo para quien ya lo usa")
    parser.add_argument_group("...", "lo demás, como --no-cache, pasa a cog push; sus archivos, con la ruta entera")
    arguments, options = parser.parse_known_args()
    match = _NAMED.fullmatch(arguments.name)
    host, name = match.groups() if match else (os.environ.get(_REGISTRY) or _REPLICATE, arguments.name)
    return push(host, Reference.parse(name), options, dry_run=arguments.dry_run, yes=arguments.yes)


def push(host: str, model: Reference, options: list[str], *, dry_run: bool, yes: bool) -> int:
    """Push the image to `model` in a registry; return cog's exit status, or 1 after a line for each thing missing.

    Raises UserError where no other check makes sense, and where the user does not agree.
    """
    name = f"{host}/{model.model}"
    own = Settings.read()
    image = image_config()
    settings = image.settings
    missing: list[str] = []
    with _noted(missing):
        prerequisites.check_cog(image.cog)
    with _noted(missing):
        prerequisites.check_docker()
    with _noted(missing):
        login = prerequisites.login(host)
        registry.check_push(host, model.model, login)
        if image.base and not registry.has(host, _BASE, image.base, login):
            print(
                f"Aviso: {host} no tiene la imagen base {_BASE}:{image.base}, y sin ella Cog parte de otra: la imagen "
                "ocupa varios GB más y arranca en frío más despacio"
            )
    with _noted(missing):
        _check_dockerignore(staging.place(settings))
    with _noted(missing):
        _check_fetched(settings, own)
        origin = checkpoint.verify(settings, thorough=True).origin
    with _noted(missing):
        interface = schema.read(ROOT / "predict.py")
    with _noted(missing):
        published = _published(model)
    for line in missing:
        print(one_line(line), file=sys.stderr)
    if missing:
        return 1

    if uncommitted := _uncommitted():
        print(f"Aviso: no está en git tal como es aquí: {_first(uncommitted)}")
    weights = f"{name}-weights"
    with staging.staged(settings, prerequisites.image_id(weights)) as folder:
        _print_contents(folder, name)
        lines = changes.breaking(published, interface.schema) if published else []
        broken = "\n  ".join(["Deja de valer para quien usa la versión publicada:", *lines]) if lines else ""
        if broken and dry_run:
            print(broken)
        elif broken:
            agree(broken, yes=yes)
        if dry_run:
            print(f"No falta nada: script/push {model.model}")
            return 0
        print(f"Publicando {origin} en {name}", flush=True)
        status = _run(["cog", "push", "--separate-weights", name, *options], folder, _environment(host, image.coglet))
        staging.note(folder, prerequisites.image_id(weights))
    if status:
        print(_meaning(host, model), file=sys.stderr)
    return status


def _environment(host: str, coglet: str | None) -> dict[str, str]:
    """The variables that cog runs with: the registry, coglet's version in the image, and the commit for its labels."""
    variables = {name: value for name, value in os.environ.items() if name not in _NOT_COGS}
    variables[_REGISTRY] = host
    if coglet:
        variables["COGLET_WHEEL"] = f"pypi:{coglet}"
    # cog reads these before it asks git, whose repository in the staging folder may be another or none
    for name, arguments in (
        ("GITHUB_SHA", ["rev-parse", "HEAD"]),
        ("GITHUB_REF_NAME", ["describe", "--tags", "--dirty"]),
    ):
        variables[name] = variables.get(name) or _git(*arguments).strip()
    return variables


def _meaning(host: str, model: Reference) -> str:
    """Why a push failed: what the registry answers now, or else what cog's messages most often mean."""
    try:
        registry.check_push(host, model.model, prerequisites.login(host))
    except UserError as error:
        return one_line(str(error))
    return (
        "No se publicó, y Cog dice arriba por qué: con «authorization failed», repita cog login; con «repository name "
        f"not known to registry», cree {model.model} en https://replicate.com/create"
    )


@contextmanager
def _noted(missing: list[str]) -> Iterator[None]:
    """Add the line of a UserError to `missing`, and go on."""
    try:
        yield
    except UserError as error:
        missing.append(str(error))


def image_config() -> Image:
    """Read cog.yaml and requirements.txt, and set MODEL_ID and MODEL_REVISION as in the image, which has no .env."""
    try:
        config = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
        variables = dict(line.split("=", 1) for line in config.get("environment") or [])
        build = config["build"]
        cog, requirements = str(build["sdk_version"]), ROOT / str(build.get("python_requirements", "requirements.txt"))
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(
            "cog.yaml no se entiende: en build lleva sdk_version, y en environment cada línea es - NOMBRE=valor"
        ) from error
    for name in ("MODEL_ID", "MODEL_REVISION"):
        # an empty one hides that of .env
        os.environ[name] = variables.get(name, "")
    text = requirements.read_text(encoding="utf-8") if requirements.is_file() else ""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))
    return Image(Settings.read(), cog, pins.get("coglet"), _base(build, pins.get("torch")))


def _base(build: dict[str, object], torch: str | None) -> str | None:
    """The tag of the base image that Cog looks for; None if one of its versions is not pinned."""
    versions = [("python", build.get("python_version")), ("torch", torch)]
    if build.get("gpu"):
        versions.insert(0, ("cuda", build.get("cuda")))
    if not all(version for _, version in versions):
        return None
    # the tag has two numbers of the versions of CUDA and Python
    return "-".join(
        f"{name}{version if name == 'torch' else '.'.join(str(version).split('.')[:2])}" for name, version in versions
    )


def _check_dockerignore(place: Path) -> None:
    if staging.dockerignore()(place):
        raise UserError(
            f".dockerignore no deja pasar {place}, el modelo de cog.yaml: cambie su última línea por !{place}, "
            "o MODEL_ID en cog.yaml"
        )


def _check_fetched(settings: Settings, own: Settings) -> None:
    if os.path.lexists(settings.folder):
        return
    # without these script/weights would fetch the model of .env
    names = ("MODEL_ID", "MODEL_REVISION") if settings != own else ()
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in names]
    raise UserError(f"Faltan los pesos de {settings.model_id}: {' '.join([*variables, 'script/weights'])}")


def _published(model: Reference) -> Schema | None:
    """The schema of the newest version on Replicate; None without one, or without a token."""
    if _TOKEN not in values():
        print(f"Sin {_TOKEN} en .env no se compara con la versión publicada")
        return None
    with hosted.explained(model.model, absent="créelo en https://replicate.com/create, o compruebe la cuenta"):
        version = hosted.client().models.get(model.model).latest_version
    return version.openapi_schema if version else None


def _uncommitted() -> list[str]:
    """The paths that differ from git's last commit; empty if the project is no repository."""
    status = _git("--no-optional-locks", "status", "--porcelain", "--no-renames", "-z", "--", ".")
    return [entry[3:] for entry in status.split("\0") if entry]


def _git(*arguments: str) -> str:
    """What git prints in the project's folder; empty if git fails or is not installed."""
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, errors="replace")
    return result.stdout if result.returncode == 0 else ""


def _first(paths: list[str]) -> str:
    shown, rest = paths[:_MOST_SHOWN], len(paths) - _MOST_SHOWN
    return one_line(", ".join(shown)) + (f" y {rest} más" if rest > 0 else "")


def _print_contents(folder: Path, name: str) -> None:
    sizes = {path.name: _size(path) for path in folder.iterdir() if path.name != staging.COG}
    print(f"Lo que va a {name}, {about(sum(sizes.values()))}:")
    for entry, size in sorted(sizes.items()):
        print(f"{about(size):>12}  {one_line(entry)}")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _run(command: list[str], folder: Path, variables: dict[str, str]) -> int:
    """Run a command in `folder` and return its exit status; the command ends with this process."""
    with subprocess.Popen(command, cwd=folder, env=variables) as process:
        try:
            return process.wait()
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_STOP)
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
