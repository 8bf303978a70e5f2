"""Ragged passes, as on a GPU, on a CPU in Triton's interpreter: the engine gives what `generate` gives."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llm.devices import attention
from llm.devices.model import Model
from llm.engine import runner
from llm.engine.engine import Engine
from llm.engine.scheduler import Chunk
from tests.support import interpreter, tiny  # noqa: F401
from tests.support.graphs import plain_call
from tests.test_gpu import CONTEXT, Unread, Watch, model_of, network, put

from llm.devices import kernels  # isort: skip
from llm.engine import ragged  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.interpreted]
NETWORKS = {
    "falcon": lambda: FalconForCausalLM(FalconConfig(**tiny.SIZE, **tiny.FALCON)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**tiny.SIZE, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**tiny.SIZE)),
}


def ragged_model(folder: Path) -> Model:
    attention.intercept("cpu")
    attention.read_grouped_as_they_are(True)
    return replace(Model.read(folder, torch.float32, max_context=128), ragged=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("falcon", {"capture": plain_call}), ("llama", {}), ("gpt2", {})],
    ids=[*NETWORKS],
)
def test_the_texts_are_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    """Prompts of one token, of less than a block, of two chunks beside others."""
    monkeypatch.setattr(ragged, "SIZES", (16, 32))
    torch.manual_seed(0)
    folder = tiny.save(tmp_path, NETWORKS[name]())
    engine = Engine(ragged_model(folder), 3, prefill_chunk=32, say=print, **options)
    assert engine._model.ragged
    tiny.assert_texts_are_generates(folder, engine, 1, 9, 40)


def test_a_kernel_that_chooses_the_same_and_is_faster_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ragged_model(tiny.save(tmp_path, NETWORKS["llama"]()))
    with torch.inference_mode():
        engine = ragged.RaggedRunner(model, 6, plain_call)
        turns = iter(range(1000))
        assert engine.prove_choosing(seconds=lambda step: next(turns))
        assert engine.chooses_with_kernel
        assert not engine.prove_choosing(seconds=lambda step: 1.0)
        choose = kernels.choose

        def another(*arguments: Any, **options: Any) -> None:
            choose(*arguments, **options)
            chosen: Tensor = arguments[-1]
            chosen[0] += 1

        monkeypatch.setattr(kernels, "choose", another)
        assert not engine.prove_choosing(seconds=lambda step: next(turns))
        assert not engine.chooses_with_kernel


@pytest.fixture(params=["falcon", "llama"])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ragged.RaggedRunner]:
    """A runner of eight rows as on a GPU, on meta tensors, for which no kernel runs; two prompts are read."""
    monkeypatch.setattr(runner, "PendingIds", Unread)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(kernels.RaggedTokens, "write", lambda *_: None)
    monkeypatch.setattr(kernels.RaggedTokens, "attend", lambda _, query, *__: torch.empty_like(query))
    # meta tensors have no intercepted attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: query)
    with torch.inference_mode():
        model = replace(model_of(network(request.param)), ragged=True)
        filled = ragged.RaggedRunner(model, 8, lambda step: step)
        filled.cuda = True
        filled.prefill([Chunk(put(filled, 7), 0, 6), Chunk(put(filled, 300), 0, 299)])
        yield filled


def test_a_captured_step_copies_nothing_from_or_to_the_host(on_gpu: ragged.RaggedRunner) -> None:
    for size in ragged.SIZES:
        with Watch() as watch:
            on_gpu._read(size)
        assert watch.forbidden == [] and watch.copies == []
    for rows in (1, 8):
        with Watch() as watch:
            on_gpu._forward(rows, CONTEXT)
            on_gpu._choose(rows, [128])
        assert watch.forbidden == [] and watch.copies == []


def test_a_prefill_pass_sends_its_places_without_waiting(on_gpu: ragged.RaggedRunner) -> None:
    sequence = put(on_gpu, 40)
    with Watch() as watch:
        on_gpu.prefill([Chunk(sequence, 0, 39)])
        on_gpu.decode()
    assert watch.forbidden == [] and watch.copies == [True]
