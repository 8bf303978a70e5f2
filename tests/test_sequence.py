"""What a client takes of its answer: all that has come, CHUNK_EVERY seconds apart at the least, and its end at once."""

import contextvars
from asyncio import CancelledError
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from llm.engine import sequence as sequence_module
from llm.engine.sequence import Generation, Request, Sampling, Sequence, Token
from llm.errors import UserError
from llm.text.detokenizer import Text
from predict import Predictor
from tests.support import checkpoints
from tests.support.processes import FINALLY

FOR_EVER = 3600.0


class Wait(Event):
    """A client's wait, in which something happens."""

    happens: Callable[[], Any]

    def wait(self, timeout: float | None = None) -> bool:
        self.happens()
        return super().wait(timeout)


def begun(*ids: int) -> Sequence:
    """An answer whose first tokens have come."""
    sequence = Sequence(Request([1], 100, Sampling()), budget=100, over=Wait(), created=0.0)
    come(sequence, *ids)
    return sequence


def come(sequence: Sequence, *ids: int) -> None:
    for id in ids:
        sequence.sent += 1
        # one second each
        sequence.events.put(Token(id, float(sequence.sent)))


def during_a_wait(sequence: Sequence, happens: Callable[[], Any]) -> None:
    assert isinstance(sequence.over, Wait)
    sequence.over.happens = happens


@pytest.fixture
def waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits for more tokens hangs."""
    monkeypatch.setattr(sequence_module, "CHUNK_EVERY", FOR_EVER)


def test_all_tokens_that_come_during_a_wait_are_one_list() -> None:
    sequence = begun(5)
    lists = iter(Generation(sequence))
    assert next(lists) == [5]
    during_a_wait(sequence, lambda: come(sequence, 6, 7, 8))
    assert next(lists) == [6, 7, 8]
    during_a_wait(sequence, lambda: come(sequence, 9))
    assert next(lists) == [9]


def test_after_a_list_a_client_waits_and_before_the_first_it_does_not() -> None:
    sequence = begun(5)
    waits: list[str] = []
    during_a_wait(sequence, lambda: waits.append("waits"))
    lists = iter(Generation(sequence))
    assert next(lists) == [5] and not waits
    come(sequence, 6)
    assert next(lists) == [6] and waits


@pytest.mark.usefixtures("waits_for_ever")
def test_the_end_of_an_answer_is_not_waited_for() -> None:
    sequence = begun(5)
    generation = Generation(sequence)
    lists = iter(generation)
    assert next(lists) == [5]

    def ends() -> None:
        come(sequence, 6)
        sequence.end(Token(6, 2.0, "length"))

    during_a_wait(sequence, ends)
    assert list(lists) == [[6]]
    assert (generation.finish_reason, generation.consumed) == ("length", 2)


@pytest.mark.usefixtures("waits_for_ever")
@pytest.mark.parametrize("error", [CancelledError, UserError])
def test_a_cancel_or_an_error_during_a_wait_ends_it(error: type[BaseException]) -> None:
    sequence = begun(5)
    generation = Generation(sequence)
    waiting = Event()
    during_a_wait(sequence, waiting.set)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(list, generation)
        assert waiting.wait(FINALLY)
        if error is CancelledError:
            generation.cancel()
        else:
            sequence.end(UserError("line"))
        assert isinstance(answer.exception(FINALLY), error)
    assert generation.consumed == 1


def test_tokens_that_came_before_an_error_are_given_first() -> None:
    sequence = begun(5, 6)
    sequence.end(UserError("line"))
    lists = iter(Generation(sequence))
    assert next(lists) == [5, 6]
    with pytest.raises(UserError, match="line"):
        next(lists)


@pytest.mark.parametrize(
    ("stops", "reason"), [(["tres"], "stop"), (["cinco seis"], "stop"), (["os", "dos cuatro"], "stop"), ([], "length")]
)
def test_an_answer_and_its_metrics_are_the_same_in_any_lists(
    monkeypatch: pytest.MonkeyPatch, stops: list[str], reason: str
) -> None:
    tokenizer = checkpoints.tokenizer()
    ids = tokenizer.encode("uno dos tres cuatro cinco seis siete", add_special_tokens=False)
    metrics: dict[str, Any] = {}
    monkeypatch.setattr(Predictor, "record_metric", lambda _, name, value: metrics.update({name: value}))
    monkeypatch.setattr(sequence_module, "CHUNK_EVERY", 0)

    def answered(size: int) -> tuple[str, dict[str, Any]]:
        sequence = begun(*ids[:size])
        sequence.admitted = 0.5
        parts = iter([ids[at : at + size] for at in range(size, len(ids), size)])

        def happens() -> None:
            if part := next(parts, None):
                come(sequence, *part)
            else:
                sequence.end(Token(ids[-1], float(len(ids)), "length"))

        during_a_wait(sequence, happens)
        text = Text(tokenizer, stops)
        chunks = list(Predictor().answer(Generation(sequence), text, contextvars.copy_context()))
        return "".join(chunks), metrics.copy()

    one_by_one = answered(1)
    assert one_by_one[1]["finish_reason"] == reason
    used = one_by_one[1]["output_token_count"]
    assert used < len(ids) if stops else used == len(ids)
    assert [answered(size) for size in range(2, len(ids) + 1)] == [one_by_one] * (len(ids) - 1)
