"""tests/support/gateway.py, by the unmodified client of the real service: what it answers is what that client takes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from replicate.client import Client as Replicate
from replicate.exceptions import ModelError, ReplicateError
from replicate.prediction import Prediction

from cli import schema
from llm.weights.settings import ROOT
from tests.support import gateway as service
from tests.support.client import Client
from tests.support.gateway import MODEL, Gateway
from tests.support.processes import FINALLY, until
from tests.support.receiver import Receiver

pytestmark = pytest.mark.slow

LONG = {"pregunta": "Once upon a time", "temperature": 0, "max_tokens": 2048, "prompt_template": "{pregunta}"}
SHORT = {**LONG, "max_tokens": 8}
REFUSED = {**SHORT, "prompt_template": "sin sitio"}
TERMINAL = {"succeeded", "failed", "canceled"}
DEPLOYMENT = {"model": MODEL, "hardware": "gpu-l40s", "min_instances": 0, "max_instances": 1}


@pytest.fixture(scope="module")
def gateway(falcon_server: Client) -> Iterator[Gateway]:
    with Gateway(falcon_server.server.url) as gateway:
        gateway.publish()
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Replicate:
    return Replicate(gateway.token, base_url=gateway.url)


@pytest.fixture
def version(gateway: Gateway) -> str:
    return next(iter(gateway.versions))


@pytest.fixture(scope="module")
def text(falcon_server: Client) -> str:
    """What the server itself answers to SHORT."""
    return "".join(falcon_server.predict(**SHORT).json()["output"])


def joined(prediction: Prediction) -> str:
    return "".join(prediction.output or [])


def status(prediction: Prediction) -> str:
    prediction.reload()
    return prediction.status


# Predictions


@pytest.mark.parametrize("wait", [True, False, 30])
def test_run(client: Replicate, version: str, text: str, wait: bool | int) -> None:
    assert "".join(client.run(f"{MODEL}:{version}", SHORT, wait=wait)) == text


def test_run_of_the_newest_version(client: Replicate, text: str) -> None:
    newest = client.models.get(MODEL).latest_version
    assert newest
    assert "".join(client.run(newest, SHORT)) == text  # type: ignore[arg-type]


def test_stream(client: Replicate, version: str, text: str) -> None:
    *output, done = client.stream(f"{MODEL}:{version}", input=SHORT)
    assert "".join(map(str, output)) == text and len(output) > 1
    assert (done.event.value, done.data) == ("done", "{}")


def test_lines_are_kept_in_a_stream(demo_gateway: Gateway) -> None:
    client = Replicate(demo_gateway.token, base_url=demo_gateway.url)
    asked = {"pregunta": "Write a letter to a friend.", "temperature": 0, "max_tokens": 12}
    prediction = client.predictions.create(version=next(iter(demo_gateway.versions)), input=asked, wait=True)
    assert "\n" in joined(prediction)
    assert "".join(map(str, prediction.stream())) == joined(prediction)


def test_async_run_of_many(client: Replicate, version: str, text: str) -> None:
    async def run() -> str:
        chunks: AsyncIterator[str] = await client.async_run(f"{MODEL}:{version}", SHORT)
        return "".join([chunk async for chunk in chunks])

    async def many() -> list[str]:
        return await asyncio.gather(*(run() for _ in range(8)))

    assert asyncio.run(many()) == [text] * 8


def test_what_is_shown_of_a_prediction(client: Replicate, gateway: Gateway, version: str, text: str) -> None:
    created = client.predictions.create(version=version, input=SHORT)
    assert (created.status, created.output, created.model, created.version) == ("starting", None, MODEL, version)
    created.wait()
    assert created.status == "succeeded" and joined(created) == text
    assert created.input == SHORT and created.error is None
    assert created.logs and "semilla" in created.logs
    assert created.metrics and {"predict_time", "total_time", "output_token_count"} <= created.metrics.keys()
    assert created.created_at and created.started_at and created.completed_at
    assert created.created_at <= created.started_at <= created.completed_at
    assert client.predictions.list().results[0] == client.predictions.get(created.id) == created


def test_a_wait_that_is_too_short_gets_what_there_is(gateway: Gateway, version: str) -> None:
    headers = {"Authorization": f"Bearer {gateway.token}", "Prefer": "wait=1"}
    body = {"version": version, "input": LONG}
    answer = httpx.post(f"{gateway.url}/v1/predictions", json=body, headers=headers, timeout=FINALLY)
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (httpx.codes.ACCEPTED, "wait=1")
    assert answer.json()["status"] in ("starting", "processing")
    get = answer.headers["Location"]
    assert get == answer.json()["urls"]["get"]
    ended = httpx.post(f"{get}/cancel", headers=headers, timeout=FINALLY)
    assert ended.json()["status"] == "canceled"


def test_cancel(client: Replicate, version: str) -> None:
    prediction = client.predictions.create(version=version, input=LONG)
    until(lambda: status(prediction) == "processing" and prediction.output)
    prediction.cancel()
    assert prediction.status == "canceled" and prediction.completed_at
    assert [event.data for event in prediction.stream() if event.event.value == "done"] == ['{"reason": "canceled"}']
    # it has ended there too, long before its last token
    assert prediction.output and len(prediction.output) < 1000
    # one that is over stays as it is
    assert client.predictions.cancel(prediction.id) == client.predictions.get(prediction.id)


def test_one_that_fails(client: Replicate, version: str) -> None:
    with pytest.raises(ModelError, match="prompt_template debe contener") as raised:
        client.run(f"{MODEL}:{version}", REFUSED)
    assert raised.value.prediction.status == "failed"
    with pytest.raises(RuntimeError, match="prompt_template debe contener"):
        list(client.stream(f"{MODEL}:{version}", input=REFUSED))


def test_one_more_than_the_server_has_places_for_waits_its_turn(
    client: Replicate, falcon_server: Client, version: str, text: str
) -> None:
    places = schema.read(ROOT / "predict.py").concurrency
    running = [client.predictions.create(version=version, input=LONG) for _ in range(places)]
    until(lambda: falcon_server.get("/health-check")["status"] == "BUSY")
    waiting = [client.predictions.create(version=version, input=SHORT) for _ in range(3)]
    assert [status(prediction) for prediction in waiting] == ["starting"] * 3
    # they are still refused there
    assert falcon_server.predict_if_free(**SHORT).status_code == httpx.codes.CONFLICT
    waiting[1].cancel()
    assert (waiting[1].status, waiting[1].output) == ("canceled", None)
    running[0].cancel()
    for prediction in (waiting[0], waiting[2]):
        prediction.wait()
        assert joined(prediction) == text
    for prediction in running:
        prediction.cancel()


# Webhooks


def statuses(receiver: Receiver) -> list[str]:
    return [json.loads(body)["status"] for _, body in receiver.got]


def test_a_webhook_is_signed(client: Replicate, version: str) -> None:
    with Receiver() as receiver:
        prediction = client.predictions.create(version=version, input=SHORT, webhook=receiver.url)
        until(lambda: TERMINAL & set(statuses(receiver)))
    secret = client.webhooks.default.secret()
    for headers, body in receiver.got:
        client.webhooks.validate(headers=headers, body=body, secret=secret, tolerance=300)
        with pytest.raises(ValueError, match="signature is invalid"):
            client.webhooks.validate(headers=headers, body=f"{body} ", secret=secret)
    *before, last = (json.loads(body) for _, body in receiver.got)
    prediction.reload()
    assert Prediction(**last) == prediction
    # no start or log unless it is asked for, and of the output only what comes half a second apart
    assert before and all(one["status"] == "processing" and one["output"] for one in before)
    assert len(before) <= 1 + last["metrics"]["total_time"] / 0.5


def test_a_webhook_comes_for_the_events_asked_for(client: Replicate, version: str) -> None:
    with Receiver() as receiver:
        events = ["start", "completed"]
        client.predictions.create(version=version, input=SHORT, webhook=receiver.url, webhook_events_filter=events)
        until(lambda: TERMINAL & set(statuses(receiver)))
    assert [json.loads(body)["output"] is None for _, body in receiver.got] == [True, False]


def test_the_last_webhook_comes_again_until_it_is_taken(client: Replicate, version: str) -> None:
    codes = iter([500, 404])
    with Receiver(lambda headers, body: next(codes, 200)) as receiver:
        completed = ["completed"]
        client.predictions.create(version=version, input=SHORT, webhook=receiver.url, webhook_events_filter=completed)
        until(lambda: len(receiver.got) == 3)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert statuses(receiver) == ["succeeded"] * 3


# What is there


def test_the_model_and_its_versions(client: Replicate, gateway: Gateway, version: str) -> None:
    model = client.models.get(MODEL)
    assert (model.id, model.owner, model.name) == (MODEL, *MODEL.split("/"))
    assert model.latest_version == model.versions.get(version) == model.versions.list().results[0]
    assert model.latest_version and model.latest_version.openapi_schema == schema.read(ROOT / "predict.py").schema

    other = gateway.publish(schema={**model.latest_version.openapi_schema, "info": {"title": "Otra"}})
    assert [found.id for found in model.versions.list()] == [other, version]
    del gateway.versions[other]


def test_a_model_to_which_nothing_was_pushed(gateway: Gateway) -> None:
    with Gateway(str(gateway._cog.base_url), model="otra/nueva") as empty:
        model = Replicate(empty.token, base_url=empty.url).models.get("otra/nueva")
        assert model.latest_version is None
        assert len(model.versions.list()) == 0


def test_an_official_model_needs_no_version(
    client: Replicate, gateway: Gateway, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = refused(lambda: client.run(MODEL, SHORT))
    assert (refusal.status, refusal.detail) == (404, "The requested resource could not be found.")
    monkeypatch.setattr(gateway, "official", True)
    assert "".join(client.run(MODEL, SHORT)) == text
    assert "".join(map(str, client.stream(MODEL, input=SHORT))) == text
    assert client.predictions.create(version=MODEL, input=SHORT).version == "hidden"


def test_hardware_and_account(client: Replicate) -> None:
    assert {"cpu", "gpu-l40s", "gpu-a100-large"} < {hardware.sku for hardware in client.hardware.list()}
    assert client.accounts.current().username == MODEL.split("/")[0]


def test_deployments(client: Replicate, version: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = client.accounts.current().username
    made = client.deployments.create(name="despliegue", version=version, **DEPLOYMENT)  # type: ignore[arg-type]
    assert made.id == f"{owner}/despliegue" and made.current_release
    assert (made.current_release.number, made.current_release.model) == (1, MODEL)
    assert client.deployments.get(made.id) == made == client.deployments.list().results[0]

    prediction = made.predictions.create(SHORT, wait=True)
    assert joined(prediction) == text and prediction.version == version
    assert "".join(map(str, client.deployments.predictions.create(made, SHORT).stream())) == text

    changed = client.deployments.update(owner, "despliegue", min_instances=1, max_instances=3).current_release
    assert changed and changed.created_by and changed.created_by.username == owner
    assert (changed.number, changed.version, changed.configuration.hardware) == (2, version, "gpu-l40s")
    assert (changed.configuration.min_instances, changed.configuration.max_instances) == (1, 3)

    def delete() -> bool:
        return client.deployments.delete(owner, "despliegue")

    assert "offline and unused for at least 15 minutes" in str(refused(delete))
    client.deployments.update(owner, "despliegue", min_instances=0)
    assert "offline and unused for at least 15 minutes" in str(refused(delete))
    monkeypatch.setattr(service, "SECONDS_OFFLINE", 0)
    assert delete()
    assert refused(lambda: client.deployments.get(made.id)).status == 404
    assert len(client.deployments.list()) == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hardware": "gpu-x"}, "- hardware: gpu-x is not a valid hardware SKU. Your options are: cpu, "),
        ({"min_instances": 6}, "- min_instances: 6 is greater than the maximum of 5"),
        ({"version": "otra"}, "- version: "),
        ({"model": "otra/otro"}, "- model: "),
    ],
)
def test_a_deployment_that_is_refused(client: Replicate, version: str, change: Any, told: str) -> None:
    refusal = refused(lambda: client.deployments.create(**{"name": "d", "version": version, **DEPLOYMENT, **change}))
    assert (refusal.status, refusal.title) == (400, "Validation failed")
    assert refusal.detail and refusal.detail.startswith(f"The following errors occurred:\n{told}")


# Errors


def refused(call: Callable[[], Any]) -> ReplicateError:
    with pytest.raises(ReplicateError) as raised:
        call()
    return raised.value


@pytest.mark.parametrize(
    ("token", "detail"),
    [(None, "You did not pass an authentication token"), ("r8_otro", "You did not pass a valid authentication token")],
)
def test_without_the_token(
    gateway: Gateway, version: str, monkeypatch: pytest.MonkeyPatch, token: str | None, detail: str
) -> None:
    monkeypatch.delenv("REPLICATE_API_TOKEN", raising=False)
    stranger = Replicate(token, base_url=gateway.url)
    refusal = refused(lambda: stranger.run(f"{MODEL}:{version}", SHORT))
    assert (refusal.status, refusal.title, refusal.detail) == (401, "Unauthenticated", detail)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.predictions.get("nada"),
        lambda client: client.predictions.cancel("nada"),
        lambda client: client.models.get("otra/otro"),
        lambda client: client.models.get(MODEL).versions.get("nada"),
        lambda client: client.deployments.get("otra/otro"),
        lambda client: client.deployments.predictions.create("otra/otro", SHORT),
        lambda client: client.collections.list(),
    ],
)
def test_what_is_not_there(client: Replicate, call: Callable[[Replicate], Any]) -> None:
    refusal = refused(lambda: call(client))
    assert (refusal.status, refusal.detail) == (404, "The requested resource could not be found.")


@pytest.mark.parametrize("reference", ["nada", f"{MODEL}:nada", "otra/otro:{version}", MODEL])
def test_a_version_that_is_not_there(client: Replicate, version: str, reference: str) -> None:
    named = reference.format(version=version)
    refusal = refused(lambda: client.predictions.create(version=named, input=SHORT))
    assert (refusal.status, refusal.title) == (422, "Invalid version or not permitted")


@pytest.mark.parametrize(
    ("inputs", "detail"),
    [
        ({}, "- input: pregunta is required\n"),
        ({"pregunta": ""}, "- input.pregunta: String length must be greater than or equal to 1\n"),
        ({"pregunta": "a" * 100_001}, "- input.pregunta: String length must be less than or equal to 100000\n"),
        ({"pregunta": 1}, "- input.pregunta: Invalid type. Expected: string, given: integer\n"),
        ({"pregunta": "a", "max_tokens": 0}, "- input.max_tokens: Must be greater than or equal to 1\n"),
        ({"pregunta": "a", "temperature": 2.1}, "- input.temperature: Must be less than or equal to 2\n"),
        ({"pregunta": "a", "seed": None}, "- input.seed: Invalid type. Expected: integer, given: null\n"),
    ],
)
def test_input_that_the_schema_forbids(
    client: Replicate, gateway: Gateway, version: str, inputs: dict[str, Any], detail: str
) -> None:
    before = len(gateway.predictions)
    refusal = refused(lambda: client.predictions.create(version=version, input=inputs))
    assert (refusal.status, refusal.title, refusal.detail) == (422, "Input validation failed", detail)
    assert len(gateway.predictions) == before


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        ("{", 400, "The request's body is not JSON: "),
        ("[]", 422, "- Invalid type. Expected: object, given: array\n"),
        ('{"input": {}, "model": "a/b"}', 422, "- version is required\n- Additional property model is not allowed\n"),
        (
            '{"version": "v", "input": {}, "webhook_events_filter": ["end"]}',
            422,
            "- webhook_events_filter.0: 0 must be ",
        ),
    ],
)
def test_a_body_that_is_no_request(gateway: Gateway, content: str, status: int, detail: str) -> None:
    headers = {"Authorization": f"Bearer {gateway.token}"}
    answer = httpx.post(f"{gateway.url}/v1/predictions", content=content, headers=headers)
    assert answer.status_code == answer.json()["status"] == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"].startswith(detail)
