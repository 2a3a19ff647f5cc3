"""A stock vLLM (.venv-serve, made by `make serve-setup`) in a process of its own: what it makes of checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

_ROOT = Path(__file__).parents[2]
_CHILD = Path(__file__).with_name("vllm_child.py")
_SECONDS = 2000
# Room for the keys and values of the prompts; vLLM would take, and fill, a part of the machine's memory.
_CACHE_BYTES = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One checkpoint as vLLM is to load it."""

    directory: Path
    options: Mapping[str, Any]
    """Arguments of `LLM`."""
    max_model_len: int = 128
    num_generated: int = 0
    """Tokens that are generated after each prompt, for their time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What vLLM made of it."""

    error: str
    """Its message; empty where it loaded the checkpoint and answered."""
    class_name: str = ""
    """The class of vLLM that computed it."""
    logprobs: tuple[Tensor, ...] = ()
    """Of each prompt: those of its tokens but the first, then those of every token that may follow."""
    seconds: float = 0.0
    """Time of the generation that was asked for."""


def python_with_vllm() -> Path:
    """The Python that has vLLM. Skips the test where there is none."""
    root = Path(os.environ.get("STRUCTPRUNE_SERVE", _ROOT / ".venv-serve"))
    if not (root / ".setup-done").exists():
        pytest.skip("vLLM is not installed here (make serve-setup)")
    return root / "bin" / "python"


def run_vllm(models: Sequence[Served], prompts: Sequence[Sequence[int]], work: Path) -> list[Answer]:
    """Load the models one after the other and answer; `work` is an empty folder.

    Fails the test with vLLM's own messages if the process ends before its answer.
    """
    spec, result = work / "spec.json", work / "result.json"
    asked = [
        {
            "directory": str(model.directory),
            "options": dict(model.options),
            "max_model_len": model.max_model_len,
            "num_generated": model.num_generated,
            "cache_bytes": _CACHE_BYTES,
        }
        for model in models
    ]
    spec.write_text(json.dumps({"models": asked, "prompts": list(map(list, prompts))}), encoding="utf-8")
    # Its modules are those of its own environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    done = subprocess.run(
        [str(python_with_vllm()), str(_CHILD), str(spec), str(result)],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        env=environment
        | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(work / "modules"), "VLLM_CACHE_ROOT": str(work / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [_answer(found) for found in json.loads(result.read_text(encoding="utf-8"))]


def _answer(found: dict[str, Any]) -> Answer:
    if "error" in found:
        return Answer(error=found["error"])
    logprobs = tuple(torch.tensor([*one["prompt"], *one["next"]]) for one in found["logprobs"])
    return Answer(error="", class_name=found["class"], logprobs=logprobs, seconds=found.get("seconds", 0.0))


@torch.no_grad()
def expected_logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """The same of a model of transformers."""
    found: list[Tensor] = []
    for ids in prompts:
        logprobs_SV = model(input_ids=torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)
        inside = logprobs_SV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(torch.cat([inside, logprobs_SV[-1]]))
    return tuple(found)
