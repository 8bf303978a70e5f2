"""How much of a device the cache may take: what is free, less what the steps need beside it. All in bytes."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

GRAPHS = 42
"""Six numbers of rows, each with four lengths and three widths, for a context of 2048."""
GRAPH_BYTES = 4 << 20
"""For the driver's copy of a graph of some 400 kernels, by estimate."""
WORKSPACE_BYTES = 128 << 20
"""Of cuBLAS and cuBLASLt on two streams: 32 MiB each on Hopper, 8 on others."""
SAMPLING_TENSORS = 11
"""(rows, vocabulary) float32 tensors' worth that choosing the next ids takes at its peak."""


@dataclass(frozen=True)
class Reserve:
    """What the cache leaves free on each GPU."""

    prefill: int
    """The largest pass over prompts."""
    graphs: int
    """The graphs, the pool in which they compute, and the tensors that they read."""
    workspaces: int

    @property
    def total(self) -> int:
        return self.prefill + self.graphs + self.workspaces


def reserve(network: PreTrainedModel, piece: int, rows: int, context: int, fused: bool) -> Reserve:
    """Bounds from the model's shape, for passes of `piece` tokens with padding, and `rows` contexts.

    fused: whether the GPU has a kernel for all of attention; without, torch computes its scores in float32.
    """
    config = network.config.get_text_config()
    size = network.dtype.itemsize
    heads, width, vocabulary = config.num_attention_heads, config.hidden_size, config.vocab_size
    head = network.get_output_embeddings()
    linear = [m for m in network.modules() if isinstance(m, nn.Linear) and m is not head]
    # GPT-2 has no nn.Linear; four times the width is what its layers have, and most others'
    widest = max([4 * width, *(max(m.in_features, m.out_features) for m in linear)])
    # between two layers, and within the widest one: its input, its product and what an activation makes of it
    activations = (6 * width + 3 * widest) * size
    # a bias for each head, as of ALiBi, or scores where no kernel is fused: themselves, their mask, their softmax
    scores = context * heads * (size if fused and config._attn_implementation == "sdpa" else 3 * 4)
    sampling = SAMPLING_TENSORS * rows * vocabulary * 4
    decode = rows * (activations + context * heads * size)
    inputs = rows * (context * 8 + vocabulary * 4)
    return Reserve(
        prefill=piece * (activations + scores) + sampling,
        graphs=GRAPHS * GRAPH_BYTES + decode + sampling + inputs,
        workspaces=WORKSPACE_BYTES,
    )


def rows_that_fit(token_bytes: Counter[torch.device], free: dict[torch.device, int], context: int, most: int) -> int:
    """How many contexts fit on every device, `most` at the most.

    token_bytes: what one token of one row takes on each device; free: what the cache may take there, both in bytes.
    """
    return min(most, *(free[device] // (size * context) for device, size in token_bytes.items()))
