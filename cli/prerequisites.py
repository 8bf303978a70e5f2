"""What a push needs on this computer beside the project: the programs cog and docker, and what `cog login` stored.

Each function raises a UserError of one line, with the command that mends what is missing.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cli.registry import Login
from llm.errors import UserError
from llm.words import one_line, reason

_INSTALL_COG = "brew install replicate/tap/cog (macOS) o sh <(curl -fsSL https://cog.run/install.sh) (Linux)"
_UPGRADE_COG = _INSTALL_COG.replace("brew install", "brew upgrade")
_OLDEST_DOCKER = 23
_SECONDS = 30


def check_cog(needed: str) -> None:
    """cog is installed, in version `needed` or newer. A development build has no number, and passes."""
    path = shutil.which("cog")
    if path is None:
        raise UserError(f"Falta cog: {_INSTALL_COG}")
    # other programs are called cog too
    match = re.match(r"cog version (\S+)", _run([path, "--version"]).stdout)
    if match is None:
        raise UserError(f"{one_line(path)} no es el cog de Replicate: {_INSTALL_COG}, y póngalo antes en PATH")
    if _numbers(match[1]) and _numbers(match[1]) < _numbers(needed):
        raise UserError(f"cog es el {match[1]} y hace falta el {needed} de cog.yaml, o más nuevo: {_UPGRADE_COG}")


def check_docker() -> None:
    """Docker is installed and running, lets this user in, and is new enough for cog."""
    if shutil.which("docker") is None:
        raise UserError("Falta Docker: instálelo como dice https://docs.docker.com/get-started/get-docker/")
    result = _run(["docker", "version", "--format", "{{.Server.Version}}"])
    if result.returncode == 0:
        version = result.stdout.strip()
        # an older one fails after the build, when cog adds its labels
        if _numbers(version) and _numbers(version)[0] < _OLDEST_DOCKER:
            raise UserError(
                f"Docker es el {one_line(version)} y Cog necesita el {_OLDEST_DOCKER} o más nuevo: instálelo como dice "
                "https://docs.docker.com/engine/install/"
            )
        return
    if "permission denied" in result.stderr:
        raise UserError("Docker no le deja entrar: sudo usermod -aG docker $USER, y abra otra sesión")
    raise UserError("Docker no contesta: abra Docker Desktop, o sudo systemctl start docker")


def login(host: str) -> Login:
    """The login that `cog login` stored for a registry, read where `cog push` reads it. The registry is not asked."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        unset = not any(config.get(key) for key in ("credsStore", "credHelpers", "auths"))
        store = _default_store() if unset else config.get("credsStore")
        stored = (_stored(store, host) if store else None) or _written(config.get("auths", {}).get(host, {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{one_line(str(path))} no se entiende: corríjalo o bórrelo, y cog login") from error
    if stored is None:
        raise UserError(f"No ha entrado en {host}: cog login")
    return stored


def _default_store() -> str:
    """The credential store that Docker's client uses if its configuration names none."""
    if sys.platform == "darwin":
        return "osxkeychain"
    return "pass" if shutil.which("pass") else "secretservice"


def _stored(store: str, host: str) -> Login | None:
    program = shutil.which(f"docker-credential-{store}")
    result = _run([program, "get"], stdin=host) if program else None
    if result is None or result.returncode:
        return None
    answer = json.loads(result.stdout)
    return Login(answer.get("Username", ""), answer.get("Secret", ""))


def _written(entry: dict[str, str]) -> Login | None:
    """The login in an entry of Docker's configuration; None if the entry has no password, which a store then holds."""
    if "auth" in entry:
        username, _, secret = base64.b64decode(entry["auth"]).decode().partition(":")
    else:
        username, secret = entry.get("username", ""), entry.get("password", "")
    return Login(username, secret) if secret else None


def image_id(name: str) -> str:
    """The id of the image of this name in this computer's Docker; empty if there is none.

    The registry is not asked. A Docker that keeps its images in containerd, as Docker Desktop and Engine 29 do, asks it
    first in a build; but it has no image of this name unless somebody pushed one.
    """
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
