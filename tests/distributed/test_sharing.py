"""Every method and pipeline on 2 and 4 ranks: the masks of one process, its weights but for sums in another order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch import Ended, largest_difference, masks, run_ranks

from structprune.api import inspect
from structprune.engine.planning.exchange import sensitivity_exchange
from support import pipeline_cases
from support.models import save_tiny

pytestmark = pytest.mark.distributed

_WALKS = ("structprune", "normed", "parallel", "experts", "removal", "admm", "flap", "llm-pruner")
RUNS: dict[str, tuple[str, dict[str, Any]]] = {name: pipeline_cases.RUNS[name] for name in _WALKS} | {
    "admm-duals": ("llama", {"method": "structprune", "solver": "admm-duals"}),
    "spap": ("llama", {"method": "spap"}),
    "fasp": ("llama", {"method": "fasp", "scope": "all"}),
    "osscar": ("llama", {"method": "osscar"}),
    "wanda-sp": ("llama", {"method": "wanda-sp"}),
    "scores": ("llama", {"method": "fasp", "allocator": "standardised", "structure": "per-layer"}),
    "magnitude": ("llama", {"method": "magnitude"}),
    "random": ("llama", {"method": "random"}),
    "texts": (
        "llama",
        {
            "method": "structprune",
            "scope": "all",
            "objective": "worst",
            "sensitivity_scale": "per-text",
            "calibration": ["python", "self"],
            "num_samples": 9,
        },
    ),
}
FAMILIES = sorted({family for family, _ in RUNS.values()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """All runs, on each number of ranks."""

    models: dict[str, Path]
    folder: Path
    ended: dict[int, Ended]


@pytest.fixture(scope="module")
def shared(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    models = {family: save_tiny(family, folder / "models" / family, num_blocks=3) for family in FAMILIES}
    common = {"calibration": str(text_file), "num_samples": 7, "seq_len": 32, "dtype": "float32", "memory": "1GiB"}
    common |= {"multiple_of": 1, "sensitivity_samples": 3, "reload_check": False}
    ended: dict[int, Ended] = {}
    for size in (1, 2, 4):
        runs = [
            {
                "model": models[family],
                "recipe": {**common, **changes},
                "output": folder / str(size) / name,
                # Hidden states go through snapshots and files as well.
                "deeds": {str(rank): [["snapshots", "inf"]] for rank in range(size)},
            }
            for name, (family, changes) in RUNS.items()
        ]
        ended[size] = run_ranks(size, runs, folder / f"said-{size}")
        assert set(ended[size].codes.values()) == {0}, ended[size].said
    return Shared(models=models, folder=folder, ended=ended)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_same_as_one_process(name: str, size: int, shared: Shared) -> None:
    alone, together = shared.folder / "1" / name, shared.folder / str(size) / name
    assert masks(together) == masks(alone)
    assert largest_difference(together, alone) < 1e-3
    said = shared.ended[size].said[list(RUNS).index(name)]
    assert len(said) == size
    for rank in said:
        assert rank["blocks"] == said[0]["blocks"]
        assert rank["report"] == said[0]["report"]
        assert rank["bytes"] == said[0]["bytes"]
    assert said[0]["report"]["num_ranks"] == size
    assert not together.with_name(f"{name}.partial").exists()


def test_bytes_of_the_survey(shared: Shared) -> None:
    """Those of two ranks and of four, by the formula."""
    layout = inspect(shared.models["llama"])
    number = list(RUNS).index("structprune")
    expected = [sensitivity_exchange(block.groups, layout.hidden_size) for block in layout.blocks]
    for size in (2, 4):
        counted = shared.ended[size].said[number][0]["survey"]
        assert counted["sums"] == sum(exchange.sums for exchange in expected)
        assert counted["tensors"] == sum(exchange.tensors for exchange in expected)
