"""An HTTP server that gives whatever a test wants, to whom it wants."""

import base64
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Host(http.server.ThreadingHTTPServer):
    """Answers with `files` (path → bytes), with `shard` whatever else is asked for; with `user`, only who logs in."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.shard: bytes | None = b""
        self.user = ""
        self.status: list[int] = []
        self.endless = False
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)

    def address(self, user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        given = self.headers.get("Authorization", "")
        if self.server.user and given != "Basic " + base64.b64encode(self.server.user.encode()).decode():
            return self.send_error(401)
        if self.server.status:
            return self.send_error(self.server.status.pop())
        data = self.server.files.get(self.path.partition("?")[0], self.server.shard)
        if data is None:
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(data)
            while self.server.endless:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            pass  # who asked has had enough

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path | None = None) -> Iterator[Host]:
    """A server in a thread; with ``folder``, of the files in it."""
    with Host() as host:
        if folder is not None:
            paths = [path for path in folder.rglob("*") if path.is_file()]
            host.files = {f"/{path.relative_to(folder)}": path.read_bytes() for path in paths}
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield host
        finally:
            host.endless = False
            host.shutdown()
            thread.join()
