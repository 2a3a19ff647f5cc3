"""An HTTP server of this machine in the place of the hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants


@contextmanager
def local_hub(handler: type[BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """The server's address, while it answers by `handler` and the hub's client is told to use it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Another protocol, of which the server knows nothing.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


OID = "0" * 40


@dataclass
class Hub:
    """What the endpoint answers, and what it was sent."""

    address: str = ""
    public: bool = False
    """Whether the repository is there already, and public."""
    status: int = 200
    """Of every answer."""
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content."""
    commits: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    """Path of the request, and its lines."""
    tokens: set[str] = field(default_factory=set)

    def files(self) -> dict[str, bytes]:
        """What the last commit holds."""
        _, lines = self.commits[-1]
        found: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.large[value["oid"]]
        return found


def upload_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """Speaks as much of the hub's protocol as an upload needs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            self.answer({"id": "me/small", "private": not hub.public, "siblings": []})

        def do_PUT(self) -> None:
            content = self.body()
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.answer({})

        def do_POST(self) -> None:
            body = self.body()
            hub.tokens.add(self.headers.get("Authorization", ""))
            path = self.path.partition("?")[0]
            if hub.status != 200:
                self.answer({"error": "no"}, hub.status)
            elif path == "/api/repos/create":
                hub.created.append(json.loads(body))
                exists = {"error": "You already created this model repo"}
                made = {"url": f"{hub.address}/me/small"}
                self.answer(exists | made if hub.public else made, 409 if hub.public else 200)
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/branch/" in path:
                hub.branches.append(path.rpartition("/")[2])
                self.answer({})
            elif "/preupload/" in path:
                self.answer({"files": [self.mode(file) for file in json.loads(body)["files"]]})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                upload = {"actions": {"upload": {"href": f"{hub.address}/upload"}}}
                self.answer({"transfer": "basic", "objects": [{**item, **upload} for item in objects]})
            elif "/commit/" in path:
                hub.commits.append((path, [json.loads(line) for line in body.splitlines()]))
                self.answer({"commitUrl": f"{hub.address}/me/small/commit/{OID}", "commitOid": OID, "success": True})
            else:
                self.answer({"error": path}, 404)

        @staticmethod
        def mode(file: dict[str, Any]) -> dict[str, Any]:
            large = file["path"].endswith(".safetensors")
            return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    return Handler
