"""script/setup with the real pip and uv, and stand-ins for package indexes and nvidia-smi."""

import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cli.install import Gpu, Tool, build_for, gpus, unseen
from llm.weights.settings import ROOT
from tests.support.processes import FINALLY, Marked, until

pytestmark = pytest.mark.slow

UV = f"uv=={version('uv')}"
Result = subprocess.CompletedProcess[str]


def wheel(folder: Path, name: str, release: str, files: dict[str, bytes] | None = None) -> None:
    """A package of that version; `files` lie in its archive beside its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{release}.dist-info"
    files = {f"{name}.py": b"", **(files or {})}
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, *metadata, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{release}-py3-none-any.whl", "w") as archive:
        for path, content in {**files, **metadata, f"{info}/RECORD": record}.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (stat.S_IFREG | 0o755) << 16
            archive.writestr(entry, content)


def torch(folder: Path, release: str, sees: bool = False) -> None:
    _, _, build = release.partition("+")
    cuda = {"": "13.0", "cpu": None, "cu126": "12.6"}[build]
    source = (
        f"class version:\n    cuda = {cuda!r}\n\n"
        f"class cuda:\n    is_available = staticmethod(lambda: {sees})\n\n"
        f"__version__ = {release!r}\n"
    )
    wheel(folder, "torch", release, {"torch.py": source.encode()})


class Served:
    """A folder on 127.0.0.1, as a package index or as a proxy for any host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        """The address of each request: a full URL where the client uses a proxy."""
        served = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

            def translate_path(self, path: str) -> str:
                served.requests.append(path)
                return super().translate_path(urlsplit(path).path)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "served"
    folder.mkdir()
    server = Served(folder)
    yield server
    server.close()


def project(folder: Path, *pins: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("script", "cli"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "requirements-dev.txt").write_text("\n".join(pins) + "\n")
    (folder / "bin").mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "env", "readlink", "rm"):
        tool = shutil.which(name)
        assert tool is not None
        (folder / "bin" / name).symlink_to(tool)
    return folder


