"""The engine on real models: it computes what transformers computes, for whoever comes, leaves or fails beside it."""

import random
from asyncio import CancelledError
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm.engine import Engine, Request
from llm.errors import UserError
from llm.model import Model
from llm.runner import Replay, Runner
from llm.sampling import Sampling
from tests import checkpoints

GREEDY = Sampling(temperature=0)
PIECE = 32


def plain_call(step: Callable[[], None]) -> Replay:
    """Stands for CUDA's capture: buckets, order and reading one step late are as on a GPU, the graphs are calls."""
    step()
    return step


def ended(engine: Engine, prompt: list[int], max_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
    return list(engine.generate(Request(prompt, max_tokens, sampling)))


def started(model: Model, rows: int = 8, **options: Any) -> Engine:
    engine = Engine(model, rows, **options)
    engine.start()
    return engine


def prompts(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


class Reference:
    """transformers' generate over the same folder, one prompt at a time."""

    def __init__(self, folder: Path, model: Model) -> None:
        self.model = model
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, prompt: list[int], max_tokens: int, repetition_penalty: float = 1.0) -> list[int]:
        ids = torch.tensor([prompt])
        beyond = list(range(self.model.vocabulary, self.network.config.vocab_size))
        found: list[int] = self.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=list(self.model.stop_ids),
            pad_token_id=0,
            repetition_penalty=repetition_penalty,
            suppress_tokens=beyond or None,
        )[0, len(prompt) :].tolist()
        return found[:-1] if found[-1] in self.model.stop_ids else found


@pytest.fixture(scope="module")
def falcon_model(falcon: Path) -> Model:
    return Model.read(falcon, torch.float32)


@pytest.fixture(scope="module")
def falcon_reference(falcon: Path, falcon_model: Model) -> Reference:
    return Reference(falcon, falcon_model)


@pytest.fixture(scope="module")
def engine(falcon_model: Model) -> Engine:
    return started(falcon_model, piece=PIECE)


@pytest.fixture(scope="module", params=["plain", "graphs"])
def any_engine(request: pytest.FixtureRequest, falcon_model: Model) -> Engine:
    """Once as on a CPU, once with buckets, graphs and tokens read a step late, as on a GPU."""
    return started(falcon_model, piece=PIECE, capture=plain_call if request.param == "graphs" else None)


def test_greedy_text_is_that_of_generate(any_engine: Engine, falcon_reference: Reference) -> None:
    for prompt in prompts((1, 5, PIECE, PIECE + 1, 3 * PIECE + 7, 600), checkpoints.TOKENS):
        found = ended(any_engine, prompt, 24)
        assert found == falcon_reference(prompt, 24)
        assert len(set(found)) > 4, "a text of one token proves nothing"


