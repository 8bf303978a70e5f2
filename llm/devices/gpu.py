"""What makes a model fast on a GPU, and how much memory that needs beside the weights and the cache.

Knows devices and shapes, nothing of rows or requests.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]

GRAPHS = 42
"""Six numbers of rows, each with four lengths and three widths, for a context of 2048."""
GRAPH_BYTES = 4 << 20
"""The driver's copy of a graph of some 400 kernels, estimated."""
WORKSPACE_BYTES = 128 << 20
"""Of cuBLAS and cuBLASLt on two streams: 32 MiB each on Hopper, 8 on others."""
WEIGHTS_SHARE = 0.8
"""Of a GPU's free memory, what a model may take there: the rest is for the cache and the steps."""
SAMPLING_TENSORS = 11
"""Choosing the next ids takes as much memory as this many (rows, vocabulary) float32 tensors at its peak."""


@dataclass(frozen=True)
class Reserve:
    """What the cache leaves free on each GPU, in bytes."""

    prefill: int
    """The largest prefill pass."""
    graphs: int
    """The graphs, the pool in which they compute, and the tensors that they read."""
    workspaces: int

    @property
    def total(self) -> int:
        return self.prefill + self.graphs + self.workspaces


def reserve(network: PreTrainedModel, chunk: int, rows: int, context: int, fused: bool) -> Reserve:
    """Bounds from the model's shape, in bytes, for prefill passes of `chunk` tokens with padding, and `rows` contexts.

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
        prefill=chunk * (activations + scores) + sampling,
        graphs=GRAPHS * GRAPH_BYTES + decode + sampling + inputs,
        workspaces=WORKSPACE_BYTES,
    )


def size(network: PreTrainedModel) -> int:
    """Of its weights and tables, in bytes."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def roomiest(size: int) -> torch.device | None:
    """The GPU with the most free memory, if weights of `size` bytes fit on it."""
    free, index = max((torch.cuda.mem_get_info(index)[0], -index) for index in range(torch.cuda.device_count()))
    return torch.device("cuda", -index) if size <= free * WEIGHTS_SHARE else None


def is_ampere(gpu: torch.device) -> bool:
    """Whether a GPU is of that generation or newer: it computes in bfloat16, and has kernels for all attention."""
    return torch.cuda.get_device_capability(gpu) >= (8, 0)


def has_kernels(gpu: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels.py is for this GPU and what it computes in."""
    return dtype in (torch.float16, torch.bfloat16) and is_ampere(gpu)


def fuse_biases(network: PreTrainedModel) -> None:
    """Have a product and its bias computed in one kernel where transformers adds the bias in another, as in Falcon."""
    for module in network.modules():
        # by its name: to import a model's own file takes a second
        if type(module).__name__ == "FalconLinear":
            module.__class__ = nn.Linear


def avoid_cudnn_attention() -> None:
    """Leave out cuDNN's attention, which plans anew for each shape: the lengths here change from pass to pass."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def seconds(step: Callable[[], object], turns: int) -> list[float]:
    """How long each turn of a step takes the GPU."""
    taken: list[float] = []
    for _ in range(turns):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return taken


@functools.cache
def shared_capture() -> Capture:
    """The process' only capture: see `cuda_capture` on its stream."""
    return cuda_capture()


def cuda_capture() -> Capture:
    """Capture as CUDA graphs that share one memory pool and one stream: one runs at a time."""
    pool = torch.cuda.graph_pool_handle()
    # one, for cuBLAS keeps a workspace for good for each that it meets; of the device of the thread that captures
    only_stream = functools.cache(torch.cuda.Stream)
    # kept, for torch does not capture into a pool again once all of its graphs are gone
    first: list[torch.cuda.CUDAGraph] = []

    def capture(step: Callable[[], None]) -> Replay:
        current, stream = torch.cuda.current_stream(), only_stream()
        # once outside: kernels are chosen and libraries make their workspaces, which a capture must not do
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
        finally:
            # a capture that fails leaves its own stream as the current one
            torch.cuda.set_stream(current)
        first[:] = first or [graph]
        return graph.replay

    return capture
