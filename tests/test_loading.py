"""A checkpoint is loaded with all of its weights, or refused in one line that says what it is and what to do."""

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
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "llama"
    config = LlamaConfig(**TINY, max_position_embeddings=512, tie_word_embeddings=False)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    bpe = ByteLevelBPETokenizer(letters | {"<end>": 256, "un": 257}, [("u", "n")])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def llama(whole: Path, tmp_path: Path) -> Path:
    """A small Llama, in a folder of the user's own."""
    return shutil.copytree(whole, tmp_path / "Mine")


def settings(folder: Path, dtype: str = "float32") -> Settings:
    return Settings(folder.name, None, folder.parent, None, dtype)


def loaded(settings: Settings) -> Model:
    return Model.load(hub.ensure(settings, print), settings, print)


def refused(folder: Path, dtype: str = "float32") -> str:
    """The line with which the server's setup refuses a folder of the user's own."""
    with pytest.raises(UserError) as error:
        loaded(settings(folder, dtype))
    line = str(error.value)
    assert "\n" not in line and folder.name in line
    return line


def edit(folder: Path, change: Callable[[State], State]) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def under(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def beside(**more: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in more.items()}


# Weights


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("lm_head.weight"), "le faltan pesos de LlamaForCausalLM, lm_head.weight:"),
        (without("model.norm.weight", "lm_head.weight"), "LlamaForCausalLM, model.norm.weight y 1 más:"),
        (
            under("base_model.model."),
            "LlamaForCausalLM, model.embed_tokens.weight y 20 más, y sobra base_model.model.lm_head.weight:",
        ),
        (lambda state: {}, "model.embed_tokens.weight y 20 más:"),
        (beside(model__norm__weight=torch.ones(7)), "model.norm.weight mide [7] y no [32]"),
        # the layer would compute something else without them
        (
            beside(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
            "no tiene model.layers.0.self_attn.q_proj.bias",
        ),
        (
            beside(model__layers__1__mlp__up_proj__weight_scale=torch.ones(1)),
            "no tiene model.layers.1.mlp.up_proj.weight_s",
        ),
        (beside(lm_head__lora_A__weight=torch.ones(2, 32)), "no tiene lm_head.lora_A.weight"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(llama: Path, change: Callable[[State], State], says: str) -> None:
    edit(llama, change)
    assert says in refused(llama)


def test_a_tied_weight_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.falcon(tmp_path / "mine", width=32)
    edit(folder, without("transformer.word_embeddings.weight"))
    assert "le faltan pesos de FalconForCausalLM, transformer.word_embeddings.weight" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name.removeprefix("model."): tensor for name, tensor in state.items()},
        beside(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
        beside(mtp__fc__weight=torch.ones(4, 4), model__layers__2__mlp__up_proj__weight=torch.ones(4, 4)),
    ],
)
def test_weights_under_the_base_models_names_or_of_parts_that_are_not_used_load(
    llama: Path, change: Callable[[State], State]
) -> None:
    expected = load_file(llama / "model.safetensors")
    edit(llama, change)
    loaded = Model.read(llama, torch.bfloat16).network.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_tied_weights_load_from_one_or_from_two(tmp_path: Path) -> None:
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
    assert loaded(settings(llama)).context == 512


INDEX = "model.safetensors.index.json"


def shard_gone(folder: Path) -> None:
    sharded(folder)
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def shard_unnamed(folder: Path) -> None:
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