def test_greedy_text_of_the_embedded_model_is_that_of_generate(demo_folder: Path) -> None:
    model = Model.read(demo_folder, torch.float32)
    engine, reference = started(model, rows=2), Reference(demo_folder, model)
    messages = [{"role": "user", "content": "Name three rivers."}]
    prompt = model.tokenizer(model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    prompt = prompt["input_ids"]
    for start in (prompt, prompt * 9):
        assert ended(engine, start, 40) == reference(start, 40)


def test_requests_that_come_and_go_get_what_they_would_get_alone(
    any_engine: Engine, falcon_reference: Reference
) -> None:
    """Eight prompts of unlike lengths, for unlike numbers of tokens, while others are cancelled under way."""
    chosen = prompts((3, 40, 17, 100, 9, 64, 1, 33, 12, 25, 150, 8), checkpoints.TOKENS, seed=1)
    budgets = [5, 40, 13, 30, 50, 8, 21, 34, 60, 60, 60, 60]
    cancelled_after = {8: 1, 9: 7, 10: 3, 11: 20}

    def one(number: int) -> list[int]:
        generation = any_engine.generate(Request(chosen[number], budgets[number], GREEDY))
        tokens = []
        for token in generation:
            tokens.append(token)
            if len(tokens) == cancelled_after.get(number):
                generation.cancel()
                break
        return tokens

    with ThreadPoolExecutor(len(chosen)) as threads:
        found = list(threads.map(one, range(len(chosen))))
    for number, tokens in enumerate(found):
        expected = falcon_reference(chosen[number], budgets[number])
        assert tokens == expected[: cancelled_after.get(number)], number


def test_a_repetition_penalty_is_that_of_generate(any_engine: Engine, falcon_reference: Reference) -> None:
    (prompt,) = prompts((50,), checkpoints.TOKENS, seed=2)
    assert ended(any_engine, prompt, 30, Sampling(temperature=0, repetition_penalty=1.7)) == falcon_reference(
        prompt, 30, 1.7
    )


def test_more_requests_than_rows_wait_their_turn(falcon_model: Model, falcon_reference: Reference) -> None:
    engine = started(falcon_model, rows=2, piece=PIECE)
    chosen = prompts((4, 8, 15, 16, 23, 42, 7), checkpoints.TOKENS, seed=3)
    generations = [engine.generate(Request(prompt, 12, GREEDY)) for prompt in chosen]
    assert [list(g) for g in generations] == [falcon_reference(prompt, 12) for prompt in chosen]
    waits = [g.queue_time for g in generations]
    assert waits == sorted(waits), "in order of arrival"


def test_a_seeded_text_is_the_same_alone_and_in_company(any_engine: Engine) -> None:
    chosen = prompts((20, 11, 31, 5, 26), checkpoints.TOKENS, seed=4)
    sampling = [
        Sampling(0.9, 0.9, 50, 1.1, 7),
        Sampling(2.0, seed=7),
        Sampling(1.0, top_k=3, seed=8),
        GREEDY,
        Sampling(1.5),
    ]
    alone = [ended(any_engine, prompt, 25, s) for prompt, s in zip(chosen, sampling, strict=True)]
    together = [any_engine.generate(Request(p, 25, s)) for p, s in zip(chosen, sampling, strict=True)]
    assert [list(g) for g in together] == alone
    assert ended(any_engine, chosen[0], 25, Sampling(0.9, 0.9, 50, 1.1, 9)) != alone[0]


def test_ids_that_no_token_has_are_never_drawn(falcon: Path) -> None:
    """Of the 50304 logits, 47 belong to no token: here they are by far the largest."""
    model = Model.read(falcon, torch.float32)
    assert model.vocabulary == checkpoints.TOKENS
    head = model.network.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(checkpoints.VOCABULARY))
    head.bias.data[checkpoints.TOKENS :] = 1e4
    engine = started(model, rows=2)
    assert int(model.network(input_ids=torch.tensor([[5, 6]])).logits[0, -1].argmax()) >= checkpoints.TOKENS
    for sampling in (GREEDY, Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=50)):
        assert max(ended(engine, [5, 6], 10, sampling)) < checkpoints.TOKENS


