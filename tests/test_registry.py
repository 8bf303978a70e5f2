"""The checks of a registry before a push, against tests/support/registry.py."""

from collections.abc import Callable, Iterator

import pytest

from cli import registry
from cli.registry import Login
from llm.errors import UserError
from tests.support.registry import BASE, SECRET, USER, Registry

LOGIN = Login(USER, SECRET)
MODEL = "usuario/modelo"


@pytest.fixture(params=["Bearer", "Basic"])
def server(request: pytest.FixtureRequest) -> Iterator[Registry]:
    with Registry() as server:
        server.scheme = request.param
        yield server


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    return str(raised.value)


def test_a_permitted_push_passes_and_leaves_no_upload(server: Registry) -> None:
    registry.check_push(server.host, MODEL, LOGIN)
    assert not server.uploads


def test_a_wrong_login_is_refused(server: Registry) -> None:
    line = f"{server.host} no reconoce lo que guardó cog login: repita cog login"
    wrong = Login(USER, "ñ")
    assert refusal(lambda: registry.check_push(server.host, MODEL, wrong)) == line
    assert refusal(lambda: registry.has(server.host, "cog-base", BASE, wrong)) == line


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_model_that_is_missing_or_anothers_is_refused(server: Registry, status: int) -> None:
    server.fails["/uploads/"] = status
    line = refusal(lambda: registry.check_push(server.host, MODEL, LOGIN))
    assert line.startswith(f"{server.host} no tiene {MODEL}, o la cuenta con que entró no puede publicar en él: créelo")


def test_a_refused_token_is_a_missing_right() -> None:
    with Registry() as server:
        server.fails["/token"] = 403
        assert "no puede publicar en él" in refusal(lambda: registry.check_push(server.host, MODEL, LOGIN))


@pytest.mark.parametrize(
    ("part", "status", "line"),
    [
        ("/v2/", 503, "falla (503): mire https://www.replicatestatus.com y repita"),
        ("/uploads/", 500, "falla (500): mire"),
        ("/v2/", 429, "espere y repita"),
        ("/v2/", 404, "no contesta como un registro de imágenes (404): compruebe la red y repita"),
        ("/uploads/", 200, "no contesta como un registro de imágenes (200)"),
    ],
)
def test_an_error_of_the_registry_is_reported(server: Registry, part: str, status: int, line: str) -> None:
    server.fails[part] = status
    assert line in refusal(lambda: registry.check_push(server.host, MODEL, LOGIN))


def test_an_answer_without_a_token_is_reported() -> None:
    with Registry() as server:
        server.fails["/token"] = 200
        line = f"No es un registro de imágenes quien contesta en {server.host}: compruebe la red y repita"
        assert refusal(lambda: registry.check_push(server.host, MODEL, LOGIN)) == line


def test_an_unreachable_registry_is_reported() -> None:
    with Registry() as server:
        host = server.host
    line = "Sin conexión con 127.0.0.1: compruebe la red y repita"
    assert refusal(lambda: registry.check_push(host, MODEL, LOGIN)) == line


def test_a_silent_registry_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SECONDS_TO_ANSWER", 0.1)
    # it listens and never answers
    silent = Registry()
    line = "127.0.0.1 no contesta: mire https://www.replicatestatus.com y repita"
    assert refusal(lambda: registry.check_push(silent.host, MODEL, LOGIN)) == line
    silent.close()


def test_a_base_image_is_found_by_its_tag(server: Registry) -> None:
    assert registry.has(server.host, "cog-base", BASE, LOGIN)
    assert not registry.has(server.host, "cog-base", "otra", LOGIN)
