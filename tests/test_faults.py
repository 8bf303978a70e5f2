"""A fault of one client, or in one answer, costs no other client."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cli import schema, server
from llm.errors import UserError
from llm.weights.settings import ROOT
from predict import Predictor
from tests.support import checkpoints
from tests.support.client import GREEDY, Client
from tests.support.processes import FINALLY

pytestmark = pytest.mark.slow

BUDGET = 200


def text_of(prediction: dict[str, Any]) -> str:
    assert prediction["status"] == "succeeded", prediction
    return "".join(prediction["output"])


def slow_stream(client: Client, tokens: int) -> socket.socket:
    """The connection of a stream that has begun, with the smallest receive buffer."""
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
        # Cog may refuse a request: see tests/support/client.py
        if connection.recv(12, socket.MSG_WAITALL) != b"HTTP/1.1 409":
            return connection
        connection.close()


def test_clients_that_read_a_byte_a_second_delay_no_other(falcon_server: Client) -> None:
    places = schema.read(ROOT / "predict.py").concurrency
    inputs = {"pregunta": "El mar", "max_tokens": 40, **GREEDY}
    alone = text_of(falcon_server.predict(**inputs).json())
    finished = threading.Event()

    def answered(_: int) -> str:
        return text_of(falcon_server.predict(**inputs).json())

    def read_slowly() -> None:
        while not finished.wait(1):
            for slow in slow_streams:
                slow.recv(1)

    with ExitStack() as connections, ThreadPoolExecutor(places) as threads:
        connections.callback(finished.set)
        opened = threads.map(lambda _: slow_stream(falcon_server, 40), range(places))
        slow_streams = [connections.enter_context(slow) for slow in opened]
        reading = threads.submit(read_slowly)
        assert list(threads.map(answered, range(4))) == [alone] * 4
        assert not reading.done()
        finished.set()
        reading.result()
        # their own answers are whole
        for slow in slow_streams:
            remainder = slow.makefile("r", encoding="utf-8").read()
            assert '"output_token_count":40' in remainder
            assert '"status":"succeeded"' in remainder


def environment(folder: Path) -> dict[str, str]:
    return {"MODEL_ID": folder.name, "WEIGHTS_DIR": str(folder.parent), "DTYPE": "float32"}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server with a falcon that repeats the prompt's last token for ever. Its turns end in <|im_end|>."""
    folder = checkpoints.falcon(tmp_path_factory.mktemp("weights") / "parrot")
    tokenizer = checkpoints.tokenizer()
    tokenizer.add_tokens(["<|im_end|>", "<|otro|>"], special_tokens=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    # the layers add nothing to a token's embedding, which is nearer to itself than to any other
    silent = ("dense.weight", "dense.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias")
    weights = {name: t.zero_() if name.endswith(silent) else t for name, t in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    with server.running(environment=environment(folder)) as running:
        running.wait_until_ready()
        yield Client(running)


# the second may begin at each token and never ends; of the third, the first text matches at once
@pytest.mark.parametrize("stops", ["", "la lu", " la la la," + "la " * BUDGET])
def test_the_same_token_for_ever_ends_at_the_budget_or_a_stop_sequence(parrot: Client, stops: str) -> None:
    prediction = parrot.predict(pregunta="Tra la", max_tokens=BUDGET, stop_sequences=stops, **GREEDY).json()
    assert text_of(prediction) == (" la" * BUDGET if "," not in stops else "")
    assert prediction["metrics"]["finish_reason"] == ("length" if "," not in stops else "stop")


def test_half_a_character_for_ever_ends_at_the_budget(parrot: Client) -> None:
    prediction = parrot.predict(pregunta="😀", max_tokens=BUDGET, **GREEDY).json()
    assert prediction["status"] == "succeeded"
    assert prediction["metrics"]["output_token_count"] == BUDGET


# the tokenizer's end of text, the chat template's end of a turn, and a token that only a stop sequence names
@pytest.mark.parametrize(
    ("end", "stops"),
    [("<|endoftext|>", {}), ("<|im_end|>", {}), ("<|otro|>", {"stop_sequences": "nunca,<|otro|>"})],
)
def test_an_empty_answer_is_a_success_without_text(parrot: Client, end: str, stops: dict[str, str]) -> None:
    inputs = {"pregunta": "hola", **GREEDY, "prompt_template": f"{{pregunta}}{end}", **stops}
    prediction = parrot.predict(**inputs).json()
    assert text_of(prediction) == ""
    assert prediction["metrics"]["output_token_count"] == len(stops)
    assert prediction["metrics"]["finish_reason"] == "stop"
    with parrot.stream(**inputs) as events:
        names = [name for name, _ in events]
    assert "output" not in names
    assert names[-1] == "completed"


@pytest.fixture
def mismatched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """predict.py's own class, whose tokenizer has a token more than its model and a chat template that needs a system
    message."""
    folder = checkpoints.llama(tmp_path / "mismatched")
    tokenizer = checkpoints.tokenizer()
    tokenizer.add_tokens(["zapatófono"])
    tokenizer.chat_template = "{{ raise_exception('First message must be system') }}"
    tokenizer.save_pretrained(folder)
    for name, value in environment(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", asyncio.run_coroutine_threadsafe)
    predictor = Predictor()
    predictor.setup()
    return predictor


def answer(predictor: Predictor, pregunta: str, **inputs: Any) -> Iterator[str]:
    """What Cog runs for a prediction: the answer's chunks. Raises UserError where it is refused before it begins."""
    defaults = {"max_tokens": 2, "top_p": 1.0, "top_k": 0, "stop_sequences": None, "seed": 1, "prompt_template": None}
    plain = {"temperature": 0.0, "repetition_penalty": 1.0}
    chunks: Any = asyncio.run(predictor.predict(pregunta, **{**defaults, **plain, **inputs}))
    return iter(chunks)


def test_a_chat_template_that_fails_is_reported_in_setup_and_where_it_is_needed(
    capsys: pytest.CaptureFixture[str], mismatched: Predictor
) -> None:
    line = "La plantilla de chat de este modelo falla (First message must be system): indique prompt_template"
    assert f"Sin prompt_template ninguna pregunta tendrá respuesta. {line}\n" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        answer(mismatched, "hola")
    assert str(error.value) == line
    assert "".join(answer(mismatched, "hola", prompt_template="{pregunta}"))


def test_a_token_that_the_model_lacks_fails_only_its_request(
    mismatched: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{pregunta}"
    chunks = answer(mismatched, "Once", max_tokens=100, prompt_template=template)
    assert next(chunks)
    with pytest.raises(UserError, match=r"^El modelo no tiene el token «zapatófono» de su tokenizador"):
        answer(mismatched, "Mi zapatófono", prompt_template=template)
    assert list(chunks)
    assert " 100 de salida" in capsys.readouterr().out


def test_the_health_check_of_a_lost_engine_says_why(mismatched: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise SystemExit("fuera")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(mismatched.engine, "_step", gone)
    line = r"^El motor se detuvo \(fuera\): hay que reiniciar el servidor$"
    assert asyncio.run(mismatched.healthcheck())
    with pytest.raises(UserError, match=line):
        list(answer(mismatched, "hola", prompt_template="{pregunta}"))
    with pytest.raises(UserError, match=line):
        asyncio.run(mismatched.healthcheck())
