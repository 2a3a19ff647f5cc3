"""`export --format vllm` without vLLM: what is written, and what is refused before anything is. See test_vllm.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_per_layer import write_per_layer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from structprune.api import export
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, NumericalError, StructPruneError, UnsupportedError
from structprune.exporters import vllm_export
from structprune.exporters.vllm_classes import NAS_ARCHITECTURE
from support.checkpoints import change_config, change_weights
from support.command_line import CommandLine
from support.decoders import tiny_decoder
from support.models import byte_tokenizer, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

WIDTHS = {"mlp": [31, 17, 48]}


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A LLaMA of three blocks of different MLP widths, tied."""
    return write_per_layer(save_tiny("llama", tmp_path / "dense", num_blocks=3), tmp_path / "uneven", WIDTHS)


def config_of(directory: Path) -> Any:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def test_what_is_written(uneven: Path, tmp_path: Path, command_line: CommandLine) -> None:
    """Every tensor as it is, a config that says of each block what it has, the tokenizer, and how to load it."""
    (uneven / "pruning_report.json").write_text("{}")
    code, out, err = command_line("export", uneven, "--format", "vllm", "-o", tmp_path / "a" / "out", "--json")
    output = tmp_path / "a" / "out"
    assert code == 0, err
    result = json.loads(out)
    assert (result["format"], result["architecture"], result["dtype"]) == ("vllm", NAS_ARCHITECTURE, "float32")
    assert result["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    assert f"vllm serve {output} --trust-remote-code, which runs configuration_structprune.py in it" in err
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert {path.name for path in output.iterdir()} == {
        *("config.json", "configuration_structprune.py", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    before, after = load_file(uneven / "model.safetensors"), load_file(output / "model.safetensors")
    assert result["num_tensors"] == len(after)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = config_of(output)
    assert [block["ffn"] for block in config["block_configs"]] == [
        {"no_op": False, "intermediate_size": width} for width in WIDTHS["mlp"]
    ]
    assert all(block["attention"] == {"no_op": False, "n_heads_in_group": 2} for block in config["block_configs"])
    assert (config["num_attention_heads"], config["head_dim"], config["tie_word_embeddings"]) == (4, 8, True)
    assert (config["attention_bias"], config["qkv_bias"], config["mlp_bias"]) == (False, False, False)
    assert "sliding_window" not in config
    assert not config.keys() & {"per_layer_config", "allow_global_per_layer_attribute_access"}
    assert AutoTokenizer.from_pretrained(output, trust_remote_code=True)("two words")["input_ids"]


def test_the_configuration_file(uneven: Path, tmp_path: Path) -> None:
    """vLLM reads attributes, copies the config, and writes it as JSON."""
    export(uneven, tmp_path / "out", format="vllm")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for found in (config, copy.deepcopy(config)):
        assert [block.ffn.intermediate_size for block in found.block_configs] == WIDTHS["mlp"]
        assert not found.block_configs[0].attention.no_op
        assert not hasattr(found.block_configs[0].ffn, "ffn_mult")
    assert json.loads(config.to_json_string(use_diff=False))["block_configs"] == config.block_configs


def test_nothing_else_loads_it(uneven: Path, tmp_path: Path) -> None:
    export(uneven, tmp_path / "out", format="vllm")
    with pytest.raises(ValueError, match="StructPruneNasConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(UnsupportedError, match="nemotron-nas"):
        export(tmp_path / "out", tmp_path / "again", format="vllm")


def test_windows_biases_and_heads_of_their_own_size(tmp_path: Path) -> None:
    for kind, expected in {
        "mistral": {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
        "qwen2": {"attention_bias": False, "qkv_bias": True},
        "llama-untied-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    }.items():
        export(save_tiny(kind, tmp_path / kind), tmp_path / f"{kind}-out", format="vllm")
        assert config_of(tmp_path / f"{kind}-out").items() >= expected.items(), kind


def test_another_dtype_and_several_files(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_export, "DEFAULT_SHARD_BYTES", 20_000)
    result = export(uneven, tmp_path / "out", format="vllm", dtype="bfloat16")
    assert (result.dtype, config_of(tmp_path / "out")["dtype"]) == ("bfloat16", "bfloat16")
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    reader, source = CheckpointReader(tmp_path / "out"), CheckpointReader(uneven)
    assert reader.shapes == source.shapes
    for name in reader.shapes:
        assert torch.equal(reader.read([name])[name], source.read([name])[name].bfloat16())


def traced(folder: Path) -> Path:
    tiny_decoder("granite").save_pretrained(folder / "m")
    byte_tokenizer().save_pretrained(folder / "m")
    return folder / "m"


def heads(folder: Path) -> Path:
    source = save_tiny("llama", folder / "dense", num_blocks=3)
    return write_per_layer(source, folder / "m", {"attention": [2, 1, 2]})


def without_first_attention(folder: Path) -> Path:
    source = save_tiny("llama", folder / "dense", num_blocks=3)
    gone = ("model.layers.1.self_attn.", "model.layers.1.input_layernorm.", "model.layers.0.")
    output = change_weights(
        write_per_layer(source, folder / "m", {"mlp": [31, 17, 48]}),
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)},
    )
    return change_config(output, structprune_removed={"0": ["attention", "mlp"], "1": ["attention"]})


def values(folder: Path) -> Path:
    source = save_tiny("llama", folder / "dense", num_blocks=3)
    return write_per_layer(source, folder / "m", {"attention": [16, 8, 4]}, "value-channel")


def llama(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: change_config(save_tiny("llama", folder / "m"), **changes)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
REFUSALS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "family": (
        lambda folder: save_tiny("opt", folder / "m"),
        "does not compute this model family; got model_type 'opt', wanted llama, mistral, qwen2. Serve the directory",
    ),
    "traced": (
        traced,
        "got model_type 'granite'",
    ),
    "heads": (heads, "as many query heads in each; got 2 in block 1, 4 in block 0. Serve the directory"),
    "first block": (
        without_first_attention,
        "got no attention in block 1. Prune again with --protect",
    ),
    "values": (values, "fewer value channels than key channels.*--head-units kv-group"),
    "activation": (llama(hidden_act="gelu"), "one activation; got gelu, wanted silu"),
    "positions": (
        llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "got rope_type dynamic, wanted default, linear, llama3, yarn",
    ),
    "factor of positions": (
        llama(rope_parameters={**YARN, "attention_factor": 1.5}),
        "got rope_type yarn with attention_factor",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, tmp_path: Path, command_line: CommandLine) -> None:
    make, message = REFUSALS[name]
    source = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match=message):
        export(source, tmp_path / "out", format="vllm")
    assert command_line("export", source, "--format", "vllm", "-o", tmp_path / "out")[0] == 2
    assert sorted(tmp_path.iterdir()) == before


def damaged(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.inf
    return tensors


def large(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = 1e6
    return tensors


def other_shape(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"model.layers.2.mlp.up_proj.weight": tensors["model.layers.2.mlp.up_proj.weight"][:5].clone()}


@pytest.mark.parametrize(
    ("change", "dtype", "kind"),
    [
        (damaged, "stored", NumericalError),
        (large, "float16", NumericalError),
        (other_shape, "stored", CheckpointError),
    ],
)
def test_nothing_is_left_of_a_failure(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    dtype: str,
    kind: type[StructPruneError],
    uneven: Path,
    tmp_path: Path,
) -> None:
    change_weights(uneven, change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        export(uneven, tmp_path / "out", format="vllm", dtype=dtype)
    assert sorted(tmp_path.iterdir()) == before


def test_what_other_entries_of_the_config_say_is_not_carried(tmp_path: Path) -> None:
    """vLLM reads entries that stock LLaMA does not know, and would compute otherwise."""
    foreign = {"logit_scale": 2.0, "bias": True, "is_causal": False, "position_embedding_type": "mistral_yarn"}
    source = change_config(save_tiny("llama", tmp_path / "m"), **foreign)
    export(source, tmp_path / "out", format="vllm")
    assert not config_of(tmp_path / "out").keys() & foreign.keys()
    rope = LlamaConfig().rope_parameters | {"partial_rotary_factor": 0.5}
    export(change_config(source, rope_parameters=rope), tmp_path / "rope", format="vllm")
    assert config_of(tmp_path / "rope")["rope_parameters"].keys() == {"rope_type", "rope_theta"}
