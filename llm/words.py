"""Numbers as a user reads them."""


def decimal(number: float) -> str:
    """With one decimal, as in Spanish."""
    return f"{number:.1f}".replace(".", ",")
