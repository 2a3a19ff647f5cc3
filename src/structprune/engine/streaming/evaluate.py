"""Perplexity of a model that is larger than memory: one block at a time, as in pruning.

All windows of all texts pass the blocks together, once per model; then the heads meet the last hidden states.

Shape suffixes: N windows, S positions, D hidden size, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.architectures.stock.model import StockModel
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.planning.host import make_plan
from structprune.engine.planning.plan import PlanRequest, PrunePlan
from structprune.engine.planning.shapes import LOGIT_TOKENS, logit_bytes
from structprune.engine.streaming.embed import embed_windows
from structprune.evaluation.perplexity import PerplexityResult, PredictionSums, score_predictions
from structprune.memory import release_free_memory
from structprune.observer import Observer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWindows:
    """One text, cut."""

    name: str
    ids_NS: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What a streamed evaluation will hold; one plan per model, the reference's first."""

    plans: tuple[PrunePlan, ...]

    @property
    def peak_bytes(self) -> int:
        return max(plan.peak_bytes for plan in self.plans)

    @property
    def store(self) -> str:
        """`memory` or `file`: of all hidden states, where one of the models leaves no room for them."""
        return "file" if any(plan.store == "file" for plan in self.plans) else "memory"


def plan_evaluation(
    models: Sequence[StockModel], num_windows: int, seq_len: int, dtype: torch.dtype, memory: int | None
) -> EvaluationPlan:
    """Plan the bytes from shapes. Raises MemoryBudgetError if even one window at a time does not fit in `memory`."""
    others = [0, *(_head_bytes(model, dtype) for model in models[:-1])]
    requests = [
        PlanRequest(
            layout=model.layout,
            groups=(),
            stored_bytes={name: model.reader.num_bytes([name]) for name in model.reader.shapes},
            stored_dtypes=model.reader.dtypes,
            compute_dtype=dtype,
            num_windows=num_windows,
            seq_len=seq_len,
            num_probe=0,
            needs_statistics=False,
            num_stores=len(models),
            compares="losses",
            other_head_bytes=other,
        )
        for model, other in zip(models, others, strict=True)
    ]
    return EvaluationPlan(plans=tuple(make_plan(request, memory) for request in requests))


def evaluate_streamed(
    models: Sequence[StockModel],
    texts: Sequence[TextWindows],
    plan: EvaluationPlan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    observer: Observer,
) -> list[PerplexityResult]:
    """Evaluate the last of `models` on each text; the one before it, if there is one, is the reference.

    Raises NumericalError for hidden states or logits that are not finite.
    """
    ids_NS = torch.cat([text.ids_NS for text in texts])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="structprune-eval-")))
        finals: list[HiddenStore] = []
        for number, (stock, own) in enumerate(zip(models, plan.plans, strict=True)):
            shape = (len(ids_NS), ids_NS.shape[1], stock.layout.hidden_size)
            in_memory = plan.store == "memory"
            store = MemoryStore(shape, dtype) if in_memory else FileStore(folder / f"{number}.bin", shape, dtype)
            stack.callback(store.close)
            propagator = embed_windows(
                stock, ids_NS, {store: len(ids_NS)}, own.micro_batch_windows, device=device, dtype=dtype
            )
            observer.start("evaluate" if stock is models[-1] else "evaluate the reference", len(stock.layout.blocks))
            for block in stock.layout.blocks:
                tensors = stock.reader.read(block.shapes, block.prefix, dtype)
                module = stock.block(block.index, {n: t.to(device) for n, t in tensors.items()})
                del tensors
                propagator.run(module, block.index, store)
                del module
                release_free_memory()
                observer.advance(f"block {block.index}")
            finals.append(store)
        heads = [stock.load_head(device, dtype) for stock in models]
        results: list[PerplexityResult] = []
        first = 0
        for text in texts:
            sums = PredictionSums()
            for index, ids_S in enumerate(text.ids_NS, start=first):
                hidden = [store.read(index, index + 1)[0].to(device) for store in finals]
                sums += _score_window(heads, hidden, ids_S.to(device))
            first += len(text.ids_NS)
            num_windows, seq_len = text.ids_NS.shape
            results.append(sums.result(text.name, seq_len, num_windows, compared=len(models) > 1))
        return results


@torch.no_grad()
def _score_window(heads: Sequence[nn.Module], hidden: Sequence[Tensor], ids_S: Tensor) -> PredictionSums:
    """Sum one window's losses; `hidden` (S, D) and `heads`: of the reference, if there is one, then of the model."""
    sums = PredictionSums()
    # The last position predicts a token outside the window.
    for start in range(0, len(ids_S) - 1, LOGIT_TOKENS):
        part = slice(start, min(start + LOGIT_TOKENS, len(ids_S) - 1))
        logits = [head(hidden_SD[part]).float() for head, hidden_SD in zip(heads, hidden, strict=True)]
        wanted_TV = logits[0] if len(logits) > 1 else None
        sums += score_predictions(logits[-1], ids_S[1:][part], wanted_TV)
    return sums


def _head_bytes(stock: StockModel, dtype: torch.dtype) -> int:
    """Return the bytes of the head in the compute dtype, and of a few positions' logits and their temporaries."""
    numbers = sum(torch.Size(stock.reader.shapes[name]).numel() for name in stock.head_tensors())
    return numbers * dtype.itemsize + logit_bytes(stock.layout.vocab_size, dtype)
