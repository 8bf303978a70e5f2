"""The folder in which `cog push` runs: what the image needs and nothing else, in the same place for every push.

Cog makes a layer of every folder with large files, and does not read .dockerignore: in the project's folder it would do
so with .venv and other models, which Docker leaves out, and the push would fail. Cog also notes in .cog, in the folder
where it runs, which weights it has built: in a new folder it would build them again each time.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pathspec import GitIgnoreSpec

from llm.errors import UserError
from llm.weights import checkpoint
from llm.weights.settings import ROOT, Settings
from llm.words import reason

COG = ".cog"
"""Cog's own folder. It never goes into an image."""

# Beside Cog's notes: the id of the image that they describe.
_IMAGE = Path(COG, "weights-image")


@contextmanager
def staged(settings: Settings, image: str) -> Iterator[Path]:
    """Fill the folder with the project and the settings' weights; after the block, only Cog's notes stay in it.

    With notes Cog takes the weights for built. `image` is the id of the weights' image that Docker has now: the notes
    are removed if they describe another one, which may be gone, or was built elsewhere or for another name.
    One push at a time may use the folder. Raises UserError.
    """
    # beside the weights: hard links need the same file system
    folder = settings.weights_dir / ".push"
    with _in_spanish(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        with _in_spanish(folder):
            # the rest of a push that was killed
            _clear(folder)
            notes, noted = folder / COG, folder / _IMAGE
            if notes.exists() and not (image and noted.is_file() and noted.read_text() == image):
                shutil.rmtree(notes)
            left_out = dockerignore()
            stage(folder, lambda path: left_out(path) or ROOT / path in (settings.weights_dir, folder))
            shutil.copytree(settings.folder, folder / place(settings), copy_function=_link)
        yield folder
    finally:
        with _in_spanish(folder):
            _clear(folder)
        os.close(lock)


def note(folder: Path, image: str) -> None:
    """Write down the id of the image that Cog made of the folder's weights. Raises UserError."""
    with _in_spanish(folder):
        (folder / COG).mkdir(exist_ok=True)
        (folder / _IMAGE).write_text(image)


@contextmanager
def _in_spanish(folder: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise UserError("Ya hay otro script/push en marcha: espere a que acabe") from error
    except shutil.Error as error:
        # (source, target, reason) of each file that was not copied
        source, *_ = error.args[0][0]
        raise UserError(
            f"No se puede copiar {checkpoint.shown(Path(source))}: corrija sus permisos o quítelo de la carpeta"
        ) from error
    except OSError as error:
        raise UserError(f"No se puede preparar la copia en {checkpoint.shown(folder)}: {reason(error)}") from error


def place(settings: Settings) -> Path:
    """The folder of the settings' model in the image."""
    return Path("weights", settings.folder.name)


def dockerignore() -> Callable[[Path], bool]:
    """A function that tells whether Docker leaves a path of the project out of the image."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    # Docker's rules start at the project's folder; git's, without a slash, would match anywhere.
    rules = [re.sub(r"^(!?)/?", r"\1/", line) for line in lines if line.strip() and not line.startswith("#")]
    return GitIgnoreSpec.from_lines(rules).match_file


def stage(folder: Path, left_out: Callable[[Path], bool]) -> None:
    """Copy the project into a folder, without the weights and what is `left_out`."""

    def ignored_names(directory: str, names: list[str]) -> set[str]:
        paths = [Path(directory, name).relative_to(ROOT) for name in names]
        # staged() adds the weights
        ignored = {path.name for path in paths if left_out(path) or path.parts[0] in (COG, "weights")}
        for path in paths:
            if path.name not in ignored and not _can_be_copied(ROOT / path):
                print(
                    f"Se deja fuera {checkpoint.shown(path)}: no es un archivo, o es un enlace que no lleva a ninguno"
                )
                ignored.add(path.name)
        return ignored

    shutil.copytree(ROOT, folder, ignore=ignored_names, dirs_exist_ok=True)
    shutil.copy2(ROOT / ".dockerignore", folder)


def _clear(folder: Path) -> None:
    """Remove all but Cog's notes."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != COG:
            for directory, _, _ in os.walk(path):
                # a read-only folder cannot be emptied
                os.chmod(directory, 0o700)
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _can_be_copied(path: Path) -> bool:
    if path.is_dir():
        # a link to a folder around it would be copied without end
        return not path.parent.resolve().is_relative_to(path.resolve())
    return path.is_file()


def _link(source: str, target: str) -> None:
    try:
        # links to the file itself: the hub's cache holds symbolic links
        os.link(os.path.realpath(source), target)
    except OSError:
        # another file system, or one without links; if the disk is what is wrong, copying says so
        shutil.copy2(source, target)
