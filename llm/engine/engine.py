"""The loop: admit, prefill, decode, hand out. Knows requests and rows; nothing of text, nothing of Cog.

It is a thread of its own. Requests come from any thread, and each gets its tokens in the thread that asked.

What holds between any two steps:
- Only the engine's thread touches rows. A generation in `running` has one, from when it is admitted until it ends or
  its last token is scheduled.
- Of a prompt and its context, 1 <= prompt < context: there is something to read, and room for one token at least.
- An entry of `_in_flight` belongs to the step that was scheduled then. Its index says where in that step's ids a
  generation's id stands; by the time they are read, the row may be another's.
"""

import threading
import time
import traceback
from asyncio import CancelledError
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

import torch

from llm.devices.gpu import Capture, cuda_capture
from llm.devices.model import Model
from llm.engine.runner import MULTIPLE, PendingIds, Row, Runner
from llm.engine.sampling import NOT_A_NUMBER, Sampling
from llm.errors import UserError
from llm.words import decimal

SMALLEST_PART = 16
"""Without memory, prefill chunks become smaller: down to this part of what they were."""

NO_MEMORY = "La GPU se quedó sin memoria: vuelva a intentarlo con una pregunta más corta"

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What to generate from: the ids of a prompt, the most new tokens, how to choose them, and the ids that end the
    text beside the model's own."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()


