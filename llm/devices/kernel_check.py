"""Which kernels a GPU uses. Nothing is trusted that this card has not shown: at start each kernel runs beside the
operations that it replaces, with the model's own shapes, and takes their place where its numbers agree and come sooner.
Whoever asks that a text does not depend on its company asks for bits, not for speed: see make_batch_invariant.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.devices import forward, gpu, kernels
from llm.devices.attention import Heads
from llm.words import Say, first_line, unsaid

Seconds = Callable[[Callable[[], Tensor]], float]
"""Measures how long a step takes a device."""

ERROR = 2.0
"""A kernel's largest error may be so many times that of the operations."""
REPLAYS = 9
MEASURED = 0.03
"""In seconds: for so long a step is repeated. A GPU that has waited for the host is slow at first."""
COMPILERS = 8
"""Threads that compile."""
TOKENS = (1, 8, 32)
"""Of a pass with which layers are tried."""
ROWS, LONGEST, CHUNK = 8, 2048, 256
"""Rows, positions of each, and tokens of a prompt, with which attention is tried."""
DECODED = range(1, kernels.MOST_TOKENS + 1)
PREFILLED = (1, 16, 48, 64, 80, 256, 272)
"""Tokens of a pass in which a token's bits are compared."""


@dataclass(frozen=True)
class Candidate:
    """A kernel and what it replaces. Each of the three returns the same shape."""

    name: str
    """In the log, in Spanish."""
    kernel: Callable[[], Tensor]
    operations: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    """The operations in float32."""
    only_if_faster: bool = True

    def errors(self) -> tuple[float, float]:
        """The largest error of the kernel, and that of the operations."""
        exact = self.exact()
        kernel, operations = ((step().float() - exact).abs().max().item() for step in (self.kernel, self.operations))
        return kernel, operations

    def agrees(self, say: Say = unsaid) -> bool:
        """Whether the kernel's numbers are about as near to the exact ones as those of the operations; says if not."""
        kernel, operations = self.errors()
        # a comparison with NaN is false
        if kernel <= ERROR * operations:
            return True
        say(f"Sin kernel para {self.name}: su error es {kernel:.2g}, y el de PyTorch {operations:.2g}")
        return False

    def earns_its_place(self, seconds: Seconds | None, say: Say = unsaid) -> bool:
        """Whether the kernel agrees, and is faster where it has to be: nowhere without `seconds`. Says why not."""
        if not self.agrees(say):
            return False
        if seconds is None or not self.only_if_faster:
            return True
        kernel, operations = seconds(self.kernel), seconds(self.operations)
        if kernel < operations:
            return True
        say(f"Sin kernel para {self.name}: tarda {kernel * 1e6:.1f} µs, y PyTorch {operations * 1e6:.1f}")
        return False


def proven(candidates: list[Candidate], seconds: Seconds | None, say: Say = unsaid) -> bool:
    """Whether all of these kernels earn their place. Says why one does not."""
    for candidate in candidates:
        try:
            if not candidate.earns_its_place(seconds, say):
                return False
        except Exception as error:  # whatever Triton raises where it cannot compile, or a lack of memory to try
            say(f"Sin kernel para {candidate.name}: no se pudo probar ({first_line(error)})")
            return False
    return True


def on_device(step: Callable[[], Tensor]) -> float:
    """The seconds that a step takes the GPU in a CUDA graph, without its launches; the least of its turns."""

    def run() -> None:
        step()

    replay, end = gpu.shared_capture()(run), time.perf_counter() + MEASURED
    taken: list[float] = []
    while not taken or time.perf_counter() < end:
        taken += gpu.seconds(replay, REPLAYS)
    return min(taken)


def compile_at_once(candidates: list[Candidate], device: torch.device) -> list[Exception | None]:
    """Compile the kernels of all candidates, each on a thread: Triton holds no lock of Python's while it compiles.

    Returns what each raised. That counts for nothing yet: a thread may meet a kernel that another one has compiled and
    not yet loaded, and what is wrong with a kernel is wrong again when it is tried, by one thread. Nothing on a CPU,
    where Triton's interpreter compiles none."""
    if device.type != "cuda":
        return []

    def compile(candidate: Candidate) -> Exception | None:
        try:
            with torch.inference_mode(), torch.cuda.device(device):
                candidate.kernel()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(COMPILERS) as pool:
        return list(pool.map(compile, candidates))


