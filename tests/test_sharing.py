"""What was read once is not read again, and the text is the one that it would be without."""

import random
from asyncio import CancelledError
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.devices import linear
from llm.devices.model import Model
from llm.engine import engine as engine_module
from llm.engine import sequence as sequence_module
from llm.engine.engine import Engine
from llm.engine.prefixes import BLOCK
from llm.engine.runner import PendingIds, Runner
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling, Sequence
from llm.engine.slots import SMALLEST
from llm.errors import UserError
from tests.support import checkpoints
from tests.support.answers import tokens_of
from tests.support.graphs import plain_call
from tests.support.processes import until

slow = pytest.mark.slow
GREEDY = Sampling(temperature=0)
CHUNK = 2 * BLOCK


@dataclass
class Answer:
    tokens: list[int]
    cached_tokens: int


@pytest.fixture(scope="module")
def model(small_falcon: Path) -> Model:
    return Model.read(small_falcon, torch.float32)


@pytest.fixture(scope="module")
def invariant_model(bfloat16_folder: Path) -> Model:
    layout = linear.layout(chosen=None)
    if not layout:
        pytest.skip("this processor has no layout of its own")
    model = Model.read(bfloat16_folder, layout.dtype, layout=layout)
    if not model.batch_invariant:
        pytest.skip("this processor has no numbers of rows that agree, and setup says so")
    return model


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of prompts each pass reads."""
    counts: list[int] = []
    prefill = Runner.prefill

    def noted(runner: Runner, chunks: list[Chunk]) -> PendingIds | None:
        counts.append(sum(chunk.count for chunk in chunks))
        return prefill(runner, chunks)

    monkeypatch.setattr(Runner, "prefill", noted)
    return counts


def started(model: Model, rows: int = 8, **options: Any) -> Engine:
    engine = Engine(model, rows, prefill_chunk=CHUNK, say=print, **options)
    engine.start()
    return engine


def ended(engine: Engine, prompt: list[int], max_tokens: int = 8) -> Answer:
    generation = engine.generate(Request(prompt, max_tokens, GREEDY))
    return Answer(tokens_of(generation), generation.cached_tokens)


def alone(model: Model, *prompts: list[int], max_tokens: int = 8) -> list[list[int]]:
    """The tokens of each prompt, from an engine that shares nothing, one after another."""
    engine = started(model, rows=1, share_prefixes=False)
    return [ended(engine, prompt, max_tokens).tokens for prompt in prompts]


def text(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(checkpoints.FEW), k=tokens)


def test_a_question_about_a_text_that_was_read_reads_only_the_rest(model: Model, read: list[int]) -> None:
    engine, document = started(model), text(5 * BLOCK + 20)
    first = ended(engine, [*document, 1, 2, 3])
    assert first.cached_tokens == 0
    read.clear()
    second = ended(engine, [*document, 4])
    assert second.cached_tokens == 5 * BLOCK
    assert read == [21]
    assert [first.tokens, second.tokens] == alone(model, [*document, 1, 2, 3], [*document, 4])


def test_the_same_question_again_reads_less_than_a_block(model: Model, read: list[int]) -> None:
    engine, prompt = started(model), text(4 * BLOCK)
    first = ended(engine, prompt)
    read.clear()
    second = ended(engine, prompt)
    assert (second.cached_tokens, read) == (3 * BLOCK, [BLOCK])
    assert second.tokens == first.tokens


def test_fewer_tokens_than_a_block_are_not_shared(model: Model) -> None:
    engine, prompt = started(model), text(BLOCK - 1)
    ended(engine, [*prompt, 1, 2])
    assert ended(engine, [*prompt, 3, 4]).cached_tokens == 0


def test_who_asks_while_a_text_is_being_read_waits_for_it_and_32_read_it_once(model: Model, read: list[int]) -> None:
    engine, document = Engine(model, 32, prefill_chunk=CHUNK), text(6 * BLOCK)
    read.clear()
    asked = [[*document, *text(3, seed)] for seed in range(32)]
    generations = [engine.generate(Request(prompt, 4, GREEDY)) for prompt in asked]
    engine.start()
    answers = [tokens_of(generation) for generation in generations]
    # the first two are the warm-up's
    assert sum(read) == 2 + 6 * BLOCK + 32 * 3
    assert [generation.cached_tokens for generation in generations] == [0, *[6 * BLOCK] * 31]
    assert answers[::6] == alone(model, *asked[::6], max_tokens=4)


@pytest.mark.parametrize("blocks", [(3, 1, 5, 0), (3, 3)])
def test_one_pass_reads_on_in_several_texts(blocks: tuple[int, ...], invariant_model: Model, read: list[int]) -> None:
    engine = started(invariant_model)
    documents = [text(count * BLOCK, seed) for seed, count in enumerate(blocks)]
    for document in documents:
        ended(engine, [*document, 1])
    read.clear()
    asked = [[*document, *text(7, seed=9)] for document in documents]
    with engine._wake:
        generations = [engine.generate(Request(prompt, 8, GREEDY)) for prompt in asked]
    answers = [tokens_of(generation) for generation in generations]
    assert read == [7 * len(blocks)]
    assert [generation.cached_tokens for generation in generations] == [count * BLOCK for count in blocks]
    assert answers == alone(invariant_model, *asked)


def test_what_a_cancelled_request_had_read_is_used(model: Model, read: list[int]) -> None:
    engine, document = started(model), text(6 * BLOCK)
    cancelled = engine.generate(Request([*document, *text(900, seed=1)], 8, GREEDY))
    until(lambda: sum(read) > 6 * BLOCK)
    cancelled.cancel()
    with pytest.raises(CancelledError):
        list(cancelled)
    assert ended(engine, [*document, 1]).cached_tokens == 6 * BLOCK


def test_the_next_turn_of_a_chat_goes_on_from_the_answer(model: Model) -> None:
    engine, prompt = started(model), text(BLOCK + 10)
    answer = ended(engine, prompt, 2 * BLOCK).tokens
    following = [*prompt, *answer, 1, 2, 3]
    second = ended(engine, following)
    assert second.cached_tokens == 3 * BLOCK
    assert [second.tokens] == alone(model, following)


def test_where_bits_are_promised_the_next_turn_goes_on_from_the_question(invariant_model: Model) -> None:
    engine, prompt = started(invariant_model), text(BLOCK + 10)
    answer = ended(engine, prompt, 2 * BLOCK).tokens
    following = [*prompt, *answer, 1, 2, 3]
    second = ended(engine, following)
    assert second.cached_tokens == BLOCK
    assert [second.tokens] == alone(invariant_model, following)
    assert ended(engine, [*following, 4]).cached_tokens == 3 * BLOCK


def test_with_share_prefixes_off_only_the_templates_prefix_is_shared(model: Model, read: list[int]) -> None:
    engine, template = Engine(model, 8, prefill_chunk=CHUNK, share_prefixes=False), text(25)
    engine.start(template)
    read.clear()
    asked = [[*template, *text(2 * BLOCK, seed=1), last] for last in range(3)]
    generations = [engine.generate(Request(prompt, 4, GREEDY)) for prompt in asked]
    answers = [tokens_of(generation) for generation in generations]
    assert sum(read) == 3 * (2 * BLOCK + 1)
    assert [generation.cached_tokens for generation in generations] == [25] * 3
    assert answers == alone(model, *asked, max_tokens=4)


def test_held_prefixes_stay_within_the_memory_that_setup_announces(model: Model) -> None:
    engine = started(replace(model, context=16 * BLOCK), rows=2)
    slots, prefixes = engine._runner.slots, engine._prefixes
    for seed in range(6):
        ended(engine, text(10 * BLOCK, seed))
        rows, length = slots.capacity
        assert len(prefixes) * BLOCK + rows * length <= 2 * 16 * BLOCK
    assert len(prefixes) > 16
    # the last one is held, the first one is not
    assert ended(engine, [*text(10 * BLOCK, seed=5), 1]).cached_tokens == 10 * BLOCK
    assert ended(engine, [*text(10 * BLOCK, seed=0), 1]).cached_tokens == 0


def test_after_a_while_without_requests_their_memory_is_given_back(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "IDLE", 0.2)
    engine, prompt = started(model), text(4 * BLOCK)
    first = ended(engine, prompt)
    # added while the first one was answered
    until(lambda: not engine._prefixes and engine._runner.slots.capacity == SMALLEST)
    second = ended(engine, prompt)
    assert second.cached_tokens == 0 and second.tokens == first.tokens


@pytest.mark.parametrize("name", ["put", "prefill", "decode"])
def test_where_memory_is_lacking_prefixes_are_given_up_first(
    model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = started(model)
    ended(engine, text(4 * BLOCK))
    step = getattr(engine._runner, name)

    def lacking_memory(*arguments: Any) -> Any:
        if engine._prefixes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11 GiB")
        return step(*arguments)

    monkeypatch.setattr(engine._runner, name, lacking_memory)
    prompt = text(30, seed=1)
    assert [ended(engine, prompt).tokens] == alone(model, prompt)
    assert not engine._prefixes


def test_without_memory_for_a_copy_requests_are_served_all_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompt = started(model), text(4 * BLOCK)

    def lacking_memory(row: int, start: int, end: int) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8388608 bytes.")

    monkeypatch.setattr(engine._runner.slots, "block", lacking_memory)
    first, second = ended(engine, prompt), ended(engine, prompt)
    assert [first.tokens, second.tokens] == alone(model, prompt, prompt)
    assert second.cached_tokens == 0


def test_what_made_logits_that_are_no_numbers_is_not_used_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompt = started(model), text(4 * BLOCK)
    block = engine._runner.slots.block

    def broken(*arguments: Any) -> Any:
        return tuple(torch.full_like(part, torch.nan) for part in block(*arguments))

    monkeypatch.setattr(engine._runner.slots, "block", broken)
    ended(engine, prompt)
    monkeypatch.undo()
    with pytest.raises(UserError, match="ningún número"):
        ended(engine, prompt)
    again = ended(engine, prompt)
    assert again.cached_tokens == 0 and [again.tokens] == alone(model, prompt)


class Hostile(Runner):
    """Steps fail now and then, before or after their work, and a row that is given back holds wrong numbers."""

    draw = random.Random(0)
    begun = False
    """The warm-up may not fail."""

    def prefill(self, chunks: list[Chunk]) -> Any:
        return self._now_and_then(super().prefill, chunks)

    def decode(self) -> Any:
        return self._now_and_then(super().decode)

    def _now_and_then(self, step: Callable[..., Any], *arguments: Any) -> Any:
        chance = self.draw.random()
        if self.begun and chance < 0.002:
            raise RuntimeError("before")
        ids = step(*arguments)
        if self.begun and chance > 0.998:
            raise RuntimeError("after")
        return ids

    def release(self, sequence: Sequence) -> None:
        row = sequence.place if self._has_row(sequence) else None
        super().release(sequence)
        if row is not None:
            for layer in self.slots.slot_layers:
                layer.keys[row], layer.values[row] = 9.0, 9.0


@dataclass
class Asked:
    request: Request
    tokens: list[int]
    whole: bool
    cached: int


def conversations(engine: Engine, count: int, most: int) -> list[Asked]:
    """What so many random requests got from `engine`: questions about a few texts, the next turns of what was answered,
    some of them cancelled, those that failed asked again. most: tokens of a prompt."""
    documents = [text(200, seed) for seed in range(5)]
    asked: list[Asked] = []

    def prompt(draw: random.Random) -> list[int]:
        beginning = draw.choice(documents)[: draw.choice([0, 64, 70, 130, 200])]
        if asked and draw.random() < 0.3:
            before = draw.choice(asked)
            beginning = [*before.request.prompt, *before.tokens]
        ids = [*beginning, *draw.choices(range(checkpoints.FEW), k=draw.choice([1, 5, 40]))]
        return ids[-most:] if len(ids) > most else ids

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        sampling = Sampling(draw.choice([0, 0, 1]), repetition_penalty=draw.choice([1, 1.2]), seed=seed)
        request = Request(prompt(draw), draw.choice([1, 4, 20]), sampling)
        leaves = draw.randrange(8) if draw.random() < 0.25 else None
        while True:
            generation = engine.generate(request)
            got: list[int] = []
            try:
                for tokens in generation:
                    got += tokens
                    if leaves and len(got) >= leaves:
                        generation.cancel()
                asked.append(Asked(request, got, True, generation.cached_tokens))
                return
            except CancelledError:
                asked.append(Asked(request, got, False, generation.cached_tokens))
                return
            except UserError as error:
                assert "vuelva a intentarlo" in str(error)

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(ask, range(count)))
    return asked


@slow
@pytest.mark.parametrize(("kind", "count"), [("layout", 100), ("plain", 80), ("graphs", 80)])
def test_requests_that_share_leave_and_fail_get_the_texts_that_each_gets_alone(
    request: pytest.FixtureRequest, model: Model, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    served = replace(request.getfixturevalue("invariant_model") if kind == "layout" else model, context=8 * BLOCK)
    monkeypatch.setattr(engine_module, "runner_class", lambda model: Hostile)
    # so that clients leave in the middle
    monkeypatch.setattr(sequence_module, "CHUNK_EVERY", 0)
    engine = Engine(served, 6, prefill_chunk=CHUNK, capture=plain_call if kind == "graphs" else None)
    engine.start(text(25))
    monkeypatch.setattr(Hostile, "begun", True)
    asked = conversations(engine, count, most=7 * BLOCK)
    monkeypatch.undo()
    assert len(asked) == count
    assert sum(one.cached >= BLOCK for one in asked) > count // 5
    fresh = started(served, rows=1, share_prefixes=False)
    for one in asked:
        expected = tokens_of(fresh.generate(one.request))
        assert one.tokens == (expected if one.whole else expected[: len(one.tokens)])
