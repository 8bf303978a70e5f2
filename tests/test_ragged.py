"""Ragged passes, as on a GPU, on a CPU in Triton's interpreter: the engine gives what `generate` gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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
from llm.engine import ragged
from llm.engine.engine import Engine
from tests.support import interpreter, tiny  # noqa: F401
from tests.support.graphs import plain_call

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
    ("name", "options"), [("falcon", {"capture": plain_call}), ("llama", {}), ("gpt2", {})], ids=[*NETWORKS]
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