def layers(network: nn.Module, seconds: Seconds = on_device, say: Say = unsaid) -> tuple[int, int]:
    """Have the norms and the linear layers computed by kernels where those prove to be right and faster, kind by kind.

    Returns how many layers are, of how many of these sorts.
    """
    kinds = _kinds(network)
    candidates = [_of_kind(modules) for modules in kinds]
    failures = compile_at_once([*chain.from_iterable(candidates)], next(network.parameters()).device)
    if (first := next(iter(failures), None)) and all(failures):
        raise first  # nothing compiles here: one reason instead of one for each kind
    use_kernels = 0
    for modules, of_kind in zip(kinds, candidates, strict=True):
        if proven(of_kind, seconds, say):
            use_kernels += len(modules)
            for module in modules:
                module.forward = partial(_with_kernel(module), module)
    return use_kernels, sum(map(len, kinds))


def compile_ahead(network: PreTrainedModel, heads: Heads, context: int, has_bias: bool, device: torch.device) -> None:
    """Compile what `layers` and `attention` try, for a network on the meta device whose weights are on their way."""
    gpu.fuse_biases(network)
    of_kinds = [_of_kind([deepcopy(modules[0]).to_empty(device=device)]) for modules in _kinds(network)]
    compile_at_once([*chain.from_iterable(of_kinds), *_of_attention(heads, context, has_bias, device)], device)


def _kinds(network: nn.Module) -> list[list[nn.Module]]:
    """The norms and the linear layers, those of one type and shape together."""
    kinds: dict[tuple[object, ...], list[nn.Module]] = {}
    for module in network.modules():
        if type(module) is nn.Linear or _is_norm(module):
            shapes = tuple((name, tensor.shape) for name, tensor in module.named_parameters(recurse=False))
            kinds.setdefault((type(module), shapes), []).append(module)
    return [*kinds.values()]


def _of_kind(modules: list[nn.Module]) -> list[Candidate]:
    return [_of_layers(modules, tokens, _with_kernel(modules[0])) for tokens in TOKENS]


def _of_layers(modules: list[nn.Module], tokens: int, with_kernel: Callable[[Any, Tensor], Tensor]) -> Candidate:
    """One layer after another of the same kind, so that no weight is still in the GPU's cache from the last turn."""
    x = _inputs(modules[0], tokens)
    return Candidate(
        f"{type(modules[0]).__name__} de {_shape(modules[0])}, tokens: {tokens}",
        kernel=lambda: [with_kernel(module, x) for module in modules][-1],
        operations=lambda: [module(x) for module in modules][-1],
        exact=lambda: deepcopy(modules[-1]).float()(x.float()),
    )


def _shape(layer: Any) -> str:
    return " x ".join(map(str, layer.weight.shape))


def _inputs(layer: Any, tokens: int) -> Tensor:
    """Random ones, (1, tokens, in features)."""
    device, width = layer.weight.device, layer.weight.shape[-1]
    x = torch.randn(1, tokens, width, generator=torch.Generator(device).manual_seed(0), device=device)
    return x.to(layer.weight.dtype)


