"""Saves the index now and then while a long run adds to a cache: after a kill, only what came later is read again."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vaflow.errors import CacheError

log = logging.getLogger(__name__)

EVERY = 300.0  # seconds between two savings
SHARE = 50  # a pause lasts that many times as long as the last saving took: at most 2 % of a slow disk's time


@contextmanager
def now_and_then(save: Callable[[], None]) -> Iterator[None]:
    """Call `save` in a thread of its own while the block runs. A disk that refuses costs that saving only."""
    ended = threading.Event()

    def work() -> None:
        pause = EVERY
        while not ended.wait(pause):
            began = time.monotonic()
            try:
                save()
            except (OSError, CacheError) as error:
                log.info("the index was not saved: %s", error)
            pause = max(EVERY, SHARE * (time.monotonic() - began))

    thread = threading.Thread(target=work, name="vaflow-index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
