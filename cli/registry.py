"""Asks a registry of images before the build what `cog push` asks only after it: the login, the model, the base image.

The protocol is Docker's: the challenge of /v2/ names the server that gives tokens, and an upload begins with a POST.
"""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import httpx

from cli.hosted import STATUS
from llm.errors import UserError
from llm.words import one_line

_SECONDS_TO_CONNECT, _SECONDS_TO_ANSWER = 10, 30
_MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)


class Login(NamedTuple):
    """A user's name and password, or token, for a registry. Neither is ever printed."""

    username: str
    secret: str


def check_push(host: str, model: str, login: Login) -> None:
    """Begin the upload of a layer, and cancel it: nothing else tells whether the login may push to OWNER/NAME.

    Raises UserError.
    """
    with _client(host) as client:
        headers = _authorization(client, host, login, f"repository:{model}:pull,push")
        response = client.post(f"{_address(host)}/v2/{model}/blobs/uploads/", headers=headers)
        if response.status_code == httpx.codes.ACCEPTED:
            with suppress(httpx.HTTPError):
                client.delete(response.url.join(response.headers.get("Location", "")), headers=headers)
        elif response.status_code in (401, 403, 404):
            raise UserError(
                f"{host} no tiene {model}, o la cuenta con que entró no puede publicar en él: créelo en "
                "https://replicate.com/create, o repita cog login con la cuenta a la que pertenece"
            )
        else:
            raise _unexpected(host, response)


def has(host: str, repository: str, tag: str, login: Login) -> bool:
    """Whether the registry has an image that this login may read. Raises UserError if it does not answer that."""
    with _client(host) as client:
        headers = {**_authorization(client, host, login, f"repository:{repository}:pull"), "Accept": _MANIFESTS}
        response = client.get(f"{_address(host)}/v2/{repository}/manifests/{tag}", headers=headers)
        if response.status_code not in (200, 401, 403, 404):
            raise _unexpected(host, response)
        return response.status_code == httpx.codes.OK


@contextmanager
def _client(host: str) -> Iterator[httpx.Client]:
    certificates = httpx.create_ssl_context()
    # cog trusts the system's certificates too, among which a company's proxy may have its own
    certificates.load_default_certs(ssl.Purpose.SERVER_AUTH)
    timeout = httpx.Timeout(_SECONDS_TO_ANSWER, connect=_SECONDS_TO_CONNECT)
    try:
        # like cog, reaches this computer without a proxy
        with httpx.Client(
            verify=certificates, timeout=timeout, follow_redirects=True, trust_env=not _is_local(host)
        ) as client:
            yield client
    except httpx.TimeoutException as error:
        raise UserError(f"{one_line(error.request.url.host)} no contesta: mire {STATUS} y repita") from error
    except httpx.TransportError as error:
        raise UserError(f"Sin conexión con {one_line(error.request.url.host)}: compruebe la red y repita") from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"No es un registro de imágenes quien contesta en {host}: compruebe la red y repita") from error


def _authorization(client: httpx.Client, host: str, login: Login, scope: str) -> dict[str, str]:
    """The header that the registry wants for a scope. Raises UserError if it refuses the login."""
    address = f"{_address(host)}/v2/"
    response = client.get(address)
    if response.status_code == httpx.codes.OK:
        return {}
    if response.status_code != httpx.codes.UNAUTHORIZED:
        raise _unexpected(host, response)
    challenge = response.headers.get("WWW-Authenticate", "")
    bearer = re.search(r"\bbearer\s+(.*)", challenge, re.IGNORECASE)
    if bearer is None:
        response = client.get(address, auth=login)
    else:
        parameters = dict(re.findall(r'(\w+)="([^"]*)"', bearer[1]))
        query = {"account": login.username, "scope": scope, "service": parameters.get("service", "")}
        response = client.get(response.url.join(parameters["realm"]).copy_merge_params(query), auth=login)
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise UserError(f"{host} no reconoce lo que guardó cog login: repita cog login")
    if response.status_code == httpx.codes.FORBIDDEN:
        # the login is valid but lacks the right: the next request is refused
        return {}
    if response.status_code != httpx.codes.OK:
        raise _unexpected(host, response)
    if bearer is None:
        return {"Authorization": response.request.headers["Authorization"]}
    token = response.json()
    return {"Authorization": f"Bearer {token.get('token') or token['access_token']}"}


def _unexpected(host: str, response: httpx.Response) -> UserError:
    status = response.status_code
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return UserError(f"Demasiadas peticiones a {host}: espere y repita")
    if status >= 500:
        return UserError(f"{host} falla ({status}): mire {STATUS} y repita")
    return UserError(f"{host} no contesta como un registro de imágenes ({status}): compruebe la red y repita")


def _is_local(host: str) -> bool:
    return host.partition(":")[0] in ("127.0.0.1", "localhost")


def _address(host: str) -> str:
    return f"{'http' if _is_local(host) else 'https'}://{host}"
