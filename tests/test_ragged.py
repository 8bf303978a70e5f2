"""Ragged passes, as on a GPU, on a CPU in Triton's interpreter: the engine gives what `generate` gives."""

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
from llm.engine.engine import Engine
from tests.support import interpreter, tiny  # noqa: F401
from tests.support.graphs import plain_call

from llm.devices import kernels  # isort: skip
from llm.engine import ragged  # isort: skip

NETWORKS = {
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            **tiny.SIZE, alibi=True, bias=True, multi_query=False, parallel_attn=False, new_decoder_architecture=False
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**tiny.SIZE, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**tiny.SIZE)),
}


def ragged_model(folder: Path) -> Model:
    attention.intercept("cpu")
    attention.read_grouped_as_they_are(True)
    return replace(Model.read(folder, torch.float32, max_context=128), ragged=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("falcon", {"capture": plain_call}), ("llama", {}), pytest.param("gpt2", {}, marks=pytest.mark.slow)],
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
        runner = ragged.RaggedRunner(model, 6, plain_call)
        turns = iter(range(1000))
        assert runner.prove_choosing(lambda step: next(turns))
        assert runner.chooses_with_kernel
        assert not runner.prove_choosing(lambda step: 1.0)
        draw = kernels.draw

        def another(top: Tensor, ids: Tensor, *arguments: Any, **options: Any) -> None:
            draw(top, ids.flip(-1) if options["width"] else ids, *arguments, **options)

        monkeypatch.setattr(kernels, "draw", another)
        assert not runner.prove_choosing(lambda step: next(turns))
        assert not runner.chooses_with_kernel
