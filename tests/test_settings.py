"""The settings in the environment and in .env, and which of them wins."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.errors import UserError
from llm.weights.settings import FALCON, FALCON_COMMIT, ROOT, Settings

NAMES = (
    "MODEL_ID",
    "MODEL_REVISION",
    "WEIGHTS_DIR",
    "HUGGINGFACE_HUB_TOKEN",
    "HF_TOKEN",
    "DTYPE",
    "MAX_CONTEXT",
    "SHARE_PREFIXES",
    "KERNELS",
    "BATCH_INVARIANT",
    "REPLICATE_API_TOKEN",
)


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_default_is_falcon_at_its_pinned_commit(tmp_path: Path) -> None:
    settings = Settings.read(tmp_path)
    assert settings == Settings(FALCON, FALCON_COMMIT, tmp_path / "weights", None, None)
    assert settings.folder == tmp_path / "weights" / "falcon-rw-1b"


def test_another_model_is_its_main_branch_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_ID", "HuggingFaceTB/SmolLM2-135M-Instruct")
    settings = Settings.read(tmp_path)
    assert settings.revision is None
    assert settings.folder.name == "smollm2-135m-instruct"


def test_the_env_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(
        "MODEL_ID=org/uno\nMODEL_REVISION='v1'\nWEIGHTS_DIR=otra/carpeta\nHF_TOKEN=hf_a${b}\nDTYPE=float32\n"
    )
    assert Settings.read(tmp_path) == Settings("org/uno", "v1", tmp_path / "otra/carpeta", "hf_a${b}", "float32")

    monkeypatch.setenv("MODEL_ID", "org/dos")
    monkeypatch.setenv("MODEL_REVISION", " ")
    monkeypatch.setenv("WEIGHTS_DIR", "/datos")
    monkeypatch.setenv("HUGGINGFACE_HUB_TOKEN", "hf_c")
    assert Settings.read(tmp_path) == Settings("org/dos", None, Path("/datos"), "hf_c", "float32")


@pytest.mark.parametrize(("value", "read"), [("1", False), ("True", False), ("0", True), ("", True)])
def test_the_env_file_can_be_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, read: bool
) -> None:
    (tmp_path / ".env").write_text("MODEL_ID=org/uno\n")
    monkeypatch.setenv("PYTHON_DOTENV_DISABLED", value)
    assert Settings.read(tmp_path).model_id == ("org/uno" if read else FALCON)


def test_an_env_file_saved_by_windows_is_read_if_in_utf_8(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("MODEL_ID=org/uno\r\n".encode("utf-8-sig"))
    assert Settings.read(tmp_path).model_id == "org/uno"

    (tmp_path / ".env").write_bytes("MODEL_ID=org/uno\r\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-8"):
        Settings.read(tmp_path)


@pytest.mark.parametrize("value", ['"hf_secreto', "'hf_secreto", '"hf_secreto"x'])
def test_a_line_that_cannot_be_read_is_named_without_its_text(
    tmp_path: Path, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".env").write_text(f"MODEL_ID=org/uno\n\n# comentario\n\nHF_TOKEN={value}\nDTYPE=float32\n")
    with pytest.raises(UserError) as error:
        Settings.read(tmp_path)
    assert str(error.value).startswith("La línea 5 de .env no se entiende: se escribe NOMBRE=valor")
    assert not caplog.records


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("no")], ids=range(3))
def test_an_env_that_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".env")
    with pytest.raises(UserError, match=r"^\.env no es un archivo: bórrelo o cámbiele el nombre$"):
        Settings.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODEL_ID", "../../etc", "MODEL_ID=../../etc no es un nombre"),
        ("MODEL_ID", "org/..", "MODEL_ID=org/.. no es un nombre"),
        ("MODEL_ID", "/datos/modelo", "weights/NOMBRE"),
        ("MODEL_ID", "a/b/c", "MODEL_ID=a/b/c no es un nombre"),
        ("DTYPE", "fp16", "bfloat16, float16, float32"),
        ("MAX_CONTEXT", "15", "MAX_CONTEXT=15 no vale: ponga cuántos tokens, 16 o más"),
        ("MAX_CONTEXT", "0", "MAX_CONTEXT=0 no vale"),
        ("MAX_CONTEXT", "-8192", "MAX_CONTEXT=-8192 no vale"),
        ("MAX_CONTEXT", "8k", "MAX_CONTEXT=8k no vale"),
        ("MAX_CONTEXT", "8192.0", "MAX_CONTEXT=8192.0 no vale"),
        ("MAX_CONTEXT", "²", "MAX_CONTEXT=² no vale"),
        ("MAX_CONTEXT", "9" * 5000, "no vale"),
        ("MAX_CONTEXT", "8\n192", "MAX_CONTEXT lleva caracteres que no se ven"),
        ("SHARE_PREFIXES", "no", "SHARE_PREFIXES=no no vale: ponga 1 o 0"),
        ("SHARE_PREFIXES", "00", "SHARE_PREFIXES=00 no vale"),
        ("KERNELS", "2", "KERNELS=2 no vale: ponga 1 o 0"),
        ("BATCH_INVARIANT", "sí", "BATCH_INVARIANT=sí no vale: ponga 1 o 0"),
        ("MODEL_REVISION", "uno\ndos", "MODEL_REVISION lleva caracteres que no se ven"),
        ("WEIGHTS_DIR", "~nadie-asi/x", "WEIGHTS_DIR=~nadie-asi/x no lleva a ninguna carpeta"),
        ("HF_TOKEN", "hf_uno dos", "HF_TOKEN lleva espacios"),
        ("HUGGINGFACE_HUB_TOKEN", "hf_ñ", "HUGGINGFACE_HUB_TOKEN lleva espacios"),
    ],
)
def test_an_invalid_value_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Settings.read(tmp_path)
    assert "\n" not in str(error.value)
    if "TOKEN" in name:
        assert value not in str(error.value)


def test_a_token_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secreto")
    settings = Settings.read(tmp_path)
    assert settings.token == "hf_secreto"
    assert "secreto" not in repr(settings)


def test_copying_the_example_changes_nothing(tmp_path: Path) -> None:
    before = Settings.read(tmp_path)
    example = (ROOT / ".env.example").read_text()
    (tmp_path / ".env").write_text(example)
    assert Settings.read(tmp_path) == before
    assert all(re.search(rf"^#?\s?{name}=", example, re.MULTILINE) for name in NAMES if name != "HF_TOKEN")


def test_a_context_is_a_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MAX_CONTEXT=8192\n")
    assert Settings.read(tmp_path).max_context == 8192
    monkeypatch.setenv("MAX_CONTEXT", "16")
    assert Settings.read(tmp_path).max_context == 16
    # as in cog.yaml: an empty value leaves the choice to the machine, whatever .env says
    monkeypatch.setenv("MAX_CONTEXT", "")
    assert Settings.read(tmp_path).max_context is None


@pytest.mark.parametrize("name", ["SHARE_PREFIXES", "KERNELS"])
def test_a_switch_is_on_unless_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def is_on() -> bool:
        return bool(getattr(Settings.read(tmp_path), name.lower()))

    assert is_on()
    (tmp_path / ".env").write_text(f"{name}=0\n")
    assert not is_on()
    for value in ("1", ""):
        monkeypatch.setenv(name, value)
        assert is_on()


def test_batch_invariance_is_off_unless_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Settings.read(tmp_path).batch_invariant
    (tmp_path / ".env").write_text("BATCH_INVARIANT=1\n")
    assert Settings.read(tmp_path).batch_invariant
    for value in ("0", ""):
        monkeypatch.setenv("BATCH_INVARIANT", value)
        assert not Settings.read(tmp_path).batch_invariant


@pytest.mark.parametrize("model_id", ["MiModelo", "alguien/MiModelo"])
def test_a_folder_is_found_with_the_capitals_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_id: str
) -> None:
    monkeypatch.setenv("MODEL_ID", model_id)
    weights = tmp_path / "weights"
    # where script/weights puts the hub's models
    assert Settings.read(tmp_path).folder == weights / "mimodelo"
    (weights / "mimodelo").mkdir(parents=True)
    assert Settings.read(tmp_path).folder == weights / "mimodelo"
    (weights / "MIMODELO").mkdir()
    assert Settings.read(tmp_path).folder == weights / "mimodelo"
    # of both, the one with MODEL_ID's capitals
    (weights / "MiModelo").mkdir()
    assert Settings.read(tmp_path).folder == weights / "MiModelo"


def test_python_without_docstrings_is_refused_with_the_reason() -> None:
    code = "from llm.weights.settings import Settings; Settings.read()"
    run = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].endswith(
        "UserError: Con PYTHONOPTIMIZE=2 transformers no carga ningún modelo: quite esa variable y repita"
    )
