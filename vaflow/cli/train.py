"""`vaflow train` and `vaflow evaluate`."""


def train() -> int:
    """To be written."""
    return 1


def evaluate() -> int:
    """To be written."""
    return 1
