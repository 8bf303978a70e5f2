"""Ports of this computer, and a server on one."""

import socket
import sys
from http.server import ThreadingHTTPServer
from typing import Any


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class PatientServer(ThreadingHTTPServer):
    """Prints nothing about a client that leaves: to a command in the same process it would be output of its own."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
