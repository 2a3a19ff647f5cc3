"""Runs `structprune.prune` several times on several ranks: `python many_ranks.py SPEC`, one import for all of them.

SPEC is a JSON file: `size`, `port`, `folder` for what the ranks say, and `runs`, each with model, recipe, output and,
where a rank is to do something of its own, `deeds`: rank -> [deed, argument] (see `_DEEDS`). Per run and rank `folder`
gets `RUN.RANK.json`: the report or the error, the sums of every pruned block's tensors, and the bytes that were
exchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from structprune import api
from structprune.calibration import snapshots
from structprune.engine.pipelines import units
from structprune.engine.ranks import group
from structprune.engine.sensitivity import fisher
from structprune.errors import StructPruneError
from structprune.evaluation import reload
from structprune.recipe import Recipe

_seen: dict[str, Any] = {}


def _at(block: int, work: Callable[[], None]) -> None:
    """Do `work` in this process when it comes to `block`."""
    prune_block = units.prune_block

    def wrapped(context: Any, layout: Any, *values: Any, **named: Any) -> Any:
        if layout.index == block:
            work()
        return prune_block(context, layout, *values, **named)

    units.prune_block = wrapped


def _die_in_sensitivity_pass(block: int) -> None:
    backward = fisher.backward

    def wrapped(context: Any, layout: Any, *values: Any) -> Any:
        if layout.index == block:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(context, layout, *values)

    fisher.backward = wrapped


def _fail() -> None:
    raise ValueError("a thing of its own")


_DEEDS: dict[str, Callable[[Any], None]] = {
    "die": lambda block: _at(block, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "die-in-survey": _die_in_sensitivity_pass,
    "stop": lambda block: _at(block, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "hang": lambda block: _at(block, lambda: time.sleep(3600)),
    "fail": lambda block: _at(block, _fail),
    "leave": lambda _: os._exit(0),
    "snapshots": lambda share: setattr(snapshots, "SHARE", float(share)),
    "version": lambda version: setattr(api, "versions", lambda: {"structprune": version}),
    "recipe": lambda changes: _seen.update(recipe=changes),
    "model": lambda model: _seen.update(model=model),
}


def _watch_blocks() -> None:
    """Take the sums of what every rank makes of each block, and the bytes that it took."""
    prune_block = units.prune_block

    def wrapped(context: Any, layout: Any, *values: Any, **named: Any) -> Any:
        before = dict(getattr(context.ranks, "counted", {}))
        outcome = prune_block(context, layout, *values, **named)
        digest = hashlib.sha256()
        for name, tensor in outcome.tensors.items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        _seen["blocks"].append(digest.hexdigest())
        counted = getattr(context.ranks, "counted", {})
        _seen["bytes"].append({name: counted[name] - before[name] for name in counted})
        return outcome

    units.prune_block = wrapped


def _watch_sensitivity() -> None:
    """The bytes of the measurements that come first."""
    measure_sensitivity = units.measure_sensitivity

    def wrapped(context: Any, *values: Any) -> Any:
        before = dict(getattr(context.ranks, "counted", {}))
        found = measure_sensitivity(context, *values)
        _seen["survey"] = {
            name: number - before[name] for name, number in getattr(context.ranks, "counted", {}).items()
        }
        return found

    units.measure_sensitivity = wrapped


def work(spec: dict[str, Any], rank: int) -> None:
    """All runs, as one rank."""
    torch.set_num_threads(1)
    # Tests of the reload check are elsewhere; it costs a process.
    reload.reload_in_a_process = lambda resolved, _: reload.reload_here(resolved)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(spec["size"])}
    os.environ |= {"LOCAL_WORLD_SIZE": str(spec["size"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(spec["port"])}
    usual = units.prune_block, units.measure_sensitivity, fisher.backward, snapshots.SHARE, api.versions
    for number, run in enumerate(spec["runs"]):
        units.prune_block, units.measure_sensitivity, fisher.backward, snapshots.SHARE, api.versions = usual
        _seen.clear()
        _seen.update(blocks=[], bytes=[])
        _watch_blocks()
        _watch_sensitivity()
        for deed, argument in run.get("deeds", {}).get(str(rank), []):
            _DEEDS[deed](argument)
        told: dict[str, Any] = {}
        started = time.monotonic()
        try:
            recipe = Recipe.build(**{**run["recipe"], **_seen.get("recipe", {})})
            model = _seen.get("model", run["model"])
            report = api.prune(model, recipe, run["output"], rank_timeout=run.get("timeout", 60))
            told["report"] = report.to_dict()
        except StructPruneError as error:
            told["error"] = {**error.to_dict(), "text": str(error), "elsewhere": error.elsewhere}
        except Exception as error:
            told["error"] = {"error": type(error).__name__, "text": str(error)}
        told |= {name: _seen.get(name) for name in ("blocks", "bytes", "survey")}
        told |= {"seconds": time.monotonic() - started}
        Path(spec["folder"], f"{number}.{rank}.json").write_text(json.dumps(told), encoding="utf-8")
        if "error" in told and not run.get("goes_on"):
            # The library's threads may wait for a rank that is gone.
            os._exit(2)


def main(path: str) -> None:
    """Fork the ranks, which costs no import, and wait for them."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    assert group.Group
    children = []
    for rank in range(spec["size"]):
        child = os.fork()
        if child == 0:
            work(spec, rank)
            os._exit(0)
        children.append(child)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + spec.get("limit", 300)
    # A rank that stops itself does not end.
    while len(codes) < len(children) - spec.get("stopped", 0) and time.monotonic() < deadline:
        for rank, child in enumerate(children):
            if rank not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for rank, child in enumerate(children):
        if rank not in codes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    print(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1])
