"""Sublayers that are finished from kept inputs of their consumers: the same result as when they are computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from structprune import Recipe, prune
from structprune.api import plan
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.pipelines import elements_settings, units_settings
from structprune.engine.streaming.activation_cache import cacheable
from structprune.engine.streaming.propagate import Propagator
from structprune.types import UNIT_KINDS
from support.models import TINY_MODELS, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fasp": ("llama", {"method": "fasp", "scope": "all"}),
    "structprune": ("llama", {"method": "structprune", "scope": "all"}),
    "biases": ("llama", {"method": "flap", "scope": "all"}),
    "query-heads": ("llama", {"method": "wanda-sp", "scope": "all", "head_units": "query-head"}),
    "value-channels": ("llama", {"method": "fasp", "scope": "all", "head_units": "value-channel"}),
    "attention-alone": ("llama", {"method": "fasp", "scope": "attention"}),
    "fused": ("phi3", {"method": "fasp", "scope": "all", "head_units": "kv-group"}),
    "transposed": ("gpt2", {"method": "fasp", "scope": "mlp"}),
    "relu": ("opt", {"method": "fasp", "scope": "mlp", "damping": "auto"}),
    "admm": ("llama", {"method": "structprune", "scope": "all", "solver": "admm"}),
    "single weights": ("llama", {"method": "sparsegpt", "pattern": "2:4", "sparsity": 0.5}),
    "ridge of single weights": ("llama", {"method": "alps", "pattern": "unstructured", "target": "dense-path"}),
    "flat inputs of single weights": ("opt", {"method": "wanda", "pattern": "unstructured", "scope": "mlp"}),
}


def recipe(name: str, text_file: Path) -> Recipe:
    common = {"calibration": str(text_file), "num_samples": 5, "seq_len": 32, "dtype": "float32", "sparsity": 0.4}
    settings = {**common, "memory": "1GiB", **RUNS[name][1]}
    return Recipe.build(**settings, **({} if "pattern" in settings else {"multiple_of": 1}))


class Passes:
    """Micro-batches that went through a block."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        apply = Propagator.apply

        def counted(*args: Any) -> Any:
            self.count += 1
            return apply(*args)

        patch.setattr(Propagator, "apply", counted)


def pruned(source: Path, settings: Recipe, output: Path, *, cached: bool) -> tuple[dict[str, torch.Tensor], Any, int]:
    with pytest.MonkeyPatch.context() as patch:
        passes = Passes(patch)
        if not cached:
            patch.setattr(units_settings, "cacheable", lambda *_: ())
            patch.setattr(elements_settings, "cacheable_maps", lambda *_: ())
        report = prune(source, settings, output)
    tensors = {name: t for path in output.glob("*.safetensors") for name, t in load_file(path).items()}
    return tensors, report, passes.count


@pytest.mark.parametrize("name", RUNS)
def test_the_same_model_with_fewer_passes(name: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny(RUNS[name][0], tmp_path / "model", num_blocks=3)
    settings = recipe(name, text_file)
    again, recomputed, num_again = pruned(source, settings, tmp_path / "again", cached=False)
    once, report, num_once = pruned(source, settings, tmp_path / "once", cached=True)
    assert not recomputed.memory.cached
    assert report.memory.cached
    assert report.memory.cache_bytes > 0
    # Of each sublayer in the cache one pass less over the windows, which are one micro-batch, in each of three blocks.
    assert num_again - num_once == 3 * len(report.memory.cached)
    assert once.keys() == again.keys()
    for key, tensor in again.items():
        assert once[key].shape == tensor.shape, key
        # Solved from sums in float32 that were added up in another order.
        torch.testing.assert_close(once[key], tensor, rtol=1e-3, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert report.calibration.pruned_perplexity == pytest.approx(recomputed.calibration.pruned_perplexity, rel=1e-5)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_only_sublayers_that_are_finished_by_their_consumer_alone(kind: str, tmp_path: Path) -> None:
    stock = StockModel(CheckpointReader(save_tiny(kind, tmp_path / "model")))
    found = cacheable(stock, UNIT_KINDS, "least-squares")
    for sublayer in found:
        assert stock.stage_of(0, sublayer) == (sublayer,)
        for block in stock.layout.blocks:
            (group,) = block.groups_of(sublayer)
            assert group.expert is None
            assert not group.output_normed
    assert "mlp" not in cacheable(stock, UNIT_KINDS, "admm")
    assert cacheable(stock, ["mlp"], "least-squares") == tuple(sublayer for sublayer in found if sublayer == "mlp")


def test_no_inputs_are_kept_that_get_another_order(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    settings = recipe("single weights", text_file)
    assert plan(source, settings).plan.cached == ("attention", "mlp")
    assert not plan(source, settings.model_copy(update={"permute_channels": True})).plan.cached


def test_which_families_have_such_sublayers(tmp_path: Path) -> None:
    found = {
        kind: cacheable(StockModel(CheckpointReader(save_tiny(kind, tmp_path / kind))), UNIT_KINDS, "bias")
        for kind in ("llama", "gemma2", "gpt_neox", "qwen3_moe")
    }
    assert found == {"llama": ("attention", "mlp"), "gemma2": (), "gpt_neox": (), "qwen3_moe": ("attention",)}
