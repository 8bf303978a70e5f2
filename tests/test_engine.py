"""The engine on real models: a request gets what transformers computes, whatever comes, leaves or fails beside it."""

import random
import re
import threading
from asyncio import CancelledError
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from cli.contenders import busy_core
from llm.devices.forward import Pass
from llm.devices.gpu import Replay
from llm.devices.model import Model
from llm.engine import engine as engine_module
from llm.engine import sequence as sequence_module
from llm.engine.engine import Engine
from llm.engine.runner import PendingIds, Runner
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling
from llm.engine.slots import Slots
from llm.errors import UserError
from tests.support import checkpoints
from tests.support.answers import tokens_of
from tests.support.graphs import plain_call
from tests.support.processes import until

GREEDY = Sampling(temperature=0)
CHUNK = 32


with_and_without_graphs = pytest.mark.parametrize(
    "options", [{}, pytest.param({"capture": plain_call}, marks=pytest.mark.slow)], ids=["plain", "graphs"]
)


def each(name: str, plain: list[Any], graphs: list[Any]) -> pytest.MarkDecorator:
    """Parametrize `name` with these values where there are no graphs, and with those where there are."""
    slow = pytest.mark.slow
    cases = [pytest.param({}, value, id=f"plain-{value!r:.20}") for value in plain]
    cases += [pytest.param({"capture": plain_call}, value, id=f"graphs-{value!r:.20}", marks=slow) for value in graphs]
    return pytest.mark.parametrize(("options", name), cases)


CPU_OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8388608 bytes.")


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11 GiB")


def generated(engine: Engine, prompt: list[int], max_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
    return tokens_of(engine.generate(Request(prompt, max_tokens, sampling)))


def started(model: Model, rows: int = 8, **options: Any) -> Engine:
    engine = Engine(model, rows, say=print, **options)
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
        without_token = list(range(self.model.vocabulary, self.network.config.vocab_size))
        answer: list[int] = self.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=list(self.model.stop_ids),
            pad_token_id=0,
            repetition_penalty=repetition_penalty,
            suppress_tokens=without_token or None,
        )[0, len(prompt) :].tolist()
        return answer[:-1] if answer[-1] in self.model.stop_ids else answer


@pytest.fixture(scope="module")
def falcon_model(small_falcon: Path) -> Model:
    return Model.read(small_falcon, torch.float32)


@pytest.fixture(scope="module")
def falcon_reference(small_falcon: Path, falcon_model: Model) -> Reference:
    return Reference(small_falcon, falcon_model)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many tokens of each prompt every prefill was asked to read."""
    counts: list[list[int]] = []
    prefill = Runner.prefill

    def counted(runner: Runner, chunks: list[Chunk]) -> Any:
        counts.append([chunk.count for chunk in chunks])
        return prefill(runner, chunks)

    monkeypatch.setattr(Runner, "prefill", counted)
    return counts


@pytest.fixture(scope="module")
def engine(falcon_model: Model) -> Engine:
    return started(falcon_model, prefill_chunk=CHUNK)


@pytest.fixture(scope="module", params=["plain", pytest.param("graphs", marks=pytest.mark.slow)])
def any_engine(request: pytest.FixtureRequest, falcon_model: Model) -> Engine:
    """Once as on a CPU, once with buckets, graphs and tokens read a step late, as on a GPU."""
    return started(falcon_model, prefill_chunk=CHUNK, capture=plain_call if request.param == "graphs" else None)


def test_greedy_text_is_that_of_generate(any_engine: Engine, falcon_reference: Reference) -> None:
    for prompt in prompts((1, 5, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 600), checkpoints.FEW):
        text = generated(any_engine, prompt, 24)
        assert text == falcon_reference(prompt, 24)
        assert len(set(text)) > 4, "a text of one token proves nothing"


@pytest.mark.slow
def test_greedy_text_of_the_embedded_model_is_that_of_generate(demo_folder: Path) -> None:
    model = Model.read(demo_folder, torch.float32)
    engine, reference = started(model, rows=2), Reference(demo_folder, model)
    messages = [{"role": "user", "content": "Name three rivers."}]
    prompt = model.tokenizer(model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    prompt = prompt["input_ids"]
    for start in (prompt, prompt * 9):
        assert generated(engine, start, 10) == reference(start, 10)


@pytest.mark.slow
def test_concurrent_and_cancelled_requests_get_the_texts_of_generate(
    any_engine: Engine, falcon_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight prompts of different lengths and budgets, beside four that are cancelled."""
    # so that they are cancelled in the middle
    monkeypatch.setattr(sequence_module, "CHUNK_EVERY", 0)
    chosen = prompts((3, 40, 17, 100, 9, 64, 1, 33, 12, 25, 150, 8), checkpoints.FEW, seed=1)
    budgets = [5, 40, 13, 30, 50, 8, 21, 34, 60, 60, 60, 60]
    cancelled_after = {8: 1, 9: 7, 10: 3, 11: 20}

    def answer(number: int) -> list[int]:
        generation = any_engine.generate(Request(chosen[number], budgets[number], GREEDY))
        tokens = []
        for came in generation:
            tokens += came
            if len(tokens) >= cancelled_after.get(number, 100):
                generation.cancel()
                break
        return tokens

    with ThreadPoolExecutor(len(chosen)) as threads:
        answers = list(threads.map(answer, range(len(chosen))))
    for number, tokens in enumerate(answers):
        expected = falcon_reference(chosen[number], budgets[number])
        assert tokens == expected[: len(tokens) if number in cancelled_after else None], number


