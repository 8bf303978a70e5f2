"""Numbers, names and the system's reasons as a user reads them."""

import errno
import os
from collections.abc import Callable

Say = Callable[[str], object]
"""Where a line for the user goes: whoever starts something passes it on."""

_REASONS = {
    errno.ENOENT: "no existe",
    errno.EISDIR: "es una carpeta",
    errno.ENOTDIR: "parte de la ruta no es una carpeta",
    errno.EACCES: "falta permiso",
    errno.EPERM: "falta permiso",
    errno.EROFS: "el disco es de solo lectura",
    errno.ENOSPC: "el disco está lleno",
    errno.EDQUOT: "se acabó su cuota de disco",
    errno.ENAMETOOLONG: "el nombre es demasiado largo",
    errno.ELOOP: "los enlaces dan vueltas",
    errno.EEXIST: "ya existe",
    errno.EIO: "el disco falla",
    errno.ENOEXEC: "no es un programa",
    errno.EBADF: "está cerrado",
    errno.EMFILE: "hay demasiados archivos abiertos",
}


def unsaid(line: str) -> None:
    """For those who want no lines."""


def decimal(number: float) -> str:
    """With one decimal, as in Spanish."""
    return f"{number:.1f}".replace(".", ",")


def thousands(number: float) -> str:
    """Without decimals, its thousands apart, as in Spanish."""
    return f"{number:,.0f}".replace(",", ".")


def about(size: int) -> str:
    """Bytes, as a person says them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{decimal(size / scale)} {unit}"
    return f"{size} bytes"


def first_line(error: BaseException) -> str:
    """What a library says is wrong, without the pages that some add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(text: str) -> str:
    """A name that may hold anything, fit to stand in a message."""
    return "".join(character if character.isprintable() else "?" for character in text)


def reason(error: OSError) -> str:
    """Why the system refused, in a few words that follow a comma or a colon."""
    if error.errno is None:
        return str(error)
    return _REASONS.get(error.errno) or f"{os.strerror(error.errno)} ({errno.errorcode.get(error.errno, error.errno)})"
