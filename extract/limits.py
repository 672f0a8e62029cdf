"""What a file may ask of us. Headers can claim anything; what exceeds these is refused before memory goes into it."""

from contextlib import suppress
from pathlib import Path

from vaflow.errors import MediaError, explain
from vaflow.timeline import Floats

MAX_SECONDS = 24 * 3600.0  # of one clip
MAX_GAP = 600.0  # seconds between two frames: grid, windows and sound of the hole between them would be made
MAX_PACKETS = 20_000_000  # of one file: more than a day of 120 frames and 100 blocks of sound a second
MAX_CHANNELS = 64
SOUND_RATES = (1000, 768_000)  # samples per second; beyond them a header is wrong
WORKER_MEMORY = 4 * 2**30  # bytes that a decoding process may take


def check_span(path: Path, times: Floats) -> None:
    """Whether frame times [N] seconds, ascending, N >= 1, are those of a recording that can be.

    Raises:
        MediaError: the last one is before 0 or later than `MAX_SECONDS`, or there is a hole longer than `MAX_GAP`.
    """
    gap = float((times[1:] - times[:-1]).max()) if times.size > 1 else 0.0
    problem = None
    if times[-1] < 0:
        problem, expected, got = "ends before it begins", "frames at 0 s or later", f"the last one at {times[-1]:.2f} s"
    elif times[-1] > MAX_SECONDS:
        problem, expected, got = "claims to be too long", f"at most {MAX_SECONDS / 3600:g} h", f"{times[-1] / 3600:g} h"
    elif gap > MAX_GAP:
        problem, expected, got = "has a hole", f"a frame every {MAX_GAP:g} s at least", f"none for {gap:g} s"
    if problem is not None:
        remedy = "Its times are damaged; copy it again, or write it anew (ffmpeg -fflags +genpts -i OLD -c copy NEW)"
        raise MediaError(explain(f"{path} {problem}", expected=expected, got=got, remedy=remedy))


def limit_memory(limit: int = WORKER_MEMORY) -> None:
    """Have this process refused memory beyond `limit` bytes: an error in the file that asked, not a full machine.

    Where the system knows no such limit, or has a lower one, nothing changes.
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > limit:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def too_much_memory() -> str:
    """What is said of a clip whose reading was refused memory."""
    return explain(
        "Reading the clip takes more memory than a decoding process may have",
        expected=f"at most {WORKER_MEMORY / 2**30:g} GiB",
        remedy="The file is damaged, or far larger than others; leave it out, or cut it into parts",
    )