class Generation:
    """One request on its way: iterate over it for its tokens, each as soon as a step has made it.

    The iteration raises UserError if the engine fails, and CancelledError once `cancel` is called.
    """

    def __init__(self, request: Request, budget: int):
        self.request = request
        self.budget = budget
        """The most new tokens: fewer than asked for where the context ends first."""
        self.row: Row | None = None
        self.scheduled = 0
        """Tokens asked of the device: those emitted, and those on their way."""
        self.emitted = 0
        """Tokens handed out."""
        self.consumed = 0
        """Tokens taken by who iterates: the answer may end before all that are emitted are used."""
        self.alone = False
        """A pass that read its prompt beside others found no memory."""
        self.cancelled = False
        self.finish_reason: FinishReason | None = None
        self.created = time.perf_counter()
        self.admitted: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        """When it was asked for, got a row, and when the first token and the last that was taken came, in seconds."""
        self.inbox: SimpleQueue[tuple[int, float] | BaseException | None] = SimpleQueue()

    def __iter__(self) -> Iterator[int]:
        while (item := self.inbox.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            token, self.last = item
            self.consumed += 1
            yield token

    @property
    def queue_time(self) -> float:
        """Seconds that it waited for a row."""
        return (self.admitted or time.perf_counter()) - self.created

    @property
    def time_to_first_token(self) -> float:
        """Seconds from asking to the first token, its prompt read."""
        return (self.first or time.perf_counter()) - self.created

    @property
    def tokens_per_second(self) -> float:
        """Over the whole time from asking to the last token that was taken."""
        return self.consumed / ((self.last or time.perf_counter()) - self.created)

    def cancel(self) -> None:
        """End it, from any thread. Its row is free at the next step."""
        self.cancelled = True
        self.inbox.put(CancelledError())


class Engine:
    """Serves every request at once, in rows of one cache."""

    def __init__(self, model: Model, most_rows: int, prefill_chunk: int | None = None, capture: Capture | None = None):
        """prefill_chunk: the tokens of prompts that one pass reads; capture: what makes graphs of a decode step.
        Raises UserError where the memory is too small for one row."""
        if model.device.type == "cuda" and not model.spread:
            capture = capture or cuda_capture()
        self.running: list[Generation] = []
        """Those that have a row. Of those that are not prefilled, the first is served next."""
        self._prefill_chunk = prefill_chunk or model.prefill_chunk()
        # two multiples: wherever a chunk starts, there is an end for it that needs no padding
        self._smallest_chunk = min(self._prefill_chunk, max(2 * MULTIPLE, self._prefill_chunk // SMALLEST_PART))
        self.most_rows = model.rows(most_rows, self._prefill_chunk)
        self.context = model.context
        self.lost: str | None = None
        """Why no more predictions can be served, once that is so."""
        self.seconds = model.seconds
        """What each part of getting ready took: `load`, `pack`, `warm_up`, `capture`, as far as there was one."""
        self._model = model
        self._capture = capture
        self._prefix: list[int] = []
        # with graphs, step n+1 is scheduled before the tokens of step n are read: the device never waits for Python
        self._ahead = 1 if capture else 0
        self._waiting: deque[Generation] = deque()
        self._in_flight: deque[tuple[list[tuple[int, Generation]], PendingIds]] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started: Future[None] = Future()

    def start(self, prefix: list[int] | None = None) -> None:
        """Start the loop, warm up, and read the prefix that many prompts will begin with. Says how many rows there
        are, and what that took."""
        self._prefix = prefix or []
        self._thread.start()
        self._started.result()

    def generate(self, request: Request) -> Generation:
        """Queue a request. Raises UserError if the device is lost, ValueError if no token can come of it."""
        if not 1 <= len(request.prompt) < self.context or request.max_tokens < 1:
            raise ValueError(f"{len(request.prompt)} ids of {self.context}, {request.max_tokens} new ones")
        generation = Generation(request, min(request.max_tokens, self.context - len(request.prompt)))
        with self._wake:
            if self.lost:
                raise UserError(self.lost)
            self._waiting.append(generation)
            self._wake.notify()
        return generation

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._serve()
        except BaseException as error:
            # nobody may be left waiting for a thread that has ended
            self._lose(f"El motor se detuvo ({_reason(error)}): hay que reiniciar el servidor")
            raise

    def _serve(self) -> None:
        try:
            # here, and not in the thread that made the engine: see Model.load
            self._runner = Runner(self._model, self.most_rows, self._capture)
            self._warm_up()
        except Exception as error:  # setup raises it
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        while not self.lost:
            if not self._has_work():
                self._runner.rest()
            with self._wake:
                self._wake.wait_for(self._has_work)
            try:
                self._step()
            except Exception as error:  # every request of the step gets it
                self._fail(error)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._in_flight or self.running)

    def _step(self) -> None:
        self._runner.fit_threads()
        self._drop_cancelled()
        self._admit()
        self._prefill()
        self._decode()
        self._hand_out()

    def _drop_cancelled(self) -> None:
        for generation in [g for g in self.running if g.cancelled]:
            self._release(generation)

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self.most_rows:
            generation = self._waiting.popleft()
            if generation.cancelled:
                continue
            generation.admitted = time.perf_counter()
            self.running.append(generation)
            generation.row = self._runner.put(generation.request.prompt, generation.request.sampling)

    def _prefill(self) -> None:
        """Read one chunk: the next of the longest-waiting prompt, and of those that have as much cached."""
        together = self._next_chunks()
        if not together:
            return
        try:
            ids = self._runner.prefill({row: count for _, row, count in together})
        except torch.OutOfMemoryError:
            self._read_smaller([generation for generation, _, _ in together])
            return
        expected = []
        for index, (generation, row, _) in enumerate(together):
            if row.prefilled:
                generation.scheduled = 1
                expected.append((index, generation))
            else:
                # behind those that have come meanwhile: a long prompt does not keep the short ones waiting
                self.running.remove(generation)
                self.running.append(generation)
        self._await_ids(expected, ids)

    def _next_chunks(self) -> list[tuple[Generation, Row, int]]:
        """Whose prompts the next pass reads, and how many tokens of each: it computes no more than a chunk."""
        waiting = [(g, g.row) for g in self.running if g.row and not g.row.prefilled]
        together: list[tuple[Generation, Row, int]] = []
        for generation, row in waiting:
            first, first_row = waiting[0]
            # an end that needs no padding: see Runner.tokens_computed
            end = (row.cached + self._prefill_chunk) // self._runner.multiple * self._runner.multiple
            count = min(row.prompt, end) - row.cached
            counts = {r: n for _, r, n in together} | {row: count}
            beside = row.cached == first_row.cached and not (generation.alone or first.alone)
            if generation is first or (beside and self._runner.tokens_computed(counts) <= self._prefill_chunk):
                together.append((generation, row, count))
        return together

    def _read_smaller(self, generations: list[Generation]) -> None:
        """After a pass without memory: read its prompts alone and in smaller chunks, and serve fewer at once."""
        self._serve_fewer()
        if len(generations) == 1 and self._prefill_chunk == self._smallest_chunk:
            self._release(generations[0])
            generations[0].inbox.put(UserError(NO_MEMORY))
        self._prefill_chunk = max(self._smallest_chunk, self._prefill_chunk // 4)
        for generation in generations:
            generation.alone = True

    def _serve_fewer(self) -> None:
        self._runner.empty_cache()
        self.most_rows = max(1, self.most_rows // 2)
        print(f"Faltó memoria: desde ahora, {self.most_rows} peticiones a la vez")

    def _decode(self) -> None:
        """Take every row whose prompt is read one token further."""
        decoding = [(g, g.row) for g in self.running if g.row and g.row.prefilled]
        if not decoding:
            return
        ids = self._runner.decode()
        for generation, _ in decoding:
            generation.scheduled += 1
        self._await_ids([(row.number, generation) for generation, row in decoding], ids)

    def _await_ids(self, expected: list[tuple[int, Generation]], ids: PendingIds) -> None:
        """Note which generation each id of a step belongs to; one whose last token is scheduled leaves its row."""
        self._in_flight.append((expected, ids))
        for _, generation in expected:
            if generation.scheduled == generation.budget:
                self._release(generation)

    def _hand_out(self) -> None:
        """Give the tokens of the steps that are done to those who wait for them."""
        ahead = self._ahead if self.running else 0
        while len(self._in_flight) > ahead:
            expected, ids = self._in_flight.popleft()
            chosen = ids.read()
            for index, generation in expected:
                if not (generation.finish_reason or generation.cancelled):
                    self._hand_to(generation, chosen[index])

    def _hand_to(self, generation: Generation, id: int) -> None:
        now = time.perf_counter()
        generation.first = generation.first or now
        if id == NOT_A_NUMBER:
            self._break_off(generation)
            return
        if id in self._model.stop_ids or id in generation.request.stop_ids:
            generation.finish_reason = "stop"
        else:
            generation.emitted += 1
            generation.inbox.put((id, now))
            if generation.emitted == generation.budget:
                generation.finish_reason = "length"
        if generation.finish_reason:
            self._release(generation)
            generation.inbox.put(None)

    def _break_off(self, generation: Generation) -> None:
        """End a request whose logits are NaN or infinite. The others in the step are not touched by it."""
        if generation.row:
            self._runner.clear(generation.row)
        self._release(generation)
        generation.cancelled = True
        step = f"token {generation.emitted + 1} de la respuesta"
        generation.inbox.put(
            UserError(
                f"El modelo no calculó ningún número en el {step}: repita la pregunta, o cargue con DTYPE=float32"
            )
        )

    def _release(self, generation: Generation) -> None:
        if generation.row:
            self._runner.release(generation.row)
        if generation in self.running:
            self.running.remove(generation)

    def _fail(self, error: Exception) -> None:
        """End what was running with one clear line, give its rows back, and go on if the device still can."""
        traceback.print_exception(error)
        line = f"La predicción falló mientras se generaba ({_reason(error)}): vuelva a intentarlo"
        failed = self._unfinished()
        try:
            if isinstance(error, torch.OutOfMemoryError):
                line = NO_MEMORY
                self._serve_fewer()
            for generation in failed:
                self._release(generation)
            self._runner.synchronize()
        except Exception as second:  # of a lost device every operation says so
            traceback.print_exception(second)
            line = f"Se perdió el dispositivo ({_reason(error)}): hay que reiniciar el servidor"
            self._lose(line)
        self._in_flight.clear()
        for generation in failed:
            generation.inbox.put(UserError(line))

    def _unfinished(self) -> set[Generation]:
        """Those that have a row, or tokens on their way."""
        return {*self.running} | {g for expected, _ in self._in_flight for _, g in expected}

    def _lose(self, line: str) -> None:
        """Refuse what comes, and end all that is there."""
        print(line)
        with self._wake:
            self.lost = line
            failed = self._unfinished() | set(self._waiting)
        for generation in failed:
            generation.inbox.put(UserError(line))

    def _warm_up(self) -> None:
        start = time.perf_counter()
        row = self._runner.put([0, 0], Sampling(temperature=1, top_k=50))
        self._runner.prefill({row: 2}).read()
        for _ in range(3):
            self._runner.decode().read()
        self._runner.release(row)
        if 0 < len(self._prefix) < self.context:
            self._runner.save_prefix(self._prefix, self._prefill_chunk)
        self.seconds["warm_up"] = time.perf_counter() - start
        size = self.most_rows * self.context * sum(self._model.token_bytes.values())
        print(f"Caché: {self.most_rows} peticiones a la vez de {self.context} tokens, hasta {decimal(size / 1e9)} GB")
        print(f"Primeros tokens de prueba en {decimal(self.seconds['warm_up'])} s")
        start = time.perf_counter()
        try:
            if graphs := self._runner.capture_graphs():
                self.seconds["capture"] = time.perf_counter() - start
                print(f"{graphs} grafos CUDA capturados en {decimal(self.seconds['capture'])} s")
        except RuntimeError as error:
            # torch says that the capture failed; why, the error that it met while it ended it
            reason = _reason(error.__context__ or error)
            self._runner.drop_graphs()
            print(f"Sin grafos CUDA, cada paso va más despacio: este modelo no se deja capturar ({reason})")


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
