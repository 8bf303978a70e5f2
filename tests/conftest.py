"""Fixtures that several test files share: the models' folders, and the real server over each, started once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cli import demo, server
from tests.support.client import Client
from tests.support.processes import FINALLY, Marked
from tests.support.registry import Registry

# Tests compute too, beside other programs. The libraries read these variables when torch is imported.
for _name, _value in server.LIBRARIES.items():
    os.environ.setdefault(_name, _value)

# Children inherit ignored signals: behind nohup or `&` no test could interrupt a command.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", nargs="?", type=float, const=10, metavar="MINUTES", help="the soak alone, for 10 minutes or for these"
    )
    parser.addoption("--image", metavar="NAME", help="an image with the tests' model, instead of the one of cog build")


def pytest_configure(config: pytest.Config) -> None:
    if {"docker", "gpu"} & {*config.option.markexpr.split()}:
        # the reason of each skip
        config.option.reportchars += "s"
    if "gpu" in config.option.markexpr.split():
        # what each test printed: which kernels are used, and how fast they are
        config.option.reportchars += "P"
    if not Path("/dev/nvidiactl").exists():
        # without a GPU Triton interprets kernels: it reads the variable when it is imported, by transformers too
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing test_docker.py asks Docker's engine; test_card.py would compute on a GPU that other tests interpret."""
    only = {"test_docker.py": "docker", "test_card.py": "gpu"}.get(collection_path.name)
    return (only is not None and only not in config.option.markexpr) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    soak = config.getoption("soak")
    left_out = [item for item in items if (item.path.name == "test_soak.py") == (soak is None)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if soak:
        for item in items:
            item.add_marker(pytest.mark.timeout(soak * 60 + 1200))


@pytest.fixture
def processes() -> Iterator[Marked]:
    """The processes that the test starts; none may outlive it."""
    marked = Marked()
    yield marked
    _, survivors = psutil.wait_procs(marked.alive(), timeout=FINALLY)
    for process in survivors:
        process.kill()
    assert not survivors


@pytest.fixture(scope="session")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny falcon-rw-1b in a weights folder of its own, without a manifest."""
    from tests.support import checkpoints

    return checkpoints.falcon(tmp_path_factory.mktemp("weights") / "falcon-rw-1b")


@pytest.fixture(scope="session")
def small_falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny falcon with checkpoints.FEW ids, for tests of what the engine does with them."""
    from tests.support import checkpoints

    return checkpoints.falcon(tmp_path_factory.mktemp("weights") / "falcon", vocabulary=checkpoints.FEW)


@pytest.fixture(scope="session")
def bfloat16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A falcon whose logits in bfloat16 are compared."""
    from tests.support import checkpoints

    folder = tmp_path_factory.mktemp("bfloat16") / "falcon"
    # heads of 64, as falcon-rw-1b's: a division by their square root, 8, does not round ALiBi
    return checkpoints.falcon(folder, layers=3, width=256, heads=4, vocabulary=checkpoints.FEW)


@pytest.fixture(scope="session")
def falcon_environment(falcon: Path) -> dict[str, str]:
    """Variables that make a server or a command serve the tiny falcon, whatever the developer's .env says."""
    return {"MODEL_ID": "tiiuae/falcon-rw-1b", "WEIGHTS_DIR": str(falcon.parent), "DTYPE": "float32"}


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    from tests.support import embedded

    return embedded.folder()


@pytest.fixture(scope="session")
def falcon_server(falcon_environment: dict[str, str]) -> Iterator[Client]:
    """The server with the tiny falcon."""
    yield from _client(falcon_environment)


@pytest.fixture(scope="session")
def demo_server(demo_folder: Path) -> Iterator[Client]:
    """The server with the embedded model."""
    yield from _client({"MODEL_ID": demo.MODEL_ID, "MODEL_REVISION": "", "WEIGHTS_DIR": str(demo_folder.parent)})


@pytest.fixture(params=[8, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels as for AVX2 and for AVX-512. LLVM splits vectors that the processor does not have."""
    from llm.devices import jit

    number: int = request.param
    monkeypatch.setattr(jit, "lanes", lambda: number)
    return number


@pytest.fixture
def registry() -> Iterator[Registry]:
    """An image registry on this computer."""
    with Registry() as registry:
        yield registry


def _client(environment: dict[str, str]) -> Iterator[Client]:
    with server.running(environment=environment) as running:
        running.wait_until_ready()
        yield Client(running)


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Restores torch's number of threads."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