def _with_kernel(layer: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    """The forward of such a layer: a function of the layer and its input."""
    return _linear if type(layer) is nn.Linear else _norm


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer's forward."""
    if x.numel() // layer.in_features > kernels.MOST_TOKENS:
        return F.linear(x, layer.weight, layer.bias)
    return kernels.linear(x.contiguous(), layer.weight, layer.bias)


def _norm(layer: Any, x: Tensor) -> Tensor:
    """The forward of a LayerNorm or an RMSNorm."""
    is_layer_norm = isinstance(layer, nn.LayerNorm)
    eps = layer.eps if is_layer_norm else getattr(layer, "variance_epsilon", None) or layer.eps
    return kernels.norm(x.contiguous(), layer.weight, getattr(layer, "bias", None), eps, subtracts_mean=is_layer_norm)


def _is_norm(module: nn.Module) -> bool:
    """Each architecture has a class of its own for RMSNorm. What one of them computes in another way, it shows."""
    if isinstance(module, nn.LayerNorm):
        return module.weight is not None and len(module.normalized_shape) == 1
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return type(module).__name__.endswith("RMSNorm") and has_eps and getattr(module, "weight", None) is not None


def make_batch_invariant(
    network: nn.Module, heads: Heads, context: int, has_bias: bool, device: torch.device, say: Say = unsaid
) -> int:
    """Have kernels compute every layer that sums, where each of them, and attention, is right and gives a token the
    same bits whatever else a ragged pass computes.

    Returns how many layers; 0 where not all of them can be computed so: then none is, and a line says why.
    """
    kinds = _kinds(network)
    replaced = {*chain.from_iterable(kinds)}
    others = (module for module in network.modules() if module not in replaced)
    if module := next(filter(_may_sum, others), None):
        say(f"Sin kernel para {type(module).__name__}")
        return 0
    length = min(context, LONGEST)
    of_pass: list[tuple[int, Sequence[int]]] = [(1, DECODED), (kernels.FEWEST_QUERIES, PREFILLED)]
    candidates = _of_attention(heads, context, has_bias, device)
    for modules in kinds:
        for block, numbers in of_pass:
            computed = _in_pass(modules[0], block)
            candidates += [_of_layers(modules[:1], tokens, computed) for tokens in (numbers[0], numbers[-1])]
    compile_at_once(candidates, device)
    if not proven(candidates, None, say):
        return 0
    for modules in kinds:
        if not all(_keeps_bits(modules[0], *each) for each in of_pass):
            say(f"El kernel para {type(modules[0]).__name__} de {_shape(modules[0])} cambia de bits en compañía")
            return 0
    if not _attention_keeps_bits(heads, length, has_bias, device):
        say("El kernel para la atención cambia de bits en compañía")
        return 0
    for module in replaced:
        module.forward = partial(_linear_of_current_pass if type(module) is nn.Linear else _norm, module)
    return len(replaced)


def _may_sum(module: nn.Module) -> bool:
    """Whether what no kernel replaces may compute a sum: it has weights, as a mixture of experts or Conv1D has, and is
    no table of them, or it is a norm without."""
    has_weights = next(module.parameters(recurse=False), None) is not None
    return not isinstance(module, nn.Embedding) and (has_weights or "Norm" in type(module).__name__)


def _in_pass(layer: nn.Module, block: int) -> Callable[[Any, Tensor], Tensor]:
    """The forward of such a layer in a ragged pass of this block: a function of the layer and its input.

    All tokens of a prompt but the last are read by prefill passes, of whatever size, and the others by decode passes.
    Each of the two has a kernel, which may sum in another order than the other: which one computes a token must not
    depend on the number of tokens, and so on company.
    """
    if type(layer) is not nn.Linear:
        return _norm
    product = kernels.linear if block == 1 else kernels.prefill_linear
    return lambda layer, x: product(x.contiguous(), layer.weight, layer.bias)


def _linear_of_current_pass(layer: Any, x: Tensor) -> Tensor:
    """A linear layer's forward where it is batch-invariant in ragged passes."""
    pass_ = forward.current()
    if pass_ is None or pass_.ragged is None:
        return _linear(layer, x)
    return _in_pass(layer, pass_.ragged.block)(layer, x)


def _keeps_bits(layer: nn.Module, block: int, numbers: Sequence[int]) -> bool:
    """Whether a token has the same bits in passes of so many tokens, at any place among them."""
    computed = _in_pass(layer, block)
    x = _inputs(layer, max(numbers))
    token = x[:, :1].clone()
    tried: list[Any] = [layer]
    if type(layer) is nn.Linear:
        # less the rounded product: what remains shows the bits of the sum that are rounded away
        product = computed(SimpleNamespace(weight=layer.weight, bias=None), token)
        tried.append(SimpleNamespace(weight=layer.weight, bias=-product[0, 0]))
    for each in tried:
        alone = computed(each, token)
        for tokens in numbers:
            for first in range(min(3, tokens)):
                company = x[:, :tokens].clone()
                company[:, first::3] = token
                if not (computed(each, company)[:, first::3] == alone).all():
                    return False
    return True


def attention(
    heads: Heads,
    context: int,
    has_bias: bool,
    device: torch.device,
    seconds: Seconds = on_device,
    say: Say = unsaid,
) -> bool:
    """Whether ragged passes attend as they should on this device, and a decode step does so sooner than before.

    A pass over a prompt only has to agree: in a graph it saves the host more than a kernel could lose.
    """
    candidates = _of_attention(heads, context, has_bias, device)
    compile_at_once(candidates, device)
    return proven(candidates, seconds, say)


def _of_attention(heads: Heads, context: int, has_bias: bool, device: torch.device) -> list[Candidate]:
    return [make(heads, min(context, LONGEST), has_bias, device) for make in (_decode, _prefill)]


def _decode(heads: Heads, length: int, has_bias: bool, device: torch.device) -> Candidate:
    """A token of each of ROWS rows, of different lengths: its key and value written, and its attention."""
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).to(device)
    in_order = rows.argsort()
    positions = torch.linspace(0, length - 1, ROWS, device=device).long()
    cache = _Cache(heads, length, has_bias, device)
    query, key, value = cache.tokens(ROWS)
    tokens = kernels.RaggedTokens(rows, positions, block=1)
    masks = cache.mask(positions[:, None])

    # of its own, so that a key written to the wrong place is missed
    own_keys, own_values = cache.keys.clone(), cache.values.clone()

    def kernel() -> Tensor:
        tokens.write(key, value, own_keys, own_values)
        return tokens.attend(query, own_keys, own_values, cache.bias, heads.size**-0.5)

    def operations(dtype: torch.dtype = heads.dtype) -> Tensor:
        at = rows[:, None], slice(None), positions[:, None]
        cache.keys[at], cache.values[at] = key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)
        # the heads that read the same keys as one head with more queries, as transformers has them
        grouped = query.transpose(0, 2)[in_order].reshape(ROWS, -1, heads.group, heads.size)
        mask = masks[in_order].reshape(ROWS, -1, heads.group if has_bias else 1, length)
        attended = _attention(grouped, cache.keys, cache.values, mask, dtype)
        return attended.reshape(ROWS, heads.number, 1, heads.size)[rows].transpose(0, 2)

    return Candidate("la atención al escribir", kernel, operations, lambda: operations(torch.float32))


