"""A checkpoint is loaded with all of its weights, or refused in one line with the reason and the remedy."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from llm.devices import gpu, linear, loading
from llm.devices.model import Model
from llm.errors import UserError
from llm.weights import hub
from llm.weights.settings import ROOT, Settings
from tests.support import checkpoints

pytestmark = pytest.mark.slow

State = dict[str, Tensor]


TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved_llama") / "llama"
    config = LlamaConfig(**TINY, max_position_embeddings=512, tie_word_embeddings=False)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    bpe = ByteLevelBPETokenizer(letters | {"<end>": 256, "un": 257}, [("u", "n")])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def llama(saved_llama: Path, tmp_path: Path) -> Path:
    """A small Llama, in a folder of the user's own."""
    return shutil.copytree(saved_llama, tmp_path / "Mine")


def settings(folder: Path, dtype: str = "float32") -> Settings:
    return Settings(folder.name, None, folder.parent, None, dtype)


def load(settings: Settings) -> Model:
    return Model.load(hub.ensure(settings, print), settings, print)


def refusal(folder: Path, dtype: str = "float32") -> str:
    """The line with which setup refuses the user's own folder."""
    with pytest.raises(UserError) as error:
        load(settings(folder, dtype))
    line = str(error.value)
    assert "\n" not in line and folder.name in line
    return line


def edit(folder: Path, change: Callable[[State], State]) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def with_prefix(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def with_tensors(**more: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in more.items()}


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.weight"), "le faltan pesos de LlamaForCausalLM, lm_head.weight:"),
        (without("model.norm.weight", "lm_head.weight"), "LlamaForCausalLM, model.norm.weight y 1 más:"),
        (
            with_prefix("base_model.model."),
            "LlamaForCausalLM, model.embed_tokens.weight y 20 más, y sobra base_model.model.lm_head.weight:",
        ),
        (lambda state: {}, "model.embed_tokens.weight y 20 más:"),
        (with_tensors(model__norm__weight=torch.ones(7)), "model.norm.weight mide [7] y no [32]"),
        # without these tensors the layer would compute something else
        (
            with_tensors(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
            "no tiene model.layers.0.self_attn.q_proj.bias",
        ),
        (
            with_tensors(model__layers__1__mlp__up_proj__weight_scale=torch.ones(1)),
            "no tiene model.layers.1.mlp.up_proj.weight_s",
        ),
        (with_tensors(lm_head__lora_A__weight=torch.ones(2, 32)), "no tiene lm_head.lora_A.weight"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    llama: Path, change: Callable[[State], State], message: str
) -> None:
    edit(llama, change)
    assert message in refusal(llama)


def test_a_missing_tied_weight_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.falcon(tmp_path / "mine", width=32)
    edit(folder, without("transformer.word_embeddings.weight"))
    assert "le faltan pesos de FalconForCausalLM, transformer.word_embeddings.weight" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name.removeprefix("model."): tensor for name, tensor in state.items()},
        with_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        with_tensors(mtp__fc__weight=torch.ones(4, 4), model__layers__2__mlp__up_proj__weight=torch.ones(4, 4)),
    ],
)
def test_weights_with_base_model_names_or_of_unused_parts_load(llama: Path, change: Callable[[State], State]) -> None:
    expected = load_file(llama / "model.safetensors")
    edit(llama, change)
    weights = Model.read(llama, torch.bfloat16).network.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_tied_weights_load_from_one_tensor_or_two(tmp_path: Path) -> None:
    for twice in (False, True):
        folder = checkpoints.falcon(tmp_path / str(twice), width=32, format="bin", tied_twice=twice)
        network = Model.read(folder, torch.float32).network
        assert network.get_output_embeddings().weight is network.get_input_embeddings().weight


def sharded(folder: Path) -> None:
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="20KB")


def test_shards_load(llama: Path) -> None:
    sharded(llama)
    assert len(list(llama.glob("model-*.safetensors"))) > 1
    assert load(settings(llama)).context == 512


INDEX = "model.safetensors.index.json"


