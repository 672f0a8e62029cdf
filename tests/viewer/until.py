"""Wait for a page."""

from typing import Any


def until(page: Any, expression: str) -> None:
    """Wait until an expression holds: the page's policy forbids `wait_for_function`, which evaluates in the page."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within 15 s: {expression}")
