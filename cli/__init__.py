"""This package on one's own computer, without Docker: the Python behind the commands in script/."""

import os
import signal
import sys


def _leave(*_: object) -> None:
    # at once: what is being imported may make another error of an exception
    os.write(2, b"\nInterrumpido\n")
    os._exit(130)


# Python's name of a command until it has found it: what that imports takes a while, and a Ctrl-C may come meanwhile.
# One that is ignored, as behind nohup or `&`, stays so.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
