"""What a run's weights are on disk: one file, or numbered ones; a kill while they are put together costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from structprune.api import prune, recover, resume
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.engine.pipelines import units
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 20_000

# A process that is gone, as by SIGKILL, in the middle of its second weight file.
_KILLED = """
import os, signal, sys
from structprune.api import prune
from structprune.checkpoint import weight_files
from structprune.recipe import Recipe

copy, begun = weight_files.copy_bytes, []

def copied(tensor, target):
    if target.name not in begun:
        begun.append(target.name)
    elif len(begun) == 2:
        target.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    copy(tensor, target)

weight_files.copy_bytes = copied
prune(sys.argv[1], Recipe.model_validate_json(sys.argv[3]), sys.argv[2])
"""


def asked(text_file: Path, **changes: Any) -> Recipe:
    values = {"calibration": str(text_file), "num_samples": 4, "seq_len": 32, "dtype": "float32", "memory": "1GiB"}
    return Recipe.build(**values, method="fasp", multiple_of=1, **changes)


def tensor_bytes(directory: Path) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes()
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_a_limit_changes_the_files_and_no_tensor(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    one = prune(tiny_llama, asked(text_file), tmp_path / "one")
    many = prune(tiny_llama, asked(text_file, max_shard_size=LIMIT), tmp_path / "many")
    assert [path.name for path in (tmp_path / "one").glob("model*")] == [SINGLE_NAME]
    assert tensor_bytes(tmp_path / "one") == tensor_bytes(tmp_path / "many")
    numbered = sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(numbered)
    assert count > 2
    assert [p.name for p in numbered] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "many" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(map(len, tensor_bytes(tmp_path / "many").values()))
    # A tensor that is larger has a file of its own.
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in numbered]
    assert all(sum(found) <= LIMIT or len(found) == 1 for found in sizes)
    for report, directory in ((one, tmp_path / "one"), (many, tmp_path / "many")):
        assert report.size.bytes_after == CheckpointReader(directory).file_bytes
        assert report.reload.mode == "whole"


def test_a_recovery_writes_one_file_too(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    prune(tiny_llama, asked(text_file, max_shard_size=LIMIT), tmp_path / "pruned")
    settings = RecoverySettings.build(
        calibration=(str(text_file),), num_samples=4, seq_len=32, held_out=1, epochs=1, dtype="float32"
    )
    for limit, name in ((5 * 10**9, "one"), (LIMIT, "many")):
        limited = settings.model_copy(update={"max_shard_size": limit})
        recover(tmp_path / "pruned", tiny_llama, limited, tmp_path / name)
    assert [path.name for path in (tmp_path / "one").glob("model*")] == [SINGLE_NAME]
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert tensor_bytes(tmp_path / "one") == tensor_bytes(tmp_path / "many")


def test_a_kill_while_files_are_put_together(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny("llama", tmp_path / "source", num_blocks=3)
    recipe = asked(text_file, max_shard_size=LIMIT)
    prune(source, recipe, tmp_path / "whole")
    arguments = [str(source), str(tmp_path / "out"), recipe.model_dump_json(exclude_unset=True)]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -9, done.stderr
    staging = tmp_path / "out.partial"
    left = sorted(path.name for path in (staging / "checkpoint").glob("*model*"))
    # One file whole, one torn under a name that nothing loads, no index.
    assert len(left) == 2
    assert left[0].startswith(".model-00002-of-")
    assert left[1].startswith("model-00001-of-")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a block was pruned again")

    monkeypatch.setattr(units, "prune_block", never)
    resume(tmp_path / "out")
    weights = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*model*")} for name in ("out", "whole")]
    assert weights[0] == weights[1]
    assert not staging.exists()
