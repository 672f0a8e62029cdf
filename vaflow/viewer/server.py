"""A server for the viewer on this machine only: it plays clips and saves ratings into a directory.

It binds to the loopback address, answers only to its own host name, and accepts ratings only with the token that is in
its page. Files that it serves are those of the viewer; it lists no directories.
"""

import json
import re
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from vaflow.errors import DataError, UsageError, explain
from vaflow.files import write_file
from vaflow.viewer.page import Viewer

HOST = "127.0.0.1"
_LIMIT = 64 * 2**20  # bytes of one posted rating
_BLOCK = 2**20
_ROW = re.compile(r"(\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?),[^,\n]*")
_NAME = re.compile(r"[\w][\w .-]{0,59}")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
HEADER = "time,valence,arousal,annotator"


class ViewerServer(ThreadingHTTPServer):
    """Serve a written viewer; `ratings` receives `<annotator>/<clip>.csv`.

    Raises:
        UsageError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, viewer: Viewer, ratings: Path, port: int = 0) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UsageError(
                explain(f"Cannot listen on port {port}", got=error.strerror, remedy="Choose another --port")
            ) from error
        self.viewer, self.ratings = viewer, ratings
        self.token = secrets.token_urlsafe(24)
        self.page = viewer.html(serve={"token": self.token}).encode()
        self.files = {f"/clips/{n:04}.js": viewer.page.parent / f"clips/{n:04}.js" for n, _ in self._numbered()}
        self.files |= {f"/media/{n}": clip.media for n, clip in self._numbered() if clip.media is not None}

    def _numbered(self) -> list[tuple[int, Any]]:
        return list(enumerate(self.viewer.clips, 1))

    @property
    def address(self) -> str:
        """The URL of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        if not self._from_our_page():
            return
        path = self.path.split("?")[0]
        if path == "/":
            self._answer(200, self.server.page, "text/html; charset=utf-8")
        elif path in self.server.files:
            self._send_file(self.server.files[path])
        else:
            self._answer(404, b"not found")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._from_our_page():
            return
        if self.path != "/ratings" or not length.isdigit() or int(length) > _LIMIT:
            self.close_connection = True
            self._answer(400, b"not a rating")
            return
        body = self.rfile.read(int(length))
        if not secrets.compare_digest(self.headers.get("X-Vaflow-Token", "").encode(), self.server.token.encode()):
            self._answer(403, b"wrong token")
            return
        try:
            document = json.loads(body)
            saved = save_rating(
                self.server.ratings,
                {clip.item for clip in self.server.viewer.clips},
                *(str(document[key]) for key in ("clip", "annotator", "csv")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._answer(400, str(error).encode())
        except OSError as error:
            self._answer(500, str(error.strerror).encode())
        else:
            self._answer(200, str(saved.relative_to(self.server.ratings)).encode())

    def _from_our_page(self) -> bool:
        """Whether the headers Host and Origin name this server; prevents DNS rebinding."""
        hosts = {f"{name}:{self.server.server_address[1]}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (origin is None or origin.removeprefix("http://") in hosts):
            return True
        self.close_connection = True
        self._answer(403, b"another host")
        return False

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self._headers(kind, len(body))
        self.wfile.write(body)

    def _headers(self, kind: str, length: int, *more: tuple[str, str]) -> None:
        fixed = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"), ("Accept-Ranges", "bytes"))
        for name, value in (("Content-Type", kind), ("Content-Length", str(length)), *fixed, *more):
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, path: Path) -> None:
        """The file or the range of it that the browser wants: seeking needs ranges."""
        try:
            size = path.stat().st_size
            file = path.open("rb")
        except OSError:
            self._answer(404, b"not found")
            return
        with file:
            kind = guess_type(path.name)[0] or "application/octet-stream"
            requested = _RANGE.fullmatch(self.headers.get("Range", ""))
            first, last = 0, size - 1
            if requested and any(requested.groups()):
                begin, end = requested.groups()
                first = int(begin) if begin else max(0, size - int(end))
                last = min(last, int(end)) if begin and end else last
                if first > last:
                    self.send_response(416)
                    self._headers(kind, 0, ("Content-Range", f"bytes */{size}"))
                    return
                self.send_response(206)
                self._headers(kind, last - first + 1, ("Content-Range", f"bytes {first}-{last}/{size}"))
            else:
                self.send_response(200)
                self._headers(kind, size)
            file.seek(first)
            left = last - first + 1
            try:
                while left > 0 and (block := file.read(min(_BLOCK, left))):
                    self.wfile.write(block)
                    left -= len(block)
            except ConnectionError:  # a browser that seeks closes the connection
                self.close_connection = True


def save_rating(folder: Path, clips: set[str], clip: str, annotator: str, text: str) -> Path:
    """Write one annotator's label CSV of one clip, and return its path.

    Raises:
        DataError: the clip is not of this viewer, the name cannot be used, or the text is not a rating.
        OSError: the disk refuses.
    """
    if clip not in clips:
        raise DataError(explain("The viewer has no such clip", got=clip))
    if not _NAME.fullmatch(annotator):
        expected = "letters, digits, spaces, points and dashes, beginning with a letter or digit"
        raise DataError(explain("The annotator's name cannot be used", expected=expected, got=annotator))
    lines = text.rstrip("\n").split("\n")
    rows = [_ROW.fullmatch(line) for line in lines[1:]]
    numbers = [tuple(map(float, row.groups())) for row in rows if row]
    ascending = all(a[0] < b[0] for a, b in pairwise(numbers))
    inside = all(abs(x) <= 1 for row in numbers for x in row[1:])
    if lines[0] != HEADER or not numbers or len(numbers) != len(rows) or not ascending or not inside:
        raise DataError(explain("The text is not a rating", expected=f"columns {HEADER}; times that ascend"))
    path = folder / annotator / f"{clip}.csv"
    body = "".join(f"{t:.6f},{v:.4f},{a:.4f},{annotator}\n" for t, v, a in numbers)
    write_file(path, f"{HEADER}\n{body}")
    return path
