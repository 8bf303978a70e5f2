"""What makes a model fast on a CPU, and its numbers the same in any company: packed weights, and attention of its own.

Knows modules and tensors, nothing of requests. The only file that calls torch below its public surface.

How a product is summed, and so the last bits of it, may depend on how many rows are computed together. So packed
layers compute only in numbers of rows for which the processor, asked, gives every row the same bits, and attention
only in tiles of the same size. Each token then has the bits of its own text alone.
"""

import ctypes
import functools
import mmap
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

FEWEST_ROWS = 4
"""Fewer are filled up to this many: oneDNN reads the weights a fifth faster for four rows than for one (Zen 4)."""
DECODE_ROWS = (FEWEST_ROWS, 8, 16, 32)
PROMPT_ROWS = (*DECODE_ROWS, 64, 128, 256)
"""What the rows of a decode step and the tokens of a prefill pass are filled up to, where they have to be."""
TILE = 64
"""Queries of a prompt that attention computes together."""
FEWEST_KEYS = 32
"""That a tile of them reads: for the smallest products MKL sums in another order."""
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for it; else it is slower in bfloat16 than in float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not BFLOAT16_FLAGS.isdisjoint(cpuinfo.read_text().split())


class Padding:
    """Which tokens of the current prefill pass are prompt; the others only pad the shorter rows."""

    def __init__(self) -> None:
        self.tokens = 0
        """Rows times length of the pass, 0 in a decode step."""
        self.real: Tensor | None = None  # (prompt tokens,) int64, indices into those tokens; None: all are
        self.queries = 8
        """Attention's tiles are filled up to a multiple of this."""


class Filling:
    """In how many rows a product is computed, so that a row gets the same bits among however many it is.

    Where the processor has kernels that sum in other orders for other numbers of rows, it is filled up to one of those
    that agree. Which do is asked of it: of a few at once, of any other when it is first needed.
    """

    def __init__(self, layer: "PackedLinear", numbers: tuple[int, ...], reference: int):
        """Of all layers of the same shape, this one is asked. Those of `numbers` that agree with `reference`, itself
        one of them, are what others are filled up to."""
        self._layer = layer
        self._row = torch.randn(1, layer.room.shape[-1], generator=torch.Generator().manual_seed(0)).bfloat16()
        # less what it rounds to: the rest shows the bits of the sum that bfloat16 would round away
        self._bias = -self._bits(reference, None)[0]
        self._expected = self._bits(reference, self._bias)[0]
        agreeing = tuple(number for number in numbers if self._agrees(number))
        self.agrees = reference in agreeing
        """Whether the processor gives a row the same bits wherever it stands among some number of them."""
        self._numbers = agreeing if self.agrees else numbers
        self.most = self._numbers[-1]
        self._filled: dict[tuple[int, int], int] = {}
        """By rows and threads."""

    def __getitem__(self, rows: int) -> int:
        """For 1 <= rows <= most."""
        key = rows, torch.get_num_threads()
        if key not in self._filled:
            exact = rows >= FEWEST_ROWS and self._agrees(rows)
            self._filled[key] = rows if exact else next(number for number in self._numbers if number >= rows)
        return self._filled[key]

    def keeps_bits(self) -> bool:
        """Whether so many threads as there are now give the bits that those gave which it was made with."""
        return all(map(self._agrees, self._numbers))

    def _agrees(self, rows: int) -> bool:
        return bool((self._bits(rows, self._bias) == self._expected).all())

    def _bits(self, rows: int, bias: Tensor | None) -> Tensor:
        return self._layer.product(self._row.expand(rows, -1).contiguous(), bias)