def missing_shard(folder: Path) -> None:
    sharded(folder)
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def missing_tensor(folder: Path) -> None:
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    weights = {name: load_file(path) for path in folder.glob("model-*") for name in [path.name]}
    (name,) = (name for name, state in weights.items() if "model.norm.weight" in state)
    save_file(without("model.norm.weight")(weights[name]), folder / name, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


def index_of(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        sharded(folder)
        (folder / INDEX).write_text(text)

    return damage


def missing_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).unlink()


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "alguien/base"}')


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()


def gguf_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_K_M.gguf")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def other_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, r"^Falta .*Mine/model-00002-of-\d+\.safetensors, una parte de los pesos"),
        (missing_tensor, "le faltan pesos de LlamaForCausalLM, model.norm.weight:"),
        (index_of("{"), f"Mine/{INDEX} no se entiende"),
        (index_of("[]"), f"Mine/{INDEX} no se entiende"),
        (index_of('{"weight_map": {}}'), "^Falta .*, una parte de los pesos"),
        (index_of('{"weight_map": {"lm_head.weight": 5}}'), f"Mine/{INDEX} no se entiende"),
        (missing_index, "Mine no es un modelo, le falta config.json o los pesos"),
        (adapter, "Mine es un adaptador .LoRA. sin su modelo base: únalos"),
        (adapter_alone, "Mine es un adaptador .LoRA. sin su modelo base: únalos"),
        (gguf_alone, "Mine no tiene pesos que se puedan usar, solo GGUF"),
        (empty, "Mine no es un modelo, le falta config.json o los pesos"),
        (other_weights, "Mine no es un modelo, le falta config.json o los pesos"),
    ],
)
def test_an_incomplete_model_is_refused_with_the_reason(
    llama: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(llama)
    assert re.search(message, refusal(llama))


# Kinds of models


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "int4_weight_only"}}, "torchao"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "compressed-tensors",
        ),
        ({"compression_config": {"format": "int-quantized"}}, "int-quantized"),
        ({"quantization_config": {"quant_method": "de-mañana"}}, "de-mañana"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
    ],
)
def test_quantized_weights_are_refused(llama: Path, changes: dict[str, Any], method: str) -> None:
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert f"Mine está cuantizado ({method}), y aquí los pesos van en 16 o 32 bits: elija" in refusal(llama)


def test_weights_with_a_quantize_config_are_refused(llama: Path) -> None:
    (llama / "quantize_config.json").write_text('{"bits": 4}')
    assert "Mine está cuantizado (gptq)" in refusal(llama)


def test_a_config_without_quantization_loads(llama: Path) -> None:
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    assert load(settings(llama)).context == 512


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_ff=16, num_layers=1)),
            "es de tipo t5, y no",
        ),
        (
            BartForConditionalGeneration(
                BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
            ),
            "es de tipo bart, y no un modelo causal",
        ),
        (BertForMaskedLM(BertConfig(**TINY)), "BertLMHeadModel no guarda claves y valores"),
        (ViTForImageClassification(ViTConfig(**TINY, image_size=16)), "es de tipo vit, y no un modelo causal"),
    ],
)
def test_models_that_are_not_causal_are_refused(network: PreTrainedModel, message: str, llama: Path) -> None:
    network.save_pretrained(llama)
    with pytest.raises(UserError) as error:
        load(settings(llama))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Loading it requires `pip install something`.\nAnd more."),
        AssertionError(),
        TypeError("takes 1 argument"),
    ],
)
@pytest.mark.parametrize("call", ["from_pretrained", "forward"])
def test_whatever_transformers_raises_is_one_line(
    llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, call: str
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, call, raising(error))
    line = refusal(llama)
    first = str(error).partition("\n")[0] or type(error).__name__
    assert line.startswith("transformers no puede cargar") and line.endswith(f"({first})")


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# Tokenizers


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "Mine no trae ningún tokenizador que se admita: hace falta tokenizer.json"),
        (["tokenizer.model"], "Mine no trae ningún tokenizador que se admita (solo tokenizer.model): hace falta"),
        (["spiece.model", "tokenizer_config.json"], "que se admita (solo spiece.model): hace falta tokenizer.json"),
        (["vocab.json"], "Mine no trae ningún tokenizador que se admita: hace falta tokenizer.json"),
    ],
)
def test_a_folder_without_a_fast_tokenizer_is_refused(llama: Path, names: list[str], message: str) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()
    for name in names:
        (llama / name).write_text("{}")
    assert message in refusal(llama)
    # script/weights and script/push refuse it too
    with pytest.raises(UserError, match=re.escape(message)):
        hub.ensure(settings(llama), print)


