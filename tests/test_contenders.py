"""cli/contenders.py in this process, which is quick: tests/test_bench.py runs it as script/bench does."""

import platform

import pytest
import torch
import transformers

from cli import contenders


def test_a_turn_names_the_versions_that_computed(
    falcon_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in falcon_environment.items():
        monkeypatch.setenv(name, value)
    (turn,) = contenders.contend("generate", [(1, False)], [2], 2)
    assert turn["versions"].keys() == {"python", "torch", "transformers", "cog"}
    assert turn["versions"]["python"] == platform.python_version()
    assert turn["versions"]["torch"] == torch.__version__
    assert turn["versions"]["transformers"] == transformers.__version__
