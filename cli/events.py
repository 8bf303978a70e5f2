"""The server-sent events in which Cog streams a prediction: bytes, as they come -> each event's name and data."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

Event = tuple[str, dict[str, Any]]


class Reader:
    """Keeps the beginning of an event until the rest of it arrives."""

    def __init__(self) -> None:
        self._name = ""
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that `piece` completes. It may end anywhere, even inside a character."""
        # at "\n" alone: JSON may hold other characters that end a line in Python, such as U+2028
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            field, _, value = line.decode().partition(": ")
            if field == "event":
                self._name = value
            elif field == "data":
                yield self._name, json.loads(value)


def read(pieces: Iterable[bytes]) -> Iterator[Event]:
    """The events of a whole stream."""
    reader = Reader()
    for piece in pieces:
        yield from reader.feed(piece)
