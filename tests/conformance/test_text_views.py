"""The text model inside an image-text model, seen as a checkpoint of its own: names, numbers and what is refused.

Shape suffixes: B sequences, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.architectures.stock.wrapper import text_view
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import StructPruneError, UnsupportedError
from support.checkpoints import change_config, change_weights
from support.streamed import streamed_logits
from support.wrappers import save_wrapper

CPU = torch.device("cpu")
PRUNED = ("gemma3", "llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
OTHERS = ("llama4", "qwen3_5")
IDS_BS = torch.randint(1, 200, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=PRUNED)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wrapper(request.param, tmp_path_factory.mktemp("wrappers") / request.param)


def stock_logits(directory: Path) -> Tensor:
    """What stock code makes of the whole, without an image."""
    model: Any = AutoModelForImageTextToText.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(input_ids=IDS_BS).logits


def test_the_text_model_computes_what_the_whole_does_without_an_image(source: Path) -> None:
    expected_BSV = stock_logits(source)
    torch.testing.assert_close(text_logits(source), expected_BSV, rtol=1e-5, atol=1e-5)
    loaded = load_model(source, CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS_BS).logits, expected_BSV, rtol=1e-5, atol=1e-5)


def test_every_tensor_is_inside_or_around(source: Path) -> None:
    whole = CheckpointReader(source)
    view = text_view(whole)
    assert view.wrapper is not None
    inside = {view.stored_name(name) for name in view.shapes}
    assert inside == view.wrapper.inside
    assert inside.isdisjoint(view.wrapper.around)
    assert inside | set(view.wrapper.around) == whole.shapes.keys()
    model: Any = AutoModelForImageTextToText.from_pretrained(source)
    layout = StockModel(whole).layout
    assert layout.all_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert layout.around.parameters > 0
    # Files, fingerprint and what is copied are those of the whole.
    assert view.files == whole.files
    assert view.fingerprint() == whole.fingerprint()
    assert text_view(view) is view


def test_names_of_today_and_of_before(source: Path, tmp_path: Path) -> None:
    """Files may have the names that modules have now; what is written has them too."""
    copy = tmp_path / "today"
    shutil.copytree(source, copy)
    model: Any = AutoModelForImageTextToText.from_pretrained(source)
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy / "model.safetensors")
    stock = StockModel(CheckpointReader(copy))
    block = stock.layout.blocks[0]
    assert stock.reader.stored_name(f"{block.prefix}mlp.new.bias").startswith("model.language_model.layers.0.")
    torch.testing.assert_close(text_logits(copy), stock_logits(source), rtol=1e-5, atol=1e-5)


def test_the_config_of_the_whole_comes_back(source: Path) -> None:
    view = text_view(CheckpointReader(source))
    assert view.wrapper is not None
    assert view.output_config(view.config) == json.loads((source / "config.json").read_text())
    changed = view.output_config({**view.config, "intermediate_size": 40, "tie_word_embeddings": False})
    assert changed["text_config"]["intermediate_size"] == 40
    assert changed["tie_word_embeddings"] is False


def test_a_config_from_before_text_configs(tmp_path: Path) -> None:
    """Qwen's files have the entries of the text model at the top; what is written is nested, as stock code saves it."""
    source = save_wrapper("qwen2_5_vl", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    (source / "config.json").write_text(json.dumps({**text, **config}))
    torch.testing.assert_close(text_logits(source), stock_logits(source), rtol=1e-5, atol=1e-5)
    view = text_view(CheckpointReader(source))
    assert view.output_config({**view.config, "intermediate_size": 40})["text_config"]["intermediate_size"] == 40


def text_logits(directory: Path) -> Tensor:
    """What the parts of the text model make of the same, one block after the other."""
    return streamed_logits(StockModel(CheckpointReader(directory)), IDS_BS)


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_positions_stored_as_integers_are_left_alone(kind: str, tmp_path: Path) -> None:
    source = save_wrapper(kind, tmp_path / "model")
    positions = {"vision_tower.embeddings.position_ids": torch.arange(4)[None]}
    change_weights(source, lambda tensors: {**tensors, **positions})
    torch.testing.assert_close(text_logits(source), stock_logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_text_model_that_is_not_described_is_refused_for_what_it_is(kind: str, tmp_path: Path) -> None:
    source = save_wrapper(kind, tmp_path / kind)
    said = None
    try:
        found_BSV = text_logits(source)
    except UnsupportedError as error:
        said = str(error)
    if said is not None:
        assert f"{kind}_text" in said
        return
    torch.testing.assert_close(found_BSV, stock_logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "what"), [("cohere2_vision", "the logits"), ("paligemma", "position_embeddings")])
def test_a_whole_that_computes_something_else_is_refused(kind: str, what: str, tmp_path: Path) -> None:
    """Cohere's leaves out the factor of its text model's logits; PaliGemma's counts positions from one."""
    source = save_wrapper(kind, tmp_path / kind)
    refused(source, "without an image it computes something else", what)


def refused(directory: Path, *said: str) -> None:
    with pytest.raises(StructPruneError) as caught:
        StockModel(CheckpointReader(directory))
    for text in said:
        assert text in str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_wrapper("llava", tmp_path / "model")


def test_no_weights_of_a_text_model(model: Path) -> None:
    change_weights(model, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("language_model")})
    refused(model, "no weights of the text model")


