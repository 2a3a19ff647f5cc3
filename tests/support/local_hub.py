"""An HTTP server of this machine in the place of the hub."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
