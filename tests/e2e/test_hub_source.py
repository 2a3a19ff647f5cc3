"""Models of the hub, with and without a revision, from an endpoint of this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from structprune.api import inspect, prune
from structprune.architectures.sources.resolve import resolve_model
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.readme import README_NAME
from structprune.cli import main
from structprune.errors import CheckpointError
from structprune.recipe import Recipe
from support.local_hub import local_hub
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "org/tiny"
OLD, NEW = "1" * 40, "2" * 40
# What a repository holds beside the files that are read: the same weights again, code; and what goes with the licence.
UNREAD = ("weights.bin", "consolidated.safetensors", "model-extra.safetensors", "model.onnx", "modeling_other.py")
LICENCES = ("NOTICE", "Notice.txt", "USE_POLICY.md", "LICENSE.txt", "tekken.json", "qwen.tiktoken")


def handler(commits: dict[str, Path], names: dict[str, str]) -> type[BaseHTTPRequestHandler]:
    """Serves the directories of `commits`; `names` are branches and tags."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].replace("%2F", "/")
            api, files = f"/api/models/{NAME}/", f"/{NAME}/resolve/"
            verb, _, rest = path.removeprefix(api if path.startswith(api) else files).partition("/")
            if path.startswith(files) and verb in commits:
                content = (commits[verb] / rest).read_bytes()
                self.answer(content, X_Repo_Commit=verb, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
            elif not path.startswith(api):
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            elif (sha := names.get(rest, rest)) not in commits:
                self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            else:
                found = sorted(commits[sha].iterdir())
                sizes = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in found]
                info = {"id": NAME, "sha": sha, "siblings": [{"rfilename": f.name} for f in found]}
                self.answer(json.dumps(sizes if verb == "tree" else info).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Generator[dict[str, Path]]:
    """Two commits of one model: main has several shards and bfloat16, the tag v1 and the branch refs/pr/3 one file."""
    new = save_tiny("llama", tmp_path / "new", max_shard_size="20KB", dtype=torch.bfloat16)
    for name in UNREAD:
        (new / name).write_bytes(b"never fetched")
    for name in LICENCES:
        (new / name).write_text(name)
    commits = {OLD: tiny_llama, NEW: new}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    names = {"main": NEW, "v1": OLD, "refs/pr/3": OLD}
    with local_hub(handler(commits, names), monkeypatch):
        yield commits


@pytest.mark.parametrize(
    ("model", "commit"),
    [
        (NAME, NEW),
        (f"{NAME}@main", NEW),
        (f"{NAME}@v1", OLD),
        (f"{NAME}@refs/pr/3", OLD),
        (f"{NAME}@{OLD}", OLD),
    ],
)
def test_the_revision_is_the_one_that_is_read(model: str, commit: str, hub: dict[str, Path]) -> None:
    directory = resolve_model(model)
    assert directory.name == commit
    assert not (directory / "weights.bin").exists()
    assert CheckpointReader(directory).fingerprint() == CheckpointReader(hub[commit]).fingerprint()


def test_a_revision_is_pruned(hub: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.build(
        method="fasp", sparsity=0.3, calibration=str(text_file), num_samples=2, seq_len=32, multiple_of=1
    )
    report = prune(f"{NAME}@v1", recipe, tmp_path / "out")
    assert report.source == f"{NAME}@v1"
    assert report.size.bytes_before == CheckpointReader(hub[OLD]).file_bytes
    assert report.source_commit == OLD
    card = (tmp_path / "out" / README_NAME).read_text()
    assert f"Made from commit `{OLD}` of its source." in card
    assert f"base_model: {NAME}\n" in card
    assert f"`{NAME}@v1`, made smaller" in card


def test_what_was_fetched_is_there_offline(hub: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model(f"{NAME}@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(f"{NAME}@v1") == resolve_model(f"{NAME}@{OLD}") == first
    assert inspect(f"{NAME}@v1").num_parameters == inspect(hub[OLD]).num_parameters
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        resolve_model(f"{NAME}@main")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (f"{NAME}@v2", f"the hub's model '{NAME}' has no revision 'v2'; wanted a branch, tag or commit."),
        (
            f"{NAME}@{'3' * 40}",
            f"the hub's model '{NAME}' has no revision '{'3' * 40}'; wanted a branch, tag or commit.",
        ),
        (f"{NAME}@", f"the revision after @ is empty; got '{NAME}@', wanted a branch, tag or commit."),
        ("org/other@v1", "the hub has no model 'org/other'. Check the name, or log in for a gated model."),
        ("what?ever@v1", "'what?ever@v1' is neither a directory nor a hub id. Check the path."),
        ("a/b/c@v1", "a/b/c@v1: the model directory does not exist. Check the path."),
    ],
)
def test_what_the_hub_does_not_have(
    model: str, message: str, hub: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", model])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"structprune: {message}\n"


def test_each_weight_once_and_all_that_goes_with_the_licence(hub: dict[str, Path]) -> None:
    """Of the weight files those that the index names; other copies of them, and code, stay on the hub."""
    fetched = resolve_model(NAME)
    names = {path.name for path in fetched.iterdir()}
    assert names >= {*LICENCES, *CheckpointReader(hub[NEW]).weight_files, "config.json", "tokenizer.json"}
    assert not names & set(UNREAD)
    assert names == {path.name for path in hub[NEW].iterdir()} - set(UNREAD)