def _prefill(heads: Heads, length: int, has_bias: bool, device: torch.device) -> Candidate:
    """The tokens of one prompt, after others that are in the cache, with padding."""
    count = min(CHUNK, length // 2)
    positions = torch.arange(length - count, length, device=device)
    cache = _Cache(heads, length, has_bias, device)
    query, _, _ = cache.tokens(count)
    padding = -count % kernels.FEWEST_QUERIES
    padded = F.pad(query, (0, 0, 0, padding))
    tokens = kernels.RaggedTokens(
        positions.new_full((count + padding,), 1), F.pad(positions, (0, padding), value=-1), kernels.FEWEST_QUERIES
    )

    def kernel() -> Tensor:
        return tokens.attend(padded, cache.keys, cache.values, cache.bias, heads.size**-0.5)[:, :, :count]

    def operations(dtype: torch.dtype = heads.dtype) -> Tensor:
        keys, values = (x[1:2].repeat_interleave(heads.group, 1) for x in (cache.keys, cache.values))
        return _attention(query, keys, values, cache.mask(positions[None]), dtype)

    return Candidate("la atención al leer", kernel, operations, lambda: operations(torch.float32), only_if_faster=False)


def _attention_keeps_bits(heads: Heads, length: int, has_bias: bool, device: torch.device) -> bool:
    """Whether a token's attention has the same bits however its prompt is cut, and whatever other rows a pass has."""
    cache = _Cache(heads, length, has_bias, device)
    queries, _, _ = cache.tokens(length)

    def attended(block: int, *chunks: tuple[int, int, int]) -> list[Tensor]:
        """Chunks of a row each, from one position to another, in one pass. Returns (1, heads, tokens, head size) of
        each."""
        padded = [[*range(start, end), *[-1] * (-(end - start) % block)] for _, start, end in chunks]
        rows = [row for (row, _, _), its in zip(chunks, padded, strict=True) for _ in its]
        positions = torch.tensor([*chain.from_iterable(padded)], device=device)
        tokens = kernels.RaggedTokens(torch.tensor(rows, device=device), positions, block)
        query = queries[:, :, positions]
        output = tokens.attend(query, cache.keys, cache.values, cache.bias, heads.size**-0.5)
        parts = output.split([*map(len, padded)], dim=2)
        return [part[:, :, : end - start] for part, (_, start, end) in zip(parts, chunks, strict=True)]

    block, end = kernels.FEWEST_QUERIES, min(CHUNK, length)
    (whole,) = attended(block, (1, 0, end))
    cuts = [0, 1, end // 3, end // 2 + 1, end]
    parts = [attended(block, (0, 0, cut), (1, first, cut), (2, first, end))[1] for first, cut in pairwise(cuts)]
    places = [(row, length * row // ROWS, length * row // ROWS + 1) for row in range(ROWS)]
    together = attended(1, *places)
    alone = [attended(1, place)[0] for place in places]
    turned = attended(1, *reversed(places))[::-1]
    return torch.equal(torch.cat(parts, 2), whole) and all(map(torch.equal, together + together, alone + turned))


class _Cache:
    """Random keys and values of ROWS rows, (rows, key heads, length, head size), and a bias of each head."""

    def __init__(self, heads: Heads, length: int, has_bias: bool, device: torch.device):
        self.heads = heads
        self._random = torch.Generator(device).manual_seed(0)
        shape = (ROWS, heads.number // heads.group, length, heads.size)
        self.keys, self.values = self._numbers(*shape), self._numbers(*shape)
        self.bias = self._numbers(1, heads.number, 1, length) if has_bias else None

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a ragged pass, (1, heads, tokens, head size)."""
        number = self.heads.number
        query, key, value = (self._numbers(1, number, count, self.heads.size) for _ in range(3))
        return query, key[:, :: self.heads.group], value[:, :: self.heads.group]

    def mask(self, positions: Tensor) -> Tensor:
        """What a model adds to the scores of (rows, tokens) at these positions."""
        hidden = torch.arange(self.keys.shape[2], device=positions.device) > positions[:, None, :, None]
        bias = self.keys.new_zeros(1) if self.bias is None else self.bias
        return bias.masked_fill(hidden, torch.finfo(self.keys.dtype).min)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self._random.device).to(self.heads.dtype)


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return F.scaled_dot_product_attention(query.to(dtype), keys.to(dtype), values.to(dtype), mask.to(dtype))
