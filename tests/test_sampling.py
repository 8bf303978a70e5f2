"""Our sampling step beside transformers' own logits processors, on the same logits."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm.engine.sampling import (
    NOT_A_NUMBER,
    SamplingRows,
    gumbel,
    nucleus,
    penalize,
    sample,
    sample_each,
    sampling_width,
)
from llm.engine.sequence import Sampling

VOCABULARY = 5000

SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.95, top_k=50, repetition_penalty=1.1),
    Sampling(temperature=2.0, top_p=0.5, top_k=1000),
    Sampling(temperature=0.1, top_k=1),
    Sampling(temperature=1.3, top_p=0.0),
    Sampling(temperature=0.9, top_p=0.3, repetition_penalty=2.0),
    Sampling(temperature=1.0, top_k=7, repetition_penalty=1.5),
    Sampling(temperature=0.01, top_p=0.99, top_k=3),
]


def rows_of(samplings: list[Sampling]) -> SamplingRows:
    rows = SamplingRows.empty(len(samplings), torch.device("cpu"))
    for row, sampling in enumerate(samplings):
        rows.put(row, sampling)
    return rows


def logits_and_history(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCABULARY, generator=generator) * 3
    return logits, torch.randint(0, VOCABULARY, (rows, 40), generator=generator)


def reference(logits: torch.Tensor, history: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """transformers' distribution for one row: (vocabulary,) float32."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    filtered: torch.Tensor = processors(history[None], logits[None].clone())  # type: ignore[arg-type]
    return filtered[0].softmax(-1)


def distribution(logits: torch.Tensor, history: torch.Tensor, samplings: list[Sampling]) -> torch.Tensor:
    """Our distribution, all rows in one step: (rows, vocabulary) float32."""
    rows = rows_of(samplings)
    penalized = penalize(logits, history, rows.repetition_penalty)
    ids, probabilities = nucleus(penalized, rows, max(sampling_width(s, logits.shape[1]) for s in samplings))
    return torch.zeros_like(logits).scatter(1, ids, probabilities)


@pytest.mark.parametrize("seed", range(3))
def test_the_filtered_distribution_is_that_of_transformers(seed: int) -> None:
    logits, history = logits_and_history(len(SAMPLINGS), seed)
    probabilities = distribution(logits, history, SAMPLINGS)
    for row, sampling in enumerate(SAMPLINGS):
        expected = reference(logits[row], history[row], sampling)
        assert torch.equal(probabilities[row] > 0, expected > 0), sampling
        torch.testing.assert_close(probabilities[row], expected, rtol=1e-5, atol=1e-7)


def test_tokens_that_tie_with_the_last_of_top_k_are_kept() -> None:
    # bfloat16 logits tie often
    logits = torch.full((1, VOCABULARY), -10.0)
    logits[0, :9] = torch.tensor([5.0, 4, 3, 2, 2, 2, 2, 1, 1])
    sampling = Sampling(temperature=1.0, top_k=4)
    probabilities = distribution(logits, torch.tensor([[VOCABULARY - 1]]), [sampling])[0]
    assert (probabilities > 0).sum() == 7
    torch.testing.assert_close(probabilities, reference(logits[0], torch.tensor([VOCABULARY - 1]), sampling))


@pytest.mark.slow
def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits, history = logits_and_history(1, seed=5)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=20)
    expected = reference(logits[0], history[0], sampling)
    seeds, positions = 200, 200
    rows = rows_of([Sampling(0.8, 0.9, 20, seed=seed) for seed in range(seeds) for _ in range(positions)])
    draws = seeds * positions
    position = torch.arange(positions).repeat(seeds)
    drawn = sample(
        logits.expand(draws, -1), history.expand(draws, -1), rows, position, sampling_width(sampling, VOCABULARY)
    )
    counts = torch.bincount(drawn, minlength=VOCABULARY)
    assert (counts[expected == 0] == 0).all()
    # five standard deviations of each count
    spread = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 5 * spread).all()