def no_index(folder: Path) -> None:
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
    ("damage", "says"),
    [
        (shard_gone, r"^Falta .*Mine/model-00002-of-\d+\.safetensors, una parte de los pesos"),
        (shard_unnamed, "le faltan pesos de LlamaForCausalLM, model.norm.weight:"),
        (index_of("{"), f"Mine/{INDEX} no se entiende"),
        (index_of("[]"), f"Mine/{INDEX} no se entiende"),
        (index_of('{"weight_map": {}}'), "^Falta .*, una parte de los pesos"),
        (index_of('{"weight_map": {"lm_head.weight": 5}}'), f"Mine/{INDEX} no se entiende"),
        (no_index, "Mine no es un modelo, le falta config.json o los pesos"),
        (adapter, "Mine es un adaptador .LoRA. sin su modelo base: únalos"),
        (adapter_alone, "Mine es un adaptador .LoRA. sin su modelo base: únalos"),
        (gguf_alone, "Mine no tiene pesos que se puedan usar, solo GGUF"),
        (empty, "Mine no es un modelo, le falta config.json o los pesos"),
        (other_weights, "Mine no es un modelo, le falta config.json o los pesos"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_named(llama: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(llama)
    assert re.search(says, refused(llama))


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
def test_quantized_weights_are_named(llama: Path, changes: dict[str, Any], method: str) -> None:
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert f"Mine está cuantizado ({method}), y aquí los pesos van en 16 o 32 bits: elija" in refused(llama)


def test_quantized_weights_of_old_tools_are_named(llama: Path) -> None:
    (llama / "quantize_config.json").write_text('{"bits": 4}')
    assert "Mine está cuantizado (gptq)" in refused(llama)


def test_a_config_that_says_that_nothing_is_quantized_is_taken(llama: Path) -> None:
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    assert loaded(settings(llama)).context == 512


@pytest.mark.parametrize(
    ("network", "says"),
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
def test_models_that_are_not_causal_are_refused(network: PreTrainedModel, says: str, llama: Path) -> None:
    network.save_pretrained(llama)
    with pytest.raises(UserError) as error:
        loaded(settings(llama))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Loading it requires `pip install something`.\nAnd more."),
        AssertionError(),
        AttributeError("no attribute"),
        TypeError("takes 1 argument"),
        NotImplementedError(),
        IndexError(),
        ZeroDivisionError("division by zero"),
    ],
)
@pytest.mark.parametrize("call", ["from_pretrained", "forward"])
def test_whatever_transformers_raises_is_one_line(
    llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, call: str
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, call, raising(error))
    line = refused(llama)
    first = str(error).partition("\n")[0] or type(error).__name__
    assert line.startswith("transformers no puede cargar") and line.endswith(f"({first})")


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# Tokenizers


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "Mine no trae ningún tokenizador que se admita: hace falta tokenizer.json"),
        (["tokenizer.model"], "Mine no trae ningún tokenizador que se admita (solo tokenizer.model): hace falta"),
        (["spiece.model", "tokenizer_config.json"], "que se admita (solo spiece.model): hace falta tokenizer.json"),
        (["vocab.json"], "Mine no trae ningún tokenizador que se admita: hace falta tokenizer.json"),
    ],
)
def test_a_folder_without_a_fast_tokenizer_is_refused(llama: Path, names: list[str], says: str) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()
    for name in names:
        (llama / name).write_text("{}")
    assert says in refused(llama)
    # script/weights and script/push see it too
    with pytest.raises(UserError, match=re.escape(says)):
        hub.ensure(settings(llama), print)


def test_a_tokenizer_of_two_files_is_taken(llama: Path) -> None:
    tokenizer = json.loads((llama / "tokenizer.json").read_text())["model"]
    for path in llama.glob("tokenizer*"):
        path.unlink()
    (llama / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (llama / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in tokenizer["merges"]))
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>"}')
    model = loaded(settings(llama))
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
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_without_memory_the_reason_is_said(llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    graphics = "CUDA" in str(error)
    says = "no cabe en la memoria libre de la GPU: cierre" if graphics else "^Falta memoria para cargar .*Mine: cierre"
    for target, name in ((AutoModelForCausalLM, "from_pretrained"), (LlamaForCausalLM, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, raising(error))
            assert re.search(says, refused(llama))
    with monkeypatch.context() as patch:
        patch.setattr(linear, "layout", lambda chosen: linear.BFloat16Linear)
        patch.setattr(linear, "pack", raising(error))
        assert re.search(says, refused(llama, "bfloat16"))


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


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that macOS does not keep")
def test_a_process_with_too_little_memory_says_so(llama: Path) -> None:
    """Neither for the thread that loads, nor for the file of weights, nor for its numbers in float32."""
    config = LlamaConfig(**TINY | {"hidden_size": 512, "intermediate_size": 8192})
    LlamaForCausalLM(config).bfloat16().save_pretrained(llama)
    limits = [10**6, 2 * 10**7, 8 * 10**7]
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

    def chosen(*now: int) -> str | torch.device:
        free[:] = now
        return loading.device_map(config, torch.bfloat16)

    room = int(size / gpu.WEIGHTS_SHARE) + 1000
    # two that are alike, one that another program fills, and one that is larger
    assert chosen(room, room) == torch.device("cuda", 0)
    assert chosen(100, room) == torch.device("cuda", 1)
    assert chosen(room, room, 2 * room) == torch.device("cuda", 2)
    # too small, each for itself
    assert chosen(size, size) == "auto"
    # accelerate keeps a part of the only one free
    assert chosen(room) == "auto"
    assert chosen() == "auto"
