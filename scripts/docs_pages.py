"""MkDocs hook: pages that are generated from the README, the command line and the notebook when the site is built."""

import io
import json
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Links of pages at the top of the repository -> pages of the site; None: text without a link.
LINKS = {
    "docs/pictures/": "pictures/",
    "docs/decisions/": "decisions/",
    "docs/": "",
    "cache_schema.md": "cache-format.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
WITHOUT_PAGE = r"\[([^\]]+)\]\((LICENSE|CITATION\.cff)\)"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "index.md": top_level_page("README.md"),
        "contributing.md": top_level_page("CONTRIBUTING.md"),
        "security.md": top_level_page("SECURITY.md"),
        "changelog.md": top_level_page("CHANGELOG.md"),
        "commands.md": commands_page(),
        "notebook.md": notebook_page(ROOT / "docs" / "notebook.ipynb"),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def top_level_page(name: str) -> str:
    """A page of the repository's root with its links changed to those of the site."""
    text = re.sub(WITHOUT_PAGE, r"\1", (ROOT / name).read_text("utf-8"))
    for link, page in LINKS.items():
        text = text.replace(f"]({link}", f"]({page}")
    return text


def commands_page() -> str:
    """The help page of every command, as printed on a terminal of 78 columns, which fit the site's code blocks."""
    from vaflow.cli import app

    lines = ["# Commands", "", "Generated from `vaflow COMMAND --help`.", "", "```text", help_of([]), "```"]
    names = [[name] for name, hidden in registered(app) if not hidden]
    for group in app.registered_groups:
        names += [[str(group.name), name] for name, hidden in registered(group.typer_instance) if not hidden]
    for name in names:
        lines += ["", f"## vaflow {' '.join(name)}", "", "```text", help_of(name), "```"]
    return "\n".join(lines) + "\n"


def registered(app: Any) -> list[tuple[str, bool]]:
    """Name of every command of an app, and whether it is hidden."""
    return [(str(c.name or c.callback.__name__), c.hidden) for c in app.registered_commands]


def help_of(arguments: list[str]) -> str:
    """The complete help page of one command."""
    from vaflow.cli import main

    os.environ |= {"COLUMNS": "78", "NO_COLOR": "1"}
    for option in ("--help-all", "--help"):
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(io.StringIO()):
            if main([*arguments, option]) == 0:
                return output.getvalue().rstrip()
    raise RuntimeError(f"no help page: {arguments}")


def notebook_page(path: Path) -> str:
    """The cells of a notebook as Markdown; the outputs are not stored and not shown."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
