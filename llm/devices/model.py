"""A folder of weights to a model on its devices, fit for the processor, and what the engine has to know of it."""

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llm.devices import activation, attention, gpu, linear, llama, loading, memory
from llm.devices.linear import PackedLinear
from llm.devices.padding import RowPadding
from llm.devices.threads import use_physical_cores
from llm.errors import UserError
from llm.weights import checkpoint
from llm.weights.settings import Settings
from llm.words import Say, decimal, first_line, thousands, unsaid

CPU_SHARE = 0.5
"""Of the free RAM, for the cache: a laptop's owner has other programs."""
FEWEST_ROWS, LEAST_CONTEXT = 4, 2048
"""A context is shortened so that so many rows fit, while it has so many tokens left: one row of 131,072 tokens serves
one request at a time."""
GPU_SHARE = 0.95
"""Of a GPU's free memory, for the cache and the steps: torch loses some between the blocks that it hands out."""

CPU_PREFILL_CHUNK = 256
GPU_PREFILL_CHUNK = 4096
OLD_GPU_PREFILL_CHUNK = 1024
RAGGED_PREFILL_CHUNK = 2048
"""Tokens of prompts that one pass reads, and so how long a running stream can pause. GPUs before Ampere have no kernel
for attention with grouped queries: what torch does instead takes a gigabyte for each 1,024 tokens and 32 heads."""


MAY_CHANGE = "En esta GPU un texto puede cambiar según qué otras preguntas haya a la vez"
"""Where the user asked that it does not."""


@dataclass(frozen=True)
class Room:
    """What the memory holds of the key/value cache."""

    rows: int
    context: int
    """Tokens of each row."""
    spare: int
    """Tokens of prefixes beside the rows, on GPUs: a CPU's prefixes take what its rows leave, which grow."""


