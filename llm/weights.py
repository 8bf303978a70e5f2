"""Hub -> weights/NAME: fetch, convert, verify. The only file in llm/ that opens a connection.

A model's folder holds what transformers loads, and manifest.json: the id, the revision that was asked for and the
commit that it was, each file's size and sha256.
It grows under another name and is renamed when whole. What a manifest does not name is not loaded beside what it does.
A folder without a manifest is the user's own: it is loaded as it stands.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from stat import S_ISREG
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm.errors import UserError
from llm.settings import ROOT, Settings
from llm.words import about, one_line, reason

# torch and huggingface_hub are imported where they are used: a command that finds its folder whole needs neither.
if TYPE_CHECKING:
    import httpx2
    import torch
    from transformers import PreTrainedModel

MANIFEST = "manifest.json"

_SECONDS_TO_ANSWER = 10
_LARGEST_FILE = "3GB"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# What transformers reads beside the weights. Never code: trust_remote_code is false everywhere.
_TEXT_FILES = re.compile(
    r"(generation_)?config\.json|chat_template\.(jinja|json)|additional_chat_templates/[\w-]{1,99}\.jinja"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|[\w.]{1,99}\.model",
    re.ASCII,
)


@dataclass(frozen=True)
class Weights:
    """A model's folder, ready to load."""

    folder: Path
    commit: str | None
    """What it was made of; None for a user's own folder."""
    origin: str
    """Where it comes from, for the log."""
    verified: bool
    """Every file is the one that the manifest names. False for a user's own folder, which has none."""


@dataclass(frozen=True)
class _HubFile:
    """What the hub says of a file."""

    name: str
    size: int
    digest: str
    """sha256 of one that Git LFS keeps, git's hash of any other."""

    def part(self, work: Path) -> Path:
        """Where it grows. The hash in its name ties it to its content: another revision's part is never continued."""
        return work / f"{self.name}.{self.digest[:16]}.part"

    def is_at(self, path: Path) -> bool:
        from huggingface_hub.utils.sha import git_hash

        if not path.is_file() or path.stat().st_size != self.size:
            return False
        return self.digest == (_sha256(path) if _SHA256.fullmatch(self.digest) else git_hash(path.read_bytes()))


@dataclass(frozen=True)
class _File:
    size: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    id: str
    revision: str | None
    commit: str
    files: dict[str, _File]


def ensure(settings: Settings, *, thorough: bool = False) -> Weights:
    """The settings' model in its folder: verified where it is there, fetched first where it is not.

    `thorough` hashes every file; otherwise only those that were touched since the manifest was written.
    Prints, in Spanish, what it does. Raises UserError; a folder that is there is never changed.
    """
    there = os.path.lexists(settings.folder)
    if not there:
        _fetch(settings)
    try:
        return _verify(settings, thorough and there)
    except OSError as error:
        raise UserError(
            f"No se puede leer {shown(settings.folder)}, {reason(error)}: arréglelo, o cambie WEIGHTS_DIR"
        ) from error


def _verify(settings: Settings, thorough: bool) -> Weights:
    folder, name = settings.folder, shown(settings.folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        if not (folder / "config.json").is_file() or not has_weights:
            raise UserError(
                f"{name} no es un modelo, le falta config.json o los pesos (.safetensors): "
                f"mueva o borre esa carpeta y se traerá {settings.model_id}, o cambie MODEL_ID"
            )
        return Weights(folder, None, f"{name} (carpeta propia)", verified=False)

    if manifest.id != settings.model_id:
        raise UserError(f"{name} contiene {manifest.id} y MODEL_ID pide {settings.model_id}: mueva o borre esa carpeta")
    if settings.revision not in (None, manifest.revision, manifest.commit):
        raise UserError(
            f"{name} es la revisión {manifest.revision or 'main'} ({manifest.commit}) y MODEL_REVISION pide "
            f"{settings.revision}: mueva o borre esa carpeta"
        )

    way_out = f"borre {name} y se traerá de nuevo (si el cambio es suyo, borre solo {name}/{MANIFEST})"
    entries = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not _is_folder(path)}
    if unnamed := sorted(entries.keys() - manifest.files.keys() - {MANIFEST}):
        raise UserError(
            f"{shown(folder / unnamed[0])} sobra, {MANIFEST} no lo nombra: bórrelo (si es suyo, borre solo "
            f"{name}/{MANIFEST})"
        )
    stamp = (folder / MANIFEST).stat().st_mtime_ns
    for file, expected in manifest.files.items():
        if file not in entries:
            raise UserError(f"Falta {name}/{file}: {way_out}")
        path = entries[file]
        stat = path.lstat()
        if not S_ISREG(stat.st_mode):
            raise UserError(f"{name}/{file} es un enlace u otra cosa, y ha de ser un archivo: {way_out}")
        if stat.st_size != expected.size:
            sizes = f"mide {_exactly(stat.st_size)} bytes en vez de {_exactly(expected.size)}"
            raise UserError(f"{name}/{file} está cortado o cambiado, {sizes}: {way_out}")
        # Hashing reads about 1 GB a second, too long for every boot of the server. publish() gives all files the
        # manifest's time, and whoever writes to one changes it; a copy that keeps no times is only hashed in vain.
        if (thorough or stat.st_mtime_ns != stamp) and _sha256(path) != expected.sha256:
            raise UserError(f"{name}/{file} está alterado, su sha256 no es el de {MANIFEST}: {way_out}")
    commit = manifest.commit[:7] if _COMMIT.fullmatch(manifest.commit) else manifest.commit
    return Weights(folder, manifest.commit, f"{name} ({manifest.id}, {commit})", verified=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _read_manifest(folder: Path) -> _Manifest | None:
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("not a file")
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {_checked_name(name): _File(**file) for name, file in content.pop("files").items()}
        manifest = _Manifest(**content, files=files)
        texts = [manifest.id, manifest.commit, manifest.revision or "", *(file.sha256 for file in files.values())]
        if not files or not all(text.isprintable() for text in texts):
            raise ValueError("no files, or a text that is none")
        if not all(type(file.size) is int for file in files.values()):
            raise TypeError("a size is a number")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{shown(path)} no se entiende: borre {shown(folder)} y se traerá de nuevo, o solo {MANIFEST} si los "
            "archivos son suyos"
        ) from error


