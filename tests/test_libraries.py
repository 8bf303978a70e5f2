"""What torch and transformers import, and that what they do not is there once something asks for it."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm.weights.settings import ROOT


def run(program: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **variables},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return run.stdout.strip()


def test_what_a_process_alone_does_not_use_is_not_imported() -> None:
    unused = {"torch._dynamo.convert_frame", "torch.distributed.tensor", "sympy"}
    assert run(f"import predict, sys; print({unused} & sys.modules.keys())") == "set()"


def test_what_was_left_out_is_imported_once_something_asks_for_it() -> None:
    program = """
import llm.devices, torch, transformers, transformers.models
print(transformers.models.LlamaConfig is transformers.LlamaConfig, transformers.models.falcon.__name__)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""
    assert run(program).splitlines() == ["True transformers.models.falcon", "2.0"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages of a file are in memory")
def test_weights_are_read_from_the_disk_meanwhile(falcon: Path, falcon_environment: dict[str, str]) -> None:
    def pages_in_memory(path: Path) -> set[int]:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.addressof(first := ctypes.c_char.from_buffer(mapped))
            assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), pages) == 0
            del first
        return {page & 1 for page in pages}

    weights = falcon / "model.safetensors"
    with weights.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(weights) != {0}:
        pytest.skip("the file system keeps its files in memory")
    run("import llm.devices", **falcon_environment)
    assert pages_in_memory(weights) == {1}


def test_settings_that_cannot_be_are_for_whoever_loads_a_model() -> None:
    assert run("import llm.devices; print('imported')", MODEL_ID="../x") == "imported"