def test_a_repetition_penalty_is_that_of_generate(any_engine: Engine, falcon_reference: Reference) -> None:
    (prompt,) = prompts((50,), checkpoints.FEW, seed=2)
    assert generated(any_engine, prompt, 30, Sampling(temperature=0, repetition_penalty=1.7)) == falcon_reference(
        prompt, 30, 1.7
    )


def test_a_repetition_penalty_ignores_the_padding_beside_a_longer_prompt(
    falcon_model: Model, falcon_reference: Reference
) -> None:
    engine = Engine(falcon_model, 4)
    chosen = prompts((5, 120), checkpoints.FEW, seed=21)
    penalty = Sampling(temperature=0, repetition_penalty=1.9)
    generations = [engine.generate(Request(prompt, 15, penalty)) for prompt in chosen]
    engine.start()
    assert [tokens_of(g) for g in generations] == [falcon_reference(prompt, 15, 1.9) for prompt in chosen]


def test_more_requests_than_rows_wait_their_turn(falcon_model: Model, falcon_reference: Reference) -> None:
    engine = started(falcon_model, rows=2, prefill_chunk=CHUNK)
    chosen = prompts((4, 8, 15, 16, 23, 42, 7), checkpoints.FEW, seed=3)
    generations = [engine.generate(Request(prompt, 12, GREEDY)) for prompt in chosen]
    assert [tokens_of(g) for g in generations] == [falcon_reference(prompt, 12) for prompt in chosen]
    admitted = [g.created + g.queue_time for g in generations]
    assert admitted == sorted(admitted), "in order of arrival"


@pytest.mark.slow
def test_a_seeded_text_is_the_same_alone_and_beside_others(any_engine: Engine) -> None:
    chosen = prompts((20, 11, 31, 5, 26), checkpoints.FEW, seed=4)
    sampling = [
        Sampling(0.9, 0.9, 50, 1.1, 7),
        Sampling(2.0, seed=7),
        Sampling(1.0, top_k=3, seed=8),
        GREEDY,
        Sampling(1.5),
    ]
    alone = [generated(any_engine, prompt, 25, s) for prompt, s in zip(chosen, sampling, strict=True)]
    together = [any_engine.generate(Request(p, 25, s)) for p, s in zip(chosen, sampling, strict=True)]
    assert [tokens_of(g) for g in together] == alone
    assert generated(any_engine, chosen[0], 25, Sampling(0.9, 0.9, 50, 1.1, 9)) != alone[0]


def test_ids_without_a_token_are_never_drawn(falcon: Path) -> None:
    """Of the 50304 logits, 47 belong to no token: here they are by far the largest."""
    model = Model.read(falcon, torch.float32)
    assert model.vocabulary == checkpoints.TOKENS
    head = model.network.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(checkpoints.VOCABULARY))
    head.bias.data[checkpoints.TOKENS :] = 1e4
    engine = started(model, rows=2)
    assert int(model.network(input_ids=torch.tensor([[5, 6]])).logits[0, -1].argmax()) >= checkpoints.TOKENS
    for sampling in (GREEDY, Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=50)):
        assert max(generated(engine, [5, 6], 10, sampling)) < checkpoints.TOKENS


