"""A folder of weights to a model on its devices, fit for the processor, and what the engine has to know of it."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llm.devices import cpu, gpu
from llm.devices.threads import use_physical_cores
from llm.errors import UserError
from llm.weights import checkpoint, hub
from llm.weights.settings import Settings
from llm.words import decimal

CPU_SHARE = 0.5
"""Of the free RAM, for the cache: the rest is the laptop owner's."""
GPU_SHARE = 0.95
"""Of a GPU's free memory, for the cache and the steps: the rest is lost between the blocks that torch hands out."""

CPU_PREFILL_CHUNK = 256
GPU_PREFILL_CHUNK = 4096
OLD_GPU_PREFILL_CHUNK = 1024
"""Tokens of prompts that one pass reads, and so how long a running stream can pause. GPUs before Ampere have no kernel
for attention with grouped queries: what torch does instead takes a gigabyte for each 1,024 tokens and 32 heads."""


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
    """How many ids are tokens. Some models have logits for more."""
    stop_ids: frozenset[int]
    layers: int
    token_bytes: Counter[torch.device]
    """What one token of one row takes in the key/value cache, in bytes, on each device."""
    padding: cpu.Padding = field(default_factory=cpu.Padding)
    packed: bool = False
    """Its linear layers are PackedLinear, which leave out the padding."""
    steady: bool = False
    """It is packed, and the processor gives a row the same bits in any company."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part of getting ready took: here `load` and `pack`."""

    @classmethod
    def load(cls, settings: Settings) -> "Model":
        """Bring the weights if they are missing, load them, and say so. Raises UserError."""
        found = hub.ensure(settings)
        # OpenMP keeps a pool of threads for each thread that ever computed. The pool that loads would stay beside the
        # engine's, and with more threads than processors all sleep, instead of spinning, between two operations.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(cls._load, found, settings).result()

    @classmethod
    def _load(cls, found: checkpoint.Weights, settings: Settings) -> "Model":
        threads = use_physical_cores()
        dtype = getattr(torch, settings.dtype) if settings.dtype else best_dtype()
        start = time.perf_counter()
        model = cls.read(found.folder, dtype)
        model.seconds["load"] = time.perf_counter() - start
        where = ", ".join(sorted({str(device) for device in model.token_bytes}))
        cores = f" con {threads} hilos" if model.device.type == "cpu" else ""
        print(f"Modelo: {found.origin}, {_parameters(model.network)} en {str(dtype).removeprefix('torch.')}")
        if not found.verified:
            print(f"Sin verificar: {checkpoint.shown(found.folder)} no tiene manifest.json")
        print(f"Cargado en {where}{cores} en {decimal(model.seconds['load'])} s")
        if model.device.type == "cuda":
            gpu.use_steady_kernels()
        if model.spread:
            print("El modelo está repartido entre varios dispositivos: cada paso va sin grafos CUDA, más despacio")
        elif model.device.type == "cpu" and dtype == torch.bfloat16 and cpu.computes_in_bfloat16():
            start = time.perf_counter()
            model.pack()
            model.seconds["pack"] = time.perf_counter() - start
            print(f"Pesos ordenados para el procesador en {decimal(model.seconds['pack'])} s")
            if not model.steady:
                print("En este procesador un texto puede cambiar según qué otras preguntas haya a la vez")
        return model

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype) -> "Model":
        """Read a folder onto the devices that accelerate chooses. Raises UserError if it is no language model."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            network = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, device_map="auto", trust_remote_code=False, local_files_only=True
            ).eval()
        except UnpicklingError as error:
            raise UserError(
                f"Los .bin de {checkpoint.shown(folder)} no llevan solo pesos: pueden llevar código, así que no se "
                "abren; use un modelo con safetensors"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"transformers no puede cargar {checkpoint.shown(folder)}: mueva o borre esa carpeta, o cambie "
                f"MODEL_ID ({reason})"
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"El tokenizador {type(tokenizer).__name__} no se admite: elija un modelo que traiga tokenizer.json"
            )
        devices = {torch.device(d if d != "disk" else "cpu") for d in getattr(network, "hf_device_map", {}).values()}
        gpus = sorted((d for d in devices if d.type != "cpu"), key=str)
        cached = _probe(network)
        return cls(
            network=network,
            tokenizer=tokenizer,
            device=gpus[0] if gpus else torch.device(network.device),
            spread=len(devices) > 1,
            context=_context(network, tokenizer, cached),
            vocabulary=min(max(tokenizer.get_vocab().values()) + 1, network.get_output_embeddings().weight.shape[0]),
            stop_ids=_stop_ids(network, tokenizer),
            layers=len(cached),
            token_bytes=_token_bytes(cached),
        )

    def pack(self) -> None:
        """Lay a bfloat16 model on the CPU out as the processor reads it fastest, in place."""
        cpu.use_own_attention(self.network, self.padding)
        self.steady = cpu.pack(self.network, self.padding) and cpu.fill_tiles(self.padding, *self._heads)
        self.packed = True

    def keeps_bits(self, threads: int) -> bool:
        """Whether so many threads as there are now give the bits that `threads` give, as far as these are steady."""
        return not self.steady or cpu.keeps_bits(self.network, self.padding, *self._heads, threads)

    @property
    def _heads(self) -> tuple[int, int]:
        """How many heads attention has, and their size."""
        config = self.network.config.get_text_config()
        heads = config.num_attention_heads
        return heads, getattr(config, "head_dim", None) or config.hidden_size // heads

    def prefill_chunk(self) -> int:
        """How many tokens of prompts one pass may read."""
        if self.device.type != "cuda":
            return CPU_PREFILL_CHUNK
        return GPU_PREFILL_CHUNK if all(map(gpu.is_ampere, self._gpus)) else OLD_GPU_PREFILL_CHUNK

    def rows(self, most: int, chunk: int) -> int:
        """How many contexts the key/value cache can hold, `most` at the most, given the memory that is free now.

        chunk: the tokens that a prefill pass computes. Where not one context fits, it is shortened to what does.
        Raises UserError where that is next to nothing.
        """
        free = {device: int(psutil.virtual_memory().available * CPU_SHARE) for device in self.token_bytes}
        if self._gpus:
            kept = gpu.reserve(self.network, chunk, most, self.context, fused=all(map(gpu.is_ampere, self._gpus)))
            print(
                f"De cada GPU se apartan {_mega(kept.prefill)} para leer preguntas, {_mega(kept.graphs)} para los "
                f"grafos y {_mega(kept.workspaces)} para las bibliotecas"
            )
            free |= {d: max(0, int(torch.cuda.mem_get_info(d)[0] * GPU_SHARE) - kept.total) for d in self._gpus}
        if rows := rows_that_fit(self.token_bytes, free, self.context, most):
            return rows
        fits = min(free[device] // size for device, size in self.token_bytes.items()) // 256 * 256
        if not fits:
            raise UserError("No queda memoria para el contexto: cierre otros programas o use un modelo más pequeño")
        print(f"La memoria libre no alcanza para un contexto de {self.context} tokens: se usan {fits}")
        self.context = fits
        return 1

    @property
    def _gpus(self) -> list[torch.device]:
        return [device for device in self.token_bytes if device.type == "cuda"]


def rows_that_fit(token_bytes: Counter[torch.device], free: dict[torch.device, int], context: int, most: int) -> int:
    """How many contexts fit on every device, `most` at the most.

    token_bytes: what one token of one row takes on each device; free: what the cache may take there, both in bytes.
    """
    return min(most, *(free[device] // (size * context) for device, size in token_bytes.items()))


def best_dtype() -> torch.dtype:
    """bfloat16 where the processor computes in it, else float16 on a GPU and float32 on a CPU."""
    if torch.cuda.is_available():
        # a spread model computes in one dtype, so every GPU has to know it
        every = all(gpu.is_ampere(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))
        return torch.bfloat16 if every else torch.float16
    return torch.bfloat16 if torch.backends.mps.is_available() or cpu.computes_in_bfloat16() else torch.float32


def _mega(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _parameters(network: PreTrainedModel) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:,.0f} millones de parámetros".replace(",", ".")


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


def _context(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, layers: list[DynamicLayer]) -> int:
    config = network.config.get_text_config()
    # the model's own number first: falcon-rw-1b's tokenizer says half of what the model reads
    context = getattr(config, "max_position_embeddings", None) or min(tokenizer.model_max_length, 2048)
    # up to its window's length, sliding-window attention is full attention
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if not windows or min(windows) >= context:
        return context
    print(f"La atención del modelo ve una ventana de {min(windows)} tokens: el contexto acaba ahí y no en {context}")
    return min(windows)


def _stop_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The ids that end a text: those that the tokenizer and the generation config name, if they are control tokens.

    falcon-rw-1b's configs name 2, which is "#" in its tokenizer.
    """
    configured = network.generation_config.eos_token_id if network.generation_config else None
    named = configured if isinstance(configured, list) else [configured]
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return frozenset(id for id in [tokenizer.eos_token_id, *named] if id in control)
