"""What a push needs beside the project: the programs cog and docker, and a login at Replicate's registry.

Each check raises a UserError of one line, with the command that mends what is missing.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from llm.errors import UserError
from llm.words import one_line, reason

REGISTRY = "r8.im"

_INSTALL_COG = "brew install replicate/tap/cog (macOS) o sh <(curl -fsSL https://cog.run/install.sh) (Linux)"
_UPGRADE_COG = _INSTALL_COG.replace("brew install", "brew upgrade")
# The stores that Docker's client looks for by itself, while its configuration says nothing.
_STORES = ("osxkeychain", "pass", "secretservice")
_SECONDS = 30


def check_cog(needed: str) -> None:
    """The command cog, of version `needed` or newer. One that somebody built has no number, and passes."""
    path = shutil.which("cog")
    if path is None:
        raise UserError(f"Falta cog: {_INSTALL_COG}")
    # there are other programs of this name
    match = re.match(r"cog version (\S+)", _run([path, "--version"]).stdout)
    if match is None:
        raise UserError(f"{one_line(path)} no es el cog de Replicate: {_INSTALL_COG}, y póngalo antes en PATH")
    if _numbers(match[1]) and _numbers(match[1]) < _numbers(needed):
        raise UserError(f"cog es el {match[1]} y hace falta el {needed} de cog.yaml, o más nuevo: {_UPGRADE_COG}")


def check_docker() -> None:
    """Docker is there, running, and lets this user in."""
    if shutil.which("docker") is None:
        raise UserError("Falta Docker: instálelo como dice https://docs.docker.com/get-started/get-docker/")
    result = _run(["docker", "info"])
    if result.returncode == 0:
        return
    if "permission denied" in result.stderr:
        raise UserError("Docker no le deja entrar: sudo usermod -aG docker $USER, y abra otra sesión")
    raise UserError("Docker no contesta: abra Docker Desktop, o sudo systemctl start docker")


def check_login() -> None:
    """`cog login` was done, which leaves its token where Docker's client does. Whether it still holds is not asked."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        silent = not any(config.get(key) for key in ("credsStore", "credHelpers", "auths"))
        stores = _STORES if silent else filter(None, [config.get("credsStore")])
        logged_in = any(config.get("auths", {}).get(REGISTRY, {}).values()) or any(map(_has_login, stores))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{one_line(str(path))} no se entiende: corríjalo o bórrelo, y cog login") from error
    if not logged_in:
        raise UserError(f"No ha entrado en {REGISTRY}: cog login")


def _has_login(store: str) -> bool:
    program = shutil.which(f"docker-credential-{store}")
    return program is not None and _run([program, "get"], stdin=REGISTRY).returncode == 0


def image_id(name: str) -> str:
    """The id of the image that Docker has under this name; empty where it has none."""
    result = _run(["docker", "image", "inspect", "--format", "{{.Id}}", name])
    return result.stdout.strip() if result.returncode == 0 else ""


def _numbers(version: str) -> list[int]:
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in match[0].split(".")] if match else []


def _run(command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{one_line(command[0])} no contesta en {_SECONDS} s: repita, o reinicie Docker") from error
    except OSError as error:
        raise UserError(f"No se puede ejecutar {one_line(command[0])}, {reason(error)}: instálelo de nuevo") from error
