"""What goes wrong with one client, or with one answer, costs no other: on the genuine server."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cli import schema, server
from llm.weights.settings import ROOT
from tests import checkpoints
from tests.client import Client
from tests.processes import FINALLY

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "repetition_penalty": 1, "prompt_template": "{pregunta}"}
END = "<|endoftext|>"
BUDGET = 200


def text_of(prediction: dict[str, Any]) -> str:
    assert prediction["status"] == "succeeded", prediction
    return "".join(prediction["output"])


def asked(client: Client, tokens: int) -> socket.socket:
    """The connection of one whose stream has begun, and who has room for next to nothing of it."""
    body = json.dumps({"input": {"pregunta": "Once upon a time", "max_tokens": tokens, **GREEDY}})
    headers = [
        "POST /predictions HTTP/1.1",
        "Host: x",
        "Connection: close",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(body)}",
    ]
    while True:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(FINALLY)
        connection.connect((server.HOST, client.server.port))
        connection.sendall("\r\n".join([*headers, "", body]).encode())
        # Cog may refuse one: see tests/client.py
        if connection.recv(12, socket.MSG_WAITALL) != b"HTTP/1.1 409":
            return connection
        connection.close()


def test_clients_that_read_a_byte_a_second_hold_nobody_up(falcon_server: Client) -> None:
    places = schema.read(ROOT / "predict.py").concurrency
    inputs = {"pregunta": "El mar", "max_tokens": 40, **GREEDY}
    alone = text_of(falcon_server.predict(**inputs).json())
    enough = threading.Event()

    def answered(_: int) -> str:
        return text_of(falcon_server.predict(**inputs).json())

    def read_slowly() -> None:
        while not enough.wait(1):
            for slow in slow_ones:
                slow.recv(1)

    with ExitStack() as connections, ThreadPoolExecutor(places) as threads:
        connections.callback(enough.set)
        asking = threads.map(lambda _: asked(falcon_server, 100), range(places))
        slow_ones = [connections.enter_context(slow) for slow in asking]
        reading = threads.submit(read_slowly)
        assert list(threads.map(answered, range(4))) == [alone] * 4
        assert not reading.done()
        enough.set()
        reading.result()
        # theirs waits for them, whole
        for slow in slow_ones:
            rest = slow.makefile("r", encoding="utf-8").read()
            assert '"output_token_count":100' in rest
            assert '"status":"succeeded"' in rest


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The server with a falcon that says the prompt's last token for ever."""
    folder = checkpoints.falcon(tmp_path_factory.mktemp("weights") / "parrot")
    file = folder / "model.safetensors"
    # nothing is added to a token's embedding, and no other is as near to it as it is
    silent = ("dense.weight", "dense.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias")
    weights = {name: t.zero_() if name.endswith(silent) else t for name, t in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    environment = {"MODEL_ID": folder.name, "WEIGHTS_DIR": str(folder.parent), "DTYPE": "float32"}
    with server.running(environment=environment) as running:
        running.wait_until_ready()
        yield Client(running)


# the second begins at each token, and the third with it
@pytest.mark.parametrize("stops", ["", "la lu", " la la la," + "la " * BUDGET])
def test_the_same_token_for_ever_ends_at_the_budget(parrot: Client, stops: str) -> None:
    prediction = parrot.predict(pregunta="Tra la", max_tokens=BUDGET, stop_sequences=stops, **GREEDY).json()
    assert text_of(prediction) == ("la" + " la" * (BUDGET - 1) if "," not in stops else "la")
    assert prediction["metrics"]["finish_reason"] == ("length" if "," not in stops else "stop")


def test_half_a_character_for_ever_ends_at_the_budget(parrot: Client) -> None:
    prediction = parrot.predict(pregunta="😀", max_tokens=BUDGET, **GREEDY).json()
    assert prediction["status"] == "succeeded"
    assert prediction["metrics"]["output_token_count"] == BUDGET


def test_an_empty_answer_is_a_success_without_text(parrot: Client) -> None:
    inputs = {"pregunta": "hola", **GREEDY, "prompt_template": f"{{pregunta}}{END}"}
    prediction = parrot.predict(**inputs).json()
    assert text_of(prediction) == ""
    assert prediction["metrics"]["output_token_count"] == 0
    assert prediction["metrics"]["finish_reason"] == "stop"
    with parrot.stream(**inputs) as events:
        names = [name for name, _ in events]
    assert "output" not in names
    assert names[-1] == "completed"
