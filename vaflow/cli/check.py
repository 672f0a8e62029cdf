"""`vaflow check`."""


def check() -> int:
    """To be written."""
    return 1