class PackedLinear(nn.Module):
    """An nn.Linear whose weight is in oneDNN's blocked layout, about twice as fast to read for a few rows.

    It skips padding, so prompts of different lengths cost no more than their tokens. It takes the weight from the
    module that it replaces: packing a model needs memory for its weights and one more layer.
    """

    decode: Filling
    """In a decode step, and in the last layer of a pass of prompts, which reads a token of each."""
    prompt: Filling
    """In every other layer of a pass of prompts."""

    def __init__(self, linear: nn.Linear, padding: Padding):
        super().__init__()
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.padding = padding
        self.room = linear.weight.new_zeros(PROMPT_ROWS[-1], 1, linear.in_features)
        """Where rows are filled up: what stands behind them there does not matter."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        del linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in features) bfloat16. Returns (..., out features) bfloat16, 0 for padding."""
        tokens = x.numel() // x.shape[-1]
        if tokens != self.padding.tokens:
            return self._filled(x, tokens, self.decode)
        real = self.padding.real
        if real is None:
            return self._filled(x, tokens, self.prompt)
        result = x.new_zeros(tokens, self.out_features)
        result[real] = self._filled(x.flatten(0, -2)[real], len(real), self.prompt)
        return result.view(*x.shape[:-1], -1)

    def _filled(self, x: Tensor, rows: int, filling: Filling) -> Tensor:
        if rows > filling.most:
            parts = x.reshape(rows, -1).split(filling.most)
            return torch.cat([self._filled(part, len(part), filling) for part in parts]).view(*x.shape[:-1], -1)
        number = filling[rows]
        if number == rows:
            return self.product(x, self.bias)
        single = x.shape[1] == 1
        self.room[:rows] = x if single else x.reshape(rows, 1, -1)
        product = self.product(self.room[:number], self.bias)[:rows]
        return product if single else product.view(*x.shape[:-1], -1)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With all rows of x (..., in features) at once."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return product


def pack(model: PreTrainedModel, padding: Padding) -> bool:
    """Replace every nn.Linear of a bfloat16 model on the CPU, in place, by a PackedLinear.

    Returns whether the processor has numbers of rows for each in which company does not change bits.
    """
    users = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    last = model.get_output_embeddings()
    first: dict[torch.Size, PackedLinear] = {}
    rooms: dict[int, Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            parent, _, child = name.rpartition(".")
            packed = PackedLinear(module, padding)
            packed.room = rooms.setdefault(module.in_features, packed.room)
            like = first.setdefault(weight.shape, packed)
            if like is packed:
                packed.decode = Filling(packed, DECODE_ROWS, DECODE_ROWS[0])
                # of a prompt the last layer reads no more than the end
                packed.prompt = packed.decode if module is last else Filling(packed, PROMPT_ROWS, PROMPT_ROWS[-1])
            packed.decode, packed.prompt = like.decode, like.prompt
            setattr(model.get_submodule(parent), child, packed)
            if users[weight.data_ptr()] == 1:
                _drop_pages(weight)
    return all(layer.decode.agrees and layer.prompt.agrees for layer in first.values())


def keeps_bits(model: PreTrainedModel, padding: Padding, heads: int, size: int, threads: int) -> bool:
    """Whether so many threads as there are now give a packed model's tokens the same bits as `threads`."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    fillings = {filling for layer in layers for filling in (layer.decode, layer.prompt)}
    return _attention_agrees(padding, heads, size, threads) and all(filling.keeps_bits() for filling in fillings)


def _drop_pages(weight: Tensor) -> None:
    """Let the system drop the pages of a weight that nobody reads again.

    transformers maps the whole file of weights, and one small tensor still in use keeps all of it resident: 5.5 GB
    instead of 3.2 for falcon-rw-1b once it is packed.
    """
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it for later (glibc)."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(ctypes.c_size_t(0))


class _Pass(threading.local):
    """The padding of the packed model that this thread has a pass of."""

    padding: Padding | None = None


_pass = _Pass()


def use_own_attention(model: nn.Module, padding: Padding) -> None:
    """Send the attention of this model's passes on the CPU through `attend`; all other attention stays torch's."""
    _intercept_attention()
    forward = model.forward

    @functools.wraps(forward)
    def own(*args: Any, **kwargs: Any) -> Any:
        _pass.padding = padding
        try:
            return forward(*args, **kwargs)
        finally:
            _pass.padding = None

    model.forward = own


@functools.cache
def _intercept_attention() -> torch.library.Library:
    def either(*args: Any, **kwargs: Any) -> Tensor:
        if _pass.padding is None:
            return _torchs_attention(*args, **kwargs)
        prompts = {"padding": _pass.padding} if _pass.padding.tokens else {}
        return attend(*args, **kwargs | prompts)

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
    padding: Padding | None = None,
) -> Tensor:
    """scaled_dot_product_attention for the CPU, where a query's bits depend on what it sees alone.

    Those of torch's kernel depend on where a pass begins and ends, for it takes queries and keys in blocks; and for
    few queries it takes 5 to 8 times as long as two batched products over contiguous keys and values.
    query (rows, heads, queries, head size); key, value (rows, heads, length, head size); attn_mask bool or additive;
    padding: of a prefill pass, whose keys end with the last query's own.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    queries, length = query.shape[-2], key.shape[-2]
    if is_causal:
        attn_mask = query.new_full((queries, length), -torch.inf).triu_(1)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    scale = scale or query.shape[-1] ** -0.5
    if padding is None:
        return _weighted(query, key, value, attn_mask, scale)
    assert attn_mask is not None
    if missing := max(0, FEWEST_KEYS - length):
        key, value = F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing))
        attn_mask = F.pad(attn_mask, (0, missing), value=-torch.inf)
    # scores in float32, as torch's kernel has them: so many queries pay for it
    query, key = query.float(), key.float()
    found = []
    for first in range(0, queries, TILE):
        tile = query[..., first : first + TILE, :]
        size = tile.shape[-2]
        seen = max(FEWEST_KEYS, length - queries + first + size)
        mask = attn_mask[..., first : first + size, :seen]
        if missing := -size % padding.queries:
            tile, mask = F.pad(tile, (0, 0, 0, missing)), F.pad(mask, (0, 0, 0, missing))
        tile = _weighted(tile, key[..., :seen, :], value[..., :seen, :], mask, scale)
        found.append(tile[..., :size, :] if missing else tile)
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def _weighted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).float()
    scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale, out=scores)
    return F.softmax(scores, -1).to(value.dtype) @ value


