"""The house's rules that import-linter's contracts, in pyproject.toml, cannot say: of predict.py, and of calls."""

import ast
import re
from pathlib import Path

import pytest

from llm.weights.settings import ROOT


def names(source: str) -> set[str]:
    """What the source imports anywhere, and each attribute that it names."""
    collected = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            collected |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            collected |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            collected.add(ast.unparse(node))
    return collected


# text and numbers, never a tensor
PREDICT = r"(torch|transformers|cli)\b"

RULES = {
    r"os\.(environb?|getenv)\b|dotenv\b": {"llm/weights/settings.py"},
    # torch may change these without notice
    r"torch\.(ops|library|(\w+\.)*_\w+)\b": {"llm/devices/linear.py", "llm/devices/attention.py"},
}
"""What only these files of llm/ may name."""


def broken(path: str, source: str) -> set[str]:
    """What the file at `path`, below the project's folder, names and may not."""
    rules = [PREDICT] if path == "predict.py" else []
    rules += [rule for rule, owners in RULES.items() if path not in owners]
    return {name for name in names(source) for rule in rules if re.match(rule, name)}


@pytest.mark.parametrize(
    "path", ["predict.py", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "llm").rglob("*.py"))]
)
def test_a_file_names_only_what_it_may(path: str) -> None:
    assert broken(path, Path(ROOT, path).read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("path", "source", "named"),
    [
        ("predict.py", "import torch.nn", {"torch.nn"}),
        ("predict.py", "def f():\n    from transformers import AutoTokenizer", {"transformers.AutoTokenizer"}),
        ("predict.py", "from cli import server", {"cli.server"}),
        ("llm/devices/model.py", "import os\nhome = os.environ['HOME']", {"os.environ"}),
        ("llm/devices/model.py", "from os import getenv", {"os.getenv"}),
        ("llm/devices/model.py", "from dotenv import load_dotenv", {"dotenv.load_dotenv"}),
        ("llm/engine/runner.py", "import torch\ntorch.ops.mkldnn._linear_pointwise(x)", {"torch.ops.mkldnn"}),
        ("llm/engine/runner.py", "from torch._C import DispatchKey", {"torch._C.DispatchKey"}),
        ("llm/engine/runner.py", "import torch\ntorch.backends.cuda._x()", {"torch.backends.cuda._x"}),
        ("llm/engine/runner.py", "import torch\ntorch.cuda.graph_pool_handle()", set()),
        ("llm/weights/settings.py", "import os\nos.getenv('HOME')", set()),
        ("llm/devices/linear.py", "import torch\ntorch.ops.mkldnn._linear_pointwise(x)", set()),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str, named: set[str]) -> None:
    assert broken(path, source) >= named
    assert bool(broken(path, source)) == bool(named)