def test_ids_without_logits_are_read_and_never_drawn(falcon: Path) -> None:
    model = Model.read(falcon, torch.float32)
    head = model.network.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight[:1000].clone())
    engine = started(model, rows=2)
    for sampling in (Sampling(0, repetition_penalty=1.3), Sampling(1.0), Sampling(1.0, top_k=50, repetition_penalty=2)):
        assert max(generated(engine, [5, 50_000, 6], 10, sampling)) < 1000


def test_a_stop_id_of_a_request_ends_only_its_own_text(engine: Engine) -> None:
    (prompt,) = prompts((30,), checkpoints.FEW, seed=6)
    text = generated(engine, prompt, 20)
    end = next(token for token in text[5:] if token not in text[:5])
    generation = engine.generate(Request(prompt, 20, GREEDY, frozenset({end})))
    assert tokens_of(generation) == text[: text.index(end)]
    assert generation.finish_reason == "stop"
    assert generated(engine, prompt, 20) == text


def test_a_text_ends_at_its_models_stop_id(small_falcon: Path, falcon_reference: Reference) -> None:
    (prompt,) = prompts((30,), checkpoints.FEW, seed=6)
    text = falcon_reference(prompt, 20)
    model = Model.read(small_falcon, torch.float32)
    end = next(token for token in text[5:] if token not in text[:5])
    model.stop_ids = frozenset({end})
    generation = started(model, rows=2, prefill_chunk=CHUNK).generate(Request(prompt, 20, GREEDY))
    assert tokens_of(generation) == text[: text.index(end)]
    assert generation.finish_reason == "stop"


def test_a_text_ends_with_the_context(any_engine: Engine, falcon_reference: Reference) -> None:
    (prompt,) = prompts((any_engine.context - 6,), checkpoints.FEW, seed=7)
    generation = any_engine.generate(Request(prompt, 100, GREEDY))
    assert generation.budget == 6
    assert tokens_of(generation) == falcon_reference(prompt, 6)
    assert generation.finish_reason == "length"


def test_the_times_of_a_request_are_in_order(engine: Engine) -> None:
    generation = engine.generate(Request(list(range(70, 110)), 9, GREEDY))
    tokens = tokens_of(generation)
    assert generation.consumed == len(tokens) == 9
    assert generation.finish_reason == "length"
    assert 0 <= generation.queue_time <= generation.time_to_first_token <= 9 / generation.tokens_per_second


def test_a_cancelled_request_raises_and_frees_its_row(falcon_model: Model) -> None:
    engine = started(falcon_model, rows=1)
    endless = engine.generate(Request([1, 2, 3], 2000, Sampling(temperature=1e6)))
    waiting = engine.generate(Request([4, 5], 2000, Sampling(temperature=1e6)))
    next(iter(endless))
    waiting.cancel()
    endless.cancel()
    for generation in (endless, waiting):
        with pytest.raises(CancelledError):
            list(generation)
    assert len(generated(engine, [1, 2, 3], 3)) == 3


# the first chunk of its prompt, its first token, one in the middle, its last
@pytest.mark.parametrize("passes_before", [1, 3, 10, 22])
@with_and_without_graphs
def test_the_row_of_a_cancelled_request_is_free_at_the_next_step(
    falcon_model: Model,
    falcon_reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    passes_before: int,
) -> None:
    engine = started(falcon_model, rows=1, prefill_chunk=CHUNK, **options)
    long, short = prompts((3 * CHUNK, 5), checkpoints.FEW)
    passes = 0

    def counted(compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*arguments: Any) -> Any:
            nonlocal passes
            passes += 1
            if passes == passes_before:
                cancelled.cancel()
            return compute(*arguments)

        return computed

    for name in ("prefill", "decode"):
        monkeypatch.setattr(Runner, name, counted(getattr(Runner, name)))
    with engine._wake:
        cancelled = engine.generate(Request(long, 20, GREEDY))
        waiting = engine.generate(Request(short, 3, GREEDY))
    assert tokens_of(waiting) == falcon_reference(short, 3)
    # the step in which the cancel arrived may still decode
    assert passes - passes_before - 3 in (0, 1)
    with pytest.raises(CancelledError):
        list(cancelled)


