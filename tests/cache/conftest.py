"""Fixtures of the cache's tests."""

import os

import pytest

from vaflow.cache.schema import STORES


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    """Every store in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def no_flush(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable fsync, which dominates the run time; `test_cache_writers` tests it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
