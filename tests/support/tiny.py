"""Tiny random models of any architecture, with a word for each id, and whether the engine serves them as `generate`."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llm.engine.engine import Engine
from llm.engine.sequence import Request, Sampling
from tests.support.answers import tokens_of

CONTEXT, WORDS = 256, 300

SIZE: dict[str, Any] = {
    "vocab_size": WORDS,
    "initializer_range": 0.3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
}


FALCON: dict[str, Any] = {
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
    "new_decoder_architecture": False,
}
"""What falcon-rw-1b has that a FalconConfig has not by itself."""


def save(folder: Path, network: PreTrainedModel) -> Path:
    network.save_pretrained(folder)
    words = Tokenizer(WordLevel({str(number): number for number in range(WORDS)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1").save_pretrained(folder)
    return folder


def assert_texts_are_generates(folder: Path, engine: Engine, *lengths: int) -> None:
    """Prompts of these lengths, decoded together, get the texts that `generate` gives each of them."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(WORDS) for _ in range(length)] for length in lengths]
    answers = [engine.generate(Request(prompt, 12, Sampling(temperature=0))) for prompt in prompts]
    engine.start()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(engine._model.stop_ids),
            pad_token_id=0,
        )[0, len(prompt) :]
        tokens = tokens_of(answer)
        assert tokens == expected[: len(tokens)].tolist()
