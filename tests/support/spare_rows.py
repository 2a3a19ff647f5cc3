"""Tiny models whose embedding has more rows than their tokenizer has tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from support.models import TINY_MODELS, spread_weights
from support.vocabularies import byte_level
from support.wrappers import tiny_wrapper

ROWS = 576


def save_with_spare_rows(kind: str, directory: Path) -> Path:
    """Save a model of a kind of `TINY_MODELS`, or of those that have images too, with a byte-level tokenizer."""
    torch.manual_seed(0)
    wrapped = kind not in TINY_MODELS
    model = tiny_wrapper(kind) if wrapped else TINY_MODELS[kind]()
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    spread_weights(model)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    (model.config.text_config if wrapped else model.config).eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
