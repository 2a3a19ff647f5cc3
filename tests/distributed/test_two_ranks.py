"""Two gloo ranks on a two-layer model: the masks of one, bit-equal, one journal, and the bytes that the model names."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import largest_difference, masks, run_ranks, settings

from structprune.api import inspect, prune
from structprune.engine.planning.exchange import pruning_exchange
from structprune.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_ranks_do_what_one_does(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = settings(text_file)
    alone = prune(tiny_llama, Recipe.build(**asked), tmp_path / "alone")
    ended = run_ranks(
        2, [{"model": tiny_llama, "recipe": asked, "output": tmp_path / "two" / "out"}], tmp_path / "said"
    )
    assert ended.codes == {0: 0, 1: 0}, ended.errors
    first, second = ended.said[0]
    assert masks(tmp_path / "two" / "out") == masks(tmp_path / "alone")
    # Sums of 160 float32 products in another order, through two factorisations.
    assert largest_difference(tmp_path / "two" / "out", tmp_path / "alone") < 1e-4
    assert first["blocks"] == second["blocks"]
    assert len(first["blocks"]) == 2
    assert first["report"] == second["report"]
    assert first["report"]["num_ranks"] == 2
    assert alone.held_out is not None
    found = first["report"]["held_out"]
    assert found["dense_perplexity"] == pytest.approx(alone.held_out.dense_perplexity, rel=1e-6)
    assert found["pruned_perplexity"] == pytest.approx(alone.held_out.pruned_perplexity, rel=1e-4)
    assert found["num_windows"] == alone.held_out.num_windows > 1
    assert alone.num_ranks == 1
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["out"]

    layout = inspect(tiny_llama)
    for block, counted, other in zip(layout.blocks, first["bytes"], second["bytes"], strict=True):
        kept = {line["kind"]: line["kept_units"] for line in first["report"]["blocks"] if line["block"] == block.index}
        expected = pruning_exchange(block.groups, kept, layout.hidden_size, 4, parts=2, follows_dense=True)
        assert counted == other
        assert (counted["sums"], counted["tensors"]) == (expected.sums, expected.tensors)
        # Four shares of a block: nothing else than small messages around the tensors.
        assert counted["messages"] <= 4 * 4096