def test_a_second_cancel_does_nothing(engine: Engine) -> None:
    generation = engine.generate(Request([1, 2, 3], 2000, Sampling(temperature=1e6)))
    for _ in range(3):
        generation.cancel()
    with pytest.raises(CancelledError):
        list(generation)
    until(lambda: not engine.running)
    events = generation._sequence.events
    assert not any(isinstance(events.get(), CancelledError) for _ in range(events.qsize()))


def test_a_cancelled_answer_counts_only_the_tokens_that_were_read(engine: Engine) -> None:
    generation = engine.generate(Request([1, 2, 3], 40, GREEDY))
    tokens = next(iter(generation))
    while generation._sequence.sent < len(tokens) + 3:
        continue
    generation.cancel()
    assert generation.consumed == len(tokens)


def test_chunks_of_a_long_prompt_alternate_with_decode_steps(
    falcon_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(falcon_model, prefill_chunk=CHUNK)
    steps: list[str] = []
    for name in ("prefill", "decode"):
        pass_ = getattr(engine._runner, name)
        monkeypatch.setattr(engine._runner, name, partial(_recorded, steps, name, pass_))
    running = engine.generate(Request([1, 2, 3], 300, Sampling(temperature=1e6)))
    tokens = iter(running)
    next(tokens)
    generated(engine, list(range(100, 100 + 5 * CHUNK)), 1)
    running.cancel()
    around = [step for step, before in zip(steps[1:], steps, strict=False) if "prefill" in (step, before)]
    assert steps.count("prefill") == 1 + 5
    assert "prefill prefill" not in " ".join(around), "two chunks without a step of the running stream between"


def _recorded(steps: list[str], name: str, pass_: Callable[..., Any], *arguments: Any) -> Any:
    steps.append(name)
    return pass_(*arguments)


@pytest.mark.slow
@with_and_without_graphs
def test_a_prefix_is_read_once_and_changes_no_text(
    falcon_model: Model, falcon_reference: Reference, passes: list[list[int]], options: dict[str, Any]
) -> None:
    (prefix,) = prompts((CHUNK + 9,), checkpoints.FEW, seed=3)
    endings = prompts((1, 2, 70, 5, 3 * CHUNK), checkpoints.FEW, seed=4)
    asked = [*(prefix + ending for ending in endings), prefix, prefix[:-1], prefix[:7], [5, *prefix]]
    engine = Engine(falcon_model, 4, prefill_chunk=CHUNK, **options)
    engine.start(prefix)
    passes.clear()
    with ThreadPoolExecutor(len(asked)) as clients:
        texts = list(clients.map(lambda prompt: generated(engine, prompt, 24), asked))
    assert texts == [falcon_reference(prompt, 24) for prompt in asked]
    tokens_read = sum(map(sum, passes))
    assert tokens_read == sum(map(len, endings)) + sum(map(len, asked[len(endings) :]))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [13, 100])
