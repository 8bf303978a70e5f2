"""script/deploy: deployments on Replicate. Each runs a model on instances of its own, more of them with more work.

The API tells how a deployment is configured, not how many of its instances run.
"""

import sys
import time
from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx

from cli import hosted
from cli.hosted import Reference, Refused, explained
from cli.terminal import Loading, Parser, agree, command
from llm.errors import UserError

# as in cli/hosted.py: for a wrong argument nobody waits for the import
if TYPE_CHECKING:
    from replicate.client import Client
    from replicate.deployment import Deployment

PRICING = "https://replicate.com/pricing"
SECONDS_TO_ANSWER = 15 * 60
QUESTION = {"pregunta": "Hola", "max_tokens": 1}


@command
def main() -> int:
    parser = Parser(
        prog="script/deploy",
        description="Un despliegue: el modelo publicado, en instancias propias de Replicate, más cuanto más trabajo.",
        epilog="Ejemplo: script/deploy crear tu-usuario/nombre-modelo --hardware gpu-l40s --min 1 --max 3",
    )
    actions = parser.add_subparsers(metavar="ACCIÓN", required=True)

    text = "crea un despliegue, o cambia el que hay, y espera a que conteste"
    action = actions.add_parser("crear", help=text, description=f"{text.capitalize()}.")
    action.add_argument("model", metavar="USUARIO/MODELO[:VERSIÓN]", help="sin VERSIÓN, la más nueva")
    action.add_argument("--name", metavar="NOMBRE", help="nombre del despliegue (el del modelo)")
    action.add_argument(
        "--hardware", metavar="MÁQUINA", help="la de cada instancia (la que tenía); si falta, se dice cuáles hay"
    )
    action.add_argument("--min", type=int, metavar="N", help="instancias siempre encendidas (0, o las que tenía)")
    action.add_argument("--max", type=int, metavar="N", help="instancias como mucho (1, o las que tenía)")
    action.set_defaults(act=create)
    for name, act, text in (
        ("ver", show, "enseña cómo está puesto un despliegue"),
        ("esperar", ask, "le hace una pregunta y espera a que conteste"),
        ("cero", switch_off, "lo apaga: deja de contestar y de costar dinero"),
        ("borrar", delete, "lo borra, si lleva 15 minutos apagado"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        action.add_argument("deployment", metavar="USUARIO/DESPLIEGUE")
        action.set_defaults(act=act)
    for name in ("crear", "esperar", "borrar"):
        actions.choices[name].add_argument("--yes", action="store_true", help="no pregunta antes de seguir")

    arguments = parser.parse_args()
    arguments.act(hosted.client(), arguments)
    return 0


def create(client: "Client", arguments: Namespace) -> None:
    reference = Reference.parse(arguments.model, versioned=True)
    name = Reference.parse(f"{reference.owner}/{arguments.name or reference.name}").name
    with explained(reference.model):
        # the deployment belongs to the token's account, which need not own the model
        owner = client.accounts.current().username
        model = client.models.get(reference.model)
        machines = {machine.sku: machine.name for machine in client.hardware.list()}
    with explained(f"{reference.model}:{reference.version}"):
        version = model.versions.get(reference.version) if reference.version else model.latest_version
    if version is None:
        raise UserError(f"{model.id} no tiene ninguna versión: publíquela con script/push {model.id}")

    id = f"{owner}/{name}"
    existing = _find(client, id)
    release = existing.current_release if existing else None
    if release and release.model != model.id:
        raise UserError(f"{id} ya es un despliegue de {release.model}: dé otro nombre a este con --name")
    settings: dict[str, Any] = {"hardware": None, "min_instances": 0, "max_instances": 0}
    if release:
        settings = release.configuration.dict()
    given = {"hardware": arguments.hardware, "min_instances": arguments.min, "max_instances": arguments.max}
    settings |= {key: value for key, value in given.items() if value is not None}
    fewest, most = settings["min_instances"], settings["max_instances"]
    if arguments.max is None:
        # of a deployment that is switched off it is 0
        most = settings["max_instances"] = max(most, fewest, 1)
    if most < max(fewest, 1):
        raise UserError("--max ha de ser 1 o más, y no menos que --min; para apagarlo está script/deploy cero")
    if settings["hardware"] not in machines:
        offered = ", ".join(f"{sku} ({machine})" for sku, machine in machines.items())
        raise UserError(f"--hardware ha de ser una de las máquinas de Replicate: {offered}")

    agree(
        f"Se {'cambia' if existing else 'crea'} {id}: {model.id}:{version.id} en {settings['hardware']} "
        f"({machines[settings['hardware']]})\n"
        f"Instancias siempre encendidas: {fewest}; con mucho trabajo, hasta {most}\n"
        "Cada una se paga por el tiempo que está encendida, aunque nadie pregunte: el precio por hora está en "
        f"{PRICING}\nAl final se le hace una pregunta, que enciende una si no hay ninguna",
        yes=arguments.yes,
    )
    with explained(id):
        if existing:
            deployment = client.deployments.update(owner, name, version=version.id, **settings)
        else:
            deployment = client.deployments.create(name=name, model=model.id, version=version.id, **settings)
    _print(deployment)
    _wait(client, deployment)


def show(client: "Client", arguments: Namespace) -> None:
    _print(_get(client, arguments.deployment))


def ask(client: "Client", arguments: Namespace) -> None:
    deployment = _get(client, arguments.deployment)
    if _release(deployment).configuration.max_instances == 0:
        raise UserError(f"{deployment.id} está apagado: se enciende con {_switch_on(deployment)}")
    agree(
        f"Se hace una pregunta a {deployment.id}, que enciende una instancia si no hay ninguna, y se paga: {PRICING}",
        yes=arguments.yes,
    )
    _wait(client, deployment)


def switch_off(client: "Client", arguments: Namespace) -> None:
    deployment = _get(client, arguments.deployment)
    with explained(deployment.id):
        # with a `max_instances` above 0 the next prediction would start an instance
        off = client.deployments.update(deployment.owner, deployment.name, min_instances=0, max_instances=0)
    _print(off)


def delete(client: "Client", arguments: Namespace) -> None:
    deployment = _get(client, arguments.deployment)
    agree(f"Se borra {deployment.id}: los programas que lo llaman se quedan sin respuesta", yes=arguments.yes)
    try:
        with explained(deployment.id):
            client.deployments.delete(deployment.owner, deployment.name)
    except Refused as refused:
        raise UserError(
            f"Todavía no se puede borrar: apáguelo con script/deploy cero {deployment.id}, espere 15 minutos sin "
            f"usarlo y repita. {refused}"
        ) from refused
    print(f"{deployment.id} está borrado")


def _find(client: "Client", id: str) -> "Deployment | None":
    from replicate.exceptions import ReplicateError

    with explained(id):
        try:
            return client.deployments.get(id)
        except ReplicateError as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise
    return None


def _get(client: "Client", name: str) -> "Deployment":
    id = Reference.parse(name).model
    deployment = _find(client, id)
    if deployment is None:
        raise UserError(
            f"No hay un despliegue {id} que su token vea: compruebe el nombre, o script/deploy crear --help"
        )
    return deployment


def _release(deployment: "Deployment") -> "Deployment.Release":
    if deployment.current_release is None:
        raise UserError(f"{deployment.id} no tiene ninguna versión: póngasela con script/deploy crear")
    return deployment.current_release


def _print(deployment: "Deployment") -> None:
    release = _release(deployment)
    configuration = release.configuration
    on = configuration.max_instances > 0
    print(
        deployment.id,
        f"  modelo      {release.model}:{release.version}",
        f"  máquina     {configuration.hardware}",
        f"  instancias  {configuration.min_instances} a {configuration.max_instances}{'' if on else ', apagado'}",
        f"  página      {_page(deployment)}",
        f"  apagarlo    script/deploy cero {deployment.id}" if on else f"  encenderlo  {_switch_on(deployment)}",
        sep="\n",
        flush=True,
    )


def _page(deployment: "Deployment") -> str:
    return f"https://replicate.com/deployments/{deployment.id}"


def _switch_on(deployment: "Deployment") -> str:
    release = _release(deployment)
    return f"script/deploy crear {release.model}:{release.version} --name {deployment.name}"


def _wait(client: "Client", deployment: "Deployment") -> None:
    """Ask the deployment a question and wait for the answer. Raises UserError if none comes or the prediction fails."""
    from replicate.exceptions import ReplicateError

    loading = Loading("Esperando a que conteste", "Contestó")
    with explained(deployment.id), loading:
        start = time.monotonic()
        prediction = deployment.predictions.create(QUESTION)
        try:
            while prediction.status in ("starting", "processing"):
                seconds = time.monotonic() - start
                if seconds > SECONDS_TO_ANSWER:
                    raise UserError(
                        f"{deployment.id} no contestó en {SECONDS_TO_ANSWER // 60} minutos, y sigue encendido: mire "
                        f"{_page(deployment)} y repita script/deploy esperar {deployment.id}"
                    )
                loading.tick(seconds)
                time.sleep(client.poll_interval)
                prediction.reload()
        except BaseException:
            # nobody waits any more; an error of cancel() must not hide what ended the wait
            with suppress(ReplicateError, httpx.HTTPError):
                prediction.cancel()
            raise
        if prediction.status != "succeeded":
            why = " ".join((prediction.error or "sin decir por qué").split())
            raise UserError(
                f"{deployment.id} no contesta, acabó en {prediction.status}: {why}; mire {_page(deployment)}"
            )


if __name__ == "__main__":
    sys.exit(main())
