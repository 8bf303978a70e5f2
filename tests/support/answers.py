"""What a request got from the engine."""

from llm.engine.sequence import Generation


def tokens_of(answer: Generation) -> list[int]:
    """Its tokens up to its end, however they came."""
    return [token for tokens in answer for token in tokens]
