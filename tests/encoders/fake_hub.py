"""Stand-ins for the Hugging Face hub: its cache on disk, and a server that speaks as much of it as a download needs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

COMMIT = "0" * 40


def into_cache(cache: Path, repo: str, file: Path) -> None:
    """Lay a file into a Hugging Face cache as a download would."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / file.name).write_bytes(file.read_bytes())


@contextmanager
def serve(files: Mapping[str, bytes], *, stall: bool = False, error: str = "EntryNotFound") -> Iterator[str]:
    """A hub with these files ("org/model/resolve/main/name" -> content); yields its address.

    With `stall` it sends the first half of a body and then nothing, until the context ends. `error` is the code that
    it answers for other files: "EntryNotFound", "GatedRepo" or "RepoNotFound".
    """
    ended = Event()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            content = files.get(self.path.strip("/").replace(COMMIT, "main"))
            self.send_response(200 if content is not None else 403 if error == "GatedRepo" else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            if content is None:
                self.send_header("X-Error-Code", error)
                content = b""
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body and stall:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                ended.wait()
            elif body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