def _checked_name(name: str) -> str:
    """A file's name in a manifest, as it is. Raises ValueError where it does not lead to one place in the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or not name.isprintable():
        raise ValueError(name)
    return name


def _fetch(settings: Settings) -> None:
    start = time.monotonic()
    with _in_spanish(settings):
        commit, files = _listing(settings)
        with workspace(settings.folder) as work:
            if os.path.lexists(settings.folder):
                return  # another process brought it while this one asked the hub
            missing = _missing(files, work)
            with room(work, _bytes_left(missing, work) + _converted_bytes(files)):
                _download(settings, commit, files, missing, work)
                bins = sorted(work.glob("*.bin"))
                if bins:
                    _say(f"Convirtiendo {settings.model_id} a safetensors en bfloat16")
                    _convert(settings, bins, work)
                publish(work, settings, commit)
    size = sum(path.stat().st_size for path in settings.folder.rglob("*"))
    _say(f"{settings.model_id} está en {shown(settings.folder)}: {about(size)}, en {time.monotonic() - start:.0f} s")


def _listing(settings: Settings) -> tuple[str, list[_HubFile]]:
    """The commit that the revision names, and those of its files that are needed, config.json first."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # token=False: without one of ours the client would look for another in the user's home.
        info = HfApi(token=settings.token or False).model_info(
            settings.model_id, revision=settings.revision, files_metadata=True, timeout=_SECONDS_TO_ANSWER
        )
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        weights = _weights_files(siblings)
        if "config.json" not in siblings or not weights:
            raise UserError(
                f"{settings.model_id} no tiene pesos que se puedan usar, config.json con model.safetensors o "
                "pytorch_model.bin: elija otro MODEL_ID"
            )
        texts = {name for name in siblings if _TEXT_FILES.fullmatch(name)} - {"config.json"}
        files = []
        for name in ["config.json", *sorted(texts), *weights]:
            size, lfs, digest = siblings[name].size, siblings[name].lfs, siblings[name].blob_id
            kind, digest = (_SHA256, lfs.sha256) if lfs else (_COMMIT, digest)
            if type(size) is not int or size < 0 or not kind.fullmatch(digest or ""):
                raise ValueError(f"what is said of {name}")
            files.append(_HubFile(name, size, str(digest)))
        if not _COMMIT.fullmatch(info.sha or ""):
            raise ValueError("a commit is a hash")
        return str(info.sha), files
    except (HfHubHTTPError, HFValidationError, json.JSONDecodeError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{_hub()} no responde como Hugging Face: compruebe HF_ENDPOINT y MODEL_ID, o pruebe más tarde"
        ) from error


def _weights_files(names: Mapping[str, Any]) -> list[str]:
    """Safetensors before .bin, one file before shards, as transformers prefers them."""
    for single, shard, index in (
        ("model.safetensors", r"model-\d{1,9}-of-\d{1,9}\.safetensors", ["model.safetensors.index.json"]),
        ("pytorch_model.bin", r"pytorch_model-\d{1,9}-of-\d{1,9}\.bin", []),
    ):
        if single in names:
            return [single]
        shards = sorted(name for name in names if re.fullmatch(shard, name, re.ASCII))
        if shards and all(name in names for name in index):
            return index + shards
    return []


