"""For some minutes more clients than places ask, read, cancel and leave: all predictions end, and nothing leaks.

`script/test --soak` runs it, and nothing else, for ten minutes; `--soak=2` for two.
"""

import asyncio
import json
import os
import random
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from cli import server
from cli.events import Reader
from llm.weights.settings import ROOT
from tests.support.processes import FINALLY, Marked

CLIENTS = 40
QUESTIONS = 40
"""Each is asked alone at first; from then on the others may not change its text."""
WARM = 200
"""Predictions before memory is measured first."""
GROWTH = 1.05
"""The most that memory may grow from there."""
SECONDS = 300
"""A prediction that takes longer hangs. Beside busy programs one of 40 may take a minute."""
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 17), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""Otherwise glibc keeps up to 64 MB free at the end of a thread's memory, now more and now less."""
THREADS_KEPT = min(32, (os.cpu_count() or 1) + 4)
"""Threads that asyncio.to_thread keeps once they have been used."""

WORDS = ["the", "of", "and", "casa", "niño", "漢字", "😀", "question", "once", "upon", "time\n"]

Inputs = dict[str, Any]


def some_inputs(draw: random.Random) -> Inputs:
    """Any size, few of them large, and any parameters."""
    inputs: Inputs = {
        "pregunta": " ".join(draw.choices(WORDS, k=draw.choice([1, 1, 5, 5, 20, 20, 20, 60, 60, 200, 800]))),
        "max_tokens": min(1 + int(draw.expovariate(1 / 40)), 200),
        "seed": draw.getrandbits(62),
    }
    others: dict[str, list[Any]] = {
        "temperature": [0, 0.3, 1, 2],
        "top_p": [0, 0.5, 1],
        "top_k": [0, 1, 40, 1000],
        "repetition_penalty": [1, 1.3, 2],
        "stop_sequences": ["a", "nunca", "\n,.,e"],
        "prompt_template": ["{pregunta}", "Q: {pregunta}\nA:"],
    }
    return inputs | {name: draw.choice(values) for name, values in others.items() if draw.random() < 0.5}


