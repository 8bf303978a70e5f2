"""What torch and transformers import, and that what they do not is there once something asks for it."""

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


def test_weights_are_read_from_the_disk_meanwhile(falcon: Path, falcon_environment: dict[str, str]) -> None:
    weights = falcon / "model.safetensors"
    if os.statvfs(weights).f_flag & getattr(os, "ST_NOATIME", 0):
        pytest.skip("the file system does not say when a file was read")
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns))
    run("import llm.devices", **falcon_environment)
    assert weights.stat().st_atime_ns > 0


def test_settings_that_cannot_be_are_for_whoever_loads_a_model() -> None:
    assert run("import llm.devices; print('imported')", MODEL_ID="../x") == "imported"
