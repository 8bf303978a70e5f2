"""A request on its way: the engine's side, a Sequence, and the client's, a Generation. Pure Python."""

import time
from asyncio import CancelledError
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from queue import SimpleQueue
from threading import Event
from typing import Literal, NamedTuple

from llm.engine.prefixes import as_bytes

FinishReason = Literal["stop", "length"]

CHUNK_EVERY = 0.02
"""In seconds. A client takes tokens no more often: to wake its thread for each one would cost most of a GPU's step."""


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens. temperature 0 is greedy; top_p 1, top_k 0, repetition_penalty 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """What to generate from: the ids of a prompt, the most new tokens, how to choose them, and the ids that end the
    text beside the model's own."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()


class Status(Enum):
    """Where a sequence is on its way: down this list, and back only from PREFILLING to WAITING. A cancel or an error
    ends it from anywhere."""

    WAITING = auto()
    """Queued: no row yet. A prompt without memory comes back here until another sequence gives its row back."""
    PREFILLING = auto()
    """It has a row, and its prompt is being read."""
    DECODING = auto()
    """It has a row, and each decode step adds a token."""
    FINISHING = auto()
    """Its last token is scheduled and its row may be another's; the last ids are on their way to the host."""
    FINISHED = auto()
    """Its client has been sent the end, whichever."""


class Token(NamedTuple):
    """One token of an answer, or its end where there is a reason. A tuple: a step makes one for each row."""

    id: int
    time: float
    """time.perf_counter() when the host had it, in seconds."""
    reason: FinishReason | None = None


@dataclass(eq=False)
class Sequence:
    """What the engine knows of one request. Only the engine's thread changes it, but for `cancelled`."""

    request: Request
    budget: int
    """The most new tokens: fewer than asked for where the context ends first."""
    status: Status = Status.WAITING
    row: int | None = None
    """Its place in the cache, from when it is admitted. A decode step may move it."""
    cached: int = 0
    """Tokens whose keys and values are in the row, or will be after the steps on their way."""
    reused: int = 0
    """Those of `cached` that were not read for this sequence."""
    scheduled: int = 0
    """New tokens asked of the device: those sent to the client, and those on their way."""
    sent: int = 0
    """Tokens sent to the client."""
    alone: bool = False
    """A pass that read its prompt beside others lacked memory."""
    cancelled: bool = False
    created: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    """When it was asked for, and when it got a row, in seconds."""
    events: SimpleQueue[Token | BaseException] = field(default_factory=SimpleQueue)
    over: Event = field(default_factory=Event)
    """The last of `events` is there: whoever waits for more of them need not."""

    def __post_init__(self) -> None:
        self.ids = as_bytes(self.prompt)
        """Those of its prompt, and of its answer as far as the host has read them."""
        self.prefill_end = len(self.prompt)
        """So many tokens of the prompt are read by prefill passes: all, or all but the last."""

    def end(self, event: Token | BaseException) -> None:
        """Send the client its last event, from any thread."""
        self.events.put(event)
        self.over.set()

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    @property
    def place(self) -> int:
        """`row`, once it has one."""
        assert self.row is not None
        return self.row

    @property
    def prefilled(self) -> bool:
        """A decode step may take it further."""
        return self.cached >= self.prefill_end


class Generation:
    """The tokens of one request, for the thread that asked: iterate, and get all that have come since the last time.

    The first one comes as soon as a step has made it, later ones CHUNK_EVERY seconds after those before at the
    earliest, unless the answer ends. The iteration raises UserError if the engine fails, and CancelledError once
    `cancel` is called.
    """

    def __init__(self, sequence: Sequence):
        self._sequence = sequence
        self.request = sequence.request
        self.budget = sequence.budget
        self.consumed = 0
        """Tokens taken. Who needs fewer of the last ones takes them off: the answer ended before."""
        self.finish_reason: FinishReason | None = None
        self._first: float | None = None
        self._times: list[float] = []
        """When the host had each token that was taken, in seconds."""

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            tokens, end = self._take()
            taken = time.perf_counter()
            if tokens:
                yield tokens
            if isinstance(end, BaseException):
                raise end
            if end:
                self.finish_reason = end.reason
                return
            self._sequence.over.wait(taken + CHUNK_EVERY - time.perf_counter())

    def _take(self) -> tuple[list[int], Token | BaseException | None]:
        """Wait for an event. Returns the tokens that have come, and the end if it has."""
        events = self._sequence.events
        tokens: list[int] = []
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                return tokens, event
            self._first = self._first or event.time
            if event.reason:
                return tokens, event
            tokens.append(event.id)
            self._times.append(event.time)
            self.consumed += 1
            if events.empty():
                return tokens, None

    @property
    def created(self) -> float:
        return self._sequence.created

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt had been read before, for the same or another request."""
        return self._sequence.reused

    @property
    def queue_time(self) -> float:
        """Seconds that it waited for a row."""
        return (self._sequence.admitted or time.perf_counter()) - self.created

    @property
    def time_to_first_token(self) -> float:
        """Seconds from asking to the first token, its prompt read."""
        return (self._first or time.perf_counter()) - self.created

    @property
    def tokens_per_second(self) -> float:
        """Over the whole time from asking to the last token of `consumed`."""
        last = self._times[self.consumed - 1] if self.consumed else time.perf_counter()
        return self.consumed / (last - self.created)

    def cancel(self) -> None:
        """End it, from any thread, once or again. Its row is free at the next step."""
        if not self._sequence.cancelled:
            self._sequence.cancelled = True
            self._sequence.end(CancelledError())
