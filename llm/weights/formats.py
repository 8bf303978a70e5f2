"""What a checkpoint is, told by the names of its files and its config.json, before anything large is read.

Knows names and JSON; imports neither torch nor transformers.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.words import one_line, reason

_SAFETENSORS, _SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# The files from which transformers makes a fast tokenizer without more packages: any one of these sets.
_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"vocab.txt"}, {"tekken.json"})

# transformers' own key, that of old compressed-tensors, and that of MLX
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
# the files that old versions of AutoGPTQ and AutoAWQ wrote instead
_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def hub_weights(names: Collection[str]) -> list[str]:
    """The files of a repository's weights and their index: safetensors before .bin, one file before shards, as
    transformers prefers them. Empty where there are none that this project reads."""
    for single, shard, index in (
        (_SAFETENSORS, r"model-\d{1,9}-of-\d{1,9}\.safetensors", [_SAFETENSORS_INDEX]),
        (_BIN, r"pytorch_model-\d{1,9}-of-\d{1,9}\.bin", []),
    ):
        if single in names:
            return [single]
        shards = sorted(name for name in names if re.fullmatch(shard, name, re.ASCII))
        if shards and all(name in names for name in index):
            return index + shards
    return []


def check_files(model: str, names: Collection[str], weights: Collection[str]) -> None:
    """Refuse a checkpoint whose files' names say that it cannot be served.

    model: what the user calls it; names: of its files; weights: those of them that transformers would load.
    Raises UserError. A missing config.json, and missing weights of no known kind, are left to the caller.
    """
    if not weights and "adapter_config.json" in names:
        raise UserError(
            f"{model} es un adaptador (LoRA) sin su modelo base: únalos con merge_and_unload, de la biblioteca peft, "
            "guarde el resultado y use ese, o elija otro MODEL_ID"
        )
    if not weights and any(name.endswith(".gguf") for name in names):
        raise UserError(
            f"{model} no tiene pesos que se puedan usar, solo GGUF, los de llama.cpp: elija el modelo original, con "
            "safetensors"
        )
    if not weights or "config.json" not in names:
        return
    if not any(files <= set(names) for files in _TOKENIZERS):
        sentencepiece = next((f" (solo {name})" for name in sorted(names) if name.endswith(".model")), "")
        raise UserError(
            f"{model} no trae ningún tokenizador que se admita{one_line(sentencepiece)}: hace falta tokenizer.json; "
            "elija un modelo que lo traiga"
        )
    for name, method in _QUANTIZATION_FILES.items():
        if name in names:
            raise _quantized(model, method)


def check_config(model: str, path: Path) -> None:
    """Refuse a config.json that says that the weights are quantized. One that cannot be read is left to transformers.

    model: what the user calls the checkpoint. Raises UserError.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    # a model with several parts has a config for each
    for part in (config, *config.values()) if isinstance(config, dict) else ():
        if not isinstance(part, dict):
            continue
        for key in _QUANTIZATION_KEYS:
            if isinstance(part.get(key), dict) and part[key]:
                raise _quantized(model, _method(part[key]))


def check_folder(model: str, folder: Path) -> None:
    """Refuse a folder that does not hold a whole checkpoint that can be served. Raises UserError, OSError."""
    names = {path.name for path in folder.iterdir()}
    weights = [name for name in (_SAFETENSORS, _SAFETENSORS_INDEX, _BIN, _BIN_INDEX) if name in names]
    check_files(model, names, weights)
    if "config.json" not in names or not weights:
        raise UserError(
            f"{model} no es un modelo, le falta config.json o los pesos ({_SAFETENSORS}, o sus partes con "
            f"{_SAFETENSORS_INDEX}): mueva o borre esa carpeta, o cambie MODEL_ID"
        )
    check_config(model, folder / "config.json")
    if weights[0].endswith(".index.json"):
        _check_shards(model, folder, weights[0])


def _check_shards(model: str, folder: Path, index: str) -> None:
    try:
        shards = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
        missing = next((shard for shard in shards if not (folder / shard).is_file()), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{model}/{index} no se entiende: cópielo otra vez, o cambie MODEL_ID") from error
    except OSError as error:
        raise UserError(f"No se puede leer {model}/{index}, {reason(error)}: corríjalo o cambie MODEL_ID") from error
    if missing or not shards:
        raise UserError(
            f"Falta {model}/{one_line(str(missing or '*.safetensors'))}, una parte de los pesos: cópiela, o cambie "
            "MODEL_ID"
        )


def _method(quantization: dict[str, Any]) -> str:
    for key in ("quant_method", "quantization_method", "format", "mode"):
        if isinstance(quantization.get(key), str):
            return one_line(quantization[key])
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return f"{quantization['bits']} bits" if isinstance(quantization.get("bits"), int) else "sin nombre"


def _quantized(model: str, method: str) -> UserError:
    return UserError(
        f"{model} está cuantizado ({method}), y aquí los pesos van en 16 o 32 bits: elija el modelo original, sin "
        "cuantizar"
    )
