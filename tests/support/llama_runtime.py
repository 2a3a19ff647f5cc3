"""A stock llama.cpp (the wheel of xllamacpp) in a process of its own: what it makes of a GGUF file.

What differs from transformers is the order of the sums, and for GELU llama.cpp's table of it in half precision.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

_SECONDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What llama.cpp made of the file."""

    logprobs_NV: Tensor
    """Of the token that follows each prompt; minus infinity where it was not among the likeliest."""
    tokens: list[list[int]]
    """Of each text; with the tokens at its ends, and those that its characters name, if that was asked for."""


def run_llama(
    model: Path,
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    *,
    likeliest: int | None = None,
    texts: Sequence[str] = (),
    add_special: bool = False,
    parse_special: bool = False,
) -> Answers:
    """Load `model` and answer. Fails the test with llama.cpp's own messages if it does not load within two minutes."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    spec, result = model.with_suffix(".spec.json"), model.with_suffix(".result.json")
    content: dict[str, object] = {"model": str(model), "prompts": list(map(list, prompts))}
    content |= {"n": likeliest or vocab_size, "texts": list(texts)}
    content |= {"add_special": add_special, "parse_special": parse_special}
    spec.write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llama_child.py")), str(spec), str(result)],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(result.read_text(encoding="utf-8"))
    logprobs_NV = torch.full((len(prompts), vocab_size), -torch.inf)
    for row, found in zip(logprobs_NV, answer["logprobs"], strict=True):
        row[[int(token) for token in found]] = torch.tensor(list(found.values()))
    return Answers(logprobs_NV=logprobs_NV, tokens=answer["tokens"])
