"""What the user sets: the environment and .env, read once. Nothing else in llm/ touches the environment."""

import io
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dotenv.parser import parse_stream

from llm.errors import UserError
from llm.words import reason

ROOT = Path(__file__).resolve().parent.parent.parent

FALCON = "tiiuae/falcon-rw-1b"
# Pinned: an unpinned download changes under the user.
FALCON_COMMIT = "e4b9872bb803165eb22f0a867d4e6a64d34fce19"

DTYPES = ("bfloat16", "float16", "float32")

SHORTEST_CONTEXT = 16
"""Tokens: the engine's warm-up takes six."""

# How many threads, and how many in each level of parallel regions below.
_OPENMP_THREADS = re.compile(r"\s*\+?0*([1-9]\d*)\s*(,\s*\+?0*[1-9]\d*\s*)*", re.ASCII)
_MODEL_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
SWITCHES = ("SHARE_PREFIXES", "KERNELS", "BATCH_INVARIANT")
"""Variables that are 1 or 0; the last one is 0 where it is not set, the others 1."""
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Settings:
    """Which model, from where, and how it is loaded."""

    model_id: str
    revision: str | None
    """A commit, branch or tag; None is the id's main."""
    weights_dir: Path
    token: str | None = field(repr=False)
    """Hugging Face's. Passed to the hub's client, never printed."""
    dtype: str | None
    """One of DTYPES; None leaves the choice to the processor."""
    max_context: int | None = None
    """Tokens of prompt and answer together, at the most; None leaves the choice to the model and the memory."""
    share_prefixes: bool = True
    """Requests that begin alike read their common beginning once, whoever asks."""
    kernels: bool = True
    """A GPU uses the kernels of this project that prove to be right and faster there."""
    batch_invariant: bool = False
    """On a GPU too a text depends on its own inputs alone, where that can be, at whatever cost."""

    @property
    def folder(self) -> Path:
        """weights/NAME, the last part of the id: as it is written where there is such a folder, else in lower case."""
        name = self.model_id.split("/")[-1]
        try:
            # in the list of names: a file system that ignores case has a folder under any
            as_written = name in os.listdir(self.weights_dir)
        except OSError:  # whoever opens the folder meets it too, and says so
            as_written = False
        return self.weights_dir / (name if as_written else name.lower())

    @classmethod
    def read(cls, root: Path = ROOT) -> "Settings":
        """The settings of the process's environment, and of root/.env where the environment is silent.

        Raises UserError for a value that cannot be.
        """
        if sys.flags.optimize > 1:
            # its model classes are made from their docstrings
            raise UserError("Con PYTHONOPTIMIZE=2 transformers no carga ningún modelo: quite esa variable y repita")
        written = values(root)
        for name in ("MODEL_ID", "MODEL_REVISION", "WEIGHTS_DIR", "DTYPE", "MAX_CONTEXT", *SWITCHES):
            # it would stand in a path, and in the one line of an error
            if not written.get(name, "").isprintable():
                raise UserError(f"{name} lleva caracteres que no se ven: escríbalo de nuevo")

        model_id = written.get("MODEL_ID", FALCON)
        # The id becomes a folder's name: no "..", no absolute path.
        if not _MODEL_ID.fullmatch(model_id):
            raise UserError(
                f"MODEL_ID={model_id} no es un nombre de Hugging Face: se escribe como {FALCON}; "
                "para un modelo suyo, ponga su carpeta en weights/NOMBRE y MODEL_ID=NOMBRE"
            )

        token_name = "HUGGINGFACE_HUB_TOKEN" if "HUGGINGFACE_HUB_TOKEN" in written else "HF_TOKEN"
        dtype = written.get("DTYPE")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"DTYPE={dtype} no vale: use {', '.join(DTYPES)}, o déjelo vacío")

        max_context = written.get("MAX_CONTEXT")
        if max_context is not None and not (_NUMBER.fullmatch(max_context) and int(max_context) >= SHORTEST_CONTEXT):
            raise UserError(
                f"MAX_CONTEXT={max_context} no vale: ponga cuántos tokens, {SHORTEST_CONTEXT} o más, o déjelo vacío"
            )

        for name in SWITCHES:
            if (switch := written.get(name, "1")) not in ("0", "1"):
                raise UserError(f"{name}={switch} no vale: ponga 1 o 0, o déjelo vacío")

        try:
            weights_dir = root / Path(written.get("WEIGHTS_DIR", "weights")).expanduser()
        except RuntimeError as error:
            raise UserError(
                f"WEIGHTS_DIR={written['WEIGHTS_DIR']} no lleva a ninguna carpeta, no hay tal usuario: escríbala entera"
            ) from error

        return cls(
            model_id=model_id,
            revision=written.get("MODEL_REVISION", FALCON_COMMIT if model_id == FALCON else None),
            weights_dir=weights_dir,
            token=token(written, token_name, "https://huggingface.co/settings/tokens"),
            dtype=dtype,
            max_context=int(max_context) if max_context else None,
            share_prefixes=written.get("SHARE_PREFIXES") != "0",
            kernels=written.get("KERNELS") != "0",
            batch_invariant=written.get("BATCH_INVARIANT") == "1",
        )


def values(root: Path = ROOT) -> dict[str, str]:
    """What the environment says, and root/.env where the environment is silent. Raises UserError.

    An empty value counts as unset: in the environment it also unsets .env's. With python-dotenv's own variable
    PYTHON_DOTENV_DISABLED the file is not read.
    """
    disabled = os.environ.get("PYTHON_DOTENV_DISABLED", "").lower() in ("1", "t", "true", "y", "yes")
    written = {**({} if disabled else _dotenv(root / ".env")), **os.environ}
    return {name: value.strip() for name, value in written.items() if value and value.strip()}


def set_for_libraries(name: str, value: str) -> None:
    """Set a variable that a library reads while this process runs."""
    os.environ[name] = value


def openmp_threads() -> int | None:
    """OMP_NUM_THREADS of the environment; None where it is no positive number, which OpenMP ignores as well."""
    match = _OPENMP_THREADS.fullmatch(os.environ.get("OMP_NUM_THREADS", ""))
    return int(match[1]) if match else None


def token(values: dict[str, str], name: str, page: str) -> str | None:
    """The token of that name, which its owner copied from `page`. Raises UserError for one that is none."""
    token = values.get(name)
    # One that cannot stand in an HTTP header would be quoted, whole, in the error of the HTTP library.
    if token is not None and not _TOKEN.fullmatch(token):
        raise UserError(f"{name} lleva espacios o letras que un token no tiene: cópielo de nuevo de {page}")
    return token


def _dotenv(path: Path) -> dict[str, str | None]:
    if not os.path.lexists(path):
        return {}
    # a fifo would be waited for
    if not path.is_file():
        raise UserError(f"{path.name} no es un archivo: bórrelo o cámbiele el nombre")
    try:
        # dotenv_values() tells the log, in English, of a line that it cannot read, and goes on
        bindings = list(parse_stream(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} no está en UTF-8: guárdelo con esa codificación") from error
    except OSError as error:
        raise UserError(f"No se puede leer {path.name}, {reason(error)}: corríjalo o borre el archivo") from error
    for binding in bindings:
        if binding.error:
            # without its text, in which a token may be
            # of what it begins with, the empty lines before it included
            text = binding.original.string
            line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
            raise UserError(
                f"La línea {line} de {path.name} no se entiende: se escribe NOMBRE=valor, con las comillas cerradas"
            )
    return {binding.key: binding.value for binding in bindings if binding.key}
