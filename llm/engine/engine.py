"""The loop: admit, prefill, decode, send. Knows sequences and rows; nothing of text, nothing of Cog.

The loop is a thread of its own. Requests come from any thread, and each gets its tokens in the thread that asked.
The scheduler holds every sequence until its client has been sent the end. A step's ids are read after the step was
scheduled; by then a row may belong to another sequence, so `_in_flight` notes the owner of each id.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from llm.devices.gpu import Capture, shared_capture
from llm.devices.memory import is_out_of_memory
from llm.devices.model import Model
from llm.engine import startup
from llm.engine.prefixes import Prefixes, as_bytes
from llm.engine.runner import PendingIds
from llm.engine.sampling import NOT_A_NUMBER
from llm.engine.scheduler import Scheduler
from llm.engine.sequence import Generation, Request, Sequence, Status, Token
from llm.engine.slots import KeyValues
from llm.engine.trial import runner_class
from llm.errors import UserError
from llm.words import Say, first_line, unsaid

NO_MEMORY = "Faltó memoria para esta petición: vuelva a intentarlo más tarde, o con una pregunta más corta"

IDLE = 600.0
"""In seconds. After so long without a request the memory of the rows and of prefixes goes back to the system."""
LONGEST_STEP = 300.0
"""In seconds. A step that takes longer is reported as one that hangs."""


Result = TypeVar("Result")


class Engine:
    """Serves all requests at once, each in a row of one cache."""

    def __init__(
        self,
        model: Model,
        most_rows: int,
        prefill_chunk: int | None = None,
        capture: Capture | None = None,
        share_prefixes: bool = True,
        say: Say = unsaid,
    ):
        """prefill_chunk: the tokens of prompts that one pass reads; capture: what makes graphs of a decode step;
        share_prefixes: whether requests share more than the template's prefix; say: where the lines on getting ready
        go. Raises UserError: see `startup.fit`."""
        if model.device.type == "cuda" and not model.spread:
            capture = capture or shared_capture()
        chunk = prefill_chunk or model.prefill_chunk()
        model, self._room = startup.fit(model, most_rows, chunk, say)
        self.most_rows = self._room.rows
        self.context = model.context
        self.lost: str | None = None
        """Why no more predictions can be served, once that is so."""
        self.seconds = model.seconds
        """What each part of getting ready took: `load`, `pack`, `warm_up`, `capture`, as far as there was one."""
        self._model = model
        self._capture = capture
        self._say = say
        # with graphs, step n+1 is scheduled before the tokens of step n are read: the device never waits for Python
        self._ahead = 1 if capture else 0
        self._runner_class = runner_class(model)
        shape = self._runner_class.pass_shape(model, graphs=capture is not None)
        self._prefixes: Prefixes[KeyValues] = Prefixes(share_prefixes)
        self._scheduler = Scheduler(self.most_rows, chunk, shape, self._prefixes)
        self._in_flight: deque[tuple[list[tuple[int, Sequence]], PendingIds]] = deque()
        self._step_began: float | None = None
        self._wake = threading.Condition()
        self._started: Future[None] = Future()

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a row."""
        return self._scheduler.running

    @property
    def failure(self) -> str | None:
        """Why predictions are not served now: the device is lost, or a step hangs."""
        began = self._step_began
        if began and (seconds := time.perf_counter() - began) > LONGEST_STEP:
            return f"El motor lleva {seconds:.0f} s en un solo paso: reinicie el servidor si no sigue"
        return self.lost

    def start(self, prefix: list[int] | None = None) -> None:
        """Start the loop, warm up, and read the template's prefix, with which most prompts will begin."""
        threading.Thread(target=self._run, args=(prefix or [],), name="engine", daemon=True).start()
        self._started.result()

    def generate(self, request: Request) -> Generation:
        """Queue a request. Raises UserError if the device is lost, ValueError if no token can come of it."""
        if not 1 <= len(request.prompt) < self.context or request.max_tokens < 1:
            raise ValueError(f"{len(request.prompt)} ids of {self.context}, {request.max_tokens} new ones")
        sequence = Sequence(request, budget=min(request.max_tokens, self.context - len(request.prompt)))
        with self._wake:
            if self.lost:
                raise UserError(self.lost)
            self._scheduler.waiting.append(sequence)
            self._wake.notify()
        return Generation(sequence)

    def _run(self, prefix: list[int]) -> None:
        try:
            with torch.inference_mode():
                self._serve(prefix)
        except BaseException as error:
            # nobody may be left waiting for a thread that has ended
            self._lose(f"El motor se detuvo ({first_line(error)}): hay que reiniciar el servidor")
            raise

    def _serve(self, prefix: list[int]) -> None:
        try:
            with startup.memory():
                # here, and not in the thread that made the engine: see Model.load
                self._runner = self._runner_class(
                    self._model, self.most_rows, self._capture, self._prefixes, self._room.spare
                )
                self.seconds |= startup.warm_up(self._runner, prefix, self._scheduler.chunk, self._say)
        except Exception as error:  # setup raises it
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        while not self.lost:
            try:
                if not self._scheduler.has_work:
                    self._wait()
                self._step_began = time.perf_counter()
                self._step()
            except Exception as error:  # every request of the step gets it
                self._fail(error)
            finally:
                self._step_began = None

    def _wait(self) -> None:
        """For a request. After a while without one, give memory back to the system."""
        with self._wake:
            if self._wake.wait_for(lambda: self._scheduler.has_work, IDLE):
                return
        self._runner.rest()
        with self._wake:
            self._wake.wait_for(lambda: self._scheduler.has_work)

    def _step(self) -> None:
        self._runner.fit_threads()
        for sequence in self._scheduler.cancelled:
            self._finish(sequence)
        self._admit()
        self._prefill()
        self._decode()
        self._send()

    def _admit(self) -> None:
        while sequence := self._scheduler.admit():
            try:
                put = partial(self._runner.put, sequence)
                self._within_memory(partial(put, self._scheduler.rows_soon), put)
                self._scheduler.placed(sequence)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._wait_or_fail(sequence)

    def _prefill(self) -> None:
        chunks = self._scheduler.next_pass()
        if not chunks:
            return
        try:
            ids = self._within_memory(partial(self._runner.prefill, chunks))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._runner.empty_cache()
            if not self._scheduler.read_less(chunks):
                self._wait_or_fail(chunks[0].sequence)
            return
        self._share([chunk.sequence for chunk in chunks])
        self._scheduler.prefilled(chunks)
        if ids:
            self._expect([(index, chunk.sequence) for index, chunk in enumerate(chunks) if chunk.is_last], ids)

    def _decode(self) -> None:
        decoding = self._scheduler.decoding
        if not decoding:
            return
        try:
            ids = self._within_memory(self._runner.decode)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._runner.empty_cache()
            # the longest takes the most, and the cache grows for the longest
            self._wait_or_fail(max(self.running, key=lambda sequence: sequence.cached))
            return
        self._expect([(sequence.place, sequence) for sequence in decoding], ids)

    def _within_memory(self, step: Callable[[], Result], smaller: Callable[[], Result] | None = None) -> Result:
        """Do a step. Where its memory is lacking, give up the prefixes and do it again, or the smaller one."""
        try:
            return step()
        except Exception as error:
            if not ((smaller or self._prefixes) and is_out_of_memory(error)):
                raise
        self._runner.give_up_prefixes()
        return (smaller or step)()

    def _share(self, sequences: list[Sequence]) -> None:
        """Let other sequences go on from what these have read, where there is memory for a copy."""
        try:
            for sequence in sequences:
                self._runner.share(sequence)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._runner.give_up_prefixes()

    def _wait_or_fail(self, sequence: Sequence) -> None:
        """For a sequence that lacks memory: queue it until another one ends, where that frees memory and no token of
        its answer is lost."""
        self._runner.release(sequence)
        can_wait = self._runner.slots.grows and sequence.status is Status.PREFILLING
        if not (can_wait and self._scheduler.wait_for_a_row(sequence)):
            self._finish(sequence, UserError(NO_MEMORY))

    def _expect(self, owners: list[tuple[int, Sequence]], ids: PendingIds) -> None:
        """Note whose each id of a step is. A sequence whose last token is scheduled gives its row back."""
        self._in_flight.append((owners, ids))
        for _, sequence in owners:
            self._scheduler.schedule(sequence)
            if sequence.status is Status.FINISHING:
                self._share([sequence])
                self._runner.release(sequence)

    def _send(self) -> None:
        """Send the tokens of the steps that are done to those who wait for them."""
        ahead = self._ahead if self.running else 0
        while len(self._in_flight) > ahead:
            owners, ids = self._in_flight[0]
            chosen = ids.read()
            self._in_flight.popleft()
            now = time.perf_counter()
            for index, sequence in owners:
                if not (sequence.status is Status.FINISHED or sequence.cancelled):
                    self._send_to(sequence, chosen[index], now)

    def _send_to(self, sequence: Sequence, id: int, now: float) -> None:
        if id == NOT_A_NUMBER:
            self._runner.clear(sequence)
            step = f"token {sequence.sent + 1} de la respuesta"
            line = f"El modelo no calculó ningún número en el {step}: repita la pregunta, o cargue con DTYPE=float32"
            self._finish(sequence, UserError(line))
            self._prefixes.forget(sequence.ids)
        elif id in self._model.stop_ids or id in sequence.request.stop_ids:
            self._finish(sequence, Token(id, now, "stop"))
        else:
            sequence.sent += 1
            sequence.ids += as_bytes([id])
            sequence.events.put(Token(id, now))
            if sequence.sent == sequence.budget:
                self._finish(sequence, Token(id, now, "length"))

    def _finish(self, sequence: Sequence, event: Token | UserError | None = None) -> None:
        """End a sequence, from whatever status, and send its client this last event."""
        self._share([sequence])
        self._runner.release(sequence)
        self._scheduler.finish(sequence)
        if event:
            sequence.end(event)

    def _fail(self, error: Exception) -> None:
        """End what was running with one clear line, give its rows back, and go on if the device still can."""
        traceback.print_exception(error)
        failed = self._scheduler.unfinished
        line = f"La predicción falló mientras se generaba ({first_line(error)}): vuelva a intentarlo"
        try:
            for sequence in failed:
                self._runner.release(sequence)
            # they may hold what the step left behind
            self._prefixes.clear()
            self._runner.synchronize()
        except Exception as second:  # of a lost device every operation says so
            traceback.print_exception(second)
            self._lose(f"Se perdió el dispositivo ({first_line(error)}): hay que reiniciar el servidor")
            return
        self._in_flight.clear()
        self._end(failed, line)

    def _lose(self, line: str) -> None:
        """Refuse what comes, and end all that is there."""
        self._say(line)
        with self._wake:
            self.lost = line
            self._end([*self._scheduler.waiting, *self._scheduler.unfinished], line)
            self._scheduler.waiting.clear()

    def _end(self, sequences: list[Sequence], line: str) -> None:
        for sequence in sequences:
            self._scheduler.finish(sequence)
            sequence.end(UserError(line))
