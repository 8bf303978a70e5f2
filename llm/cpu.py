"""What makes a model fast on a CPU: its threads, packed weights, and attention of its own.

Knows modules and tensors, nothing of requests. The only file that calls torch below its public surface.
"""

import ctypes
import functools
import mmap
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_ROWS = 4
"""A decode step pads its rows to this many: oneDNN reads the weights a fifth faster for four than for one (Zen 4)."""
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for it; else it is slower in bfloat16 than in float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not BFLOAT16_FLAGS.isdisjoint(cpuinfo.read_text().split())


def use_physical_cores() -> int:
    """One thread for each physical core that this process may run on: two on one core compete for its units."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    threads = min(allowed, psutil.cpu_count(logical=False) or allowed)
    torch.set_num_threads(threads)
    return threads


class Padding:
    """Which tokens of the current prefill pass are prompt; the others only pad the shorter rows."""

    def __init__(self) -> None:
        self.real: Tensor | None = None  # (tokens,) int64, indices into the flat (rows * length); None: all are real


class PackedLinear(nn.Module):
    """An nn.Linear whose weight is in oneDNN's blocked layout, about twice as fast to read for a few rows.

    It skips padding, so prompts of different lengths cost no more than their tokens. It takes the weight from the
    module that it replaces: packing a model needs memory for its weights and one more layer.
    """

    def __init__(self, linear: nn.Linear, padding: Padding):
        super().__init__()
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.padding = padding
        self.few = linear.weight.new_zeros(FEWEST_ROWS, 1, linear.in_features)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        del linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, tokens, in features) bfloat16. Returns (rows, tokens, out features) bfloat16, 0 for padding. For
        other shapes, which some models make, everything is computed."""
        if x.dim() != 3:
            return self._linear(x)
        rows, tokens, _ = x.shape
        real = self.padding.real
        if tokens == 1 and rows < FEWEST_ROWS:
            self.few[:rows] = x
            return self._linear(self.few)[:rows]
        if tokens == 1 or real is None:
            return self._linear(x)
        flat = x.new_zeros(rows * tokens, self.out_features)
        flat[real] = self._linear(x.flatten(0, 1)[real])
        return flat.view(rows, tokens, self.out_features)

    def _linear(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product


def pack(model: nn.Module, padding: Padding) -> None:
    """Replace every nn.Linear of a bfloat16 model on the CPU, in place, by a PackedLinear."""
    users = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(module, padding))
            if users[weight.data_ptr()] == 1:
                _drop_pages(weight)


def _drop_pages(weight: Tensor) -> None:
    """Let the system drop the pages of a weight that nobody reads again.

    transformers maps the whole file of weights, and one small tensor still in use keeps all of it resident: 5.5 GB
    instead of 3.2 for falcon-rw-1b once it is packed.
    """
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


class _Pass(threading.local):
    """Whether this thread is within a pass of a packed model."""

    ours = False


_pass = _Pass()


def use_own_attention(model: nn.Module) -> None:
    """Send the attention of this model's passes on the CPU through `attend`; all other attention stays torch's."""
    _intercept_attention()
    forward = model.forward

    @functools.wraps(forward)
    def own(*args: Any, **kwargs: Any) -> Any:
        _pass.ours = True
        try:
            return forward(*args, **kwargs)
        finally:
            _pass.ours = False

    model.forward = own


@functools.cache
def _intercept_attention() -> torch.library.Library:
    def either(*args: Any, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs) if _pass.ours else _torchs_attention(*args, **kwargs)

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", either, "CPU")
    return library  # the cache keeps it: when it goes, so does its kernel


def _torchs_attention(*args: Any, **kwargs: Any) -> Tensor:
    """What scaled_dot_product_attention does where nobody intercepts it."""
    result: Tensor = torch.ops.aten.scaled_dot_product_attention.default.decompose(*args, **kwargs)
    return result


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention for the CPU, faster where each row has few bfloat16 queries.

    There torch's own kernel takes 5 to 8 times as long as two batched products over contiguous keys and values.
    query (rows, heads, queries, head size); key, value (rows, heads, length, head size); attn_mask bool or additive.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    few = query.dtype == torch.bfloat16 and query.shape[-2] * 8 <= key.shape[-2] and not is_causal
    if not few:
        return _torchs_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    scale = scale or query.shape[-1] ** -0.5
    scores = (query @ key.transpose(-1, -2)).float()
    scores = scores * scale if attn_mask is None else torch.add(attn_mask, scores, alpha=scale)
    return F.softmax(scores, -1).to(value.dtype) @ value
