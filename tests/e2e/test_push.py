"""Uploads, to an endpoint of this machine that speaks as much of the hub's protocol as an upload needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from huggingface_hub import constants

from structprune import Recipe, prune
from structprune.api import push
from structprune.cli import main
from structprune.errors import CheckpointError, InputError
from support.local_hub import OID, Hub, local_hub, upload_handler

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of huggingface_hub's own upload, by its HTTP library.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    """The endpoint, and the hub's client told to use it."""
    found = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with local_hub(upload_handler(found), monkeypatch) as found.address:
        yield found


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "small"
    settings = {
        "method": "fasp",
        "calibration": str(text_file),
        "num_samples": 2,
        "seq_len": 32,
        "dtype": "float32",
        "multiple_of": 1,
        "max_shard_size": "20KB",
        "reload_check": False,
    }
    prune(tiny_llama, Recipe.build(**settings), output)
    return output


def test_every_file_arrives_in_one_commit(hub: Hub, finished: Path) -> None:
    (finished / ".model.tmp-1").write_bytes(b"left over")
    try:
        address = push(finished, "me/small")
    finally:
        (finished / ".model.tmp-1").unlink()
    assert address == f"{hub.address}/me/small/commit/{OID}"
    assert hub.files() == {path.name: path.read_bytes() for path in finished.iterdir()}
    assert {"README.md", "model.safetensors.index.json", "pruning_report.json"} <= set(hub.files())
    assert len(hub.commits) == 1
    path, lines = hub.commits[0]
    assert path == "/api/models/me/small/commit/main"
    assert lines[0]["value"]["summary"].startswith("fasp: ")
    assert (hub.created[0]["name"], hub.created[0]["organization"]) == ("small", "me")
    assert "private" not in hub.created[0]
    assert hub.branches == []
    assert hub.tokens == {"Bearer hf_test"}


def test_a_private_repository_and_a_branch(hub: Hub, finished: Path) -> None:
    push(finished, "me/small", private=True, revision="pruned")
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.branches == ["pruned"]
    assert hub.commits[0][0] == "/api/models/me/small/commit/pruned"


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, finished: Path) -> None:
    hub.public = True
    with pytest.raises(InputError, match="the repository exists and is public"):
        push(finished, "me/small", private=True)
    assert hub.commits == []
    push(finished, "me/small")
    assert len(hub.commits) == 1


def test_command_line(hub: Hub, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["push", str(finished), "me/small", "--json"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"repo_id": "me/small", "commit": f"{hub.address}/me/small/commit/{OID}"}
    assert f"uploading {finished} to {hub.address}/me/small" in err
    with pytest.raises(SystemExit) as caught:
        main(["push", str(finished), "not a name/at all"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("structprune: this is no name of a repository; got not a name/at all")


def test_the_endpoint_and_the_token_come_from_the_environment(hub: Hub, finished: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_other",
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "structprune", "push", str(finished), "me/small", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/me/small/commit/{OID}\n"
    assert hub.tokens == {"Bearer hf_other"}
    assert len(hub.files()) == len(list(finished.iterdir()))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the hub does not know who is asking. Log in with `hf auth login`"),
        (403, "the hub refuses the upload; got .*Log in"),
        (400, "the hub refuses the upload; got "),
    ],
)
def test_refusals_of_the_hub(status: int, message: str, hub: Hub, finished: Path) -> None:
    hub.status = status
    with pytest.raises(InputError, match=f"me/small: {message}"):
        push(finished, "me/small")
    assert hub.commits == []


def test_a_hub_that_is_not_there(hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"me/small: the hub cannot be reached; got .*Check the network"):
        push(finished, "me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"the hub client is set to work offline\. Unset HF_HUB_OFFLINE"):
        push(finished, "me/small")


def test_what_is_not_finished_is_not_sent(hub: Hub, finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a finished output of structprune; got no pruning_report\.json"):
        push(tiny_llama, "me/small")
    with pytest.raises(CheckpointError, match="not a finished output"):
        push(tmp_path / "nowhere", "me/small")
    copy = shutil.copytree(finished, tmp_path / "copy")
    min(copy.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="a shard that the index names is missing"):
        push(copy, "me/small")
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="the weight files have no index"):
        push(copy, "me/small")
    (copy / "pruning_report.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="the file cannot be read as JSON"):
        push(copy, "me/small")
    assert hub.created == []
