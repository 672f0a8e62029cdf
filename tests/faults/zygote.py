"""A process that has imported everything and forks commands, so that they start immediately.

Reads one JSON object per line and answers with one: {"run": ...} -> {"pid"}, {"reap": pid} -> {"code"} of a command
that has ended (negative: the signal that ended it). Run as a program by `lab.Lab`.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

IMPORTED = """matplotlib.backends.backend_agg matplotlib.figure mpl_toolkits.mplot3d torch._dynamo
torch._inductor.config torch.utils.tensorboard
typer._adapters typer._click.decorators zarr vaflow.cache.maintenance vaflow.cli vaflow.extract.encoding
vaflow.extract.loop vaflow.extract.pipeline vaflow.train.scores vaflow.train.plots vaflow.train.train_run"""


def preload() -> None:
    """Import what the commands import lazily; nothing that starts a thread."""
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED.split():
        importlib.import_module(name)
    from blank_figures import FIGURES, plot_blank

    from vaflow.encoders import build_encoder
    from vaflow.train import plots

    for name in FIGURES:
        setattr(plots, name, plot_blank)
    for name in ("clip-tiny", "ast-tiny"):
        build_encoder(name)
    gc.collect()
    gc.freeze()  # otherwise every fork copies the objects that garbage collection visits
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        print(f"the zygote has {threads} threads", file=sys.stderr)


def become(job: dict[str, Any]) -> None:
    """Run the command in the child, in its own session. Does not return."""
    code = 1
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            handle = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        exec(compile(job["before"], "<before>", "exec"), {})  # a fault that the test injects
        from vaflow.cli import main

        code = main(job["args"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - as a real process: a traceback and 1
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # the test has not closed it
                stream.flush()
        _leave(code)


def _leave(code: int) -> None:
    """Exit like the interpreter, without returning into the zygote's frames."""
    import atexit
    import multiprocessing.util
    import threading

    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    atexit._clear()
    os._exit(code)


def main() -> None:
    """Serve until standard input ends."""
    preload()
    answer: dict[str, Any] = {"ready": os.getpid()}
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        if "run" in request:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                become(request["run"])
            answer = {"pid": pid}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])}


if __name__ == "__main__":
    main()
