"""The perplexity of held-out windows, which nothing was fitted on: of the dense model, then of what was written.

Both are streamed, one block in memory at a time; several ranks share the windows.

Shape suffixes: N windows, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from structprune.architectures.stock.model import StockModel
from structprune.calibration.select import fingerprint
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.losses import last_states, summed_losses
from structprune.engine.streaming.model import StreamedModel
from structprune.errors import NumericalError
from structprune.memory import release_free_memory
from structprune.phases import Phase
from structprune.ranks import add_numbers
from structprune.results.schema import HeldOutReport


def measure_held_out(context: RunContext, written: StockModel) -> HeldOutReport | None:
    """Measure the perplexities before and after, on every rank; None where no window is held out.

    Each is a step of the journal, so that a run that was cut between them does not repeat it. Raises NumericalError for
    outputs that are not finite.
    """
    ids_NS = context.windows.held_out_NS
    if ids_NS is None:
        return None
    models = {"dense": context.stock, "pruned": written}
    context.observer.start("held-out windows", sum(len(stock.layout.blocks) for stock in models.values()))
    perplexities = {name: _perplexity(context, name, stock) for name, stock in models.items()}
    return HeldOutReport(
        dense_perplexity=perplexities["dense"],
        pruned_perplexity=perplexities["pruned"],
        num_windows=len(ids_NS),
        seq_len=ids_NS.shape[1],
        set_apart=context.windows.set_apart,
        fingerprint=fingerprint(ids_NS),
    )


def _perplexity(context: RunContext, name: str, stock: StockModel) -> float:
    step = f"held-out windows, {name}"
    line = context.run.journal.find(step)
    if line is None:
        mean = _mean_loss(context, name, stock)
        line = context.ranks.broadcast(lambda: _record(context, step, mean, name))
    else:
        for block in stock.layout.blocks:
            context.observer.advance(f"block {block.index}")
    return math.exp(line["loss"])


def _mean_loss(context: RunContext, name: str, stock: StockModel) -> float:
    """Measure the mean negative log-likelihood over the windows of all ranks; right on the first one only."""
    ranks, ids_NS = context.ranks, context.windows.held_out_NS
    assert ids_NS is not None
    model = StreamedModel(
        stock=stock,
        windows=replace(context.windows, ids_NS=ids_NS),
        plan=context.plan,
        device=context.device,
        dtype=context.dtype,
        meter=context.meter,
        ranks=ranks,
    )
    path = context.run.staging / f"held-out-{name}.bin"
    store = last_states(model, path, Phase.HELD_OUT, context.observer.advance)
    try:
        with context.meter.phase(Phase.HELD_OUT):
            head = stock.load_head(context.device, context.dtype)
            own = summed_losses(head, store, ids_NS[ranks.rank :: ranks.size], context.device)
            del head
    finally:
        store.close()
    release_free_memory()
    (total,) = add_numbers(ranks, [own], owner=0)
    return total / ids_NS[:, 1:].numel()


def _record(context: RunContext, step: str, mean: float, name: str) -> Mapping[str, Any]:
    if not mean < 700:
        raise NumericalError(
            "the model's output on the held-out windows is NaN, infinite or absurdly large",
            where=f"{name} model",
            do="use --dtype float32; if it stays, the source checkpoint is damaged",
        )
    return context.run.journal.record(step, loss=mean, peak_bytes=context.meter.peak_so_far())
