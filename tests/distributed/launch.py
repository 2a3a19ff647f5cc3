"""Starts ranks for the tests, and reads what they say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

MANY_RANKS = Path(__file__).with_name("many_ranks.py")


def settings(text_file: Path) -> dict[str, Any]:
    """Of a run with every kind of exchange. Windows are such that one of two ranks has more of each part."""
    return {
        "method": "structprune",
        "scope": "all",
        "calibration": str(text_file),
        "num_samples": 5,
        "seq_len": 32,
        "sensitivity_samples": 3,
        "dtype": "float32",
        "memory": "1GiB",
        "multiple_of": 1,
        "reload_check": False,
    }


def environment() -> dict[str, str]:
    """One thread per rank: on tiny tensors threads only wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "", "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Runs on several ranks that are over."""

    codes: dict[int, int]
    """Rank -> exit code, of those that ended by themselves; negative: the signal."""
    said: list[list[dict[str, Any]]]
    """Per run, what each rank said; {} where it could not."""
    errors: str
    """The ranks' standard error."""


def run_ranks(size: int, runs: Sequence[dict[str, Any]], folder: Path, **spec: Any) -> Ended:
    """See many_ranks.py. One store is for all runs, as in a script that a launcher started."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{**run, "model": str(run["model"]), "output": str(run["output"])} for run in runs]
    path = folder / "spec.json"
    what = {"size": size, "folder": str(folder), "port": free_port(), "runs": runs, **spec}
    path.write_text(json.dumps(what), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, MANY_RANKS, path], env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [[_read(folder / f"{number}.{rank}.json") for rank in range(size)] for number in range(len(runs))]
    codes = {int(rank): code for rank, code in json.loads(done.stdout.splitlines()[-1]).items()}
    return Ended(codes=codes, said=said, errors=done.stderr)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def masks(output: Path) -> Any:
    return json.loads((output / "pruning_manifest.json").read_text(encoding="utf-8"))["kept_indices"]


def tensors(output: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(output.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def largest_difference(output: Path, wanted: Path) -> float:
    """The largest of all tensors' |a - b| / |b|."""
    mine, theirs = tensors(output), tensors(wanted)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].shape == theirs[name].shape for name in mine)
    return max(
        float((mine[name].double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp(min=1e-12))
        for name in mine
    )


def all_finite(output: Path) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors(output).values())
