"""`vaflow demo`."""


def demo() -> int:
    """To be written."""
    return 1
