"""A server on the loopback that speaks the part of the Hugging Face hub's API that uploads and downloads use."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """``repos`` has what was created, ``files`` uploaded contents by repository and name, ``tokens`` those sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.messages: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repos[name] = asked
            self._answer({"url": f"{self.server.address}/{name}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files.setdefault(name, {})[line["value"]["path"]] = content
                elif line["key"] == "header":
                    self.server.messages.append(line["value"]["summary"])
            self._answer({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({"error": f"no {path}"}, 404)

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._file(body=True)

    def _file(self, body: bool) -> None:
        owner, name, *rest = self.path.partition("?")[0].strip("/").split("/")
        if owner == "api":
            repo = "/".join([*rest, "", ""][:2])
            files = self.server.files.get(repo, {})
            tree = [{"type": "file", "path": name, "size": len(x), "oid": "0" * 40} for name, x in files.items()]
            is_tree, inside = rest[2:3] == ["tree"], rest[4:]
            found = ([] if inside else tree) if is_tree else {"id": repo, "sha": COMMIT, "siblings": []}
            self._answer(found, 200 if files else 404)
            return
        content = self.server.files.get(f"{owner}/{name}", {}).get("/".join(rest[2:]))
        if content is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._answer({"error": "not found"}, 404, missing, body)
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._answer(content, 200, headers, body)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Serve for the block."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
