"""The table of docs/wrappers.md: what becomes of every image-text type of stock transformers, with a tiny text model.

`STRUCTPRUNE_REWRITE=1 python -m pytest -m slow tests/conformance/test_image_text_types.py` writes the table anew.

Shape suffixes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from structprune.architectures.stock.model import StockModel
from structprune.architectures.stock.placeholders import parameters_on_meta
from structprune.architectures.stock.wrapper import is_wrapper_type
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import StructPruneError
from support.decoders import SIZES, TINY_DECODERS
from support.generated import check_table
from support.streamed import streamed_logits
from support.wrappers import SECTIONS, TINY_WRAPPERS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PAGE = Path(__file__).parents[2] / "docs" / "wrappers.md"
START, END = "<!-- made by tests/conformance/test_image_text_types.py -->", "<!-- end -->"
IDS_BS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(3))
# What a text config is given beside the sizes: positions of three axes, for heads of eight dimensions.
GIVEN: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": SECTIONS, "head_dim": 8} for name in ("glm4v", "glm46v", "glm_ocr", "glmga")},
    "qwen2_5_omni_thinker": {"rope_parameters": SECTIONS},
}
_MOST_PARAMETERS = 30_000_000


def tiny(model_type: str) -> Any:
    """A model of this type whose text model is small; what is around it has its usual size, and no storage."""
    if model_type in TINY_WRAPPERS:
        config: Any = CONFIG_MAPPING[model_type](**TINY_WRAPPERS[model_type])
    else:
        text = CONFIG_MAPPING[model_type]().get_text_config()
        entries = {**SIZES, **TINY_DECODERS.get(text.model_type, {})}
        entries |= GIVEN.get(model_type, {})
        config = CONFIG_MAPPING[model_type](text_config={"model_type": text.model_type, **entries})
    with parameters_on_meta():
        return AutoModelForImageTextToText.from_config(config).eval()


def filled(model: Any) -> dict[str, Tensor]:
    """Give the text model and the head of `model` random weights; all tensors, those around as single zeros."""
    text = type(model.config.get_text_config())
    modules = [module for name, module in model.named_modules() if name]
    inside = [module for module in modules if isinstance(getattr(module, "config", None), text)]
    wanted = {id(parameter) for module in (*inside, model.get_output_embeddings()) for parameter in module.parameters()}
    if sum(parameter.numel() for parameter in model.parameters() if id(parameter) in wanted) > _MOST_PARAMETERS:
        raise OverflowError("its text model does not become small by the usual entries")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in wanted:
            value = torch.randn(parameter.shape, generator=generator) * 0.15
            tensors[name] = value + 1 if value.ndim == 1 and name.endswith("norm.weight") else value
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    kept = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    around = {name: torch.zeros(1) for name, _ in model.named_parameters() if name not in tensors}
    for name, zero in around.items():
        # On the CPU, where stock code looks for the place of a model.
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(zero))
    return {**tensors, **kept, **around}


def outcome(model_type: str) -> tuple[str, str, str]:
    """What becomes of the type, the type of its text model, and the reason where it is not taken."""
    if not is_wrapper_type(model_type):
        return "refused", "", "its config has no config of a text model"
    text = ""
    try:
        text = CONFIG_MAPPING[model_type]().get_text_config().model_type
        model = tiny(model_type)
        text = model.config.get_text_config().model_type
        tensors = filled(model)
    except OverflowError as error:
        return "not tried", text, str(error)
    except Exception as error:
        # Configs want more than the usual entries, and say so by many types.
        return "not tried", text, f"its config wants more than the usual entries ({type(error).__name__})"
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        try:
            found_BSV = streamed_logits(StockModel(CheckpointReader(Path(directory))), IDS_BS)
        except StructPruneError as error:
            said = re.sub(r"^.* (has no family file|wraps a text model), and ", "", error.what)
            got = " ".join(str(error.got or "").split())[:100]
            return "refused", text, (said + (f": {got}" if got else "")).replace("|", "/")
    with torch.no_grad():
        expected_BSV = model(input_ids=IDS_BS, use_cache=False).logits
    if not torch.allclose(found_BSV, expected_BSV, rtol=1e-4, atol=1e-5):
        return "refused", text, "its text model computes other logits than the whole does"
    return ("pruned and tested" if model_type in TINY_WRAPPERS else "compared"), text, ""


def test_the_table_is_what_becomes_of_every_type() -> None:
    types = sorted(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name in CONFIG_MAPPING)
    found = {model_type: outcome(model_type) for model_type in types}
    counts = Counter(how for how, _, _ in found.values())
    summary = ", ".join(f"{count} {how}" for how, count in sorted(counts.items(), key=lambda each: -each[1]))
    made = [
        f"{len(found)} types: {summary}.",
        "",
        "| `model_type` | text model | what becomes of it | reason |",
        "|---|---|---|---|",
        *(f"| {name} | {text} | {how} | {reason} |" for name, (how, text, reason) in found.items()),
    ]
    check_table(PAGE, START, END, made)
