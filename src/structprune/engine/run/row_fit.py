"""Steps of head rows toward what missing tokens would have been given, from last hidden states and the source's head.

Shape suffixes: T positions, C positions computed at once, G pieces whose rows change, M missing tokens of one slice,
E examples of one piece, V vocabulary, D hidden size, R ridges.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.architectures.sources.fewer_tokens import read_tokenizer
from structprune.architectures.stock.head import HeadParts
from structprune.calibration.store import FileStore, HiddenStore
from structprune.checkpoint.fewer_rows import FewerRows
from structprune.engine.planning.shapes import LOGIT_TOKENS
from structprune.engine.run.context import RunContext
from structprune.memory import release_free_memory
from structprune.vocabulary.files import TOKENIZER_NAME
from structprune.vocabulary.first_pieces import first_pieces
from structprune.vocabulary.merged import MERGED_BYTES, RIDGES, ROWS, SHARES, Examples, lifts, most_positions, row_steps

# Of the slope at zero: where a family's cap hardly lets a logit move.
_LEAST_SLOPE = 0.1
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Rows that change, and which of them a missing token belongs to."""

    rows_G: Tensor
    """Their ids."""
    of_tokens: Tensor
    """Id in the source -> place in `rows_G`; -1 for a token that stays or has no first piece."""

    @property
    def of_missing(self) -> Tensor:
        """The places of the missing tokens that have one, by their ids in the source."""
        return self.of_tokens[self.of_tokens >= 0]


