"""What a calibration source is given: the model's tokenizer, and windows that the model samples itself."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.model import StockModel
from structprune.architectures.stock.sampler import sample_windows
from structprune.calibration.context import SourceContext, WindowStart
from structprune.calibration.sources.file import join_turns
from structprune.kinds import StartToken
from structprune.types import Render


def source_context(
    stock: StockModel,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_bytes: int,
    bos: StartToken,
) -> SourceContext:
    """Put together the request for `num_samples` windows with the means of the model `stock`.

    Raises CheckpointError for a tokenizer that cannot be used, InputError for a start token that it does not have.
    """
    reader = stock.reader
    encoder = TextEncoder(reader.directory, stock.layout.vocab_size, stock.config)

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
        render=encoder.render,
        sample=sample,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        start=window_start(encoder, bos),
    )


def window_start(encoder: TextEncoder, bos: StartToken) -> WindowStart:
    """Find what windows begin with. Raises InputError and CheckpointError as `TextEncoder.start_ids` does."""
    ids = encoder.start_ids(bos)
    return WindowStart(ids=ids, text=encoder.spelled(ids))


def renderer(directory: Path) -> Render:
    """Return what writes chats by the template of the model in `directory`, whose tokenizer is loaded for the first
    one; plainly without a template."""
    render = functools.cache(lambda: TextEncoder(directory).render or join_turns)
    return lambda turns: render()(turns)
