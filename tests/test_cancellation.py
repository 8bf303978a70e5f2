"""A cancel ends its prediction, whenever it arrives; a Cog that cancels in another way still serves predictions."""

import asyncio
import ctypes
import os
import re
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cog
import httpx
import pytest

from cli import events, server
from llm import cancellation
from llm.cancellation import follow_cancels, on_cancel
from llm.engine import sequence as sequence_module
from predict import Predictor
from tests.support import words
from tests.support.client import GREEDY, SSE, Client
from tests.support.processes import FINALLY

OTHER_COG_WARNING = "Esta versión de Cog cancela de otro modo"
# A Cog whose way to submit a prediction we cannot replace.
OTHER_COG = """\
import asyncio, types

class Another(types.ModuleType):
    def __setattr__(self, name, value):
        if name != "run_coroutine_threadsafe":
            super().__setattr__(name, value)

asyncio.__class__ = Another
"""


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, as Cog's worker has for predictions."""
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", asyncio.run_coroutine_threadsafe)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_cancel_after_the_coroutine_has_returned_runs_its_callback(loop: asyncio.AbstractEventLoop) -> None:
    follow_cancels(cog.CancelationException)
    cancelled = threading.Event()

    async def predict() -> str:
        on_cancel(cancelled.set)
        return "answer"

    future = asyncio.run_coroutine_threadsafe(predict(), loop)
    assert future.result(FINALLY) == "answer"
    assert not cancelled.is_set()
    future.cancel()
    assert cancelled.is_set()


def test_a_cancel_while_cog_submits_a_prediction_cancels_it(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_cancels(cog.CancelationException)
    schedule = loop.call_soon_threadsafe

    def schedule_and_cancel(*arguments: Any, **options: Any) -> Any:
        handle = schedule(*arguments, **options)
        # as Cog does: the exception is raised in this thread at its next bytecode
        thread, exception = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(cog.CancelationException)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, exception)
        return handle

    ran = threading.Event()

    async def predict() -> None:
        ran.set()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", schedule_and_cancel)
        future = asyncio.run_coroutine_threadsafe(predict(), loop)
    with pytest.raises(CancelledError):
        future.result(FINALLY)
    assert ran.wait(FINALLY)


@pytest.mark.slow
def test_a_cancel_is_no_failure_however_early_it_arrives(falcon_server: Client) -> None:
    inputs = {"pregunta": "Once upon a time", "max_tokens": 30, **GREEDY}

    def cancelled_at_once(number: int) -> str:
        url = f"{falcon_server.server.url}/predictions/{uuid.uuid4().hex}"
        headers = SSE if number % 2 else {}
        asking = thread.submit(http.put, url, json={"input": inputs}, headers=headers)
        while not asking.done() and not http.post(f"{url}/cancel").is_success:
            continue
        answer = asking.result()
        *_, (_, end) = events.read([answer.content]) if number % 2 else [("", answer.json())]
        return str(end["status"])

    with ThreadPoolExecutor(1) as thread, httpx.Client(timeout=FINALLY, trust_env=False) as http:
        ends = [cancelled_at_once(number) for number in range(40)]
    # Cog itself loses a cancel that arrives before its worker has read the prediction
    assert {*ends} <= {"canceled", "succeeded"}
    assert "canceled" in ends


def test_a_cog_that_cancels_in_another_way_is_reported_once(
    loop: asyncio.AbstractEventLoop, capsys: pytest.CaptureFixture[str]
) -> None:
    cancellation._say_that_cog_is_another.cache_clear()
    # Python's own exceptions cannot be changed
    for _ in range(2):
        follow_cancels(KeyboardInterrupt)
    assert capsys.readouterr().out.count(OTHER_COG_WARNING) == 1


@pytest.mark.slow
def test_a_cog_that_submits_in_another_way_still_serves_predictions(tmp_path: Path) -> None:
    variables = words.write(tmp_path)
    # beside predict.py, where Python finds it at its start
    (tmp_path / "sitecustomize.py").write_text(OTHER_COG)
    variables["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    with server.running(folder=tmp_path, environment=variables) as running:
        running.wait_until_ready()
        client = Client(running)
        answers = [client.predict(pregunta="Once", max_tokens=4, **GREEDY).json() for _ in range(2)]
    assert [answer["status"] for answer in answers] == ["succeeded"] * 2
    assert [OTHER_COG_WARNING in answer["logs"] for answer in answers] == [True, False]


@pytest.fixture
def predictor(falcon_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Predictor:
    for name, value in falcon_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", asyncio.run_coroutine_threadsafe)
    predictor = Predictor()
    predictor.setup()
    return predictor


@pytest.mark.slow
def test_a_stopped_answer_frees_its_row_before_the_client_reads_its_end(
    predictor: Predictor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a chunk for each token, or almost
    monkeypatch.setattr(sequence_module, "CHUNK_EVERY", 0)

    def answer(max_tokens: int, stop_sequences: str | None) -> Iterator[str]:
        inputs: dict[str, Any] = {
            "pregunta": "Once",
            "max_tokens": max_tokens,
            "stop_sequences": stop_sequences,
            "seed": 1,
        }
        drawn = {"temperature": 2.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
        chunks: Any = asyncio.run(predictor.predict(**inputs, **drawn, prompt_template="{pregunta}"))  # type: ignore
        return iter(chunks)

    chunks = list(answer(60, None))
    whole = "".join(chunks)
    # the stop sequence begins within a token's text, so that some text before it is still to be sent
    shown, stop = next(
        ("".join(chunks[:k]) + chunks[k][:2], chunks[k][2:])
        for k in range(3, len(chunks))
        if len(chunks[k]) > 4 and "," not in chunks[k] and whole.find(chunks[k][2:]) == len("".join(chunks[:k])) + 2
    )
    slow = answer(2000, stop)
    text = next(slow)
    (sequence,) = predictor.engine.running
    while text != shown:
        text += next(slow)
    while predictor.engine.running:
        continue
    assert sequence.sent < 1000
    capsys.readouterr()
    assert list(slow) == []
    (used,) = re.findall(r"(\d+) de salida", capsys.readouterr().out)
    assert int(used) <= 60
