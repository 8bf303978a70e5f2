"""This package on one's own computer, without Docker: the Python behind the commands in script/."""

import os
import signal
import sys


def _leave(*_: object) -> None:
    # not an exception: a module that is being imported may turn it into another error
    os.write(2, b"\nInterrumpido\n")
    os._exit(130)


# While `python -m` imports a command, sys.argv[0] is "-m". That takes a while, and a Ctrl-C may come meanwhile.
# A SIGINT that is ignored, as behind nohup or `&`, stays ignored.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
