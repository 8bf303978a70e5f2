"""Install what requirements-dev.txt pins into the environment whose Python runs this file, for script/setup.

uv installs, as pip is configured; where uv cannot, pip does. In a new environment only the standard library and pip can
be imported.
"""

import ast
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from types import FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements-dev.txt"
UV = Path(sys.executable).parent / "uv"
PYTORCH = os.environ.get("PYTORCH_INDEX_URL") or "https://download.pytorch.org/whl"
"""Below it an index for each build of torch."""

# torch 2.13 is built for CUDA 13.0, the registry's on Linux, and in PyTorch's own index for CUDA 12.6 and for CPUs too.
CUDA_13_DRIVER = 580
CUDA_13_CAPABILITY = 7.5
CUDA_12_DRIVER = 525
CUDA_12_CAPABILITY = 9.0
"""The newest that the build for CUDA 12.6 has kernels for."""

ELSEWHERE = ("target", "user", "prefix", "root", "python", "dry-run")
"""Settings of pip with which nothing is installed in its own environment."""

UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
    "retries": "UV_HTTP_RETRIES",
    "keyring-provider": "UV_KEYRING_PROVIDER",
}
UV_FLAGS = ("no-index", "no-deps", "require-hashes")
UV_LISTS = ("no-binary", "only-binary")

Settings = dict[str, str]


class Gpu(NamedTuple):
    driver: str
    capability: float


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Tool:
    """Runs a program whose output a terminal shows, and `show` elsewhere. A signal to this process ends it."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)

    def run(self, command: list[str], environment: dict[str, str] | None = None, quiet: bool = False) -> bool:
        """Whether it succeeds. With `quiet` a terminal is not shown its output."""
        self._log.seek(0)
        self._log.truncate()
        output = sys.stderr if sys.stderr.isatty() and not quiet else self._log
        # In a group of its own, so that what ends it is the SIGINT with which pip removes what it was fetching.
        try:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )
        except OSError as error:
            self._log.write(f"{error}\n".encode())
            return False
        if self._stopped:
            self._process.send_signal(signal.SIGINT)
        self._process.wait()
        if self._stopped:
            sys.exit(1)
        return self._process.returncode == 0

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def show(self) -> None:
        sys.stderr.write(self.output())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._process:
            self._process.send_signal(signal.SIGINT)


def pip_settings(tool: Tool) -> Settings:
    """What pip's files and its variables say of an installation, but for what would put it elsewhere."""
    # What these say is said of this command too.
    whole = {"PIP_USER": "0", "PIP_GLOBAL": "0", "PIP_SITE": "0", "PIP_QUIET": "0", "PIP_PYTHON": sys.executable}
    if not tool.run([sys.executable, "-I", "-m", "pip", "config", "list"], {**os.environ, **whole}, quiet=True):
        tool.show()
        sys.exit("pip no puede leer su configuración: corrija lo que dice arriba y repita")
    lines = [line.partition("=") for line in tool.output().splitlines()]
    settings = {}
    for section in ("global.", "install.", ":env:."):
        for name, _, value in lines:
            if name.startswith(section):
                settings[name.removeprefix(section)] = str(ast.literal_eval(value))
    return {name: value for name, value in settings.items() if name not in ELSEWHERE}


def pip_environment(settings: Settings) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    variables = {f"PIP_{name.upper().replace('-', '_')}": value for name, value in settings.items()}
    return {**rest, **variables, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def yes(settings: Settings, name: str) -> bool:
    return settings.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def uv_environment(settings: Settings) -> dict[str, str]:
    """uv reads nothing of pip's configuration. Its own variables go before."""
    variables = {}
    for name, variable in UV_VARIABLES.items():
        if name in settings:
            # pip splits them at spaces too
            values = [os.path.expanduser(value) for value in settings[name].split()]
            variables[variable] = ("," if name == "find-links" else " ").join(values)
    if "extra-index-url" in settings:
        # of all indexes the best version, as pip takes it
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if yes(settings, "no-cache-dir"):
        variables["UV_NO_CACHE"] = "1"
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        # what uv leaves to the first import would be done again at each
        variables["UV_COMPILE_BYTECODE"] = "1"
    environment = {**variables, **os.environ}
    for name, variable in (("cert", "SSL_CERT_FILE"), ("client-cert", "SSL_CLIENT_CERT")):
        if name in settings:
            environment[variable] = os.path.expanduser(settings[name])
    if "proxy" in settings:
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            environment[variable] = settings["proxy"]
    return environment


def uv_command(settings: Settings) -> list[str]:
    # Of another project: pyproject.toml leaves out torch's CUDA libraries, for script/lock alone.
    command = [str(UV), "pip", "install", "--project=/", f"--python={sys.executable}"]
    command += [f"--{name}" for name in UV_FLAGS if yes(settings, name)]
    command += [f"--{name}={each}" for name in UV_LISTS for each in re.split(r"[,\s]+", settings.get(name, "")) if each]
    return command


def gpus(tool: Tool) -> list[Gpu]:
    """What nvidia-smi lists. Its oldest versions know no capability; 8.0 stands for it, which all builds have."""
    if not shutil.which("nvidia-smi"):
        return []
    for fields in ("driver_version,compute_cap", "driver_version"):
        if tool.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], quiet=True):
            lines = re.findall(r"^\s*(\d[\d.]*)(?:,\s*(\d+\.\d+))?", tool.output(), re.MULTILINE)
            return [Gpu(driver, float(capability or 8)) for driver, capability in lines]
    if "No devices" not in tool.output():
        reason = tool.output().strip().partition("\n")[0]
        say(f"nvidia-smi falla ({reason}): si hay una GPU de Nvidia, arregle su controlador, borre .venv y repita")
    return []