@pytest.mark.slow
def test_the_numbers_of_neighbouring_seeds_positions_and_ids_are_uncorrelated() -> None:
    count = 100_000
    steps = torch.arange(count)
    zero = torch.zeros(1, dtype=torch.long)
    seeds = rows_of([Sampling(seed=seed) for seed in range(count)]).seed
    by_id = gumbel(seeds[:1], zero, steps[None])[0]
    by_position = gumbel(seeds[:1].expand(count), steps, zero.expand(count)[:, None])[:, 0]
    by_seed = gumbel(seeds, zero.expand(count), zero.expand(count)[:, None])[:, 0]
    assert torch.isfinite(torch.stack([by_id, by_position, by_seed])).all()
    for numbers in (by_id, by_position, by_seed):
        # of the standard Gumbel distribution, the mean is Euler's constant and the variance pi**2 / 6
        assert abs(numbers.mean() - 0.5772) < 0.02
        assert abs(numbers.var() - torch.pi**2 / 6) < 0.05
        assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 0.02
    assert (torch.corrcoef(torch.stack([by_id, by_position, by_seed])).fill_diagonal_(0).abs() < 0.02).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLINGS[1]])
def test_a_row_whose_logits_are_no_numbers_is_marked_and_the_others_are_sampled(bad: float, sampling: Sampling) -> None:
    logits, history = logits_and_history(3, seed=9)
    rows, position = rows_of([sampling] * 3), torch.arange(3)
    expected = sample(logits, history, rows, position, sampling_width(sampling, VOCABULARY))
    logits[1, 17] = bad
    ids = sample(logits, history, rows, position, sampling_width(sampling, VOCABULARY))
    assert ids.tolist() == [expected[0], NOT_A_NUMBER, expected[2]]
    logits[1] = -torch.inf
    assert sample(logits, history, rows, position, sampling_width(sampling, VOCABULARY))[1] == NOT_A_NUMBER


def test_each_row_draws_the_token_that_it_draws_alone() -> None:
    samplings = [Sampling(temperature=0), *SAMPLINGS, Sampling(temperature=0, repetition_penalty=1.8)]
    logits, history = logits_and_history(len(samplings) + 40, seed=7)
    # with few levels most tokens tie: where top_p cuts depends on how many of the likeliest are sorted
    logits[len(samplings) :] = torch.randint(0, 3, (40, VOCABULARY), generator=torch.Generator().manual_seed(0)).float()
    samplings += [Sampling(temperature=1.0, top_k=(50, 0)[seed % 2], top_p=0.5, seed=seed) for seed in range(40)]
    position = torch.arange(len(samplings)) * 100
    widths = [sampling_width(sampling, VOCABULARY) for sampling in samplings]
    together = sample_each(logits, history, rows_of(samplings), position, widths)
    for row, (sampling, width) in enumerate(zip(samplings, widths, strict=True)):
        one = slice(row, row + 1)
        alone = sample(logits[one], history[one], rows_of([sampling]), position[one], width)
        assert together[row] == alone[0], sampling


def test_temperature_0_takes_the_likeliest_token_after_the_penalty() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9, -1.0]])
    history = torch.tensor([[1]])
    for penalty, likeliest in ((1.0, 1), (1.1, 2)):
        rows = rows_of([Sampling(temperature=0, repetition_penalty=penalty)])
        assert sample(logits, history, rows, torch.tensor([2]), 0).tolist() == [likeliest]


def test_a_greedy_step_sorts_nothing_and_another_no_more_than_it_needs() -> None:
    assert sampling_width(Sampling(temperature=0, top_k=0), VOCABULARY) == 0
    for top_k, width in ((1, 2), (2, 4), (3, 8), (50, 128), (64, 128), (65, 256), (1000, 2048)):
        assert sampling_width(Sampling(temperature=1, top_k=top_k), VOCABULARY) == width
    assert sampling_width(Sampling(temperature=1), VOCABULARY) == VOCABULARY
