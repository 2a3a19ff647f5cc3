"""Runs of tiny models that go every way through the engine: family of the model, and settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structprune import Recipe

# Every pipeline, every sensitivity pass, and what moves the streams in another way.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "structprune": ("llama", {"method": "structprune", "scope": "all", "outer_iterations": 1}),
    "normed": ("gemma2", {"method": "structprune"}),
    "parallel": ("gpt_neox", {"method": "structprune"}),
    "experts": ("qwen3_moe", {"method": "structprune", "target": "local", "multiple_of": 8}),
    "removal": ("llama", {"method": "structprune", "allow_block_removal": True, "sparsity": 0.6}),
    "admm": ("llama", {"method": "structprune", "solver": "admm"}),
    "fasp": ("llama", {"method": "fasp"}),
    "flap": ("llama", {"method": "flap"}),
    "llm-pruner": ("llama", {"method": "llm-pruner", "protect_first": 0, "protect_last": 0}),
    "gates": ("llama", {"method": "structprune", "scope": "all", "gates": "graspprune", "gates_steps": 4}),
    "repair": ("llama", {"method": "fasp", "scope": "all", "repair": "scales"}),
    "repair-biases": ("llama", {"method": "fasp", "scope": "all", "repair": "scales+biases", "repair_epochs": 2}),
    "angular": ("llama", {"method": "depth", "sparsity": 0.4}),
    "measured-loss": ("llama", {"method": "depth", "sparsity": 0.6, "score": "measured-loss"}),
    "whole-experts": ("qwen3_moe", {"method": "reap"}),
    "elements": ("llama", {"method": "alps", "pattern": "2:4", "target": "dense-path", "sparsity": 0.5}),
    "elements-experts": ("qwen3_moe", {"method": "wanda", "solver": "refit", "allocator": "owl", "sparsity": 0.5}),
    "elements-by-loss": ("llama", {"method": "sparsegpt", "allocator": "dp", "sparsity": 0.5}),
    "slice": ("llama", {"method": "slicegpt"}),
    "slice-uniform": ("llama", {"method": "slicegpt", "structure": "uniform"}),
}


def tiny_recipe(settings: Mapping[str, Any], text_file: Path, **more: Any) -> Recipe:
    """A few short windows in float32."""
    common = {"calibration": str(text_file), "num_samples": 5, "seq_len": 32, "dtype": "float32"}
    own = Recipe.kind_for(settings).model_fields
    # Whole blocks are chosen by as many windows as there are.
    if settings["method"] != "depth":
        common |= {name: value for name, value in (("multiple_of", 1), ("sensitivity_samples", 3)) if name in own}
    return Recipe.build(**{**common, **more, **settings})
