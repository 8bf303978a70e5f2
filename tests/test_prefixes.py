"""Which beginnings of prompts are held, in ids alone; tests/test_sharing.py has them in the engine."""

import random
import subprocess
import sys

import pytest

from llm.engine.prefixes import BLOCK, Prefixes, as_bytes, beginning
from llm.weights.settings import ROOT


def prefixes(most: int, shares: bool = True) -> "Prefixes[bytes]":
    made: Prefixes[bytes] = Prefixes(shares)
    made.limit(most)
    return made


def add(prefixes: "Prefixes[bytes]", ids: list[int]) -> None:
    """As blocks, the ids that they are for."""
    prefixes.add(as_bytes(ids), lambda start, end: as_bytes(ids[start:end]))


def test_they_need_no_torch() -> None:
    program = "import sys, llm.engine.prefixes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_whole_blocks_are_held_and_the_last_token_of_a_prompt_is_always_read() -> None:
    some = prefixes(most=8)
    add(some, list(range(3 * BLOCK + 10)))
    for tokens, cached in [(10, 0), (BLOCK, 0), (BLOCK + 1, 1), (2 * BLOCK, 1), (3 * BLOCK + 1, 3), (4 * BLOCK, 3)]:
        assert some.cached(as_bytes(list(range(tokens)))) == cached * BLOCK
    assert some.cached(as_bytes([1, *range(1, 2 * BLOCK)])) == 0


def test_what_begins_alike_is_held_once() -> None:
    some, text = prefixes(most=8), list(range(2 * BLOCK))
    for ending in range(1000, 1003):
        add(some, [*text, *[ending] * BLOCK])
    assert len(some) == 2 + 3


def test_the_least_recently_used_goes_first_from_its_end() -> None:
    some = prefixes(most=4)
    first, second = [1] * (2 * BLOCK), [2] * (2 * BLOCK)
    add(some, first)
    add(some, second)
    some.use(as_bytes([*first, 0]))
    add(some, [3] * BLOCK)
    assert [some.cached(as_bytes([*ids, 0])) for ids in (first, second)] == [2 * BLOCK, BLOCK]
    some.limit(2)
    assert [some.cached(as_bytes([*ids, 0])) for ids in (first, second)] == [BLOCK, 0]


def test_more_than_there_is_memory_for_is_held_from_its_beginning() -> None:
    some = prefixes(most=3)
    add(some, [1] * (5 * BLOCK))
    assert some.cached(as_bytes([1] * (9 * BLOCK))) == 3 * BLOCK


def test_the_templates_prefix_has_any_length_and_stays() -> None:
    for shares in (True, False):
        some = prefixes(most=2, shares=shares)
        template = list(range(25))
        some.add_template(as_bytes(template), b"template")
        some.limit(0)
        some.clear()
        some.forget(as_bytes(template))
        assert some.use(as_bytes([*template, 7])) == (25, [b"template"])
        assert some.cached(as_bytes(template)) == some.cached(as_bytes([7, *template])) == 0


def test_without_sharing_nothing_else_is_held() -> None:
    some = prefixes(most=8, shares=False)
    add(some, [1] * (2 * BLOCK))
    assert len(some) == some.most == some.cached(as_bytes([1] * (3 * BLOCK))) == 0


def test_a_copy_that_fails_leaves_what_was_held() -> None:
    some, ids = prefixes(most=8), [1] * (4 * BLOCK)
    add(some, ids[:BLOCK])

    def copy(start: int, end: int) -> bytes:
        if end > 3 * BLOCK:
            raise MemoryError
        return as_bytes(ids[start:end])

    with pytest.raises(MemoryError):
        some.add(as_bytes(ids), copy)
    assert len(some) == 1 and some.cached(as_bytes(ids)) == BLOCK


def test_whatever_is_added_used_and_dropped_a_prompt_gets_its_own_blocks_without_a_gap() -> None:
    draw = random.Random(0)
    some, lengths = prefixes(most=12), set()
    for _ in range(3000):
        # each block is one of two, so that many prompts begin alike
        ids = [id for id in draw.choices(range(2), k=draw.randrange(6)) for _ in range(BLOCK)]
        if draw.random() < 0.5:
            add(some, ids)
        prompt = as_bytes([*ids, 99])
        cached = some.cached(prompt)
        held, blocks = some.use(prompt)
        assert held == cached and b"".join(blocks) == beginning(prompt, held)
        lengths.add(held // BLOCK)
        if draw.random() < 0.1:
            some.limit(draw.randrange(3, 12))
        if draw.random() < 0.05:
            some.forget(as_bytes(ids))
            assert some.cached(prompt) == 0
        assert len(some) <= some.most
    assert lengths == {0, 1, 2, 3, 4, 5}