def environment(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """The environment of a user who configured `variables` alone, with a PyTorch index that does not answer."""
    return {
        "PATH": str(folder / "bin"),
        "HOME": str(folder),
        "PYTHON": sys.executable,
        "PYTORCH_INDEX_URL": "http://127.0.0.1:9/whl",
        "PIP_CONFIG_FILE": os.devnull,
        **variables,
    }


def setup(folder: Path, **variables: str) -> Result:
    return subprocess.run(
        [folder / "script" / "setup"], env=environment(folder, variables), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose .venv script/setup has made from nothing, with pip and uv in it."""
    folder, wheels = project(tmp_path_factory.mktemp("made"), UV), tmp_path_factory.mktemp("wheels")
    program = Path(sysconfig.get_path("scripts"), "uv").read_bytes()
    release = UV.removeprefix("uv==")
    wheel(wheels, "uv", release, {f"uv-{release}.data/scripts/uv": program})
    result = setup(folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert result.returncode == 0, result.stderr
    assert messages(result) == []
    assert (setup(folder).returncode, setup(folder).stderr) == (0, "")
    return folder


@pytest.fixture
def ready(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """Another project with that .venv, which pins these packages and uv."""

    def copy(*pins: str, uv: str = UV) -> Path:
        folder = project(tmp_path / "project", uv, *pins)
        shutil.copytree(made / ".venv", folder / ".venv", symlinks=True, copy_function=os.link)
        return folder

    return copy


def site(folder: Path) -> Path:
    (packages,) = folder.glob(".venv/lib/python*/site-packages")
    return packages


def installed(folder: Path, name: str) -> tuple[str, str]:
    """The version of the package in .venv, and what installed it."""
    (info,) = site(folder).glob(f"{name}-*.dist-info")
    return info.name.removeprefix(f"{name}-").removesuffix(".dist-info"), (info / "INSTALLER").read_text().strip()


def messages(result: Result) -> list[str]:
    """The lines of setup between its first and its last."""
    assert result.returncode == 0, result.stderr
    first, *lines, last = result.stderr.splitlines()
    assert first.startswith("Preparando .venv") and last == "Listo"
    return lines


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("global", "index-url = {url}/simple\ntarget = {folder}/elsewhere\nuser = true\nquiet = 1\npython = /no"),
        ("install", "index-url = {url}/empty\nextra-index-url = {url}/empty\n  {url}/simple"),
        ("global", "no-index = yes\nfind-links = {folder}/simple/otra ~/served/simple/prueba"),
        ("install", "index-url = http://indice.invalid/simple\nproxy = {url}"),
    ],
)
def test_uv_installs_as_pip_is_configured(
    ready: Callable[..., Path], served: Served, tmp_path: Path, section: str, text: str
) -> None:
    folder = ready("prueba==1.0", "otra==1.0 ; sys_platform == 'win32'")
    wheel(served.folder / "simple" / "prueba", "prueba", "1.0")
    (served.folder / "empty").mkdir()
    (served.folder / "simple" / "otra").mkdir()
    config = tmp_path / "pip.conf"
    config.write_text(f"[{section}]\n{text.format(url=served.url, folder=served.folder)}\n")
    assert messages(setup(folder, PIP_CONFIG_FILE=str(config), HOME=str(tmp_path))) == []
    assert installed(folder, "prueba") == ("1.0", "uv")
    assert "proxy" not in text or "http://indice.invalid/simple/prueba/" in served.requests


def test_a_package_that_neither_can_install_is_named(ready: Callable[..., Path], served: Served) -> None:
    """uv obeys a constraint of pip's."""
    folder = ready("prueba==1.0")
    wheel(served.folder, "prueba", "1.0")
    (folder / "constraints.txt").write_text("prueba<1\n")
    result = setup(
        folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(served.folder), PIP_CONSTRAINT=str(folder / "constraints.txt")
    )
    assert result.returncode == 1
    *reasons, line = result.stderr.splitlines()
    assert any("prueba==1.0" in reason for reason in reasons)
    assert line.startswith("No se pudo instalar lo de requirements-dev.txt: mire la razón arriba")
    assert "Traceback" not in result.stderr
    assert not (folder / ".venv" / "ready").exists()


def test_variables_that_would_install_elsewhere_are_ignored(ready: Callable[..., Path], served: Served) -> None:
    folder = ready("prueba==1.0")
    wheel(served.folder, "prueba", "1.0")
    elsewhere = {name: str(folder / "otra") for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON")}
    result = setup(
        folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(served.folder), **elsewhere, PIP_USER="1", PIP_DRY_RUN="1"
    )
    assert messages(result) == []
    assert installed(folder, "prueba") == ("1.0", "uv")
    # Python itself writes it, at the first import
    assert not list(site(folder).glob("__pycache__/prueba.*.pyc"))
    assert setup(folder).stderr == ""


def broken(folder: Path, program: str) -> str:
    """Put a uv that is only this program into the folder, and return the line that pins it."""
    wheel(folder, "uv", "0.1", {"uv-0.1.data/scripts/uv": f"#!/bin/sh\n{program}\n".encode()})
    return "uv==0.1"


@pytest.mark.parametrize("case", ["fails", "elsewhere"])
def test_where_uv_fails_pip_installs(ready: Callable[..., Path], served: Served, tmp_path: Path, case: str) -> None:
    uv = UV if case == "elsewhere" else broken(served.folder, "echo uv says why; exit 1")
    folder = ready("prueba==1.0", uv=uv)
    wheel(served.folder, "prueba", "1.0")
    if case == "elsewhere":
        toml = folder / ".config" / "uv" / "uv.toml"
        toml.parent.mkdir(parents=True)
        toml.write_text(f'[pip]\ntarget = "{tmp_path / "otra"}"\n')
    lines = messages(
        setup(folder, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(served.folder), PIP_TARGET=str(tmp_path / "no"))
    )
    assert installed(folder, "prueba") == ("1.0", "pip")
    assert lines[-1] == "uv no pudo instalarlo: sigue pip, que tarda más"
    assert case != "fails" or lines[0] == "uv says why"
    assert setup(folder).stderr == ""


def test_a_configuration_that_pip_cannot_read_is_one_line(ready: Callable[..., Path], tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text("find-links = x\n")
    result = setup(ready("prueba==1.0"), PIP_CONFIG_FILE=str(config))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "pip no puede leer su configuración: corrija lo que dice arriba y repita"
    assert "Traceback" not in result.stderr


def nvidia_smi(folder: Path, text: str, status: int = 0) -> None:
    """A stand-in that prints `text`; if `text` has no capability, an old one that cannot be asked for it."""
    program = folder / "bin" / "nvidia-smi"
    is_old = "," not in text and status == 0
    refusal = 'case "$*" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2;; esac'
    program.write_text(f"#!/bin/sh\n{refusal if is_old else ''}\necho '{text}'\nexit {status}\n")
    program.chmod(0o755)


def builds(served: Served, *sees: str) -> dict[str, str]:
    """Add a registry's torch and PyTorch's two builds, of which `sees` see the GPU; the variables that lead there."""
    torch(served.folder / "simple" / "torch", "2.13.0", "" in sees)
    for build in ("cpu", "cu126"):
        torch(served.folder / "whl" / build / "torch", f"2.13.0+{build}", build in sees)
    return {"PIP_INDEX_URL": f"{served.url}/simple", "PYTORCH_INDEX_URL": f"{served.url}/whl"}


OLD = "La GPU no se usará: su controlador es el {} y PyTorch pide el {} o más nuevo: actualícelo"


@pytest.mark.parametrize(
    ("gpus", "build"),
    [
        ([], "cpu"),
        ([("580.95.05", 9.0)], ""),
        ([("580.95.05", 12.0)], ""),
        ([("590.1", 7.5)], ""),
        ([("525.60", 9.0)], "cu126"),
        ([("580.95.05", 6.1)], "cu126"),
        ([("580.95.05", 9.0), ("580.95.05", 7.0)], "cu126"),
        # no build supports all of these
        ([("580.95.05", 12.0), ("580.95.05", 7.0)], ""),
        # no build supports this GPU with this driver: the remedy is a newer driver
        ([("575.57.08", 12.0)], ""),
        ([("470.256.02", 8.0)], "cpu"),
    ],
)
def test_the_build_suits_the_driver_and_the_gpus(gpus: list[tuple[str, float]], build: str) -> None:
    assert build_for([Gpu(*gpu) for gpu in gpus]) == build


@pytest.mark.parametrize(
    ("gpus", "build", "line"),
    [
        (None, "cpu", None),
        ("550.54.15, 8.9\n550.54.15, 6.1", "cu126", None),
        ("470.256.02", "cpu", OLD.format("470.256.02", "525") + ", borre .venv y repita"),
    ],
)
def test_setup_installs_the_build_for_the_machine(
    ready: Callable[..., Path], served: Served, gpus: str | None, build: str, line: str | None
) -> None:
    folder = ready("torch==2.13.0")
    if gpus is not None:
        nvidia_smi(folder, gpus)
    variables = builds(served, *([] if line else [build]))
    assert messages(setup(folder, **variables)) == ([line] if line else [])
    assert installed(folder, "torch") == ("2.13.0" + (f"+{build}" if build else ""), "uv")
    assert bool([path for path in served.requests if path.startswith("/whl")]) == bool(build)


def test_pip_too_installs_the_build_for_the_machine(ready: Callable[..., Path], served: Served) -> None:
    folder = ready("torch==2.13.0", uv="# no uv")
    assert messages(setup(folder, **builds(served))) == []
    assert installed(folder, "torch") == ("2.13.0+cpu", "pip")


@pytest.mark.parametrize(
    ("tool", "gpus", "build", "line", "more"),
    [
        ("pip", None, "cpu", "CUDA, y .venv ocupará unos 5 GB", []),
        (
            "uv",
            "550.54.15, 8.9",
            "cu126",
            "CUDA 13, que pide el controlador 580 y una GPU Turing o posterior",
            [OLD.format("550.54.15", "580")],
        ),
    ],
)
def test_without_pytorchs_index_the_registrys_build_is_installed(
    ready: Callable[..., Path], served: Served, tool: str, gpus: str | None, build: str, line: str, more: list[str]
) -> None:
    folder = ready("torch==2.13.0", uv=UV if tool == "uv" else "# no uv")
    if gpus is not None:
        nvidia_smi(folder, gpus)
    variables = {**builds(served), "PYTORCH_INDEX_URL": "http://127.0.0.1:9/whl"}
    start = (
        f"No se pudo traer PyTorch de http://127.0.0.1:9/whl/{build}: será el del registro de paquetes, en Linux para "
    )
    assert messages(setup(folder, **variables)) == [start + line, *more]
    assert installed(folder, "torch") == ("2.13.0", tool)


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_a_build_of_the_users_own_source_is_installed(ready: Callable[..., Path], served: Served, tool: str) -> None:
    folder = ready("torch==2.13.0", uv=UV if tool == "uv" else "# no uv")
    own = served.folder / "own"
    torch(own, "2.13.0+cu126")
    variables = {**builds(served), "PYTORCH_INDEX_URL": "http://127.0.0.1:9/whl", "PIP_FIND_LINKS": str(own)}
    assert messages(setup(folder, **variables)) == []
    assert installed(folder, "torch") == ("2.13.0+cu126", tool)


def test_an_installed_torch_is_not_replaced(ready: Callable[..., Path], served: Served) -> None:
    folder = ready("torch==2.13.0")
    variables = builds(served)
    nvidia_smi(folder, "580.95.05, 9.0")
    assert setup(folder, **variables).returncode == 0
    assert installed(folder, "torch") == ("2.13.0", "uv")
    (folder / "bin" / "nvidia-smi").unlink()
    with (folder / "requirements-dev.txt").open("a") as pins:
        pins.write("# changed\n")
    assert messages(setup(folder, **variables)) == []
    assert installed(folder, "torch") == ("2.13.0", "uv")


@pytest.fixture
def tool() -> Iterator[Tool]:
    """Of this process, whose signals it takes."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield Tool()
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def program(path: Path, text: str, status: int = 0) -> Path:
    """A program that only prints `text`."""
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("sees", "line"),
    [
        (
            "2.13.0 13.0 False",
            'PyTorch no la ve: mire qué dice .venv/bin/python -c "import torch; torch.cuda.init()"',
        ),
        (
            "2.13.0+cpu None False",
            "PyTorch 2.13.0+cpu es para CPU: quite de pip config list la dirección que lo da, borre .venv y repita",
        ),
        ("2.13.0 13.0 True", ""),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_reported(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees: str, line: str
) -> None:
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "python", sees)))
    assert unseen(tool, [Gpu("580.95.05", 9.0)]) == line


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("No devices were found", []),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95",
            [
                "nvidia-smi falla (Failed to initialize NVML: Driver/library version mismatch): si hay una GPU de "
                "Nvidia, arregle su controlador, borre .venv y repita"
            ],
        ),
    ],
)
def test_where_nvidia_smi_fails_there_is_no_gpu(
    tool: Tool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    lines: list[str],
) -> None:
    program(tmp_path / "nvidia-smi", text, 6)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus(tool) == []
    assert capsys.readouterr().err.splitlines() == lines


def test_a_terminal_shows_what_is_installed_and_where_python_writes_no_bytecode_setup_does(
    ready: Callable[..., Path], served: Served
) -> None:
    folder = ready("prueba==1.0")
    wheel(served.folder, "prueba", "1.0")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(served.folder)}
    variables = environment(folder, {**pip, "PYTHONDONTWRITEBYTECODE": "1"})
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen([folder / "script" / "setup"], env=variables, stdout=theirs, stderr=theirs)
        os.close(theirs)
        text = b""
        # reading from a closed terminal is an error
        while chunk := _read(terminal.fileno()):
            text += chunk
        assert process.wait(FINALLY) == 0, text
    assert b"Installed" in text and b"prueba" in text and b"Listo" in text
    assert list(site(folder).glob("__pycache__/prueba.*.pyc"))


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


HANGS = "exec /bin/sleep 600"
HALF = f'cd "${{0%/bin/*}}"/lib/python*/site-packages && /bin/mkdir prueba-1.0.dist-info && {HANGS}'
"""A package as an interrupted uv leaves it."""


@pytest.mark.parametrize(
    ("hangs", "number", "status"),
    [("uv", signal.SIGINT, 130), ("uv", signal.SIGHUP, 129), ("nvidia-smi", signal.SIGTERM, 143)],
)
def test_an_interrupted_installation_is_repeated(
    ready: Callable[..., Path],
    served: Served,
    processes: Marked,
    tmp_path: Path,
    hangs: str,
    number: signal.Signals,
    status: int,
) -> None:
    folder, temporary = ready("prueba==1.0", uv=broken(served.folder, HALF)), tmp_path / "temporary"
    temporary.mkdir()
    wheel(served.folder, "prueba", "1.0")
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(served.folder), "PIP_NO_CACHE_DIR": "1"}
    variables["TMPDIR"] = str(temporary)
    if hangs == "nvidia-smi":
        program = folder / "bin" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{HANGS}\n")
        program.chmod(0o755)
    process = subprocess.Popen(
        [folder / "script" / "setup"],
        env=environment(folder, {**variables, **processes.environment}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # below a shell's & a Ctrl-C would be ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: processes.alive("sleep 600") or process.poll() is not None)
    process.send_signal(number)
    output, errors = process.communicate(timeout=FINALLY)
    assert (process.returncode, output) == (status, "")
    _, line = errors.splitlines()
    assert line == "Interrumpido: repita la orden y se terminará de preparar .venv"
    assert not processes.alive() and not list(temporary.iterdir())
    assert not (folder / ".venv" / "ready").exists()
    if number != signal.SIGINT:
        return

    broken(served.folder, "exit 1")
    assert messages(setup(folder, **variables))[-1].startswith("uv no pudo instalarlo")
    assert installed(folder, "prueba") == ("1.0", "pip")
    assert (site(folder) / "prueba.py").exists()