def major(version: str) -> int:
    return int(version.partition(".")[0])


def build_for(present: list[Gpu]) -> str:
    """The build of torch that a machine with these GPUs needs: a name below PYTORCH, or "", the registry's."""
    driver = min((major(gpu.driver) for gpu in present), default=0)
    capabilities = [gpu.capability for gpu in present]
    if not present or driver < CUDA_12_DRIVER:
        return "cpu"
    if driver >= CUDA_13_DRIVER and min(capabilities) >= CUDA_13_CAPABILITY:
        return ""
    return "cu126" if max(capabilities) <= CUDA_12_CAPABILITY else ""


def pinned(name: str) -> str:
    """The line of a package in requirements-dev.txt, or ""."""
    lines = re.findall(rf"^{name}==[^\s;]+", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    return lines[0] if lines else ""


def missing() -> list[str]:
    """The names of what is pinned and not there in that version."""
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

    importlib.invalidate_caches()
    there = {canonicalize_name(each.name): each.version for each in distributions()}
    wanted = [Requirement(line) for line in PINS.read_text(encoding="utf-8").splitlines() if line[:1].isalnum()]
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate()]
    return [each.name for each in wanted if there.get(canonicalize_name(each.name), "0") not in each.specifier]


def install_torch(tool: Tool, command: list[str], environment: dict[str, str], build: str, probe: bool) -> None:
    """Install that build from PyTorch's index, or say that it cannot be had there. A probe asks first, and once."""
    url = f"{PYTORCH.rstrip('/')}/{build}"
    wanted = ["--no-deps", f"--extra-index-url={url}", f"{pinned('torch')}+{build}"]
    if probe and not tool.run([*command, "--dry-run", *wanted], {**environment, "UV_HTTP_RETRIES": "0"}, quiet=True):
        there = False
    else:
        there = tool.run([*command, *wanted], environment)
    if not there:
        is_for = "CUDA, y .venv ocupará unos 5 GB"
        if build != "cpu":
            is_for = f"CUDA 13, que pide el controlador {CUDA_13_DRIVER} y una GPU Turing o posterior"
        say(f"No se pudo traer PyTorch de {url}: será el del registro de paquetes, en Linux para {is_for}")


def with_uv(tool: Tool, settings: Settings, build: str) -> bool:
    uv, torch = pinned("uv"), pinned("torch")
    if not uv:
        return False
    pip = [sys.executable, "-I", "-m", "pip", "install", "--no-deps"]
    if tool.run([*pip, uv], pip_environment(settings), quiet=True):
        command, environment = uv_command(settings), uv_environment(settings)
        if torch and build and "UV_TORCH_BACKEND" not in os.environ:
            tool.run([*command, "--dry-run", "--no-deps", torch], environment, quiet=True)
            # With a + in its version a source of the user's has it, who chose a build; without a line it is installed.
            if re.search(rf"^ \+ {re.escape(torch)}$", tool.output(), re.MULTILINE):
                install_torch(tool, command, environment, build, probe=True)
        if tool.run([*command, f"--requirements={PINS}"], environment) and not missing():
            return True
    tool.show()
    say("uv no pudo instalarlo: sigue pip, que tarda más")
    return False


def with_pip(tool: Tool, settings: Settings, build: str) -> bool:
    command, environment = [sys.executable, "-I", "-m", "pip", "install"], pip_environment(settings)
    # pip cannot say, without fetching it, which build the user's sources have.
    if pinned("torch") and build and not {"extra-index-url", "find-links", "no-index"} & set(settings):
        install_torch(tool, [*command, "--retries=0", "--timeout=15"], environment, build, probe=False)
    return tool.run([*command, f"--requirement={PINS}"], environment) and not missing()


def unseen(tool: Tool, present: list[Gpu]) -> str:
    """Why torch sees none of these GPUs, and the way out; "" where it does."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    # whether it can, not whether it may
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if not tool.run([sys.executable, "-I", "-W", "ignore", "-c", code], environment, quiet=True):
        tool.show()
        sys.exit("PyTorch no carga: mire la razón arriba; si no la entiende, borre .venv y repita")
    version, cuda, sees = tool.output().split()[-3:]
    driver = min((gpu.driver for gpu in present), key=major)
    needed = CUDA_13_DRIVER if cuda.startswith("13.") else CUDA_12_DRIVER
    if sees == "True":
        return ""
    if major(driver) < needed:
        again = ", borre .venv y repita" if cuda == "None" else ""
        return f"su controlador es el {driver} y PyTorch pide el {needed} o más nuevo: actualícelo{again}"
    if cuda == "None":
        return f"PyTorch {version} es para CPU: quite de pip config list la dirección que lo da, borre .venv y repita"
    return 'PyTorch no la ve: mire qué dice .venv/bin/python -c "import torch; torch.cuda.init()"'


def main() -> None:
    tool = Tool()
    settings = pip_settings(tool)
    present = gpus(tool) if sys.platform == "linux" else []
    build = build_for(present) if sys.platform == "linux" else ""
    if not with_uv(tool, settings, build) and not with_pip(tool, settings, build):
        tool.show()
        sys.exit(
            "No se pudo instalar lo de requirements-dev.txt: mire la razón arriba (casi siempre la red o el disco) y "
            "repita"
        )
    if present and pinned("torch") and (reason := unseen(tool, present)):
        say(f"La GPU no se usará: {reason}")


if __name__ == "__main__":
    main()
