"""`vaflow extract`."""


def extract() -> int:
    """To be written."""
    return 1
