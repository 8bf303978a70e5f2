"""Which kernels a GPU uses. Nothing is trusted that this card has not shown: at start each kernel runs beside the
operations that it replaces, with the model's own shapes, and takes their place where its numbers agree and come sooner.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.devices import gpu, kernels
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

    def earns_its_place(self, seconds: Seconds, say: Say = unsaid) -> bool:
        """Whether the kernel agrees, and is faster where it has to be. Says why not."""
        if not self.agrees(say):
            return False
        if not self.only_if_faster:
            return True
        kernel, operations = seconds(self.kernel), seconds(self.operations)
        if kernel < operations:
            return True
        say(f"Sin kernel para {self.name}: tarda {kernel * 1e6:.1f} µs, y PyTorch {operations * 1e6:.1f}")
        return False


def proven(candidates: list[Candidate], seconds: Seconds, say: Say = unsaid) -> bool:
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
    least = min(gpu.seconds(replay, REPLAYS))
    while time.perf_counter() < end:
        least = min(least, *gpu.seconds(replay, REPLAYS))
    return least


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
    kinds: dict[tuple[object, ...], list[nn.Module]] = {}
    for module in network.modules():
        if type(module) is nn.Linear or _is_norm(module):
            shapes = tuple((name, tensor.shape) for name, tensor in module.named_parameters(recurse=False))
            kinds.setdefault((type(module), shapes), []).append(module)
    candidates = [[_of_layers(modules, tokens) for tokens in TOKENS] for modules in kinds.values()]
    failures = compile_at_once([*chain.from_iterable(candidates)], next(network.parameters()).device)
    if (first := next(iter(failures), None)) and all(failures):
        raise first  # nothing compiles here: one reason instead of one for each kind
    use_kernels = 0
    for modules, of_kind in zip(kinds.values(), candidates, strict=True):
        if proven(of_kind, seconds, say):
            use_kernels += len(modules)
            for module in modules:
                module.forward = partial(_with_kernel(module), module)
    return use_kernels, sum(map(len, kinds.values()))


def _of_layers(modules: list[nn.Module], tokens: int) -> Candidate:
    """One layer after another of the same kind, so that no weight is still in the GPU's cache from the last turn."""
    with_kernel = _with_kernel(modules[0])
    weight: Any = modules[0].weight
    width = weight.shape[-1]
    x = torch.randn(1, tokens, width, generator=torch.Generator(weight.device).manual_seed(0), device=weight.device)
    x = x.to(weight.dtype)
    return Candidate(
        f"{type(modules[0]).__name__} de {' x '.join(map(str, weight.shape))}, tokens: {tokens}",
        kernel=lambda: [with_kernel(module, x) for module in modules][-1],
        operations=lambda: [module(x) for module in modules][-1],
        exact=lambda: deepcopy(modules[-1]).float()(x.float()),
    )


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
    length = min(context, LONGEST)
    decode, prefill = (candidate(heads, length, has_bias, device) for candidate in (_decode, _prefill))
    compile_at_once([decode, prefill], device)
    return proven([decode, prefill], seconds, say)


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