def pieces_of(context: RunContext) -> Pieces:
    """Find the first piece of every token that is gone."""
    reader, kept = context.reader, context.recipe.tokens
    after = json.loads((reader.directory / TOKENIZER_NAME).read_text(encoding="utf-8"))
    found = first_pieces(read_tokenizer(_source(context).base.directory), after, kept.new_ids, str(reader.directory))
    found = {number: piece for number, piece in found.items() if number < kept.num_rows}
    rows_G = torch.tensor(sorted(set(found.values())), dtype=torch.int64)
    of_tokens = torch.full((kept.num_rows,), -1, dtype=torch.int64)
    if found:
        numbers, firsts = torch.tensor(list(found)), torch.tensor(list(found.values()))
        of_tokens[numbers] = torch.searchsorted(rows_G, firsts)
    return Pieces(rows_G=rows_G, of_tokens=of_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingRows:
    """Head rows of the missing tokens, and the place of each one's first piece."""

    rows: FileStore
    of_pieces: Tensor
    biases: Tensor | None


@contextlib.contextmanager
def missing_rows(context: RunContext, pieces: Pieces, scratch: Path) -> Generator[MissingRows]:
    """Copy the missing tokens' rows into a file in the dtype of the forward passes: they are read often."""
    source, stock, dtype = _source(context), context.stock, context.dtype
    of_missing = pieces.of_missing
    rows = FileStore(scratch / "missing.bin", (len(of_missing), 1, stock.layout.hidden_size), dtype)
    done = 0
    for numbers, rows_MD in source.others(context.reader.stored_name(stock.head_weight)):
        wanted_MD = rows_MD[pieces.of_tokens[numbers] >= 0].to(dtype)
        if len(wanted_MD):
            rows.write(done, wanted_MD[:, None])
        done += len(wanted_MD)
    biases = None
    if (bias := stock.head_bias) is not None:
        parts = source.others(context.reader.stored_name(bias))
        biases = torch.cat([values_M[pieces.of_tokens[numbers] >= 0] for numbers, values_M in parts]).to(dtype)
    release_free_memory()
    try:
        yield MissingRows(rows=rows, of_pieces=of_missing, biases=biases)
    finally:
        rows.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFit:
    """The problem of one run. Files are in `scratch`."""

    context: RunContext
    head: HeadParts
    """The head of the model as it is before."""
    pieces: Pieces
    missing: MissingRows
    scratch: Path

    def steps(self, store: HiddenStore, windows: Sequence[int]) -> tuple[list[FileStore], int]:
        """Solve for the steps (G, 1, D) of each ridge: files that are the caller's to close, and the positions used."""
        normed_TD = self._normed(store, windows)
        examples = Examples(self.scratch, len(self.pieces.rows_G))
        for start, chunk in self._chunks(normed_TD):
            weight_GC, lift_GC = lifts(chunk.own_GC, chunk.missing_GC)
            examples.add(start, weight_GC, lift_GC if chunk.slope_GC is None else lift_GC.div_(chunk.slope_GC))
            del chunk, weight_GC, lift_GC
        release_free_memory()
        energy = _mean_square(normed_TD)
        shape = (len(self.pieces.rows_G), 1, normed_TD.shape[1])
        steps = [FileStore(self.scratch / f"steps-{ridge}.bin", shape, torch.float32) for ridge in RIDGES]
        for piece, position_E, weight_E, lift_E in examples.by_piece():
            found_RD = row_steps(normed_TD[position_E], weight_E, lift_E, RIDGES, energy)
            for into, step_D in zip(steps, found_RD, strict=True):
                into.write(piece, step_D[None, None])
        examples.remove()
        return steps, len(normed_TD)

    @torch.no_grad()
    def divergences(
        self, store: HiddenStore, windows: Sequence[int], steps: Sequence[FileStore]
    ) -> tuple[float, dict[tuple[int, float], float]]:
        """Compute mean KL divergences, in nats per position: before, and by (number of the steps, share of them).

        From what the states in `store` and all rows predict, missing tokens at their first pieces. The states are taken
        as they are, and logits to follow the rows as fast as they do where they are.
        """
        normed_TD = self._normed(store, windows)
        before, total = 0.0, {(number, share): 0.0 for number in range(len(steps)) for share in SHARES}
        for start, chunk in self._chunks(normed_TD):
            wanted_GC = chunk.wanted_GC()
            gained_GC = (chunk.missing_GC / chunk.own_GC.clamp_min(_TINY)).log1p_()
            # What stays but for the pieces has less by as much as the missing tokens have.
            known_C = (wanted_GC * gained_GC).sum(0) - chunk.missing_GC.sum(0).log1p()
            before += float(known_C.sum(dtype=torch.float64))
            hidden_DC = normed_TD[start : start + len(known_C)].to(wanted_GC.device).float().T
            others_C = (1 - chunk.own_GC.sum(0)).clamp_min_(0)
            del gained_GC
            for number, step in enumerate(steps):
                moved_GC = torch.empty_like(wanted_GC)
                for first in range(0, len(moved_GC), ROWS):
                    step_GD = step.read(first, min(first + ROWS, len(moved_GC)))[:, 0].to(moved_GC.device)
                    moved_GC[first : first + ROWS] = step_GD @ hidden_DC
                if chunk.slope_GC is not None:
                    moved_GC *= chunk.slope_GC
                for share in SHARES:
                    scale_C = (others_C + (chunk.own_GC * (moved_GC * share).exp_()).sum(0)).log()
                    change_C = scale_C - share * (wanted_GC * moved_GC).sum(0)
                    total[number, share] += float((known_C + change_C).sum(dtype=torch.float64))
        return before / len(normed_TD), {choice: value / len(normed_TD) for choice, value in total.items()}

    @torch.no_grad()
    def divergence_of(
        self, new_head: nn.Module, new: HiddenStore, places: Mapping[int, int], store: HiddenStore
    ) -> float:
        """Compute the mean KL divergence of another model's predictions from those that `divergences` goes by.

        `places` are windows in the other model's store `new` with what each is in `store`.
        """
        total, rows_G = 0.0, self.pieces.rows_G.to(self.context.device)
        normed_TD = self._normed(store, list(places.values()))
        states_TD = _taken(new, list(places))
        for start, chunk in self._chunks(normed_TD):
            wanted_GC, missing_C = chunk.wanted_GC(), chunk.missing_GC.sum(0)
            for first in range(0, len(missing_C), LOGIT_TOKENS):
                part = slice(first, min(first + LOGIT_TOKENS, len(missing_C)))
                here = slice(start + part.start, start + part.stop)
                old_CV = self.head.changes(self.head.projection(normed_TD[here].to(rows_G.device))).float()
                wanted_CV = old_CV.sub_(old_CV.logsumexp(-1, keepdim=True)).sub_(missing_C[part, None].log1p())
                wanted_CV[:, rows_G] = wanted_GC[:, part].T.clamp_min(_TINY).log()
                found_CV = new_head(states_TD[here].to(rows_G.device)).float()
                found_CV.sub_(found_CV.logsumexp(-1, keepdim=True))
                total += float(nn.functional.kl_div(found_CV, wanted_CV, reduction="sum", log_target=True))
        return total / len(normed_TD)

    @torch.no_grad()
    def _chunks(self, normed_TD: Tensor) -> Iterator[tuple[int, _Chunk]]:
        """Yield (number of the first position, what is predicted there) for some positions at a time."""
        device, rows_G = self.context.device, self.pieces.rows_G.to(self.context.device)
        size = max(LOGIT_TOKENS, MERGED_BYTES // (4 * len(rows_G)))
        for start in range(0, len(normed_TD), size):
            hidden_CD = normed_TD[start : start + size].to(device)
            own_GC, lse_C, slope_GC = _own(self.head, hidden_CD, rows_G)
            missing_GC = torch.zeros_like(own_GC)
            for logits_MC, of_M in _missing_logits(self.head, hidden_CD, self.missing):
                missing_GC.index_add_(0, of_M, logits_MC.sub_(lse_C).exp_())
            yield start, _Chunk(own_GC=own_GC, missing_GC=missing_GC, slope_GC=slope_GC)

    @torch.no_grad()
    def _normed(self, store: HiddenStore, windows: Sequence[int]) -> Tensor:
        """Read the normalised states of as many positions as there is room for, spread evenly over the windows."""
        return _taken(store, windows, lambda states_PD: self.head.norm(states_PD.to(self.context.device)).cpu())


def _taken(store: HiddenStore, windows: Sequence[int], change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Read the states (T, D) of `_spread`'s positions of these windows, changed window by window."""
    _, seq_len, hidden = store.shape
    take = _spread(store, len(windows))
    taken_TD = torch.empty(len(take), hidden, dtype=store.dtype)
    done = 0
    for place, number in enumerate(windows):
        inside = take[(take >= place * seq_len) & (take < (place + 1) * seq_len)] - place * seq_len
        if len(inside):
            taken_TD[done : done + len(inside)] = change(store.read(number, number + 1)[0, inside])
            done += len(inside)
    return taken_TD


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """What pieces are given at some positions, as a share of what all tokens that stay are given."""

    own_GC: Tensor
    missing_GC: Tensor
    """What the missing tokens that begin with a piece would have beside these."""
    slope_GC: Tensor | None
    """How fast the piece's logit follows its product of row and state; None: as fast as that."""

    def wanted_GC(self) -> Tensor:
        """Return the probability that each piece is to have."""
        return (self.own_GC + self.missing_GC) / (1 + self.missing_GC.sum(0))


def _spread(store: HiddenStore, num_windows: int) -> Tensor:
    """Return which of so many windows' positions are taken, one behind the other: evenly, where not all can be."""
    _, seq_len, hidden = store.shape
    total = num_windows * seq_len
    count = min(total, most_positions(hidden, store.dtype.itemsize))
    return torch.arange(count) * total // count


def _source(context: RunContext) -> FewerRows:
    weights = context.reader.weights
    assert isinstance(weights, FewerRows), "rows are merged where tokens went"
    return weights


@torch.no_grad()
def _own(head: HeadParts, hidden_CD: Tensor, rows_G: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute, among the tokens that stay, the pieces' probabilities (G, C) and what they were divided by (C).

    With them how fast each logit follows its product of row and state, where a family changes logits: else None.
    """
    own_GC = hidden_CD.new_empty(len(rows_G), len(hidden_CD), dtype=torch.float32)
    slope_GC = torch.empty_like(own_GC) if len(head.changes) else None
    lse_C = hidden_CD.new_empty(len(hidden_CD), dtype=torch.float32)
    for start in range(0, len(hidden_CD), LOGIT_TOKENS):
        part = slice(start, start + LOGIT_TOKENS)
        products_CV = head.projection(hidden_CD[part])
        logits_CV = head.changes(products_CV).float()
        lse_C[part] = logits_CV.logsumexp(-1)
        own_GC[:, part] = (logits_CV[:, rows_G] - lse_C[part, None]).exp_().T
        if slope_GC is not None:
            slope_GC[:, part] = _slope(head.changes, products_CV[:, rows_G].float()).T
    return own_GC, lse_C, slope_GC


@torch.enable_grad()
def _slope(changes: nn.Module, products_CG: Tensor) -> Tensor:
    """Differentiate what a family does to logits, each by itself."""
    found = products_CG.detach().requires_grad_(True)
    at_zero = torch.zeros(1, device=found.device, requires_grad=True)
    slope_CG, slope_1 = torch.autograd.grad(changes(found).sum() + changes(at_zero).sum(), [found, at_zero])
    return torch.maximum(slope_CG, _LEAST_SLOPE * slope_1)


@torch.no_grad()
def _missing_logits(head: HeadParts, hidden_CD: Tensor, missing: MissingRows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (logits (M, C) of some missing tokens in float32, the places of their first pieces)."""
    for start in range(0, missing.rows.shape[0], ROWS):
        stop = min(start + ROWS, missing.rows.shape[0])
        products_MC = missing.rows.read(start, stop)[:, 0].to(hidden_CD.device) @ hidden_CD.T
        if missing.biases is not None:
            products_MC += missing.biases[start:stop, None].to(hidden_CD.device)
        yield head.changes(products_MC).float(), missing.of_pieces[start:stop].to(hidden_CD.device)


def _mean_square(states_TD: Tensor) -> float:
    """Compute it in float32 without a copy of all states."""
    total = sum(float(part.float().square().sum(dtype=torch.float64)) for part in states_TD.split(ROWS))
    return total / max(1, states_TD.numel())
