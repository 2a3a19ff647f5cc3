"""What each width of a sublayer takes on this machine, timed on stock models of a few blocks with random weights.

Models that differ in one width alone are timed in turn; what one takes longer than the model without the sublayer is
the sublayer's. The whole source need not be in memory: its time is that of a model of one block, and for each further
block what one more takes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from structprune.architectures.stock.config import BLOCK_LISTS
from structprune.architectures.stock.loading import without_global_width_warnings
from structprune.architectures.stock.model import StockModel
from structprune.errors import UnsupportedError
from structprune.evaluation.speed import time_once
from structprune.kinds import UnitKind
from structprune.observer import Observer
from structprune.recipe.latency import LatencyTable, SublayerTimes

_BLOCKS = 2
"""Blocks of the models that are timed: their difference in one width counts that often."""
_LEVELS = 8
"""Widths that are timed, beside none at all."""
_FEW_TOKENS = 64
"""Size of the vocabulary where the output projection is not what is timed."""
Times = tuple[float, float]
"""Seconds of a prefill, and of one decoded token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How models are timed."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    prompt_tokens: int
    decode_tokens: int
    repeats: int

    def fastest(self, models: Mapping[Any, nn.Module]) -> dict[Any, Times]:
        """Time the models in turn and return the least of the repeats: what else a machine does only adds to a time."""
        found: dict[Any, list[Times]] = {name: [] for name in models}
        for repeat in range(self.repeats + 1):
            for name, model in models.items():
                prefill, decode = time_once(model, self.batch, self.prompt_tokens, self.decode_tokens)
                # The first one warms up.
                if repeat:
                    found[name].append((prefill, decode / self.decode_tokens))
        return {
            name: (min(prefill for prefill, _ in times), min(decode for _, decode in times))
            for name, times in found.items()
        }


def measure_latency(
    stock: StockModel, timing: Timing, *, source: str, machine: str, observer: Observer
) -> LatencyTable:
    """Time every kind of sublayer of a model at widths from none to its own, and the whole of it.

    `observer` is told of each kind of sublayer and of the whole. Raises UnsupportedError for widths that a stock config
    cannot say.
    """
    sublayers: dict[tuple[UnitKind, int], int] = {}
    for block in stock.layout.blocks:
        for group in block.groups:
            if group.config_fields:
                sublayers.setdefault((group.kind, group.num_units), block.index)
    observer.start("times", len(sublayers) + 1)
    rows: list[SublayerTimes] = []
    for (kind, num_units), index in sublayers.items():
        rows.append(_time_sublayer(stock, timing, index, kind, num_units))
        observer.advance(f"{kind} of {num_units} units")
    prefill, decode = _time_whole(stock, timing)
    observer.advance("whole model")
    return LatencyTable(
        source=source,
        device=str(timing.device),
        dtype=str(timing.dtype).removeprefix("torch."),
        machine=machine,
        batch=timing.batch,
        prompt_tokens=timing.prompt_tokens,
        prefill=1e6 * prefill,
        decode=1e6 * decode,
        sublayers=tuple(rows),
    )


def _time_sublayer(stock: StockModel, timing: Timing, index: int, kind: UnitKind, num_units: int) -> SublayerTimes:
    step = stock.layout.blocks[index].group(kind).multiple_of
    inner = (num_units * level // _LEVELS // step * step for level in range(1, _LEVELS))
    widths = sorted({0, *inner, num_units})
    models = {width: _model(stock, timing, index, _BLOCKS, kept=(kind, width)) for width in widths}
    found = timing.fastest(models)
    without = found[0]
    columns = ([1e6 * (found[width][phase] - without[phase]) / _BLOCKS for width in widths] for phase in range(2))
    prefill, decode = columns
    return SublayerTimes(kind=kind, units=tuple(widths), prefill=tuple(prefill), decode=tuple(decode))


def _time_whole(stock: StockModel, timing: Timing) -> Times:
    """Time a model of one block, and what every further block of each make adds."""
    makes = Counter(_make(stock, block.index) for block in stock.layout.blocks)
    first_of = {_make(stock, block.index): block.index for block in reversed(stock.layout.blocks)}
    total = [0.0, 0.0]
    for number, (make, count) in enumerate(makes.items()):
        models = {n: _model(stock, timing, first_of[make], n, vocabulary=True) for n in (1, 1 + _BLOCKS)}
        found = timing.fastest(models)
        del models
        for phase in range(2):
            each = max(0.0, found[1 + _BLOCKS][phase] - found[1][phase]) / _BLOCKS
            total[phase] += count * each + (found[1][phase] - each if number == 0 else 0.0)
    return total[0], total[1]


def _make(stock: StockModel, index: int) -> tuple[Any, ...]:
    """Describe what makes a block as slow as another one."""
    lists = (getattr(stock.config, name, None) for name in BLOCK_LISTS)
    entries = tuple(str(values[index]) for values in lists if isinstance(values, list))
    return (*entries, *((group.kind, group.num_units) for group in stock.layout.blocks[index].groups))


def _model(
    stock: StockModel,
    timing: Timing,
    index: int,
    num_blocks: int,
    *,
    kept: tuple[UnitKind, int] | None = None,
    vocabulary: bool = False,
) -> nn.Module:
    """Build a stock model whose blocks are all like block `index`; without units of a kind they lack the sublayer."""
    config: Any = copy.deepcopy(stock.resized_config(dict([kept]) if kept else {}, index))
    config.num_hidden_layers = num_blocks
    for name in BLOCK_LISTS:
        values = getattr(stock.config, name, None)
        if isinstance(values, list) and len(values) == len(stock.layout.blocks):
            setattr(config, name, [values[index]] * num_blocks)
    if not vocabulary:
        config.vocab_size = _FEW_TOKENS
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    try:
        with without_global_width_warnings(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=timing.dtype, trust_remote_code=False)
    except Exception as error:
        # transformers raises many types for a config that makes no model.
        raise UnsupportedError(
            "stock code builds no model of a few blocks like this one",
            where=f"block {index}",
            got=f"{type(error).__name__}: {error}"[:200],
            do="use --target-parameters or --target-bytes instead of a limit of time",
        ) from error
    layers: Any = model.get_submodule(stock.family.blocks_module)
    if kept and kept[1] == 0:
        for layer in layers:
            for name, module in stock.stand_ins(index, kept[0]).items():
                layer.set_submodule(name, module)
    return model.to(timing.device).eval()