def test_a_part_of_them(model: Path) -> None:
    lost = "language_model.model.layers.1.mlp.up_proj.weight"
    change_weights(model, lambda tensors: {n: t for n, t in tensors.items() if n != lost})
    refused(model, "lacks 1 tensor", lost)


def test_a_tensor_too_many(model: Path) -> None:
    more = {"language_model.model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}
    change_weights(model, lambda tensors: {**tensors, **more})
    refused(model, "layers.7.mlp.up_proj")


def test_no_text_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["text_config"]
    (model / "config.json").write_text(json.dumps(config))
    # Stock code takes another model's numbers then.
    refused(
        model, "config.json does not say num_hidden_layers, which the stock class would make 32", "entry text_config"
    )


@pytest.mark.parametrize("text", ["llama", 3, [1, 2], {"model_type": "nothing"}, {"model_type": "bert"}, {}])
def test_a_text_config_that_is_none(model: Path, text: Any) -> None:
    change_config(model, text_config=text)
    refused(model)


def test_two_text_models(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    change_config(model, decoder=config["text_config"])
    refused(model, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 64},
        {"hidden_size": 64},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
        {"intermediate_size": "many"},
    ],
)
def test_sizes_that_the_weights_do_not_have(model: Path, changes: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    change_config(model, text_config={**config["text_config"], **changes})
    refused(model)


def test_as_many_blocks_of_vision(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    change_config(model, vision_config={**config["vision_config"], "num_hidden_layers": 10**9})
    refused(model, "num_hidden_layers is larger than the number of tensors")


def test_kernels_of_another_repository(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    change_config(model, text_config={**config["text_config"], "attn_implementation": "evil/kernel"})
    refused(model, "names code of another repository")


def test_blocks_of_different_widths(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    own = {"per_layer_config": {"1": {"intermediate_size": 40}}}
    change_config(model, text_config={**config["text_config"], **own})
    refused(model, "blocks of different widths")


def test_a_quantised_one(model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "awq"})
    refused(model, "announces a quantisation")


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    directory = save_wrapper("llava", tmp_path / "model")
    change_config(directory, model_type="pix2struct", architectures=["Pix2StructForConditionalGeneration"])
    refused(directory, "pix2struct", "encoder and a decoder")


def test_a_tied_head_that_differs_is_kept(tmp_path: Path) -> None:
    """Its entry is that of the whole, by which stock code ties."""
    source = save_wrapper("gemma3", tmp_path / "model")
    head = {"language_model.lm_head.weight": torch.randn(260, 32)}
    change_weights(source, lambda tensors: {**tensors, **head})
    stock = StockModel(CheckpointReader(source))
    assert not stock.layout.tied_embeddings
    assert stock.reader.output_config(stock.layout.config)["tie_word_embeddings"] is False
