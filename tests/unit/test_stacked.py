"""Experts stacked in files: read one by one, written again as they were, and split stock modules that compute alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from structprune.architectures.family import Experts
from structprune.architectures.stock.conversions import maps_in_files, renamed_tensors
from structprune.architectures.stock.experts import find_stacked, split_experts, stacked_maps
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.stacked import Stacking
from structprune.checkpoint.writer import CheckpointWriter, FileForm
from support.decoders import SIZES, TINY_DECODERS

APART = Stacking(module="mlp.experts", maps={"up": ("gate.weight", "up.weight"), "down": ("down.weight",)})
TURNED = Stacking(module="experts", maps={"up": ("up.weight",), "up_bias": ("up.bias",)}, transposed=True)


def stacked_tensors(stacking: Stacking) -> dict[str, Tensor]:
    shapes = {
        "up": (3, 4, 10) if stacking.transposed else (3, 10, 4),
        "up_bias": (3, 10),
        "down": (3, 4, 5),
    }
    return {
        f"a.0.{stacking.module}.{name}": torch.randn(shapes[name], generator=torch.Generator().manual_seed(len(name)))
        for name in stacking.maps
    }


@pytest.mark.parametrize("stacking", [APART, TURNED])
def test_experts_are_read_one_by_one(stacking: Stacking, tmp_path: Path) -> None:
    stacked = stacked_tensors(stacking)
    save_file({**stacked, "a.norm.weight": torch.ones(4)}, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    view = CheckpointReader(tmp_path).unstacked(stacking)
    up = stacked[f"a.0.{stacking.module}.up"]
    if stacking.transposed:
        assert torch.equal(view.read([f"a.0.{stacking.module}.2.up.weight"]).popitem()[1], up[2].T)
        assert view.shapes[f"a.0.{stacking.module}.1.up.bias"] == (10,)
    else:
        names = [f"a.0.{stacking.module}.1.{name}.weight" for name in ("gate", "up")]
        found = view.read(names)
        assert torch.equal(torch.cat([found[name] for name in names]), up[1])
    assert "a.norm.weight" in view.shapes
    assert not any(name in view.shapes for name in stacked)
    # Rows in pieces, as a large tensor is read.
    name = next(name for name in view.shapes if name.endswith("2.up.weight"))
    rows = torch.cat([part for _, part in view.read_rows(name, 3)])
    assert torch.equal(rows, view.read([name])[name])


@pytest.mark.parametrize("stacking", [APART, TURNED])
def test_what_was_read_is_written_as_it_was(stacking: Stacking, tmp_path: Path) -> None:
    stacked = stacked_tensors(stacking)
    save_file(stacked, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    view = CheckpointReader(tmp_path).unstacked(stacking)
    single = view.read(view.shapes)
    again = stacking.stack(single)
    assert again.keys() == stacked.keys()
    assert all(torch.equal(again[name], stacked[name]) for name in stacked)
    assert stacking.stacked_shapes(view.shapes) == {name: tuple(each.shape) for name, each in stacked.items()}
    # And by a run's writer, which gives back what it wrote.
    (tmp_path / "shards").mkdir()
    writer = CheckpointWriter(tmp_path / "shards", 1, FileForm(stacking=stacking))
    writer.write(1, single)
    found = writer.read(1, single)
    assert all(torch.equal(found[name], single[name]) for name in single)


def test_other_tensors_are_passed_through() -> None:
    tensors = {"a.experts.weight": torch.ones(2), "a.mlp.experts.x.up.weight": torch.ones(1)}
    assert APART.stack(tensors) == tensors
    assert APART.place("a.mlp.experts.1.other.weight") is None


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "qwen3_next", "jamba", "nemotron_h"])
@torch.no_grad()
def test_split_experts_compute_what_the_stock_module_does(model_type: str) -> None:
    """Concatenated and alternating gates, without gates, biased, rows for columns, sorted tokens."""
    torch.manual_seed(0)
    own: dict[str, Any] = TINY_DECODERS.get(model_type, {})
    if model_type == "nemotron_h":
        pattern = ["moe", "attention", "moe", "attention"]
        own = {"layers_block_type": pattern, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        own |= {"moe_intermediate_size": 24, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SIZES, **own})).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    ids_BS = torch.arange(3, 33).reshape(2, 15)
    expected = model(input_ids=ids_BS).logits
    found = 0
    blocks: Any = max((each for each in model.modules() if isinstance(each, torch.nn.ModuleList)), key=len)
    for block in blocks:
        layout = find_stacked(block)
        if layout is None:
            continue
        first, last = maps_in_files(model_type, layout.first), maps_in_files(model_type, "down_proj")
        stacked = stacked_maps(layout, first or (layout.first,), last[0] if last else "down_proj")
        experts = Experts(
            module=layout.module,
            routers=(),
            writer=last[0] if last else "down_proj",
            count_field="",
            chosen_field="",
            stacked=stacked,
            transposed=layout.transposed,
        )
        stock = dict(block.state_dict())
        split_experts(block, experts)
        single = {name: torch.empty(each.shape) for name, each in block.state_dict().items()}
        for name, tensor in stock.items():
            parts = list(experts.stacking.parts_of(name, tuple(tensor.shape)))
            single |= {part: experts.stacking.take(tensor, place) for part, place, _ in parts} or {name: tensor}
        block.load_state_dict(single)
        found += 1
    assert found
    torch.testing.assert_close(model(input_ids=ids_BS).logits, expected, rtol=1e-4, atol=1e-4)


def test_names_in_files_are_those_of_transformers_own_table() -> None:
    assert maps_in_files("mixtral", "gate_up_proj") == ("w1", "w3")
    assert maps_in_files("deepseek_v3", "gate_up_proj") == ("gate_proj", "up_proj")
    assert maps_in_files("gpt_oss", "gate_up_proj") == ()
    stored = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert renamed_tensors("mixtral", [stored]) == {stored: "model.layers.0.mlp.experts.1.w1.weight"}
    assert renamed_tensors("llama", [stored]) == {}
