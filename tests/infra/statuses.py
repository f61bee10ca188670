"""A git host that only takes commit statuses, and records them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Statuses(ThreadingHTTPServer):
    """POST …/repos/OWNER/NAME/statuses/COMMIT; `answers` are the statuses to give first."""

    daemon_threads = True

    def __init__(self, *answers: int) -> None:
        self.told: list[dict[str, Any]] = []
        self.answers = list(answers)
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/api/v1"

    def __enter__(self) -> Statuses:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Statuses

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        about = {"path": self.path, "authorization": self.headers["authorization"]}
        answer = self.server.answers.pop(0) if self.server.answers else 201
        if answer < 300:
            self.server.told.append(body | about)
        self.send_response(answer)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_arguments: Any) -> None:
        pass
