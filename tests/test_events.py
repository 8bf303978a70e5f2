"""Cog's streams, as the commands read them: in whatever pieces they arrive, and whatever an answer holds."""

import pytest

from cli import events

# each of these ends a line in Python, and none does in a stream of events
LINE_ENDS = "\x85\u2028\u2029"

STREAM = f"""event: start
data: {{"status": "processing"}}

event: output
data: {{"chunk": "año{LINE_ENDS}", "index": 0}}

event: completed
data: {{"status": "succeeded"}}

"""


@pytest.mark.parametrize("size", [1, 2, 7, len(STREAM) * 2])
def test_a_stream_is_the_same_in_any_pieces(size: int) -> None:
    content = STREAM.encode()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    assert list(events.read(pieces)) == [
        ("start", {"status": "processing"}),
        ("output", {"chunk": f"año{LINE_ENDS}", "index": 0}),
        ("completed", {"status": "succeeded"}),
    ]