def test_no_pass_computes_more_than_a_chunk(falcon_model: Model, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Padding included: a pass over one long prompt and many short ones once ended every stream."""
    engine = Engine(falcon_model, 8, prefill_chunk=chunk, capture=plain_call)
    computed: list[int] = []
    logits = Runner._logits

    def recorded(runner: Runner, pass_: Pass, *arguments: Any, **named: Any) -> torch.Tensor:
        computed.append(pass_.tokens)
        return logits(runner, pass_, *arguments, **named)

    monkeypatch.setattr(Runner, "_logits", recorded)
    (prefix,) = prompts((11,), checkpoints.FEW, seed=10)
    chosen = [*prompts((200, 3, 3, 9, 70, 1, 3), checkpoints.FEW, seed=11), *([*prefix, n] for n in range(4))]
    generations = [engine.generate(Request(prompt, 2, GREEDY)) for prompt in chosen]
    engine.start(prefix)
    for generation in generations:
        assert len(tokens_of(generation)) == 2
    # the first two are the warm-up and the prefix
    assert max([tokens for tokens in computed if tokens][2:]) <= chunk


def failing(step: Callable[..., Any], *errors: BaseException | None) -> Callable[..., Any]:
    """The step, whose calls raise these errors one after another (None: no error), and then do its work."""
    remaining = iter(errors)

    def run(*arguments: Any) -> Any:
        if error := next(remaining, None):
            raise error
        return step(*arguments)

    return run


@with_and_without_graphs
@pytest.mark.parametrize(
    ("name", "error"),
    [("put", RuntimeError), ("prefill", ValueError), ("decode", RuntimeError), ("_move", ValueError)],
)
def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    falcon_model: Model,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    name: str,
    error: type[Exception],
) -> None:
    """No client waits for ever, and no row is lost."""
    engine = started(falcon_model, rows=2, **options)
    expected = generated(engine, [7, 8, 9], 10)
    step = getattr(engine._runner, name)
    monkeypatch.setattr(engine._runner, name, failing(step, error("the device said no\nand more")))
    # the first ends before the second, which compaction then moves to the first's row
    generations = [engine.generate(Request([7, 8, 9], tokens, GREEDY)) for tokens in (5, 10, 10, 10)]
    texts = []
    for generation in generations:
        try:
            texts.append(tokens_of(generation))
        except UserError as raised:
            assert re.search(r"falló.*\(the device said no\): vuelva a intentarlo", str(raised))
    assert len(texts) < 4 and all(tokens == expected[: len(tokens)] for tokens in texts)
    assert generated(engine, [7, 8, 9], 10) == expected
    assert engine.lost is None and not engine.running and not engine._runner.rows


@each("max_tokens", plain=[10], graphs=[1, 2, 10])
def test_ids_that_cannot_be_read_end_their_request_also_at_the_last_token(
    falcon_model: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], max_tokens: int
) -> None:
    """A GPU's errors surface there. By the last token the row is free again."""
    engine = started(falcon_model, rows=2, **options)
    expected = generated(engine, [7, 8, 9], 10)
    errors = [None] * (max_tokens - 1) + [RuntimeError("an illegal memory access")]
    read = PendingIds.read
    remaining = iter(errors)

    def failing_read(ids: PendingIds) -> list[int]:
        if error := next(remaining, None):
            raise error
        return read(ids)

    monkeypatch.setattr(PendingIds, "read", failing_read)
    with pytest.raises(UserError, match=r"falló.*illegal memory access"):
        generated(engine, [7, 8, 9], max_tokens)
    assert generated(engine, [7, 8, 9], 10) == expected
    assert not engine.running


def test_a_step_that_hangs_is_a_failure_until_it_goes_on(falcon_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(falcon_model, rows=1)
    monkeypatch.setattr("llm.engine.engine.LONGEST_STEP", 0.05)
    goes_on = threading.Event()
    decode = engine._runner.decode
    monkeypatch.setattr(engine._runner, "decode", lambda: goes_on.wait() and decode())
    generation = engine.generate(Request([7, 8, 9], 3, GREEDY))
    until(lambda: engine.failure is not None)
    assert re.fullmatch(r"El motor lleva \d+ s en un solo paso: reinicie .*", engine.failure or "")
    goes_on.set()
    assert len(tokens_of(generation)) == 3
    until(lambda: engine.failure is None)


@pytest.mark.parametrize("error", [out_of_memory(), CPU_OUT_OF_MEMORY], ids=["gpu", "cpu"])
def test_a_lack_of_memory_at_the_start_is_one_line(
    falcon_model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = Engine(falcon_model, 2)
    monkeypatch.setattr(Slots, "ensure_capacity", failing(Slots.ensure_capacity, error))
    with pytest.raises(UserError, match="Falta memoria para empezar"):
        engine.start()


def test_a_lack_of_memory_in_the_trial_is_not_blamed_on_the_model(
    falcon_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slots, "ensure_capacity", failing(Slots.ensure_capacity, CPU_OUT_OF_MEMORY))
    with pytest.raises(UserError, match="Falta memoria para empezar"):
        Engine(falcon_model, 2)


def test_a_cache_that_cannot_shrink_costs_no_request(falcon_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "IDLE", 0.1)
    engine = started(falcon_model, rows=1)
    rest = engine._runner.rest
    rested = threading.Event()

    def failing_rest() -> None:
        monkeypatch.setattr(engine._runner, "rest", rest)
        rested.set()
        raise CPU_OUT_OF_MEMORY

    monkeypatch.setattr(engine._runner, "rest", failing_rest)
    expected = generated(engine, [7, 8, 9], 10)
    assert rested.wait(60)
    assert generated(engine, [7, 8, 9], 10) == expected


def test_a_lost_device_refuses_new_requests(falcon_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_whatever_ends_the_engines_thread_ends_every_request(
    falcon_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started(falcon_model, rows=1)
    ends: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", ends.append)
    monkeypatch.setattr(engine._runner, "decode", failing(engine._runner.decode, SystemExit("out")))
    generations = [engine.generate(Request([7, 8, 9], 10, GREEDY)) for _ in range(2)]
    for generation in generations:
        with pytest.raises(UserError, match=r"El motor se detuvo \(out\): hay que reiniciar"):
            list(generation)
    until(lambda: bool(ends))
    assert [end.exc_type for end in ends] == [SystemExit]
    assert engine.lost
    with pytest.raises(UserError, match="hay que reiniciar"):
        engine.generate(Request([7], 1, GREEDY))


@pytest.mark.parametrize("request_", [Request([], 5, GREEDY), Request([5], 0, GREEDY), Request([5] * 2048, 1, GREEDY)])
def test_a_request_without_room_for_a_token_is_refused(engine: Engine, request_: Request) -> None:
    with pytest.raises(ValueError, match="ids of 2048"):
        engine.generate(request_)
    assert len(generated(engine, [5] * 2047, 9)) == 1


@with_and_without_graphs
def test_prompts_that_lack_memory_are_read_again_alone_and_in_smaller_chunks(
    falcon_model: Model,
    falcon_reference: Reference,
    passes: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    engine = started(falcon_model, rows=8, prefill_chunk=256, **options)
    chosen = prompts((20, 60, 31), checkpoints.FEW, seed=12)
    # decodes while the others' prompts find no memory
    (beside,) = prompts((40,), checkpoints.FEW, seed=13)
    running = engine.generate(Request(beside, 60, GREEDY))
    first = next(iter(running))
    prefill = engine._runner.prefill
    monkeypatch.setattr(engine._runner, "prefill", failing(prefill, out_of_memory(), out_of_memory()))
    passes.clear()
    generations = [engine.generate(Request(prompt, 20, GREEDY)) for prompt in chosen]
    assert [tokens_of(g) for g in generations] == [falcon_reference(prompt, 20) for prompt in chosen]
    assert [*first, *tokens_of(running)] == falcon_reference(beside, 60)
    # 256, then 64, then 16
    assert all(len(counts) == 1 for counts in passes) and max(map(max, passes)) <= 16
    assert engine.lost is None
    # with memory again, the chunk grows back
    for long in prompts((1500, 1500), checkpoints.FEW, seed=17):
        assert generated(engine, long, 5) == falcon_reference(long, 5)
    assert max(map(max, passes)) == 256


@each("error", plain=[out_of_memory(), CPU_OUT_OF_MEMORY, MemoryError()], graphs=[out_of_memory()])
def test_a_prompt_that_never_finds_memory_fails_and_the_others_go_on(
    falcon_model: Model,
    falcon_reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: Exception,
) -> None:
    engine = started(falcon_model, rows=4, prefill_chunk=256, **options)
    (beside, large) = prompts((40, 200), checkpoints.FEW, seed=14)
    running = engine.generate(Request(beside, 60, GREEDY))
    first = next(iter(running))
    prefill = engine._runner.prefill

    def without_memory(chunks: list[Chunk]) -> Any:
        if chunks[0].sequence.prompt == large:
            raise error
        return prefill(chunks)

    monkeypatch.setattr(engine._runner, "prefill", without_memory)
    with pytest.raises(UserError, match="Faltó memoria para esta petición: vuelva a intentarlo"):
        generated(engine, large, 5)
    assert [*first, *tokens_of(running)] == falcon_reference(beside, 60)
    monkeypatch.undo()
    assert generated(engine, large, 5) == falcon_reference(large, 5)


@pytest.mark.parametrize("name", ["put", "prefill"])
def test_where_rows_grow_a_prompt_without_memory_waits_until_another_sequence_ends(
    falcon_model: Model, falcon_reference: Reference, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = started(falcon_model, rows=4)
    chosen = prompts((40, 50, 60, 70), checkpoints.FEW, seed=18)
    step = getattr(engine._runner, name)

    def memory_for_two_rows(argument: Any, *others: Any) -> Any:
        if len({*engine._runner.rows.values()} | {s for s in engine.running if s is argument}) > 2:
            raise CPU_OUT_OF_MEMORY
        return step(argument, *others)

    monkeypatch.setattr(engine._runner, name, memory_for_two_rows)
    generations = [engine.generate(Request(prompt, 20, GREEDY)) for prompt in chosen]
    assert [tokens_of(g) for g in generations] == [falcon_reference(prompt, 20) for prompt in chosen]


@each("error", plain=[CPU_OUT_OF_MEMORY], graphs=[out_of_memory()])
def test_a_decode_step_without_memory_ends_the_longest_sequence_and_the_others_go_on(
    falcon_model: Model,
    falcon_reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: Exception,
) -> None:
    engine = started(falcon_model, rows=4, **options)
    lengths = (9, 300, 30)
    chosen = prompts(lengths, checkpoints.FEW, seed=19)
    decode = engine._runner.decode

    def without_memory_for_the_longest() -> Any:
        if any(len(sequence.prompt) == 300 for sequence in engine._runner.rows.values() if sequence.prefilled):
            raise error
        return decode()

    monkeypatch.setattr(engine._runner, "decode", without_memory_for_the_longest)
    generations = [engine.generate(Request(prompt, 20, GREEDY)) for prompt in chosen]
    for prompt, generation in zip(chosen, generations, strict=True):
        if len(prompt) == 300:
            with pytest.raises(UserError, match="Faltó memoria para esta petición"):
                list(generation)
        else:
            assert tokens_of(generation) == falcon_reference(prompt, 20)


def test_a_cache_that_cannot_grow_fails_only_the_request_that_needs_it(
    falcon_model: Model, falcon_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have grown by then, and others have not."""
    engine = started(falcon_model, rows=4, prefill_chunk=CHUNK)
    beside, large, next_ = prompts((40, 900, 1000), checkpoints.FEW, seed=20)
    running = engine.generate(Request(beside, 100, GREEDY))
    first = next(iter(running))
    layer = engine._runner.slots.slot_layers[-1]
    resize = layer.resize

    def no_more_than_512(rows: int, length: int) -> None:
        if length > 512:
            raise CPU_OUT_OF_MEMORY
        resize(rows, length)

    monkeypatch.setattr(layer, "resize", no_more_than_512)
    with pytest.raises(UserError, match="Faltó memoria"):
        generated(engine, large, 5)
    assert [*first, *tokens_of(running)] == falcon_reference(beside, 100)
    monkeypatch.undo()
    assert generated(engine, next_, 20) == falcon_reference(next_, 20)


@each("bad", plain=[torch.nan], graphs=[torch.inf])
def test_logits_that_are_no_numbers_fail_only_their_request(
    falcon_model: Model,
    falcon_reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    bad: float,
) -> None:
    """The keys and values of its row are no numbers either: the next sequence in that row does not read them."""
    engine = started(falcon_model, rows=2, **options)
    broken, beside, next_ = prompts((9, 30, 5), checkpoints.FEW, seed=15)
    logits = Runner._logits

    def corrupted(runner: Runner, *arguments: Any, **named: Any) -> torch.Tensor:
        result = logits(runner, *arguments, **named)
        # four steps after its prompt's last pass
        row = [i for i, s in runner.rows.items() if len(s.prompt) == len(broken) and s.cached == len(broken) + 3]
        if row:
            result[row] = bad
            for layer in runner.slots.slot_layers:
                layer.keys[row], layer.values[row] = bad, bad
        return result

    monkeypatch.setattr(Runner, "_logits", corrupted)
    running = [engine.generate(Request(prompt, 40, GREEDY)) for prompt in (broken, beside)]
    tokens: list[int] = []
    with pytest.raises(UserError, match="ningún número en el token 5 de la respuesta"):
        for came in running[0]:
            tokens += came
    assert tokens == falcon_reference(broken, 4)
    assert [sequence.prompt for sequence in engine.running] == [beside], "its row is free"
    monkeypatch.setattr(Runner, "_logits", logits)
    assert generated(engine, next_, 40) == falcon_reference(next_, 40)
    assert tokens_of(running[1]) == falcon_reference(beside, 40)


def refused_capture(step: Callable[[], None]) -> Replay:
    """As CUDA's capture, which refuses a step that copies numbers from the host or reads any back."""

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name.removeprefix("aten::") in ("lift_fresh", "item", "is_nonzero", "nonzero"):
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            return func(*args, **(kwargs or {}))

    step()
    with Refusing():
        step()
    return step


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["falcon", "multi-query falcon", "gpt-neo", "dynamic llama"])
def test_a_model_that_cannot_be_captured_is_served_without_graphs(
    small_falcon: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_falcon if kind == "falcon" else uncapturable(tmp_path / "model", kind)
    model = Model.read(folder, torch.float32)
    engine = started(model, rows=2, prefill_chunk=CHUNK, capture=refused_capture)
    output = capsys.readouterr().out
    (prompt,) = prompts((CHUNK + 5,), 250, seed=16)
    assert generated(engine, prompt, 12) == Reference(folder, model)(prompt, 12)
    if kind == "falcon":
        assert "Sin grafos" not in output and "grafos CUDA capturados en" in output
        assert engine._runner.forward_graphs and engine._runner.choose_graphs
    else:
        (line,) = [line for line in output.splitlines() if "grafos" in line]
        assert line.startswith("Sin grafos CUDA, cada paso va más despacio: este modelo no se deja capturar (operation")
        assert not engine._runner.forward_graphs and not engine._runner.choose_graphs


def uncapturable(folder: Path, kind: str) -> Path:
    """A model whose forward copies from the host: it indexes with a list, or makes tensors of numbers."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": checkpoints.FEW, "initializer_range": 0.3}
    network: PreTrainedModel
    if kind == "multi-query falcon":
        network = FalconForCausalLM(FalconConfig(**size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    elif kind == "gpt-neo":
        layers: Any = [[["global"], 2]]
        network = GPTNeoForCausalLM(
            GPTNeoConfig(**size, hidden_size=64, num_layers=2, num_heads=4, attention_types=layers)
        )
    else:
        rope: Any = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        network = LlamaForCausalLM(
            LlamaConfig(
                **size,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                rope_parameters=rope,
            )
        )
    network.save_pretrained(folder)
    checkpoints.tokenizer().save_pretrained(folder)
    return folder


def test_a_capture_without_memory_is_served_without_graphs(
    falcon_model: Model, falcon_reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    captures = failing(plain_call, None, None, out_of_memory())
    engine = started(falcon_model, rows=2, capture=captures)
    assert "Sin grafos CUDA" in capsys.readouterr().out
    assert generated(engine, [7, 8, 9], 10) == falcon_reference([7, 8, 9], 10)


def test_rows_are_only_as_long_as_the_longest_sequence_needs(falcon_model: Model) -> None:
    engine = started(falcon_model, rows=3)
    slots = engine._runner.slots
    beside = engine.generate(Request([5] * 3, 2000, GREEDY))
    next(iter(beside))
    assert slots.capacity[1] < 128
    long = engine.generate(Request([5] * 1000, 20, GREEDY))
    next(iter(long))
    assert slots.capacity[1] >= 1000
    long.cancel()
    until(lambda: slots.capacity[1] < 1000)
    assert engine.running
    beside.cancel()


@pytest.mark.slow
def test_llama_too_is_served_as_generate_would(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama", vocabulary=checkpoints.FEW)
    model = Model.read(folder, torch.float32)
    reference = Reference(folder, model)
    for options in ({}, {"capture": plain_call}):
        engine = started(model, rows=4, prefill_chunk=CHUNK, **options)
        chosen = prompts((3, 80, 17, 200, 9), checkpoints.FEW, seed=8)
        generations = [engine.generate(Request(prompt, 20, GREEDY)) for prompt in chosen]
        assert [tokens_of(g) for g in generations] == [reference(prompt, 20) for prompt in chosen]


def test_beside_busy_processes_one_thread_computes_the_same_text(falcon_model: Model) -> None:
    engine = started(falcon_model)
    quiet = generated(engine, [7, 8, 9], 20)
    threads = engine._runner.threads
    assert threads
    with ExitStack() as stack:
        for _ in range(psutil.cpu_count() or 1):
            stack.enter_context(busy_core())
        until(lambda: generated(engine, [7, 8, 9], 20) == quiet and threads.number == 1)
