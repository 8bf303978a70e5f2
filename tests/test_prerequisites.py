"""The checks of this computer before a push, with stand-ins for its programs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import prerequisites
from llm.errors import UserError
from tests.support.programs import Programs


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path)
    for name, value in programs.environment.items():
        monkeypatch.setenv(name, value)
    return programs


def refusal(check: Callable[[], None]) -> str:
    with pytest.raises(UserError) as raised:
        check()
    return str(raised.value)


def check_cog() -> None:
    prerequisites.check_cog("0.23.1")


@pytest.mark.parametrize(
    "version", ["0.23.1", "0.23.10", "1.0.0", "0.24.0-rc.1", "dev (built none)", "0.23.1-dev+g6110c91"]
)
def test_a_new_enough_cog_is_accepted(programs: Programs, version: str) -> None:
    programs.write("cog", f"#!/bin/sh\necho 'cog version {version}'\n")
    check_cog()


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("cog version 0.23.0 (built 2026-09-01T12:00:00Z)", "cog es el 0.23.0 y hace falta el 0.23.1 de cog.yaml"),
        ("cog version 0.9.9", "cog es el 0.9.9 y hace falta el 0.23.1 de cog.yaml, o más nuevo: brew upgrade"),
        # WebKit's browser and the code generator of that name
        ("0.18.4 (WPE WebKit 2.46.1)", "bin/cog no es el cog de Replicate: brew install"),
        ("", "bin/cog no es el cog de Replicate: brew install"),
    ],
)
def test_an_old_cog_or_another_program_is_refused(programs: Programs, output: str, line: str) -> None:
    programs.write("cog", f"#!/bin/sh\necho '{output}'\n")
    assert line in refusal(check_cog)


def test_a_cog_that_cannot_run_is_refused(programs: Programs) -> None:
    programs.write("cog", "\0")
    assert "bin/cog, no es un programa: instálelo de nuevo" in refusal(check_cog)


# "dev": a build from source
@pytest.mark.parametrize("version", ["23.0.0", "28.5.2+dfsg1", "29.0.1", "dev"])
def test_a_docker_that_answers_is_accepted(programs: Programs, version: str) -> None:
    programs.write("docker", f"#!/bin/sh\n[ \"$*\" = 'version --format {{{{.Server.Version}}}}' ] && echo {version}\n")
    prerequisites.check_docker()


@pytest.mark.parametrize("version", ["20.10.24+dfsg1", "19.03.15"])
def test_an_old_docker_is_refused(programs: Programs, version: str) -> None:
    programs.write("docker", f"#!/bin/sh\necho {version}\n")
    assert refusal(prerequisites.check_docker).startswith(f"Docker es el {version} y Cog necesita el 23 o más nuevo: ")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "Docker no contesta: abra Docker Des"),
        (
            "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock",
            "Docker no le deja entrar: sudo usermod -aG docker $USER",
        ),
    ],
)
def test_a_docker_that_fails_is_refused(programs: Programs, output: str, line: str) -> None:
    programs.write("docker", f"#!/bin/sh\necho 'ERROR: {output}' >&2; exit 1\n")
    assert line in refusal(prerequisites.check_docker)


def test_a_docker_that_hangs_is_refused(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerequisites, "_SECONDS", 0.1)
    programs.write("docker", "#!/bin/sh\nexec sleep 600\n")
    assert "docker no contesta en 0.1 s: repita, o reinicie Docker" in refusal(prerequisites.check_docker)


def store_login(programs: Programs, store: str) -> None:
    """Put the login into a store of Docker's."""
    answer = '{"ServerURL":"r8.im","Username":"usuario","Secret":"secreto"}'
    request = "read -r host; [ \"$1 $host\" = 'get r8.im' ]"
    programs.write(f"docker-credential-{store}", f"#!/bin/sh\n{request} && echo '{answer}'\n")


def check_login() -> None:
    prerequisites.login("r8.im")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"auths": {"r8.im": {"auth": "eDp5Og=="}}}, ("x", "y:")),
        ({"auths": {"r8.im": {"auth": "eDp5"}}, "credsStore": "falta"}, ("x", "y")),
        ({"auths": {"r8.im": {"username": "x", "password": "y"}}}, ("x", "y")),
        # the store is asked first
        ({"auths": {"r8.im": {"auth": "eDp5"}}, "credsStore": "tiene"}, ("usuario", "secreto")),
        # as Docker Desktop writes it
        ({"auths": {"r8.im": {}}, "credsStore": "tiene"}, ("usuario", "secreto")),
        # the store that Docker uses by default
        ({}, ("usuario", "secreto")),
        (None, ("usuario", "secreto")),
    ],
)
def test_the_login_is_read_from_where_cog_writes_it(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, config: Any, expected: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    programs.login(config)
    programs.write("pass", "#!/bin/sh\n")
    for store in ("tiene", "pass"):
        store_login(programs, store)
    assert prerequisites.login("r8.im") == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "config",
    [
        {"auths": {"r8.im": {}, "https://index.docker.io/v1/": {"auth": "eDp5"}}},
        {"auths": {"https://index.docker.io/v1/": {"auth": "eDp5"}}},
        {"auths": {"r8.im": {}}, "credsStore": "secretservice"},
        {"auths": {}, "credsStore": "falta"},
        # where cog does not look
        {"credHelpers": {"r8.im": "pass"}},
    ],
)
def test_a_login_elsewhere_does_not_count(programs: Programs, config: Any) -> None:
    programs.login(config)
    store_login(programs, "pass")
    assert refusal(check_login) == "No ha entrado en r8.im: cog login"


@pytest.mark.parametrize(
    ("platform", "installed", "store"),
    [
        ("linux", ["pass"], "pass"),
        ("linux", [], "secretservice"),
        ("darwin", ["pass"], "osxkeychain"),
    ],
)
@pytest.mark.parametrize("config", [{}, None])
def test_the_platform_decides_which_store_is_read(
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    platform: str,
    installed: list[str],
    store: str,
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv("PATH", str(programs.folder))
    programs.login(config)
    for name in installed:
        programs.write(name, "#!/bin/sh\n")
    for other in {"osxkeychain", "pass", "secretservice"} - {store}:
        store_login(programs, other)
    assert refusal(check_login) == "No ha entrado en r8.im: cog login"
    store_login(programs, store)
    assert prerequisites.login("r8.im") == ("usuario", "secreto")


@pytest.mark.parametrize(
    "config", [[], {"auths": []}, {"auths": {"r8.im": "x"}}, {"auths": {"r8.im": {"auth": "/w="}}}]
)
def test_a_broken_docker_configuration_is_refused(programs: Programs, config: Any) -> None:
    programs.login(config)
    assert "config.json no se entiende: corríjalo o bórrelo, y cog login" in refusal(check_login)
