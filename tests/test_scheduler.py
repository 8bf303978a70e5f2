"""The scheduler: who has a row and what a pass reads, in numbers alone."""

import subprocess
import sys

import pytest

from llm.engine.prefixes import BLOCK, Prefixes, beginning
from llm.engine.scheduler import PASSES_TO_GROW, Chunk, Ragged, Rectangle, Scheduler
from llm.engine.sequence import Request, Sampling, Sequence, Status
from llm.weights.settings import ROOT


def scheduler(
    rows: int = 4, chunk: int = 64, multiple: int = 1, skips_padding: bool = False, mixes_starts: bool = False
) -> Scheduler:
    return Scheduler(rows, chunk, Rectangle(2048, multiple, skips_padding, mixes_starts), Prefixes())


def arrive(scheduler: Scheduler, prompt: int | list[int], budget: int = 5) -> Sequence:
    ids = prompt if isinstance(prompt, list) else [1] * prompt
    sequence = Sequence(Request(ids, budget, Sampling()), budget)
    scheduler.waiting.append(sequence)
    return sequence


def admit(scheduler: Scheduler) -> list[Sequence]:
    return list(iter(scheduler.admit, None))


def read(scheduler: Scheduler) -> list[int]:
    """Do the next pass. Returns how many tokens it reads of each prompt."""
    chunks = scheduler.next_pass()
    for chunk in chunks:
        chunk.sequence.cached += chunk.count
        share(scheduler, chunk.sequence)
    scheduler.prefilled(chunks)
    return [chunk.count for chunk in chunks]


