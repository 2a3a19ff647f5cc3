"""What a calibration source is given: the model's tokenizer, and windows that the model samples itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.config import build_config, usable_config
from structprune.architectures.stock.model import StockModel
from structprune.architectures.stock.sampler import sample_windows
from structprune.calibration.context import SourceContext, WindowRequest, WindowStart
from structprune.calibration.sources.rows import join_turns
from structprune.checkpoint.reader import CheckpointReader
from structprune.kinds import StartToken
from structprune.types import Render


def source_context(
    stock: StockModel, wanted: WindowRequest, *, dtype: torch.dtype, device: torch.device, budget_bytes: int
) -> SourceContext:
    """Put together the request for windows with the means of the model `stock`.

    Raises CheckpointError for a tokenizer that cannot be used, InputError for a start token that it does not have.
    """
    reader = stock.reader
    encoder = TextEncoder(reader.directory, stock.layout.vocab_size, stock.tokenizer_config)

    def sample(num_windows: int, window_len: int, draw: int) -> Tensor:
        return sample_windows(
            reader,
            num_windows,
            window_len,
            draw,
            start_id=encoder.bos_id,
            dtype=dtype,
            device=device,
            budget_bytes=budget_bytes,
        )

    return SourceContext(
        encode=encoder.encode,
        decode=encoder.decode,
        render=encoder.render,
        sample=sample,
        num_samples=wanted.num_samples,
        seq_len=wanted.seq_len,
        seed=wanted.seed,
        start=window_start(encoder, wanted.bos),
        num_held_out=wanted.num_held_out,
        num_repair=wanted.num_repair,
        min_samples=wanted.min_samples,
    )


def window_start(encoder: TextEncoder, bos: StartToken) -> WindowStart:
    """Find what windows begin with. Raises InputError and CheckpointError as `TextEncoder.start_ids` does."""
    ids = encoder.start_ids(bos)
    return WindowStart(ids=ids, text=encoder.spelled(ids))


def renderer(reader: CheckpointReader) -> Render:
    """Return what writes chats by the model's template, with a tokenizer that is loaded for the first one; plainly
    without a template."""

    @functools.cache
    def render() -> Render:
        # As of the model whose tokenizer it is.
        config = build_config(reader, usable_config(reader)[0]) if reader.wrapper is None else None
        return TextEncoder(reader.directory, config=config).render or join_turns

    return lambda turns: render()(turns)