def test_a_tokenizer_of_two_files_loads(llama: Path) -> None:
    tokenizer = json.loads((llama / "tokenizer.json").read_text())["model"]
    for path in llama.glob("tokenizer*"):
        path.unlink()
    (llama / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (llama / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in tokenizer["merges"]))
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>"}')
    model = load(settings(llama))
    assert model.tokenizer.decode(model.tokenizer("una prueba")["input_ids"]) == "una prueba"


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        SystemError("error return without exception set"),
        SystemError("<function from_pretrained at 0x7f1be24ff240> returned NULL without setting an exception"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_a_lack_of_memory_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    on_gpu = "CUDA" in str(error)
    message = "no cabe en la memoria libre de la GPU: cierre" if on_gpu else "^Falta memoria para cargar .*Mine: cierre"
    for target, name in ((AutoModelForCausalLM, "from_pretrained"), (LlamaForCausalLM, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, raising(error))
            assert re.search(message, refusal(llama))
    with monkeypatch.context() as patch:
        patch.setattr(linear, "layout", lambda chosen: linear.BFloat16Linear)
        patch.setattr(linear, "pack", raising(error))
        assert re.search(message, refusal(llama, "bfloat16"))


LOADING = """
import resource, sys
from pathlib import Path
import psutil
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from llm.devices.model import Model
from llm.errors import UserError
from llm.weights import hub
from llm.weights.settings import Settings
folder = Path(sys.argv[1])
settings = Settings(folder.name, None, folder.parent, None, "float32")
for more in sys.argv[2:]:
    limit = psutil.Process().memory_info().vms + int(more)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        Model.load(hub.ensure(settings, print), settings, print)
    except UserError as error:
        print(error, type(error.__cause__).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce this limit")
def test_a_process_with_too_little_memory_ends_in_one_line(llama: Path) -> None:
    """Too little for the loading thread, or for the file of weights, which safetensors maps and then torch."""
    config = LlamaConfig(**TINY | {"hidden_size": 512, "intermediate_size": 16384})
    LlamaForCausalLM(config).bfloat16().save_pretrained(llama)
    # far from a megabyte more or less, where Python cannot always say that memory ran out
    limits = [10**6, 7 * 10**7, 19 * 10**7]
    command = [sys.executable, "-c", LOADING, str(llama), *map(str, limits)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = f"Falta memoria para cargar {llama}: cierre otros programas o elija un modelo más pequeño"
    assert [text.startswith(line) for text in run.stdout.splitlines()] == [True] * len(limits), run.stdout + run.stderr


# Devices


def test_one_gpu_takes_the_whole_model_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**TINY, tie_word_embeddings=False)
    size = sum(tensor.nbytes for tensor in LlamaForCausalLM(config).bfloat16().state_dict().values())
    free: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 10**12))

    def device_map(*bytes_free: int) -> str | torch.device:
        free[:] = bytes_free
        return loading.device_map(config, torch.bfloat16)

    enough = int(size / gpu.WEIGHTS_SHARE) + 1000
    # two equal GPUs, one that another program fills, and a larger one
    assert device_map(enough, enough) == torch.device("cuda", 0)
    assert device_map(100, enough) == torch.device("cuda", 1)
    assert device_map(enough, enough, 2 * enough) == torch.device("cuda", 2)
    # each too small alone
    assert device_map(size, size) == "auto"
    # accelerate leaves a part of a single GPU free
    assert device_map(enough) == "auto"
    assert device_map() == "auto"
