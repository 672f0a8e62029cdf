"""HTML pages that open from disk: one template system, one stylesheet, no network.

Templates are Jinja2 with automatic escaping, so names and labels from data sets appear as text. Scripts and styles are
inlined; a content security policy allows these scripts by their hash and forbids connections.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vaflow.errors import visible

_HERE = Path(__file__).parent
UPLOT = "uplot.min.js"  # version 1.6.32, MIT: uplot.LICENSE.txt


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["number"] = number
    environment.filters["signed"] = lambda value, places=3: number(value, places, sign=True)
    return environment


def _shown(value: Any) -> Any:
    """Return text on one line, with control and bidirectional characters spelled out; other values unchanged."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def number(value: float | None, places: int = 3, *, sign: bool = False) -> str:
    """A number for a table; a dash for None, and a true minus sign."""
    if value is None or value != value:
        return "\u2013"
    return f"{value:{'+' if sign else ''}.{places}f}".replace("-", "\u2212")


def render(
    template: str,
    *,
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    folder: bool = False,
    connect: bool = False,
    demonstration: Sequence[str] = (),
    **values: Any,
) -> str:
    """Return a page.

    Args:
        template: file name below `templates`.
        scripts: file names below `static`, inlined in this order.
        data: JSON for the scripts, as `JSON.parse(document.getElementById("data").textContent)`.
        folder: the page loads scripts and media from files below or beside its own folder.
        demonstration: encoders with random weights, which the page names.
        connect: the page may send requests to the server it came from.
        values: for the template.

    Raises:
        ValueError: `data` holds NaN or infinity.
    """
    sources = [_static(name) for name in scripts]
    local = " 'self' file:" if folder else ""
    hashes = "".join(f" 'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in sources)
    policy = {
        "default-src": "'none'",
        "script-src": f"{hashes}{local}".strip() or "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": f"data: blob:{local}",
        "media-src": f"blob:{local}",
        "connect-src": "'self'" if connect else "'none'",
        "form-action": "'none'",
        "base-uri": "'none'",
    }
    return (
        _environment()
        .get_template(template)
        .render(
            policy=Markup("; ".join(f"{name} {value}" for name, value in policy.items())),
            style=Markup(_static("style.css") + (_static("uplot.min.css") if UPLOT in scripts else "")),
            scripts=[Markup(source) for source in sources],
            demonstration=demonstration,
            data=None if data is None else Markup(script_json(data)),
            **values,
        )
    )


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element and as JavaScript.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _static(name: str) -> str:
    return (_HERE / "static" / name).read_text("utf-8")
