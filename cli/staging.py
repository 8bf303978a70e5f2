"""The folder in which `cog push` runs: what the image needs and nothing else, at the same place from push to push.

Cog gives a layer to every folder with large files that it finds, without a look at .dockerignore: in this tree also to
.venv and to other models, which Docker then does not see, and the push stops. And it notes in .cog, below the folder
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

# Beside Cog's notes: the id of the image that they speak of.
_IMAGE = Path(COG, "weights-image")


@contextmanager
def staged(settings: Settings, image: str) -> Iterator[Path]:
    """The folder, filled with the project and the settings' weights; afterwards it holds no more than Cog's notes.

    By its notes alone Cog takes the weights for built. So they go too unless `image`, the id of what Docker now has for
    the weights, is the one of note(): that may be gone since, or be made elsewhere or for another name.
    One push at a time has the folder. Raises UserError.
    """
    # beside the weights, where a link to them can be
    folder = settings.weights_dir / ".push"
    with _in_spanish(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        with _in_spanish(folder):
            # what a push that was killed left
            _clear(folder)
            notes, known = folder / COG, folder / _IMAGE
            if notes.exists() and not (image and known.is_file() and known.read_text() == image):
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
    """Keep the id of the image that Cog made of the folder's weights. Raises UserError."""
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
        # what did not work, file by file
        source, *_ = error.args[0][0]
        raise UserError(
            f"No se puede copiar {checkpoint.shown(Path(source))}: corrija sus permisos o quítelo de la carpeta"
        ) from error
    except OSError as error:
        raise UserError(f"No se puede preparar la copia en {checkpoint.shown(folder)}: {reason(error)}") from error


def place(settings: Settings) -> Path:
    """Where the settings' model goes in the image."""
    return Path("weights", settings.folder.name)


def dockerignore() -> Callable[[Path], bool]:
    """Whether Docker leaves a path of the project out of the image."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    # Docker's rules start at the project's folder; git's, without a slash, would match anywhere.
    rules = [re.sub(r"^(!?)/?", r"\1/", line) for line in lines if line.strip() and not line.startswith("#")]
    return GitIgnoreSpec.from_lines(rules).match_file


def stage(folder: Path, left_out: Callable[[Path], bool]) -> None:
    """Copy the project into a folder, without the weights and what is `left_out`."""

    def passed_over(directory: str, names: list[str]) -> set[str]:
        paths = [Path(directory, name).relative_to(ROOT) for name in names]
        # the weights come apart
        ignored = {path.name for path in paths if left_out(path) or path.parts[0] in (COG, "weights")}
        for path in paths:
            if path.name not in ignored and not _can_be_copied(ROOT / path):
                print(
                    f"Se deja fuera {checkpoint.shown(path)}: no es un archivo, o es un enlace que no lleva a ninguno"
                )
                ignored.add(path.name)
        return ignored

    shutil.copytree(ROOT, folder, ignore=passed_over, dirs_exist_ok=True)
    shutil.copy2(ROOT / ".dockerignore", folder)


def _clear(folder: Path) -> None:
    """Remove all but Cog's notes."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != COG:
            for directory, _, _ in os.walk(path):
                # a copy of a folder in which nobody may write cannot be emptied
                os.chmod(directory, 0o700)
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _can_be_copied(path: Path) -> bool:
    if path.is_dir():
        # a link to a folder that it is in has no end
        return not path.parent.resolve().is_relative_to(path.resolve())
    return path.is_file()


def _link(source: str, target: str) -> None:
    try:
        # of the file itself: the hub's cache holds its files as symbolic links
        os.link(os.path.realpath(source), target)
    except OSError:
        # another file system, or one without links; if the disk is what is wrong, copying says so
        shutil.copy2(source, target)
