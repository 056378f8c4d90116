"""A live run in the browser: the page, and at the page's asking the parts of it that have changed.

It listens on 127.0.0.1 only; to see a run of another machine, forward the port (`ssh -L`). Requests that a browser
sends for another site are refused by their Host header.
"""

import json
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from titan_metrics.report.document import Document, build, page
from titan_metrics.report.files import ReportError
from titan_metrics.report.run import Run

_HOSTS = ("127.0.0.1", "localhost")
_MOST_BYTES = 1 << 20  # of a request


class Live:
    """The document of runs that may still grow; files are read again if they have changed since the last reading."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._seen = [run.stamp() for run in runs]
        self._document = build(runs)
        self._versions = self._document.versions()

    def latest(self) -> tuple[Document, dict[str, str]]:
        """The document as of now, and the digests of its parts.

        Raises:
            ReportError: if a file is not what it should be.
        """
        with self._lock:
            now = [run.stamp() for run in self._runs]
            if now != self._seen:
                for run in self._runs:
                    run.refresh()
                self._document = build(self._runs)
                self._versions = self._document.versions()
                self._seen = now
            return self._document, self._versions


def serve(runs: Sequence[Run], port: int, announce: Callable[[str], None]) -> None:
    """Serves the page until it is interrupted; returns then.

    Args:
        runs: to show.
        port: of this machine; 0 takes any that is free.
        announce: called with the page's address once it can be opened.

    Raises:
        ReportError: if the port cannot be used.
    """
    live = Live(runs)

    class Handler(_Handler):
        document = live

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ReportError(
            f"Cannot listen on port {port} ({error}); name another with --serve PORT, or take any that is free "
            "with --serve 0."
        ) from error
    with server:
        announce(f"http://127.0.0.1:{server.server_port}/")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            return


class _Handler(BaseHTTPRequestHandler):
    document: Live
    protocol_version = "HTTP/1.1"
    server_version = "titan-report"

    def do_GET(self) -> None:
        """The page."""
        if self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is only the page itself.")
            return
        try:
            document, _ = self.document.latest()
        except ReportError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", str(error).encode())
            return
        self._answer(HTTPStatus.OK, "text/html", page(document, live=True).encode())

    def do_POST(self) -> None:
        """`update`: from the digests of the parts that the page has to those parts that are not the same now."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/update" or length > _MOST_BYTES:
            self.close_connection = True
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is only /update.")
            return
        try:
            known = dict(json.loads(self.rfile.read(length)))
            document, versions = self.document.latest()
        except (ReportError, ValueError, TypeError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "application/json", json.dumps({"error": str(error)}).encode())
            return
        changed = {name: part for name, part in document.parts.items() if versions[name] != known.get(name)}
        news = json.dumps({"versions": versions, "parts": changed})
        self._answer(HTTPStatus.OK, "application/json", news.encode())

    def parse_request(self) -> bool:
        """Refuses what a foreign page makes a browser send here (DNS rebinding)."""
        if not super().parse_request():
            return False
        if self.headers.get("Host", "").rpartition(":")[0] in _HOSTS:
            return True
        self.close_connection = True
        self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"Open the page by the address that titan-report has printed.")
        return False

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line every two seconds would bury the address."""