def _missing(files: list[_HubFile], work: Path) -> list[_HubFile]:
    """The files that an earlier run did not finish. What lies in `work` and is none of them goes."""
    wanted = {path for file in files for path in (work / file.name, file.part(work))}
    for path in work.rglob("*"):
        if path not in wanted and not _is_folder(path):
            path.unlink()
    return [file for file in files if not file.is_at(work / file.name)]


def _bytes_left(missing: list[_HubFile], work: Path) -> int:
    parts = [file.part(work) for file in missing]
    return sum(file.size for file in missing) - sum(part.stat().st_size for part in parts if part.exists())


def _converted_bytes(files: list[_HubFile]) -> int:
    """The most that the safetensors take which stand for a while beside the .bin they are made from."""
    return sum(file.size for file in files if file.name.endswith(".bin"))


class _Part(io.BufferedWriter):
    """A file on its way, of at most `size` bytes: each write is on the disk when it returns."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._size = size

    def write(self, chunk: Any) -> int:
        if self.tell() + len(chunk) > self._size:
            raise _TooLong
        written = super().write(chunk)
        self.flush()
        return written


class _TooLong(Exception):
    """More arrives of a file than the hub said that it has."""


def _download(settings: Settings, commit: str, files: list[_HubFile], missing: list[_HubFile], work: Path) -> None:
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, tqdm

    total, left = sum(file.size for file in files), _bytes_left(missing, work)
    rest = f", de los que faltan {about(left)}" if left < total else ""
    _say(f"Trayendo {settings.model_id} ({commit[:7]}) de {_hub()}: {about(total)}{rest}")

    # As it arrives: http_get would collect 10 MB, and lose them where an answer is cut before.
    constants.DOWNLOAD_CHUNK_SIZE = None  # type: ignore[assignment]
    get_session().event_hooks["response"].append(_without_delay)
    headers = build_hf_headers(token=settings.token or False, headers={"Accept-Encoding": "identity"})
    with tqdm(
        total=total, initial=total - left, desc=settings.folder.name, unit="B", unit_scale=True, disable=None
    ) as bar:
        for file in missing:
            part = file.part(work)
            part.parent.mkdir(exist_ok=True)
            with _Part(part, file.size) as stream, suppress(_TooLong):
                if stream.tell() != file.size:
                    # hf_hub_download throws away what an interrupted run brought; http_get, below it, continues.
                    http_get(
                        hf_hub_url(settings.model_id, file.name, revision=commit),
                        stream,
                        resume_size=stream.tell(),
                        headers=headers,
                        tqdm_class=lambda **_: nullcontext(bar),  # type: ignore[arg-type]  # one bar for all files
                    )
            if not file.is_at(part):
                part.unlink()
                raise UserError(f"{file.name} llegó cambiado de {_hub()}: ejecute script/weights otra vez")
            part.rename(work / file.name)
            if file.name == "config.json" and _converted_bytes(files):
                # before gigabytes are brought that nobody can convert
                _empty_model(settings, work)


def _without_delay(response: "httpx2.Response") -> None:
    """Leave how often a busy hub is asked again to the client: the hub may say a day, waited for without a word."""
    for header in ("Retry-After", "RateLimit"):
        response.headers.pop(header, None)


def _empty_model(settings: Settings, work: Path) -> "PreTrainedModel":
    """The model of config.json without its weights. Raises UserError, and removes `work`, where there is none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(work, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a stranger's config.json may break any line of transformers
        shutil.rmtree(work)
        raise UserError(f"{settings.model_id} no es un modelo causal que transformers conozca: elija otro") from error
    return model


def _convert(settings: Settings, bins: list[Path], work: Path) -> None:
    """Replace the .bin files by bfloat16 safetensors of the same tensors."""
    import torch

    state: dict[str, torch.Tensor] = {}
    for path in bins:
        try:
            # mmap: a tensor stays in the file until it is written. The format before torch 1.6 knows no such way.
            state |= torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
                raise TypeError("a state dict holds tensors")
        except (UnpicklingError, RuntimeError, TypeError, EOFError) as error:
            shutil.rmtree(work)
            raise UserError(
                f"{path.name} de {settings.model_id} no lleva solo pesos: puede llevar código, así que no se abre y se "
                "ha borrado; elija un modelo con safetensors"
            ) from error

    model = _empty_model(settings, work)
    for copy, original in model.all_tied_weights_keys.items():
        if copy in state and original in state and torch.equal(state[copy], state[original]):
            del state[copy]

    write_safetensors(state, work)
    for path in bins:
        path.unlink()


def write_safetensors(state: dict[str, "torch.Tensor"], folder: Path) -> None:
    """Write a model's tensors, each once, as bfloat16 safetensors that transformers loads.

    In files of 3 GB at most, with an index where there are several: no more than one file's tensors are in memory.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    def dtype(tensor: torch.Tensor) -> torch.dtype:
        return torch.bfloat16 if tensor.is_floating_point() else tensor.dtype

    names: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(state[name].shape, dtype=dtype(state[name]), device="meta") for name in names.values()},
        max_shard_size=_LARGEST_FILE,
    )
    for file, shard in plan.filename_to_tensors.items():
        tensors = {name: state[name].to(dtype(state[name])).contiguous() for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to make it in, alone; publish() renames it. What a cut run left there is kept.

    Raises UserError where another process has it, or where the system lets nothing be written in it.
    """
    work = folder.with_name(f".{folder.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"Otro proceso está trayendo {shown(folder)}: espere a que acabe") from error
            yield work
        finally:
            os.close(lock)
    except OSError as error:
        # the hub's client and transformers raise it with words alone, for what is not the system's
        if error.errno is None:
            raise
        raise UserError(
            f"No se puede escribir en {shown(folder.parent)}, {reason(error)}: cambie WEIGHTS_DIR"
        ) from error


@contextmanager
def room(work: Path, needed: int) -> Iterator[None]:
    """Raises UserError if the disk has not `needed` bytes for what is written within, or proves to be full."""
    from safetensors import SafetensorError

    def no_room() -> UserError:
        free = shutil.disk_usage(work).free
        return UserError(
            f"No hay sitio en {shown(work.parent)}: hacen falta {about(needed)} y quedan {about(free)} libres; "
            "libere espacio o cambie WEIGHTS_DIR, y repita: sigue donde quedó"
        )

    if needed > shutil.disk_usage(work).free:
        raise no_room()
    try:
        yield
    except SafetensorError as error:
        # Its writer has no errno, only words.
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise no_room() from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise no_room() from error


def publish(work: Path, settings: Settings, commit: str) -> None:
    """Turn a workspace into the settings' folder: write the manifest, then rename."""
    paths = sorted(path for path in work.rglob("*") if path.is_file())
    files = {path.relative_to(work).as_posix(): _File(path.stat().st_size, _sha256(path)) for path in paths}
    manifest = work / MANIFEST
    manifest.write_text(
        json.dumps(asdict(_Manifest(settings.model_id, settings.revision, commit, files)), indent=2) + "\n"
    )
    # Whole seconds: an image's layers keep no more. The safetensors library makes files that only their owner reads.
    now, mode = int(time.time()), manifest.stat().st_mode
    for path in (manifest, *paths):
        path.chmod(mode)
        os.utime(path, (now, now))
    work.rename(settings.folder)


@contextmanager
def _in_spanish(settings: Settings) -> Iterator[None]:
    """Each way in which the hub or the folder refuses, as the line that a user can act on."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging

    # The client speaks English about each retry; the bar shows it.
    logging.set_verbosity_error()
    model, hub = settings.model_id, _hub()
    no_access = f"Su token no da acceso a {model}: pídalo en https://{hub}/{model} con la cuenta del token"
    demo = "o pruebe el modelo de muestra con script/predict --demo"
    try:
        yield
    except GatedRepoError as error:
        if settings.token:
            raise UserError(no_access) from error
        raise UserError(
            f"{model} pide permiso: acéptelo en https://{hub}/{model}, cree un token en "
            f"https://{hub}/settings/tokens y póngalo en .env como HUGGINGFACE_HUB_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{model} no tiene la revisión {settings.revision}: corrija MODEL_REVISION") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{hub} no tiene ningún modelo {model}: corrija MODEL_ID o, si es privado, ponga en .env el "
            "HUGGINGFACE_HUB_TOKEN de quien pueda verlo"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if settings.token and status == 401:
            raise UserError(
                f"{hub} no reconoce su token: cópielo de nuevo de https://{hub}/settings/tokens, o quite "
                "HUGGINGFACE_HUB_TOKEN si el modelo es público"
            ) from error
        if settings.token and status == 403:
            raise UserError(no_access) from error
        raise UserError(f"{hub} responde con el error {status}: pruebe más tarde, {demo}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"Sin conexión con {hub} porque HF_HUB_OFFLINE lo pide: quite esa variable, {demo}") from error
    except (httpx2.RequestError, httpx2.InvalidURL, json.JSONDecodeError) as error:
        raise UserError(f"Sin conexión con {hub}: compruebe la red y repita, que sigue donde quedó, {demo}") from error


def _hub() -> str:
    from huggingface_hub import constants

    # The name alone: an address of a mirror may carry a password.
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shown(path: Path) -> str:
    """A path as the user would type it in the project's folder."""
    return one_line(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))


def _exactly(size: int) -> str:
    return f"{size:,}".replace(",", ".")


def _say(line: str) -> None:
    print(line, flush=True)
