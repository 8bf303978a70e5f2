"""What a registry is asked before a push, of one of ours."""

from collections.abc import Callable, Iterator

import pytest

from cli import registry
from cli.registry import Login
from llm.errors import UserError
from tests.support.registry import BASE, SECRET, USER, Registry

LOGIN = Login(USER, SECRET)
MODEL = "usuario/modelo"


@pytest.fixture(params=["Bearer", "Basic"])
def there(request: pytest.FixtureRequest) -> Iterator[Registry]:
    with Registry() as there:
        there.scheme = request.param
        yield there


def refused(ask: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        ask()
    return str(raised.value)


def test_a_push_that_may_be(there: Registry) -> None:
    registry.check_push(there.host, MODEL, LOGIN)
    # nothing is left begun
    assert not there.uploads


def test_a_login_that_does_not_hold(there: Registry) -> None:
    line = f"{there.host} no reconoce lo que guardó cog login: repita cog login"
    wrong = Login(USER, "ñ")
    assert refused(lambda: registry.check_push(there.host, MODEL, wrong)) == line
    assert refused(lambda: registry.has(there.host, "cog-base", BASE, wrong)) == line


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_page_that_is_not_there_or_is_anothers(there: Registry, status: int) -> None:
    there.fails["/uploads/"] = status
    line = refused(lambda: registry.check_push(there.host, MODEL, LOGIN))
    assert line.startswith(f"{there.host} no tiene {MODEL}, o la cuenta con que entró no puede publicar en él: créelo")


def test_a_token_that_gives_no_right() -> None:
    with Registry() as there:
        there.fails["/token"] = 403
        assert "no puede publicar en él" in refused(lambda: registry.check_push(there.host, MODEL, LOGIN))


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
def test_a_registry_that_fails(there: Registry, part: str, status: int, line: str) -> None:
    there.fails[part] = status
    assert line in refused(lambda: registry.check_push(there.host, MODEL, LOGIN))


def test_a_token_that_is_none() -> None:
    with Registry() as there:
        there.fails["/token"] = 200
        line = f"No es un registro de imágenes quien contesta en {there.host}: compruebe la red y repita"
        assert refused(lambda: registry.check_push(there.host, MODEL, LOGIN)) == line


def test_a_registry_that_is_away() -> None:
    with Registry() as there:
        host = there.host
    line = "Sin conexión con 127.0.0.1: compruebe la red y repita"
    assert refused(lambda: registry.check_push(host, MODEL, LOGIN)) == line


def test_a_registry_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SECONDS_TO_ANSWER", 0.1)
    # it listens, and nobody serves
    silent = Registry()
    line = "127.0.0.1 no contesta: mire https://www.replicatestatus.com y repita"
    assert refused(lambda: registry.check_push(silent.host, MODEL, LOGIN)) == line
    silent.close()


def test_a_base_image(there: Registry) -> None:
    assert registry.has(there.host, "cog-base", BASE, LOGIN)
    assert not registry.has(there.host, "cog-base", "otra", LOGIN)
