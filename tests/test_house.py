"""The house's rules: which file may import what, read from the imports, and which may call what."""

import ast
import re
from pathlib import Path

import pytest

from llm.settings import ROOT

NETWORK = {"aiohttp", "ftplib", "http", "httpx", "httpx2", "huggingface_hub", "requests", "socket", "urllib", "urllib3"}
# predict.py -> prompt -> engine (slots, model, sampling) -> text -> predict.py
ENGINE, OTHERS = {"llm.engine", "llm.runner"}, {"llm.prompt", "llm.text", "llm.weights", "llm.settings"}
FORBIDDEN = {
    **{f"llm/{name}.py": ENGINE for name in ("text", "prompt", "sampling", "slots")},
    **{f"llm/{name}.py": OTHERS for name in ("engine", "runner")},
}


def imported(source: str) -> set[str]:
    """Each module that the source imports anywhere, with those above it; `from a import b` may be the module a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return found


def attributes(source: str) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def reads_environment(source: str) -> bool:
    names = {"os.environ", "os.environb", "os.getenv"}
    return bool(names & (attributes(source) | imported(source))) or "dotenv" in imported(source)


def goes_below_torch(source: str) -> bool:
    """Whether it calls what torch may change without a word."""
    names = attributes(source) | imported(source)
    return any(re.match(r"torch\.(ops|library|(\w+\.)*_\w+)\b", name) for name in names)


def broken_rules(path: str, source: str) -> set[str]:
    """What the file at `path`, below the project's folder, does and may not."""
    modules = imported(source)
    broken = modules & FORBIDDEN.get(path, set())
    if path == "predict.py":
        broken |= modules & {"torch", "transformers", "local"}
    if path.startswith("llm/"):
        broken |= modules & {"cog", "coglet", "local", "predict"}
    if path != "llm/weights.py":
        broken |= modules & NETWORK
    if path != "llm/settings.py" and reads_environment(source):
        broken.add("environment")
    if path != "llm/processor.py" and goes_below_torch(source):
        broken.add("torch")
    return broken


def files() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in [ROOT / "predict.py", *(ROOT / "llm").rglob("*.py")]]


@pytest.mark.parametrize("path", files())
def test_the_house_is_in_order(path: str) -> None:
    assert broken_rules(path, Path(ROOT, path).read_text(encoding="utf-8")) == set()


def test_each_file_with_a_rule_is_there() -> None:
    assert {*FORBIDDEN, "predict.py", "llm/weights.py", "llm/settings.py", "llm/processor.py"} <= set(files())


@pytest.mark.parametrize(
    ("path", "source", "broken"),
    [
        ("predict.py", "import torch.nn", {"torch"}),
        ("predict.py", "def f():\n    from transformers import AutoTokenizer", {"transformers"}),
        ("predict.py", "from local import server", {"local"}),
        ("llm/model.py", "import cog", {"cog"}),
        ("llm/model.py", "from local.server import running", {"local"}),
        ("llm/model.py", "from huggingface_hub import HfApi", {"huggingface_hub"}),
        ("llm/model.py", "from urllib.request import urlopen", {"urllib"}),
        ("llm/model.py", "import os\nhome = os.environ['HOME']", {"environment"}),
        ("llm/model.py", "from os import getenv", {"environment"}),
        ("llm/model.py", "from dotenv import load_dotenv", {"environment"}),
        ("llm/text.py", "from llm.engine import Engine", {"llm.engine"}),
        ("llm/prompt.py", "from llm import engine", {"llm.engine"}),
        ("llm/engine.py", "import llm.text", {"llm.text"}),
        ("llm/engine.py", "from llm.settings import Settings", {"llm.settings"}),
        ("llm/runner.py", "import torch\ntorch.ops.mkldnn._linear_pointwise(x)", {"torch"}),
        ("llm/runner.py", "from torch._C import DispatchKey", {"torch"}),
        ("llm/runner.py", "import torch\ntorch.backends.cuda._x()", {"torch"}),
        ("llm/runner.py", "import torch\ntorch.cuda.graph_pool_handle()", set()),
        ("llm/weights.py", "import httpx2", set()),
        ("llm/settings.py", "import os\nos.getenv('HOME')", set()),
    ],
)
def test_a_broken_rule_is_seen(path: str, source: str, broken: set[str]) -> None:
    assert broken_rules(path, source) == broken
