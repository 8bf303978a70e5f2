"""What the engine needs to know is read from the model; a model that it cannot serve is refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from llm.devices import memory
from llm.devices import model as model_module
from llm.devices.model import Model, Room, rows_that_fit
from llm.errors import UserError
from tests.support import checkpoints

pytestmark = pytest.mark.slow

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def save(folder: Path, network: PreTrainedModel) -> Path:
    network.save_pretrained(folder)
    checkpoints.tokenizer().save_pretrained(folder)
    return folder


def test_falcons_context_is_its_own_and_not_its_tokenizers(falcon: Path) -> None:
    model = Model.read(falcon, torch.float32)
    assert model.tokenizer.model_max_length == 1024
    assert model.context == 2048
    assert model.vocabulary == checkpoints.TOKENS


def test_ids_without_an_embedding_are_not_in_the_vocabulary(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama")
    tokenizer = checkpoints.tokenizer()
    tokenizer.add_tokens(["zapatófono"])
    tokenizer.save_pretrained(folder)
    assert Model.read(folder, torch.float32).vocabulary == checkpoints.TOKENS


def test_a_cached_token_takes_the_bytes_of_its_keys_and_values(falcon: Path, tmp_path: Path) -> None:
    # 2 layers, keys and values, 128 wide; half of the Llama's heads have keys
    assert Model.read(falcon, torch.bfloat16).token_bytes == Counter({CPU: 2 * 2 * 128 * 2})
    llama = checkpoints.llama(tmp_path / "llama")
    assert Model.read(llama, torch.float32).token_bytes == Counter({CPU: 2 * 2 * 64 * 4})


def test_stop_ids_are_the_named_ids_that_are_control_tokens(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama")
    end = checkpoints.TOKENS - 1
    generation = json.loads((folder / "generation_config.json").read_text())
    # id 2, "#", is no control token, and 60000 no token at all
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, 60000, end]}))
    assert Model.read(folder, torch.float32).stop_ids == {end}


def test_falcons_stop_id_is_its_tokenizers_and_not_the_2_of_its_config(falcon: Path) -> None:
    model = Model.read(falcon, torch.float32)
    assert model.stop_ids == {model.tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=checkpoints.TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2)
    folder = save(tmp_path / "mamba", MambaForCausalLM(config))
    with pytest.raises(UserError, match=r"^MambaForCausalLM no guarda claves y valores .*: use un modelo de atención"):
        Model.read(folder, torch.float32)


def test_a_tokenizer_written_in_python_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.json").write_text('{"<unk>": 0, "a": 1}')
    (folder / "merges.txt").write_text("#version\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    with pytest.raises(UserError, match=r"^El tokenizador CTRLTokenizer no se admite: .*tokenizer\.json$"):
        Model.read(folder, torch.float32)


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


class Code:
    """Pickled, code that runs when the pickle is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('the code of the .bin ran')",)


def code_in_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.ln_f.weight": Code()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "transformers no puede cargar"),
        (code_in_weights, "Los .bin de"),
    ],
)
def test_a_users_folder_that_cannot_be_loaded_is_named(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = checkpoints.falcon(tmp_path / "mine")
    damage(folder)
    with pytest.raises(UserError, match=rf"{message} .*mine") as error:
        Model.read(folder, torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("free", "rows"), [({CPU: 10**9, GPU: 10**9}, 5), ({CPU: 10**9, GPU: 399_999}, 1), ({CPU: 99_999, GPU: 10**9}, 0)]
)
def test_rows_fit_on_every_device(free: dict[torch.device, int], rows: int) -> None:
    assert rows_that_fit(Counter({CPU: 100, GPU: 300}), free, context=1000, most=5) == rows


def test_a_context_that_does_not_fit_is_shortened(
    falcon: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model.read(falcon, torch.float32)
    token = model.token_bytes[CPU]
    free = SimpleNamespace(available=token * 900 / model_module.CPU_SHARE)
    monkeypatch.setattr(memory, "available", lambda: free.available)
    assert model.room(32, chunk=256, say=print) == Room(1, 768, spare=0)
    assert "contexto de 2048 tokens: se usan 768" in capsys.readouterr().out
    free.available = token * 200 / model_module.CPU_SHARE
    with pytest.raises(UserError, match="No queda memoria para el contexto"):
        model.room(32, chunk=256)


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        # all fit
        (32 * 131_072, 32, (32, 131_072)),
        (4 * 131_072, 32, (4, 131_072)),
        # four do not: the context shrinks by 256 tokens at a time
        (3 * 131_072, 32, (4, 98_304)),
        (131_072, 32, (4, 32_768)),
        (50_000, 32, (4, 12_288)),
        (4 * 2048, 32, (4, 2048)),
        # no more rows than asked for
        (131_072, 2, (2, 65_536)),
        # four would have less than 2,048
        (4 * 2048 - 1, 32, (1, 7936)),
    ],
)
def test_a_long_context_is_shortened_until_four_rows_fit(
    falcon: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokens: int,
    most: int,
    expected: tuple[int, int],
) -> None:
    model = Model.read(falcon, torch.float32)
    model.context = 131_072
    free = SimpleNamespace(available=tokens * model.token_bytes[CPU] / model_module.CPU_SHARE)
    monkeypatch.setattr(memory, "available", lambda: free.available)
    assert model.room(most, chunk=256, say=print) == Room(*expected, spare=0)
    lines = capsys.readouterr().out.splitlines()
    assert [f"se usan {expected[1]}" in line for line in lines] == [True] * (expected[1] < 131_072)


def test_a_context_that_the_user_chose_is_not_shortened_for_more_rows(
    falcon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Model.read(falcon, torch.float32, max_context=100_000).context == 2048
    model = Model.read(falcon, torch.float32, max_context=300)
    assert model.context == 300
    model.context = 100_000
    free = SimpleNamespace(available=150_000 * model.token_bytes[CPU] / model_module.CPU_SHARE)
    monkeypatch.setattr(memory, "available", lambda: free.available)
    assert model.room(32, chunk=256) == Room(1, 100_000, spare=0)
