"""The stand-in for Replicate, asked by Replicate's own client: what neither examples nor script/deploy ask of it."""

from collections.abc import Iterator

import httpx
import pytest
from replicate.client import Client as Replicate
from replicate.prediction import Prediction

from cli import schema
from llm.weights.settings import ROOT
from tests.support.client import Client
from tests.support.gateway import MODEL, Gateway
from tests.support.processes import until

pytestmark = pytest.mark.slow

LONG = {"pregunta": "Once upon a time", "temperature": 0, "max_tokens": 2048, "prompt_template": "{pregunta}"}
SHORT = {**LONG, "max_tokens": 8}


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


def test_a_stream_keeps_line_ends(demo_gateway: Gateway) -> None:
    client = Replicate(demo_gateway.token, base_url=demo_gateway.url)
    inputs = {"pregunta": "Write a letter to a friend.", "temperature": 0, "max_tokens": 12}
    prediction = client.predictions.create(version=next(iter(demo_gateway.versions)), input=inputs, wait=True)
    assert "\n" in joined(prediction)
    assert "".join(map(str, prediction.stream())) == joined(prediction)


def test_a_prediction_has_all_fields_of_the_api(client: Replicate, gateway: Gateway, version: str, text: str) -> None:
    created = client.predictions.create(version=version, input=SHORT)
    assert (created.status, created.output, created.model, created.version) == ("starting", None, MODEL, version)
    created.wait()
    assert created.status == "succeeded" and joined(created) == text
    assert created.input == SHORT and created.error is None
    assert created.logs and "semilla" in created.logs
    assert created.metrics and {"predict_time", "total_time", "output_token_count"} <= created.metrics.keys()
    assert created.created_at and created.started_at and created.completed_at
    assert created.created_at <= created.started_at <= created.completed_at
    assert client.predictions.get(created.id) == created


def test_a_cancel_ends_the_prediction_and_its_stream(client: Replicate, version: str) -> None:
    prediction = client.predictions.create(version=version, input=LONG)
    until(lambda: status(prediction) == "processing" and prediction.output)
    prediction.cancel()
    assert prediction.status == "canceled" and prediction.completed_at
    assert [event.data for event in prediction.stream() if event.event.value == "done"] == ['{"reason": "canceled"}']
    # the server has ended the prediction too, long before its last token
    assert prediction.output and len(prediction.output) < 1000
    # a prediction that has ended stays as it is
    assert client.predictions.cancel(prediction.id) == client.predictions.get(prediction.id)


def test_a_prediction_beyond_the_servers_places_waits_its_turn(
    client: Replicate, falcon_server: Client, version: str, text: str
) -> None:
    places = schema.read(ROOT / "predict.py").concurrency
    running = [client.predictions.create(version=version, input=LONG) for _ in range(places)]
    until(lambda: falcon_server.get("/health-check")["status"] == "BUSY")
    waiting = [client.predictions.create(version=version, input=SHORT) for _ in range(3)]
    assert [status(prediction) for prediction in waiting] == ["starting"] * 3
    # the server itself would refuse them
    assert falcon_server.predict_if_free(**SHORT).status_code == httpx.codes.CONFLICT
    waiting[1].cancel()
    assert (waiting[1].status, waiting[1].output) == ("canceled", None)
    running[0].cancel()
    for prediction in (waiting[0], waiting[2]):
        prediction.wait()
        assert joined(prediction) == text
    for prediction in running:
        prediction.cancel()
