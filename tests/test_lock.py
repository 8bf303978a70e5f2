"""requirements.txt and requirements-dev.txt: all that is installed, as script/lock wrote it from what we pin."""

import ast
import re
import sys
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llm.weights.settings import ROOT

DEVELOPMENT = ["requirements.in", "requirements-dev.in"]


def versions(*names: str) -> dict[str, str]:
    """Each package of these files that is for this computer, and its version. Of two that pin it the last is right."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def imported(*paths: Path) -> set[str]:
    """The packages, of those that are installed, that these files import anywhere."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    theirs = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    installed = packages_distributions()
    return {canonicalize_name(installed[module][0]) for module in theirs if module in installed}


@pytest.mark.parametrize(
    ("lock", "pins"), [("requirements.txt", ["requirements.in"]), ("requirements-dev.txt", DEVELOPMENT)]
)
def test_a_lock_holds_what_is_pinned(lock: str, pins: list[str]) -> None:
    locked, pinned = versions(lock), versions(*pins)
    assert {name: locked.get(name) for name in pinned} == pinned
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in locked.values())
    # of the CUDA of another torch than the image's
    assert not [name for name in locked if re.match("nvidia|cuda|triton", name)]


def test_what_the_image_imports_is_pinned() -> None:
    found = imported(ROOT / "predict.py", *(ROOT / "llm").rglob("*.py"))
    assert {"torch", "cog", "httpx2"} < found
    assert found <= set(versions("requirements.in"))


def test_what_the_commands_and_the_tests_import_is_pinned() -> None:
    found = imported(*(ROOT / "cli").glob("*.py"), *(ROOT / "tests").rglob("*.py"))
    assert {"replicate", "pytest", "psutil"} < found
    # script/setup's own installer is there before any package
    assert found - {"pip"} <= set(versions(*DEVELOPMENT))


def test_what_is_installed_is_locked() -> None:
    """In an environment as script/setup makes it: but for torch's CUDA libraries, and what makes environments."""
    locked = versions("requirements-dev.txt")
    installed = {canonicalize_name(found.name): found.version.partition("+")[0] for found in distributions()}
    others = re.compile("nvidia|cuda|triton|setuptools|wheel$|pip$")
    assert {
        name: version for name, version in installed.items() if locked.get(name) != version and not others.match(name)
    } == {}