@dataclass
class Model:
    """A causal language model and its tokenizer."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    """Where ids go in and logits come out."""
    spread: bool
    """Over several devices, or partly offloaded."""
    context: int
    """Tokens of prompt and answer together."""
    vocabulary: int
    """How many ids are tokens that the model reads. Some models have logits for more."""
    stop_ids: frozenset[int]
    layers: int
    parameters: int
    precision: str
    """Of the weights, and of the products where that is another, in Spanish."""
    token_bytes: Counter[torch.device]
    """What one token of one row takes in the key/value cache, in bytes, on each device."""
    context_chosen: bool = False
    """The user chose it: it is not shortened so that more rows fit."""
    packed: bool = False
    """Its linear layers are PackedLinear, which skip the padding."""
    tile: int | None = None
    """See forward.Pass: set where attention is the CPU's own."""
    ragged: bool = False
    """On a GPU with kernels for it, passes are ragged: see forward.Ragged."""
    mixes_starts: bool = False
    """Attention is the CPU's own, so that a prefill pass may read chunks that start at different positions."""
    row_paddings: Collection[RowPadding] = ()
    """Those of its layers in a decode pass, where its attention knows of padding."""
    batch_invariant: bool = False
    """On this processor the bits of a row do not depend on the other rows of a pass. On a GPU only where the user asked
    for that, and passes are ragged."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part of getting ready took: here `load`, `pack` and `kernels`."""

    @classmethod
    def load(cls, weights: checkpoint.Weights, settings: Settings, say: Say) -> "Model":
        """Load a folder's model, and lay it out for its device. Raises UserError."""
        # OpenMP keeps a pool of threads for each thread that ever computed. The pool that loads would stay beside the
        # engine's, and with more threads than processors all sleep, instead of spinning, between two operations.
        with loading.memory(weights.folder), ThreadPoolExecutor(1) as thread:
            return thread.submit(cls._load, weights, settings, say).result()

    @classmethod
    def _load(cls, weights: checkpoint.Weights, settings: Settings, say: Say) -> "Model":
        threads = use_physical_cores()
        chosen = getattr(torch, settings.dtype) if settings.dtype else None
        model = cls.read(
            weights.folder,
            chosen or best_dtype(),
            settings.max_context,
            say,
            linear.layout(chosen),
            settings.kernels,
            settings.batch_invariant,
        )
        where = ", ".join(sorted({str(device) for device in model.token_bytes}))
        cores = f" con {threads} hilos" if model.device.type == "cpu" else ""
        say(
            f"Modelo: {weights.origin}, {thousands(model.parameters / 1e6)} millones de parámetros en {model.precision}"
        )
        if not weights.verified:
            say(f"Sin verificar: {checkpoint.shown(weights.folder)} no tiene manifest.json")
        say(f"Cargado en {where}{cores} en {decimal(model.seconds['load'])} s")
        if model.spread:
            say("El modelo está repartido entre varios dispositivos: cada paso va sin grafos CUDA, más despacio")
        if model.packed:
            say(f"Pesos ordenados para el procesador en {decimal(model.seconds['pack'])} s")
            if not model.batch_invariant:
                say("En este procesador un texto puede cambiar según qué otras preguntas haya a la vez")
        return model

    @classmethod
    def read(
        cls,
        folder: Path,
        dtype: torch.dtype,
        max_context: int | None = None,
        say: Say = unsaid,
        layout: type[PackedLinear] | None = None,
        kernels: bool = True,
        batch_invariant: bool = False,
    ) -> "Model":
        """Read a folder onto one GPU, or onto the devices that accelerate chooses.

        dtype: what the model computes in. max_context: tokens of prompt and answer together, where the model's own
        context is longer. layout: of the linear layers, for a model on the CPU.
        kernels: whether a GPU may use those of this project. batch_invariant: whether a GPU has to be that, if it can.
        Raises UserError where the folder does not hold a whole causal language model that this project can
        serve.
        """
        start = time.perf_counter()
        with loading.explained(folder), ThreadPoolExecutor(1) as thread:

            def compile_meanwhile(network: PreTrainedModel) -> None:
                thread.submit(_compile_kernels, network, max_context)

            before = compile_meanwhile if kernels and torch.cuda.is_available() else None
            if layout:
                thread.submit(lambda: layout.compile_ahead(loading.stored_dtype(folder)))
            tokenizer, network = loading.load(folder, layout.read_as if layout else dtype, before)
            loaded, layers_agree = time.perf_counter(), False
            parameters = network.num_parameters()
            if layout:
                layers_agree = linear.pack(network, layout)
            packed = time.perf_counter()
            cached = _probe(network)
        devices = {torch.device(d if d != "disk" else "cpu") for d in getattr(network, "hf_device_map", {}).values()}
        gpus = sorted((d for d in devices if d.type != "cpu"), key=str)
        context = _context(network, tokenizer, cached, say)
        embeddings: Any = network.get_input_embeddings()
        model = cls(
            network=network,
            tokenizer=tokenizer,
            device=gpus[0] if gpus else torch.device(network.device),
            spread=len(devices) > 1,
            context=min(context, max_context or context),
            context_chosen=max_context is not None,
            vocabulary=min(max(tokenizer.get_vocab().values()) + 1, embeddings.weight.shape[0]),
            stop_ids=_stop_ids(network, tokenizer),
            layers=len(cached),
            parameters=parameters,
            precision=linear.precision(network) if layout else str(dtype).removeprefix("torch."),
            token_bytes=_token_bytes(cached),
            seconds={"load": loaded - start} | ({"pack": packed - loaded} if layout else {}),
        )
        if layout:
            activation.replace(network)
            llama.replace(network)
            attention.intercept("cpu")
            attention.read_grouped_as_they_are(True)
            tile = attention.batch_invariant_tile(model._heads)
            model.packed = True
            model.tile = tile or attention.MULTIPLES[-1]
            # of the attention of a model that does not call torch's nothing is known
            known = network.config._attn_implementation == "sdpa"
            model.mixes_starts = known
            model.row_paddings = linear.decode_paddings(network) if known else ()
            model.batch_invariant = layers_agree and tile is not None and known
        if model.device.type == "cuda":
            # before kernels are tried beside the operations: on a Hopper, cuDNN's would be taken first
            gpu.avoid_cudnn_attention()
            gpu.fuse_biases(network)
            if kernels and not model.spread and gpu.has_kernels(model.device, network.dtype):
                model._use_kernels(say, batch_invariant)
            if batch_invariant and not model.batch_invariant:
                say(MAY_CHANGE)
        return model

    def _use_kernels(self, say: Say, batch_invariant: bool = False) -> None:
        """Use the kernels that prove to be right and faster on this GPU, and say which. batch_invariant: all that are
        right, whatever their speed, if the model then is."""
        start = time.perf_counter()
        config = self.network.config.get_text_config()
        try:
            from llm.devices import kernel_check  # imports Triton, which a computer without a GPU may lack

            with torch.inference_mode(), torch.cuda.device(self.device):
                proven = of = 0
                if is_known := config._attn_implementation == "sdpa":
                    of_attention = self._heads, self.context, _has_bias(self.network), self.device
                    if batch_invariant:
                        proven = of = kernel_check.make_batch_invariant(self.network, *of_attention, say=say)
                if proven:
                    self.ragged = self.batch_invariant = True
                else:
                    proven, of = kernel_check.layers(self.network, say=say)
                    self.ragged = is_known and kernel_check.attention(*of_attention, say=say)
        except Exception as error:  # whatever Triton raises where it cannot compile, or a lack of memory to try
            say(f"Sin kernels propios, cada paso va más despacio: no se pudieron probar ({first_line(error)})")
            return
        finally:
            self._give_back_memory()
        if self.ragged:
            attention.intercept("cuda")
            attention.read_grouped_as_they_are(True)
        self.seconds["kernels"] = time.perf_counter() - start
        if not (proven or self.ragged):
            say("Sin kernels propios: en esta GPU las operaciones de PyTorch son más rápidas, o más exactas")
            return
        also = " y la atención" if self.ragged else ""
        say(f"Kernels propios: {proven} de {of} capas{also}, probados en {decimal(self.seconds['kernels'])} s")

    def _give_back_memory(self) -> None:
        """That of the cache with which attention was tried. Raises UserError where a kernel has broken the GPU, which
        then fails at whatever comes next."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise UserError(
                f"La GPU falló al probar los kernels propios ({first_line(error)}): ponga KERNELS=0"
            ) from error
        memory.empty_cuda_cache()

    def without_ragged(self) -> "Model":
        """The model with passes that are rectangles."""
        attention.read_grouped_as_they_are(False)
        return replace(self, ragged=False)

    def bits_agree(self, threads: int) -> bool:
        """Whether as many threads as there are now give the bits of `threads` threads, where the model is
        batch-invariant."""
        # a GPU's kernels have no threads of the host's
        if not (self.batch_invariant and self.tile):
            return True
        return attention.agrees(self.tile, self._heads, threads) and linear.agree_now(self.network)

    @property
    def _heads(self) -> attention.Heads:
        return _heads(self.network)

    def padding(self, rows: int) -> int:
        """How many rows a decode pass of so many computes beside them: see forward.Pass."""
        return RowPadding.for_all(self.row_paddings, rows) - rows

    def prefill_chunk(self) -> int:
        """How many tokens of prompts one pass may read."""
        if self.device.type != "cuda":
            return CPU_PREFILL_CHUNK
        if self.ragged:
            return RAGGED_PREFILL_CHUNK
        return GPU_PREFILL_CHUNK if all(map(gpu.is_ampere, self._gpus)) else OLD_GPU_PREFILL_CHUNK

    def room(self, most: int, chunk: int, say: Say = unsaid) -> Room:
        """What the key/value cache can hold, `most` rows at the most, given the memory that is free now.

        chunk: the tokens that a prefill pass computes. A context of which few rows fit is shortened, and the log says
        so: to what FEWEST_ROWS leave, unless that is below LEAST_CONTEXT or the user chose the context; where not
        one row fits, to what does. Raises UserError where that is next to nothing.
        """
        free = {device: int(memory.available() * CPU_SHARE) for device in self.token_bytes}
        free |= {device: int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE) for device in self._gpus}

        def fit(context: int, at_most: int = most) -> int:
            reserve = self._reserve(chunk, most, context).total if self._gpus else 0
            left = free | {device: max(0, free[device] - reserve) for device in self._gpus}
            return rows_that_fit(self.token_bytes, left, context, at_most)

        def longest(rows: int) -> int:
            """The longest context, in steps of 256 tokens, of which so many rows fit; 0 if there is none."""
            contexts = range(256, self.context, 256)
            count = bisect_right(contexts, -rows, key=lambda context: -fit(context))
            return contexts[count - 1] if count else 0

        context, wanted = self.context, min(FEWEST_ROWS, most)
        if not self.context_chosen and fit(context) < wanted and (shorter := longest(wanted)) >= LEAST_CONTEXT:
            context = shorter
            say(
                f"La memoria libre no alcanza para {wanted} contextos de {self.context} tokens: se usan {context}; con "
                "MAX_CONTEXT elige usted"
            )
        elif not fit(context):
            context = longest(1)
            if not context:
                raise UserError("No queda memoria para el contexto: cierre otros programas o use un modelo más pequeño")
            say(f"La memoria libre no alcanza para un contexto de {self.context} tokens: se usan {context}")
        if self._gpus:
            reserve = self._reserve(chunk, most, context)
            say(
                f"De cada GPU se apartan {_mega(reserve.prefill)} para leer preguntas, {_mega(reserve.graphs)} para "
                f"los grafos y {_mega(reserve.workspaces)} para las bibliotecas"
            )
        rows, spare = fit(context), 0
        if self._gpus:
            spare = fit(context, 2 * most) - rows
            if not spare and rows > FEWEST_ROWS:
                rows, spare = rows - 1, 1
        return Room(rows, context, spare * context)

    def _reserve(self, chunk: int, most: int, context: int) -> gpu.Reserve:
        # in a ragged pass a model makes its mask for tokens that follow on a whole context
        context += chunk if self.ragged else 0
        return gpu.reserve(self.network, chunk, most, context, fused=all(map(gpu.is_ampere, self._gpus)))

    @property
    def _gpus(self) -> list[torch.device]:
        return [device for device in self.token_bytes if device.type == "cuda"]


def rows_that_fit(token_bytes: Counter[torch.device], free: dict[torch.device, int], context: int, most: int) -> int:
    """How many contexts fit on every device, `most` at the most.

    token_bytes: what one token of one row takes on each device; free: what the cache may take there, both in bytes.
    """
    return min(most, *(free[device] // (size * context) for device, size in token_bytes.items()))


def best_dtype() -> torch.dtype:
    """What a model computes in: bfloat16 where the processor does, else float16 on a GPU and float32 on a CPU."""
    if torch.cuda.is_available():
        # a spread model computes in one dtype, so every GPU has to know it
        every = all(gpu.is_ampere(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))
        return torch.bfloat16 if every else torch.float16
    return torch.bfloat16 if torch.backends.mps.is_available() or linear.BFloat16Linear.is_fast() else torch.float32


def _heads(network: PreTrainedModel) -> attention.Heads:
    config = network.config.get_text_config()
    number = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // number
    sharing = getattr(config, "num_key_value_heads", None) or number
    return attention.Heads(number, number // sharing, size, network.dtype)


def _has_bias(network: PreTrainedModel) -> bool:
    """Whether its attention adds a bias of each head to the scores."""
    return bool(getattr(network.config.get_text_config(), "alibi", False))


def _compile_kernels(network: PreTrainedModel, max_context: int | None) -> None:
    """For a network on the meta device, while its weights are read. What fails here fails again, and is said, where the
    kernels are tried."""
    # by far: the weights for which kernels are compiled shall not take the place of the model's own
    device = gpu.roomiest(2 * gpu.size(network))
    if device and gpu.has_kernels(device, network.dtype):
        from llm.devices import kernel_check  # imports Triton, which a computer without a GPU may lack

        context = max_context or getattr(network.config.get_text_config(), "max_position_embeddings", None)
        kernel_check.compile_ahead(
            network, _heads(network), context or kernel_check.LONGEST, _has_bias(network), device
        )
        memory.empty_cuda_cache()


def _mega(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _probe(network: PreTrainedModel) -> list[DynamicLayer]:
    """What the model caches for one token, learned by running it: the surest way for any architecture."""
    with torch.inference_mode():
        ids = torch.zeros(1, 1, dtype=torch.long, device=network.device)
        cache = getattr(network(input_ids=ids, use_cache=True), "past_key_values", None)
    # BART's cache has a layer for each of an encoder that a causal model lacks
    cached = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "is_initialized", True)]
    layers = [layer for layer in cached if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
    if not layers or len(layers) < len(cached):
        name = type(network).__name__
        raise UserError(
            f"{name} no guarda claves y valores de cada token: use un modelo de atención (Falcon, Llama...)"
        )
    return layers


def _token_bytes(layers: list[DynamicLayer]) -> Counter[torch.device]:
    size: Counter[torch.device] = Counter()
    for layer in layers:
        assert layer.keys is not None and layer.values is not None
        size[layer.keys.device] += layer.keys.nbytes + layer.values.nbytes
    return size


def _context(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, layers: list[DynamicLayer], say: Say) -> int:
    config = network.config.get_text_config()
    # the model's own number first: falcon-rw-1b's tokenizer says half of what the model reads
    context = getattr(config, "max_position_embeddings", None) or min(tokenizer.model_max_length, 2048)
    # up to its window's length, sliding-window attention is full attention
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if not windows or min(windows) >= context:
        return context
    say(f"La atención del modelo ve una ventana de {min(windows)} tokens: el contexto acaba ahí y no en {context}")
    return min(windows)


def _stop_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The ids that end a text: those that the tokenizer and the generation config name, if they are control tokens.

    falcon-rw-1b's configs name 2, which is "#" in its tokenizer.
    """
    configured = network.generation_config.eos_token_id if network.generation_config else None
    named = configured if isinstance(configured, list) else [configured]
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return frozenset(id for id in [tokenizer.eos_token_id, *named] if id in control)
