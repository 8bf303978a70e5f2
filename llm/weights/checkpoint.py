"""A model's folder, weights/NAME: made whole or not at all, and verified at every start.

The folder holds what transformers loads, and manifest.json: the id, the revision that was asked for, its commit, and
each file's size and sha256. It grows under another name and is renamed when whole. A file that the manifest does not
name is refused. A folder without a manifest is the user's own: it is loaded unverified.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from llm.errors import UserError
from llm.weights import formats
from llm.weights.settings import ROOT, Settings
from llm.words import about, one_line, reason, thousands

MANIFEST = "manifest.json"

COMMIT = re.compile(r"[0-9a-f]{40}")


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
class _File:
    size: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    id: str
    revision: str | None
    commit: str
    files: dict[str, _File]


def verify(settings: Settings, *, thorough: bool = False) -> Weights:
    """The settings' model in its folder, which is never changed.

    `thorough` hashes every file; otherwise only those that were touched since the manifest was written. Raises
    UserError.
    """
    try:
        return _verify(settings, thorough)
    except OSError as error:
        raise UserError(
            f"No se puede leer {shown(settings.folder)}, {reason(error)}: arréglelo, o cambie WEIGHTS_DIR"
        ) from error


def check_links(*paths: Path) -> None:
    """Raises UserError for a link that leads nowhere, as a link to weights does in an image of `cog build`."""
    for path in paths:
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(
                f"{shown(path)} es un enlace a {one_line(os.readlink(path))}, que aquí no existe: ponga en su lugar lo "
                "que enlaza (script/push sigue los enlaces; cog build y cog predict, no)"
            )


def _verify(settings: Settings, thorough: bool) -> Weights:
    folder, name = settings.folder, shown(settings.folder)
    check_links(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        # but those of editors
        check_links(*folder.rglob("[!.]*"))
        formats.check_folder(name, folder)
        return Weights(folder, None, f"{name} (carpeta propia)", verified=False)

    if manifest.id != settings.model_id:
        raise UserError(f"{name} contiene {manifest.id} y MODEL_ID pide {settings.model_id}: mueva o borre esa carpeta")
    if settings.revision not in (None, manifest.revision, manifest.commit):
        raise UserError(
            f"{name} es la revisión {manifest.revision or 'main'} ({manifest.commit}) y MODEL_REVISION pide "
            f"{settings.revision}: mueva o borre esa carpeta"
        )

    way_out = f"borre {name} y se descargará de nuevo (si el cambio es suyo, borre solo {name}/{MANIFEST})"
    entries = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not is_folder(path)}
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
            sizes = f"mide {thousands(stat.st_size)} bytes en vez de {thousands(expected.size)}"
            raise UserError(f"{name}/{file} está cortado o cambiado, {sizes}: {way_out}")
        # Hashing reads about 1 GB a second, too long for every boot of the server. publish() gives all files the
        # manifest's time, and whoever writes to one changes it; a copy that keeps no times is only hashed in vain.
        if (thorough or stat.st_mtime_ns != stamp) and sha256(path) != expected.sha256:
            raise UserError(f"{name}/{file} está alterado, su sha256 no es el de {MANIFEST}: {way_out}")
    commit = manifest.commit[:7] if COMMIT.fullmatch(manifest.commit) else manifest.commit
    return Weights(folder, manifest.commit, f"{name} ({manifest.id}, {commit})", verified=True)


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
            f"{shown(path)} no se entiende: borre {shown(folder)} y se descargará de nuevo, o solo {MANIFEST} si los "
            "archivos son suyos"
        ) from error


def _checked_name(name: str) -> str:
    """A file's name in a manifest, as it is. Raises ValueError where it does not lead to one place in the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or not name.isprintable():
        raise ValueError(name)
    return name


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, for one process, in which to make it; publish() renames it. It still holds what an
    interrupted run left there.

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
                raise UserError(f"Otro proceso está descargando {shown(folder)}: espere a que acabe") from error
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
    files = {path.relative_to(work).as_posix(): _File(path.stat().st_size, sha256(path)) for path in paths}
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


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shown(path: Path) -> str:
    """A path as the user would type it in the project's folder."""
    return one_line(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))
