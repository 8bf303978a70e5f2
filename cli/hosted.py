"""A model on Replicate: its name, Replicate's own client with the user's token, and the client's errors in Spanish.

The client takes Replicate's address from REPLICATE_BASE_URL.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING, NamedTuple

import httpx

from llm.errors import UserError
from llm.weights import settings
from llm.words import one_line

# Replicate's client is imported where it is used: it takes long, and a wrong argument or name needs none of it.
if TYPE_CHECKING:
    from replicate.client import Client
    from replicate.exceptions import ReplicateError

TOKENS = "https://replicate.com/account/api-tokens"
BILLING = "https://replicate.com/account/billing"
STATUS = "https://www.replicatestatus.com"

# A name that Docker accepts, perhaps behind Replicate's registry.
_NAME = re.compile(
    r"(?:r8\.im/)?(?P<owner>[a-z0-9]+(?:[_-]+[a-z0-9]+)*)/(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*)"
    r"(?P<version>:[A-Za-z0-9]+)?"
)
_SECONDS_TO_CONNECT = 10


class Reference(NamedTuple):
    """OWNER/NAME, or OWNER/NAME:VERSION."""

    owner: str
    name: str
    version: str | None = None

    @property
    def model(self) -> str:
        return f"{self.owner}/{self.name}"

    @classmethod
    def parse(cls, text: str, *, versioned: bool = False) -> "Reference":
        """The model that `text` names, and, if `versioned`, its version where it names one. Raises UserError."""
        match = _NAME.fullmatch(text)
        if match is None or (match["version"] and not versioned):
            form = "USUARIO/NOMBRE o USUARIO/NOMBRE:VERSIÓN" if versioned else "USUARIO/NOMBRE"
            raise UserError(f'"{one_line(text)}" no es un nombre de Replicate: se escribe {form}, en minúsculas')
        return cls(match["owner"], match["name"], match["version"] and match["version"][1:])


class Refused(UserError):
    """The request is not valid. The message ends in the service's own words."""


def client(*, seconds: float = 30) -> "Client":
    """Replicate's client with the user's token; `seconds` is how long it waits for an answer. Raises UserError."""
    token = settings.token(settings.values(), "REPLICATE_API_TOKEN", TOKENS)
    if token is None:
        raise UserError(f"Falta REPLICATE_API_TOKEN: cópielo de {TOKENS} y póngalo en .env")
    from replicate.client import Client

    return Client(token, timeout=httpx.Timeout(seconds, connect=_SECONDS_TO_CONNECT))


@contextmanager
def explained(what: str, *, absent: str = "compruebe el nombre y la cuenta") -> Iterator[None]:
    """Turn the client's errors into a UserError of one line, Refused where the request is not valid.

    `what` is the model or deployment that was asked for, `absent` the way out if Replicate does not have it.
    """
    from replicate.exceptions import ReplicateError

    try:
        yield
    except ReplicateError as error:
        raise _explained(error, what, absent) from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UserError("REPLICATE_BASE_URL no es una dirección: se escribe https://..., o se deja vacía") from error
    except httpx.TimeoutException as error:
        raise UserError(f"{error.request.url.host} no contesta: mire {STATUS} y repita") from error
    except httpx.TransportError as error:
        raise UserError(f"Sin conexión con {error.request.url.host}: compruebe la red y repita") from error
    except JSONDecodeError as error:
        raise UserError("No es Replicate quien contesta: compruebe REPLICATE_BASE_URL y la red") from error


def _explained(error: "ReplicateError", what: str, absent: str) -> UserError:
    detail = " ".join((error.detail or error.title or error.type or "sin decir por qué").split())
    match error.status:
        case 400 | 422:
            return Refused(f"Replicate no acepta lo que se le pide de {what}: {detail}")
        case 401:
            return UserError(f"Replicate no reconoce su REPLICATE_API_TOKEN: cópielo de nuevo de {TOKENS}")
        case 402:
            return UserError(f"Replicate pide saldo o una forma de pago: póngalos en {BILLING} ({detail})")
        case 403:
            return UserError(f"Su token no da acceso a {what}: use el de la cuenta a la que pertenece ({detail})")
        case 404:
            return UserError(f"Replicate no tiene {what}, o su token no lo ve: {absent}")
        case 429:
            return UserError(f"Demasiadas peticiones para su cuenta de Replicate: espere y repita ({detail})")
        case int(status) if status >= 500:
            return UserError(f"Replicate falla ({status}): mire {STATUS} y repita")
        case status:
            return UserError(f"Replicate no hizo lo que se le pidió de {what} ({status or 'sin código'}): {detail}")