def test_falcon_ends_at_its_tokenizers_end_and_not_at_the_2_of_its_config(falcon_model: Model) -> None:
    assert falcon_model.stop_ids == {falcon_model.tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_a_text_ends_where_its_model_says(falcon: Path, falcon_reference: Reference) -> None:
    (prompt,) = prompts((30,), checkpoints.TOKENS, seed=6)
    text = falcon_reference(prompt, 20)
    model = Model.read(falcon, torch.float32)
    end = next(token for token in text[5:] if token not in text[:5])
    model.stop_ids = frozenset({end})
    generation = started(model, rows=2, piece=PIECE).generate(Request(prompt, 20, GREEDY))
    assert list(generation) == text[: text.index(end)]
    assert generation.finish_reason == "stop"


def test_a_text_ends_with_the_context(any_engine: Engine, falcon_reference: Reference) -> None:
    (prompt,) = prompts((any_engine.context - 6,), checkpoints.TOKENS, seed=7)
    generation = any_engine.generate(Request(prompt, 100, GREEDY))
    assert generation.budget == 6
    assert list(generation) == falcon_reference(prompt, 6)
    assert generation.finish_reason == "length"


def test_times_are_in_the_order_of_what_happened(engine: Engine) -> None:
    generation = engine.generate(Request(list(range(70, 110)), 9, GREEDY))
    tokens = list(generation)
    assert generation.count == len(tokens) == 9
    assert generation.finish_reason == "length"
    assert 0 <= generation.queue_time <= generation.time_to_first_token <= 9 / generation.tokens_per_second


def test_a_cancelled_request_says_so_and_frees_its_row(falcon_model: Model) -> None:
    engine = started(falcon_model, rows=1)
    endless = engine.generate(Request([1, 2, 3], 2000, Sampling(temperature=1e6)))
    waiting = engine.generate(Request([4, 5], 2000, Sampling(temperature=1e6)))
    next(iter(endless))
    waiting.cancel()
    endless.cancel()
    for generation in (endless, waiting):
        with pytest.raises(CancelledError):
            list(generation)
    assert len(ended(engine, [1, 2, 3], 3)) == 3


def test_a_long_prompt_is_read_in_pieces_between_the_steps_of_others(
    falcon_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(falcon_model, piece=PIECE)
    steps: list[str] = []
    for name in ("prefill", "decode"):
        pass_ = getattr(engine._runner, name)
        monkeypatch.setattr(engine._runner, name, partial(_noted, steps, name, pass_))
    running = engine.generate(Request([1, 2, 3], 300, Sampling(temperature=1e6)))
    tokens = iter(running)
    next(tokens)
    ended(engine, list(range(100, 100 + 5 * PIECE)), 1)
    running.cancel()
    pieces = [step for step, before in zip(steps[1:], steps, strict=False) if "prefill" in (step, before)]
    assert steps.count("prefill") == 1 + 5
    assert "prefill prefill" not in " ".join(pieces), "two pieces without a step of the running stream between"


def _noted(steps: list[str], name: str, pass_: Callable[..., Any], *arguments: Any) -> Any:
    steps.append(name)
    return pass_(*arguments)


@pytest.mark.parametrize("options", [{}, {"capture": plain_call}])
def test_a_prefix_is_read_once_and_its_prompts_go_on_as_generate_does(
    falcon_model: Model, falcon_reference: Reference, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (prefix,) = prompts((PIECE + 9,), checkpoints.TOKENS, seed=3)
    endings = prompts((1, 2, 70, 5, 3 * PIECE), checkpoints.TOKENS, seed=4)
    asked = [*(prefix + ending for ending in endings), prefix, prefix[:-1], prefix[:7], [5, *prefix]]
    engine = Engine(falcon_model, 4, piece=PIECE, **options)
    engine.start(prefix)
    read: list[int] = []
    prefill = Runner.prefill

    def noted(runner: Runner, counts: dict[int, int]) -> Any:
        read.extend(counts.values())
        return prefill(runner, counts)

    monkeypatch.setattr(Runner, "prefill", noted)
    with ThreadPoolExecutor(len(asked)) as clients:
        found = list(clients.map(lambda prompt: ended(engine, prompt, 24), asked))
    assert found == [falcon_reference(prompt, 24) for prompt in asked]
    assert sum(read) == sum(map(len, endings)) + sum(map(len, asked[len(endings) :]))


def test_short_prompts_that_wait_are_read_in_one_pass(falcon_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(falcon_model, 8, piece=PIECE)
    passes: list[dict[int, int]] = []
    prefill = Runner.prefill

    def noted(runner: Runner, counts: dict[int, int]) -> Any:
        passes.append(counts)
        return prefill(runner, counts)

    monkeypatch.setattr(Runner, "prefill", noted)
    generations = [engine.generate(Request([5] * length, 2, GREEDY)) for length in (4, 9, 6, 13)]
    engine.start()
    for generation in generations:
        list(generation)
    assert [sorted(counts.values()) for counts in passes[1:]] == [[4, 6, 9, 13]]


@pytest.mark.parametrize("options", [{}, {"capture": plain_call}])
def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    falcon_model: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    engine = started(falcon_model, rows=2, **options)
    expected = ended(engine, [7, 8, 9], 10)
    decode = engine._runner.decode
    failing = iter([False, True])

    def fails_once() -> Any:
        if next(failing, False):
            raise RuntimeError("the device said no\nand more")
        return decode()

    monkeypatch.setattr(engine._runner, "decode", fails_once)
    generations = [engine.generate(Request([7, 8, 9], 10, GREEDY)) for _ in range(3)]
    for generation in generations[:2]:
        with pytest.raises(UserError, match=r"falló.*\(the device said no\): vuelva a intentarlo"):
            list(generation)
    assert list(generations[2]) == expected, "the one that waited"
    assert engine.lost is None


def test_a_lost_device_refuses_what_comes(falcon_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(falcon_model, rows=1)

    def gone() -> None:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(engine._runner, "decode", gone)
    monkeypatch.setattr(engine._runner, "synchronize", gone)
    generations = [engine.generate(Request([7, 8, 9], 10, GREEDY)) for _ in range(2)]
    for generation in generations:
        with pytest.raises(UserError, match="Se perdió el dispositivo"):
            list(generation)
    assert engine.lost
    with pytest.raises(UserError, match="hay que reiniciar"):
        engine.generate(Request([7], 1, GREEDY))


def test_rows_are_only_as_long_as_the_longest_needs(falcon_model: Model) -> None:
    engine = started(falcon_model, rows=3)
    slots = engine._runner.slots
    ended(engine, [5] * 1000, 3)
    assert slots.room[1] >= 1000
    ended(engine, [5] * 3, 3)
    assert slots.room[1] < 128


def test_llama_too_is_served_as_generate_would(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama")
    model = Model.read(folder, torch.float32)
    reference = Reference(folder, model)
    for options in ({}, {"capture": plain_call}):
        engine = started(model, rows=4, piece=PIECE, **options)
        chosen = prompts((3, 80, 17, 200, 9), checkpoints.TOKENS, seed=8)
        generations = [engine.generate(Request(prompt, 20, GREEDY)) for prompt in chosen]
        assert [list(g) for g in generations] == [reference(prompt, 20) for prompt in chosen]