def fill_tiles(padding: Padding, heads: int, size: int) -> bool:
    """Choose what attention's tiles are filled up to, so that all are of whole blocks of the processor's.

    Returns whether a query has then the same bits however its prompt is cut, however far the cache reaches, and beside
    any others.
    """
    return any(_attention_agrees(padding, heads, size, torch.get_num_threads()) for padding.queries in (8, 32))


def _attention_agrees(padding: Padding, heads: int, size: int, threads: int) -> bool:
    """Whether a query has the same bits in these passes as in one of them all, which so many threads compute."""
    most = 520
    query, key, value = torch.randn(3, 1, heads, most, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    sees = torch.ones(most, most, dtype=torch.bool).tril_()

    def bits(first: int, end: int, length: int, rows: int, padding: Padding | None) -> Tensor:
        cut = query[:, :, first:end], key[:, :, :length], value[:, :, :length]
        q, k, v = (x.expand(rows, -1, -1, -1) for x in cut)
        return attend(q, k, v, sees[first:end, :length], padding=padding)

    now = torch.get_num_threads()
    torch.set_num_threads(threads)
    whole = bits(0, most, most, 1, padding)
    alone = bits(40, 41, 41, 1, None)
    torch.set_num_threads(now)
    cuts = [(0, 2, 1), (0, 5, 1), (0, 11, 4), (3, 17, 1), (0, 45, 3), (5, 133, 2), (500, most, 3)]
    return all(
        bool((bits(first, end, end, rows, padding) == whole[:, :, first:end]).all()) for first, end, rows in cuts
    ) and all(bool((bits(40, 41, length, rows, None) == alone).all()) for length, rows in [(64, 3), (most, 4)])