def share(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.prefixes.add(beginning(sequence.ids, sequence.cached), lambda start, end: None)


def test_it_needs_no_torch() -> None:
    program = "import sys, llm.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_sequence_goes_from_waiting_to_finished() -> None:
    s = scheduler()
    sequence = arrive(s, prompt=100, budget=2)
    steps = (
        (lambda: admit(s), Status.PREFILLING),
        (lambda: read(s), Status.PREFILLING),
        (lambda: read(s), Status.DECODING),
        (lambda: s.schedule(sequence), Status.DECODING),
        (lambda: s.schedule(sequence), Status.FINISHING),
        (lambda: s.finish(sequence), Status.FINISHED),
    )
    statuses = [sequence.status]
    for step, status in steps:
        assert s.has_work
        step()
        statuses.append(sequence.status)
        assert (sequence in s.running) == (status in (Status.PREFILLING, Status.DECODING))
        assert (sequence in s.unfinished) == (status is not Status.FINISHED)
    assert not s.has_work
    assert statuses == [Status.WAITING, *(status for _, status in steps)]


def test_rows_go_to_those_who_wait_longest_and_never_to_a_cancelled_one() -> None:
    s = scheduler(rows=2)
    first, second, third, fourth = (arrive(s, 5) for _ in range(4))
    second.cancelled = True
    assert admit(s) == [first, third]
    assert second.status is Status.FINISHED and fourth.status is Status.WAITING
    s.finish(first)
    assert admit(s) == [fourth]


@pytest.mark.parametrize("budget", [1, 3])
def test_a_row_is_free_once_the_last_token_is_scheduled(budget: int) -> None:
    s = scheduler(rows=1)
    first, second = arrive(s, 5, budget), arrive(s, 5)
    assert admit(s) == [first]
    read(s)
    for _ in range(budget):
        assert admit(s) == []
        s.schedule(first)
    assert admit(s) == [second] and s.unfinished == [second, first]


@pytest.mark.parametrize(
    ("options", "prompts", "passes"),
    [
        # what is computed counts: as many tokens for each as the longest has
        ({"chunk": 52}, (4, 9, 6, 13), [[4, 9, 6, 13]]),
        ({"chunk": 51}, (4, 9, 6, 13), [[4, 9, 6], [13]]),
        ({"chunk": 51, "skips_padding": True}, (4, 9, 6, 13), [[4, 9, 6, 13]]),
        ({"chunk": 64}, (60, 2, 2), [[60], [2, 2]]),
        ({"chunk": 64, "multiple": 8}, (4, 9, 6, 13), [[4, 9, 6, 13]]),
        ({"chunk": 63, "multiple": 8}, (4, 9, 6, 13), [[4, 9, 6], [13]]),
        # a long prompt lets those pass that have come meanwhile
        ({"chunk": 32}, (70, 5), [[32], [5], [32], [6]]),
        # chunks end at a multiple
        ({"chunk": 30, "multiple": 8}, (50,), [[24], [24], [2]]),
    ],
)
def test_what_a_pass_reads(options: dict[str, int], prompts: tuple[int, ...], passes: list[list[int]]) -> None:
    s = scheduler(**options)  # type: ignore[arg-type]
    for prompt in prompts:
        arrive(s, prompt)
    admit(s)
    assert [read(s) for _ in passes] == passes
    assert s.next_pass() == []


@pytest.mark.parametrize(
    ("prompts", "passes"),
    [
        # the last token of each is left to a decode step
        ((41, 17), [[40, 16]]),
        # a chunk takes whole blocks: 48 of 64 are taken, and 16 are left for the next prompt, which is read on later
        ((41, 41, 9), [[40, 16], [8, 24]]),
        # a long prompt lets those pass that have come meanwhile
        ((200, 17), [[64], [16, 48], [64], [23]]),
    ],
)
def test_what_a_ragged_pass_reads(prompts: tuple[int, ...], passes: list[list[int]]) -> None:
    s = Scheduler(4, 64, Ragged(16), Prefixes())
    for prompt in prompts:
        place(s, prompt)
    assert [read(s) for _ in passes] == passes
    assert s.next_pass() == [] and len(s.decoding) == len(prompts)


def place(scheduler: Scheduler, prompt: int) -> None:
    """As the engine does, whose runner says where prefill passes end."""
    sequence = arrive(scheduler, prompt)
    admit(scheduler)
    sequence.prefill_end = prompt - scheduler.shape.left_to_decode
    scheduler.placed(sequence)


def test_a_prompt_of_one_token_is_decoded_at_once() -> None:
    s = Scheduler(4, 64, Ragged(16), Prefixes())
    place(s, 1)
    assert s.next_pass() == [] and len(s.decoding) == 1


MIXED = {"mixes_starts": True, "skips_padding": True}


@pytest.mark.parametrize(
    ("options", "prompts", "cached", "end", "passes"),
    [
        ({}, (30, 30), (0, 10), 30, [[(0, 0, 30)], [(1, 10, 20)]]),
        (MIXED, (30, 40, 30), (0, 20, 0), 50, [[(0, 0, 30), (1, 20, 20)], [(2, 0, 30)]]),
        # near the context's end, beside a chunk that the pass does not cut
        (MIXED, (2040, 20, 8), (2035, 0, 0), 2043, [[(0, 2035, 5), (2, 0, 8)], [(1, 0, 20)]]),
    ],
)
def test_prompts_that_start_at_other_positions_share_a_pass_where_the_layers_allow_that(
    options: dict[str, bool],
    prompts: tuple[int, ...],
    cached: tuple[int, ...],
    end: int,
    passes: list[list[tuple[int, int, int]]],
) -> None:
    s = scheduler(**options)
    sequences = [arrive(s, prompt) for prompt in prompts]
    admit(s)
    for sequence, tokens in zip(sequences, cached, strict=True):
        sequence.cached = tokens
    assert isinstance(s.shape, Rectangle) and s.shape.end(s.next_pass()) == end
    for expected in passes:
        assert s.next_pass() == [Chunk(sequences[index], start, count) for index, start, count in expected]
        read(s)


@pytest.mark.parametrize(
    ("start", "count", "multiple", "end"),
    [(0, 1, 8, 8), (0, 13, 8, 16), (16, 24, 8, 40), (0, 2047, 8, 2048), (0, 1, 1, 2), (7, 1, 1, 9), (7, 3, 1, 10)],
)
def test_where_a_pass_ends(start: int, count: int, multiple: int, end: int) -> None:
    sequence = Sequence(Request([1] * 2047, 1, Sampling()), 1)
    assert Rectangle(2048, multiple, skips_padding=False).end([Chunk(sequence, start, count)]) == end


def test_without_memory_prompts_are_read_one_by_one_in_smaller_chunks_down_to_a_smallest() -> None:
    s = scheduler(chunk=64)
    first, second = arrive(s, 30), arrive(s, 30)
    admit(s)
    assert s.read_less(s.next_pass())
    assert s.next_pass() == [Chunk(first, 0, 16)]
    assert s.read_less(s.next_pass())
    assert s.next_pass() == [Chunk(first, 0, 4)]
    assert not s.read_less(s.next_pass())
    s.finish(first)
    assert s.next_pass() == [Chunk(second, 0, 4)]


def test_a_chunk_grows_back_after_passes_with_memory() -> None:
    s = scheduler(chunk=64)
    arrive(s, 2000)
    admit(s)
    s.read_less(s.next_pass())
    assert [read(s) for _ in range(PASSES_TO_GROW)] == [[16]] * PASSES_TO_GROW
    assert [read(s) for _ in range(PASSES_TO_GROW)] == [[32]] * PASSES_TO_GROW
    assert [read(s) for _ in range(PASSES_TO_GROW + 1)] == [[64]] * (PASSES_TO_GROW + 1)


def test_a_sequence_without_memory_waits_first_in_line_until_a_row_is_given_back() -> None:
    s = scheduler(rows=3)
    first, second, third = (arrive(s, 30) for _ in range(3))
    assert admit(s) == [first, second, third]
    second.cached = 8
    fourth = arrive(s, 30)
    assert s.wait_for_a_row(second)
    assert (second.status, second.cached) == (Status.WAITING, 0)
    assert admit(s) == [], "there is a row, and no memory for it"
    s.finish(third)
    assert admit(s) == [second, fourth]


def test_the_only_sequence_with_a_row_has_nothing_to_wait_for() -> None:
    s = scheduler()
    arrive(s, 30)
    (only,) = admit(s)
    assert not s.wait_for_a_row(only)
    assert s.running == [only]


TEXT = list(range(3 * BLOCK))


def test_who_could_go_on_from_what_is_being_read_waits_until_it_is_read_and_lets_others_pass() -> None:
    s = scheduler(chunk=2 * BLOCK)
    s.prefixes.limit(8)
    first, second, other, short = (arrive(s, ids) for ids in ([*TEXT, 1], [*TEXT, 2], [9] * 100, TEXT[:BLOCK]))
    third = arrive(s, [*TEXT[:BLOCK], *[7] * BLOCK])
    assert admit(s) == [first, other, short]
    read(s)
    # of the first prompt two blocks are read: all that the third shares
    assert admit(s) == [third]
    while first.status is Status.PREFILLING:
        read(s)
    s.finish(other)
    assert admit(s) == [second]


def test_where_a_reader_leaves_another_one_reads_on() -> None:
    s = scheduler(chunk=BLOCK)
    s.prefixes.limit(8)
    first, second, third = (arrive(s, [*TEXT, last]) for last in range(3))
    assert admit(s) == [first]
    read(s)
    s.finish(first)
    assert admit(s) == [second]
    second.cached = s.prefixes.cached(second.ids)
    assert second.cached == BLOCK
    read(s)
    read(s)
    assert admit(s) == [third]


@pytest.mark.parametrize("most", [0, 1])
def test_nobody_waits_for_what_there_is_no_memory_to_hold(most: int) -> None:
    s = scheduler(chunk=BLOCK)
    s.prefixes.limit(most)
    sequences = [arrive(s, [*TEXT, last]) for last in range(3)]
    admitted = admit(s)
    while len(admitted) < 3:
        assert sum(read(s)) <= BLOCK
        admitted += admit(s)
    assert admitted == sequences
    assert sequences[0].cached == most * BLOCK