class Clients:
    """Make one prediction after another, each in one of several manners, and note how it ended."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._alone: list[tuple[Inputs, str]] = []
        self.ends: Counter[str] = Counter()
        self.cancels = 0
        self.wrong: list[str] = []

    @property
    def predictions(self) -> int:
        return self.ends.total() - self.ends["refused"]

    async def ask_alone(self) -> None:
        """Ask each question for the first time, one after another."""
        draw = random.Random(0)
        async with self._connections() as http:
            for _ in range(QUESTIONS):
                inputs = some_inputs(draw)
                end = (await http.post("/predictions", json={"input": inputs})).json()
                assert end["status"] == "succeeded", end
                self._alone.append((inputs, "".join(end["output"])))

    async def ask_at_once(self, until: Callable[[], bool]) -> None:
        async with self._connections() as http:
            draws = [random.Random(f"{number} {self.predictions}") for number in range(CLIENTS)]
            await asyncio.gather(*(self._ask(http, draw, until) for draw in draws))
            # the cache is as long as the longest running sequence needs: this one shrinks it
            await http.post("/predictions", json={"input": {"pregunta": "a", "max_tokens": 1}})

    def _connections(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._url, timeout=SECONDS, trust_env=False, limits=httpx.Limits(max_connections=None)
        )

    async def _ask(self, http: httpx.AsyncClient, draw: random.Random, until: Callable[[], bool]) -> None:
        while not until():
            inputs, expected = draw.choice(self._alone)
            manner = draw.choice(["whole", "stream", "stream", "dropped stream", "cancelled whole", "cancelled stream"])
            try:
                async with asyncio.timeout(SECONDS):
                    if manner.endswith("whole"):
                        end, text = await self._whole(http, inputs, draw, manner)
                    else:
                        end, text = await self._stream(http, inputs, draw, manner)
            except (httpx.HTTPError, TimeoutError) as error:
                end, text = repr(error), ""
            self.ends[end] += 1
            # once in thousands the cancel reaches Cog while Cog reads the input, before any of our code
            ended = end == "canceled" or "Invalid JSON input: CancelationException" in end
            cancelled = manner.startswith("cancelled") and ended and expected.startswith(text)
            if not (cancelled or end in ("refused", "dropped") or (end == "succeeded" and text == expected)):
                self.wrong.append(f"{manner}, {end}: {text!r} instead of {expected!r} for {inputs}")
            if end == "refused":
                await asyncio.sleep(draw.uniform(0, 0.5))

    async def _whole(
        self, http: httpx.AsyncClient, inputs: Inputs, draw: random.Random, manner: str
    ) -> tuple[str, str]:
        """How it ended, and its text."""
        url = f"/predictions/{uuid.UUID(int=draw.getrandbits(128))}"
        asking = asyncio.create_task(http.put(url, json={"input": inputs}))
        if manner.startswith("cancelled"):
            await asyncio.sleep(draw.choice([0, draw.uniform(0, 0.05), draw.uniform(0, 1)]))
            await self._cancel(http, url)
        answer = await asking
        if answer.status_code == httpx.codes.CONFLICT:
            return "refused", ""
        prediction = answer.json()
        return prediction.get("error") or prediction["status"], "".join(prediction.get("output") or [])

    async def _stream(
        self, http: httpx.AsyncClient, inputs: Inputs, draw: random.Random, manner: str
    ) -> tuple[str, str]:
        """The same for a stream, which may be dropped or cancelled at one of its first events."""
        url = f"/predictions/{uuid.UUID(int=draw.getrandbits(128))}"
        last_event = draw.choice([0, 1, draw.randrange(50)])
        text = ""
        events, reader = 0, Reader()
        async with http.stream("PUT", url, json={"input": inputs}, headers={"Accept": "text/event-stream"}) as answer:
            if answer.status_code == httpx.codes.CONFLICT:
                return "refused", ""
            async for piece in answer.aiter_bytes():
                for name, data in reader.feed(piece):
                    if name == "completed":
                        return data.get("error") or data["status"], text
                    if name == "output":
                        text += data["chunk"]
                    if events == last_event and manner.startswith("dropped"):
                        return "dropped", text
                    if events == last_event and manner.startswith("cancelled"):
                        await self._cancel(http, url)
                    events += 1
        return "a stream without an end", text

    async def _cancel(self, http: httpx.AsyncClient, url: str) -> None:
        answer = await http.post(f"{url}/cancel")
        self.cancels += answer.status_code == httpx.codes.OK


class Observer:
    """Measures server and worker from outside, and the worker from inside through tests/support/probe."""

    def __init__(self, processes: list[psutil.Process], worker: socket.socket) -> None:
        self._processes = processes
        self._worker = worker.makefile("rw")

    def measure(self) -> tuple[dict[str, int], int, float]:
        """The number of objects of each kind, threads, and megabytes in use."""
        print(file=self._worker, flush=True)
        kinds: dict[str, int] = json.loads(self._worker.readline())
        kinds["descriptors"] = sum(process.num_fds() for process in self._processes)
        kinds["children"] = sum(len(process.children()) for process in self._processes)
        threads = sum(process.num_threads() for process in self._processes)
        return kinds, threads, sum(process.memory_info().rss for process in self._processes) / 1e6


def test_every_prediction_ends_and_nothing_leaks(
    falcon_environment: dict[str, str],
    processes: Marked,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    minutes = pytestconfig.getoption("soak")
    with socket.create_server((server.HOST, 0)) as listener:
        probe = {"PYTHONPATH": str(ROOT / "tests" / "support" / "probe"), "PROBE": str(listener.getsockname()[1])}
        with server.running(environment=falcon_environment | processes.environment | probe | MALLOC) as running:
            running.wait_until_ready()
            worker, _ = listener.accept()
            observer = Observer(processes.alive(), worker)
            clients = Clients(running.url)
            asyncio.run(clients.ask_alone())
            kinds_before, threads_before, _ = observer.measure()
            over = time.monotonic() + minutes * 60
            asyncio.run(clients.ask_at_once(lambda: clients.predictions >= WARM))
            _, _, memory_before = observer.measure()
            asyncio.run(clients.ask_at_once(lambda: time.monotonic() > over and clients.predictions > 2 * WARM))

            # the server closes its connections and ends the threads of the answers after some seconds
            end = time.monotonic() + FINALLY
            kinds, threads, memory = observer.measure()
            while (kinds != kinds_before or threads > threads_before + THREADS_KEPT) and time.monotonic() < end:
                time.sleep(1)
                kinds, threads, memory = observer.measure()
    with capsys.disabled():
        print(
            f"\n{minutes:g} minutes, {clients.predictions} predictions, {clients.cancels} cancels: "
            f"{dict(clients.ends)}; "
            f"memory {memory_before:.0f} MB after {WARM}, {memory:.0f} MB at the end; "
            f"threads {threads_before}, {threads}; {kinds_before}, {kinds}"
        )
    assert clients.wrong == []
    assert (
        min(clients.ends["succeeded"], clients.ends["refused"], clients.ends["canceled"], clients.ends["dropped"]) > 0
    )
    assert kinds == kinds_before
    assert threads <= threads_before + THREADS_KEPT
    assert memory < memory_before * GROWTH
