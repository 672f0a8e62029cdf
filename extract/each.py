"""A function applied to many things in decoding processes: whatever a file does to one of them costs that one thing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vaflow.errors import VaflowError
from vaflow.extract.config import default_workers
from vaflow.extract.limits import too_much_memory
from vaflow.extract.messages import Done, Failed
from vaflow.extract.pool import ITEM_TIMEOUT, WorkerPool

Thing = TypeVar("Thing")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """One call: `function(argument)`."""

    number: int
    function: Callable[[Any], Any]
    argument: Any


@dataclass(frozen=True)
class Returned:
    """What a call returned."""

    job: int
    result: Any


def each(
    function: Callable[[Thing], Result],
    things: Sequence[Thing],
    *,
    workers: int = 0,
    item_timeout: float = ITEM_TIMEOUT,
) -> Iterator[tuple[int, Result | Failed]]:
    """(which thing, what the function returned or why it failed), as results come.

    Args:
        function: importable by name or a `partial` of such; its errors of this package, of the system and of memory
            are failures of the thing, as are crashes and hangs. What it returns is sent between processes.
        things: what it is called with.
        workers: processes; 0 chooses by machine.
        item_timeout: seconds without a sign of life after which a thing has failed; 0: none.
    """
    if not things:
        return
    tasks = (Task(number, function, thing) for number, thing in enumerate(things))
    count = min(workers or default_workers("cuda"), len(things))
    with WorkerPool(tasks, count, item_timeout=item_timeout, work=call) as pool:
        for message in pool:
            if isinstance(message, Failed):
                yield message.job, message
            elif isinstance(message, Returned):
                yield message.job, message.result


def call(task: Task, send: Callable[[Any], None]) -> None:
    """In a decoding process: make the call."""
    try:
        send(Returned(task.number, task.function(task.argument)))
    except MemoryError as error:
        send(Failed(task.number, "worker", type(error).__name__, too_much_memory()))
    except (VaflowError, OSError) as error:
        send(Failed(task.number, "worker", type(error).__name__, str(error) or repr(error)))
    else:
        send(Done(task.number))
