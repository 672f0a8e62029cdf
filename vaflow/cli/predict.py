"""`vaflow predict`."""


def predict() -> int:
    """To be written."""
    return 1
