"""The perplexity of held-out windows, which nothing was fitted on: of the dense model, then of what was written.

Both are streamed, one block in memory at a time; several ranks share the windows.

Shape suffixes: N windows, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import TextWindows
from structprune.calibration.select import fingerprint
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.losses import last_states, window_losses
from structprune.engine.streaming.model import StreamedModel
from structprune.errors import NOT_FINITE_ADVICE, NumericalError
from structprune.memory import release_free_memory
from structprune.phases import Phase
from structprune.ranks import add_numbers
from structprune.results.texts import HeldOutReport, HeldOutText


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
    perplexities = {name: _perplexities(context, name, stock) for name, stock in models.items()}
    (dense, *dense_texts), (pruned, *pruned_texts) = perplexities["dense"], perplexities["pruned"]
    return HeldOutReport(
        dense_perplexity=dense,
        pruned_perplexity=pruned,
        texts=[
            HeldOutText(
                name=text.name, num_windows=len(text.held_out), dense_perplexity=before, pruned_perplexity=after
            )
            for text, before, after in zip(_measured(context), dense_texts, pruned_texts, strict=True)
        ],
        num_windows=len(ids_NS),
        seq_len=ids_NS.shape[1],
        set_apart=context.windows.set_apart,
        fingerprint=fingerprint(ids_NS),
        num_bytes=context.windows.held_out_bytes,
    )


def _measured(context: RunContext) -> list[TextWindows]:
    """List the texts that have held-out windows, where there are several."""
    return [text for text in context.windows.texts if text.held_out]


def _perplexities(context: RunContext, name: str, stock: StockModel) -> list[float]:
    """Measure the perplexity over all windows, then over those of each text where there are several."""
    step = f"held-out windows, {name}"
    line = context.run.journal.find(step)
    if line is None:
        means = _mean_losses(context, name, stock)
        line = context.ranks.broadcast(lambda: _record(context, step, means, name))
    else:
        for block in stock.layout.blocks:
            context.observer.advance(f"block {block.index}")
    return [math.exp(loss) for loss in (line["loss"], *line["texts"])]


def _mean_losses(context: RunContext, name: str, stock: StockModel) -> list[float]:
    """Measure the mean negative log-likelihoods over the windows of all ranks; right on the first one only."""
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
            losses = window_losses(head, store, ids_NS[ranks.rank :: ranks.size], context.device)
            del head
    finally:
        store.close()
    release_free_memory()
    own = dict(zip(range(ranks.rank, len(ids_NS), ranks.size), losses, strict=True))
    groups = [range(len(ids_NS)), *(text.held_out for text in _measured(context))]
    totals = add_numbers(ranks, [sum(own.get(number, 0.0) for number in group) for group in groups], owner=0)
    predictions = ids_NS.shape[1] - 1
    return [total / (len(group) * predictions) for total, group in zip(totals, groups, strict=True)]


def _record(context: RunContext, step: str, means: Sequence[float], name: str) -> Mapping[str, Any]:
    if not all(mean < 700 for mean in means):
        raise NumericalError(
            "the model's output on the held-out windows is NaN, infinite or absurdly large",
            where=f"{name} model",
            do=NOT_FINITE_ADVICE,
        )
    return context.run.journal.record(
        step, loss=means[0], texts=list(means[1:]), peak_bytes=context.meter.peak_so_far()
    )
