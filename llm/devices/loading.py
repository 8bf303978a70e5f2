"""A checkpoint's folder to a tokenizer and a network on its devices: all of its weights, or one line on why not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llm.devices import gpu
from llm.devices.memory import is_out_of_memory
from llm.errors import UserError
from llm.weights import formats
from llm.weights.checkpoint import shown
from llm.words import first_line, one_line


def load(
    folder: Path, dtype: torch.dtype | None, before: Callable[[PreTrainedModel], None] | None = None
) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Load a causal language model onto one GPU, or onto the devices that accelerate chooses.

    dtype: None for the checkpoint's own, unless a table that the model computes for itself would lose precision.
    before: called with the network on the meta device, before its weights are read.
    Raises UserError where a part of the model is missing, and all that transformers raises: see `explained`.
    """
    formats.check_folder(shown(folder), folder)
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **local)
    # of some models with an encoder, as BART, transformers would load the decoder alone
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{shown(folder)} es de tipo {config.model_type}, y no un modelo causal: cambie MODEL_ID")
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"El tokenizador {type(tokenizer).__name__} no se admite: elija un modelo que traiga tokenizer.json"
        )

    def network_in(dtype: torch.dtype) -> PreTrainedModel:
        # mismatched sizes do not raise here, so that _check_weights names one
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map(config, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **local,
        )
        network: PreTrainedModel = loaded[0].eval()
        _check_weights(folder, network, report=loaded[1])
        return network

    if before and dtype:
        before(_without_weights(config, dtype))
    network = network_in(dtype or stored_dtype(folder))
    if dtype is None and not all(buffer.dtype == torch.float32 for buffer in _made_when_loaded(network)):
        network = network_in(torch.float32)
    return tokenizer, network


def stored_dtype(folder: Path) -> torch.dtype:
    """What all of a checkpoint's weights are stored in; float32 where they differ, or are not in safetensors."""
    names = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as weights:
            names |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    if names == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if names == {"F16"} else torch.float32


def _made_when_loaded(network: PreTrainedModel) -> list[Tensor]:
    """The floating-point buffers that no checkpoint stores, such as tables of positions."""
    stored = network.state_dict()
    return [b for name, b in network.named_buffers() if name not in stored and b.is_floating_point()]


def device_map(config: PreTrainedConfig, dtype: torch.dtype) -> str | torch.device:
    """The GPU that holds the whole model; "auto", accelerate's choice, where there are not several or none does.

    Left to accelerate, a model that fits on one GPU is split over all: without CUDA graphs, several times as slow.
    """
    if torch.cuda.device_count() < 2:
        return "auto"
    return gpu.roomiest(gpu.size(_without_weights(config, dtype))) or "auto"


def _without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return network


def _check_weights(folder: Path, network: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse a network with weights that the checkpoint does not have, which transformers draws at random.

    report: transformers' `output_loading_info`, where tied weights are not missing. Raises UserError.
    """
    name, kind, way_out = shown(folder), type(network).__name__, "cópielo otra vez, entero, o cambie MODEL_ID"
    unexpected = sorted(report["unexpected_keys"])
    if missing := [key for key in network.state_dict() if key in report["missing_keys"]]:
        more = f" y {len(missing) - 1} más" if len(missing) > 1 else ""
        instead = f", y sobra {unexpected[0]}" if unexpected else ""
        raise UserError(one_line(f"A {name} le faltan pesos de {kind}, {missing[0]}{more}{instead}: {way_out}"))
    for key, there, expected in sorted(report["mismatched_keys"]):
        raise UserError(
            one_line(f"Los pesos de {name} no son los de su config.json, {key} mide {[*there]} y no {[*expected]}: ")
            + way_out
        )
    # Other unexpected weights are of parts that nobody computes here. Those of a layer, a bias or a scale, change what
    # the layer computes.
    layers = {name for name, module in network.named_modules() if not any(module.children()) and module._parameters}
    for key in unexpected:
        parts = key.split(".")
        if any(".".join(parts[:end]) in layers for end in range(1, len(parts))):
            raise UserError(
                one_line(f"Los pesos de {name} no son los de su config.json, {kind} no tiene {key}: ") + way_out
            )


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn whatever transformers raises for a checkpoint that it cannot load or run into one line, a UserError."""
    with memory(folder):
        try:
            yield
        except UserError:
            raise
        except UnpicklingError as error:
            raise UserError(
                f"Los .bin de {shown(folder)} no llevan solo pesos: pueden llevar código, así que no se abren; use un "
                "modelo con safetensors"
            ) from error
        except Exception as error:  # a stranger's checkpoint may break any line of transformers
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"transformers no puede cargar {shown(folder)}: mueva o borre esa carpeta, o cambie MODEL_ID "
                f"({one_line(first_line(error))})"
            ) from error


@contextmanager
def memory(folder: Path) -> Iterator[None]:
    """Turn whatever says that memory ran out while the folder's model loads into one line, a UserError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise UserError(
                f"{shown(folder)} no cabe en la memoria libre de la GPU: cierre otros programas que la usen, elija "
                "una con más memoria o un modelo más pequeño"
            ) from error
        raise UserError(
            f"Falta memoria para cargar {shown(folder)}: cierre otros programas o elija un modelo más pequeño"
        ) from error
