"""What torch and transformers import, and that what they do not is there once something asks for it."""

import subprocess
import sys

from llm.weights.settings import ROOT


def run(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


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


def test_a_package_that_was_imported_before_stays_whole() -> None:
    program = "import torch._dynamo, llm.devices, torch._dynamo.backends.debugging as module; print(module.__name__)"
    assert run(program) == "torch._dynamo.backends.debugging"
    assert run("import torch._dynamo, llm.devices; print(bool(torch._dynamo.__path__))") == "True"
