"""requirements.txt and requirements-dev.txt: every installed package, as script/lock wrote them from our pins."""

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
    """The packages that these files pin for this computer, and their versions; the last of two pins counts."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def imported(*paths: Path) -> set[str]:
    """The installed packages that these files import anywhere, but for Triton, which torch brings where it can."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    third_party = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    installed = packages_distributions()
    third_party -= {"triton"}
    return {canonicalize_name(installed[module][0]) for module in third_party if module in installed}


@pytest.mark.parametrize(
    ("lock", "pins"), [("requirements.txt", ["requirements.in"]), ("requirements-dev.txt", DEVELOPMENT)]
)
def test_a_lock_holds_what_is_pinned(lock: str, pins: list[str]) -> None:
    locked, pinned = versions(lock), versions(*pins)
    assert {name: locked.get(name) for name in pinned} == pinned
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in locked.values())
    # they would be another torch's CUDA, not the image's
    assert not [name for name in locked if re.match("nvidia|cuda|triton", name)]


def test_what_the_image_imports_is_pinned() -> None:
    packages = imported(ROOT / "predict.py", *(ROOT / "llm").rglob("*.py"))
    assert {"torch", "cog", "httpx2"} < packages
    assert packages <= set(versions("requirements.in"))


def test_what_the_commands_and_the_tests_import_is_pinned() -> None:
    packages = imported(*(ROOT / "cli").glob("*.py"), *(ROOT / "tests").rglob("*.py"))
    assert {"replicate", "pytest", "psutil"} < packages
    # script/setup's own installer is there before any package
    assert packages - {"pip"} <= set(versions(*DEVELOPMENT))


def test_what_is_installed_is_locked() -> None:
    """Except torch's CUDA libraries and the packages that make environments."""
    locked = versions("requirements-dev.txt")
    installed = {canonicalize_name(item.name): item.version.partition("+")[0] for item in distributions()}
    ignored = re.compile("nvidia|cuda|triton|setuptools|wheel$|pip$")
    assert {
        name: version for name, version in installed.items() if locked.get(name) != version and not ignored.match(name)
    } == {}
