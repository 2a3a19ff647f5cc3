"""How long a run will take on this machine: what it does (`planning/work.py`) times what each of it takes here.

Each kind of work is done once with numbers of no meaning, in the shapes of the model's widest block, on as many tokens
as a quarter of a second allows; searches and solves are done on problems of up to a thousand inputs, and their time is
extended from there. Nothing is read from the checkpoint.

Shape suffixes: B windows, S positions, D hidden size, T tokens, I consumer inputs, O outputs, U units, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.sources.fewer_tokens import missing_tokens
from structprune.architectures.stock.model import StockModel, block_arguments, output_tensor
from structprune.engine.planning.merged import likely_rows
from structprune.engine.planning.pieces import Piece, What, Work
from structprune.engine.run.pace_maps import MapTrials, extrapolated
from structprune.linalg.rotation import principal_basis
from structprune.memory import release_free_memory
from structprune.recipe import ResolvedRecipe
from structprune.recipe.repaired import objective_of
from structprune.recipe.units import ResolvedUnits
from structprune.scores import SELECTORS
from structprune.scores.selection import removal_path
from structprune.solvers import SOLVERS
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, LayerProblem, Moments, SublayerKind, TaylorSums, UnitGroup
from structprune.vocabulary.merged import EXAMPLES_PER_POSITION, MOST_EXAMPLES, RIDGES, most_positions, row_steps

# A trial is repeated with more tokens until it takes so long; the first one has so many.
_LONG_ENOUGH_S = 0.25
_FIRST_TOKENS = 64
_TOO_LONG_S = 1.0
_MOST_INPUTS = 1024
_MOST_VOCABULARY = 8192
_DAMPING = 1e-2
# Reading weights and text, starting the process that loads the result.
_AROUND_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A run's time, as it is expected on this machine."""

    seconds: float
    stretches: Mapping[str, float]
    """Name of a stretch of the run -> its seconds."""


def in_words(seconds: float) -> str:
    """Say a time as a person does."""
    if seconds < 45:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    if seconds < 90:
        return "about a minute"
    minutes = seconds / 60
    return f"about {minutes:.0f} minutes" if minutes < 90 else f"about {minutes / 60:.1f} hours"


def measured_pace(
    stock: StockModel, recipe: ResolvedRecipe, work: Work, device: torch.device, dtype: torch.dtype
) -> dict[Piece, float]:
    """Time every kind of work that `work` has, once; a few seconds in all."""
    pieces = {piece for counts in work.values() for piece in counts}
    weighs = any(piece.what is What.COSTS for piece in pieces)
    trials = Trials(stock=stock, recipe=recipe, device=device, dtype=dtype, weighs=weighs)
    pace = {piece: trials.seconds(piece) for piece in sorted(pieces)}
    release_free_memory()
    return pace


def expected(work: Work, pace: Mapping[Piece, float]) -> Expected:
    """Add up what the run will take at this pace."""
    stretches = {name: sum(times * pace[piece] for piece, times in counts.items()) for name, counts in work.items()}
    return Expected(seconds=_AROUND_S + sum(stretches.values()), stretches=stretches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Times one kind of work after the other, on one block of the model."""

    stock: StockModel
    recipe: ResolvedRecipe
    device: torch.device
    dtype: torch.dtype
    weighs: bool
    """Whether units are chosen by the loss's sensitivity to the consumer's output."""

    def seconds(self, piece: Piece) -> float:
        """Measure what one of these takes."""
        match piece.what:
            case What.STAGE:
                assert piece.kind is not None
                with self._block(piece.kind) as (block, module):
                    stage = self.stock.stage_of(block.index, piece.kind)
                    with self.stock.stage(module, block.index, stage):
                        return self._timed(partial(self._forward, block, module))
            case What.BACKWARD | What.WEIGHT_BACKWARD:
                with self._block() as (block, module):
                    module.requires_grad_(piece.what is What.WEIGHT_BACKWARD)
                    return self._timed(partial(self._backward, block, module))
            case What.HEAD | What.HEAD_BACKWARD:
                return self._head(differentiated=piece.what is What.HEAD_BACKWARD)
            case What.STREAM_SUMS:
                return self._sums(self.stock.layout.hidden_size, 0)
            case What.BASIS:
                return self._basis()
            case What.ROW_SOLVE:
                return self._row_solve()
            case What.MAP_INPUTS | What.MAP_SUMS | What.MAP_SOLVE:
                assert piece.kind is not None
                return self._maps(piece.what, piece.kind)
            case _:
                assert piece.kind is not None
                return self._of_group(piece.what, self._widest(piece.kind).group(piece.kind))

    def _maps(self, what: What, kind: SublayerKind) -> float:
        """Time what is done for the maps of one block's sublayer that get zeros."""
        assert kind != "mixer", "a mixer's maps are left as they are"
        maps = MapTrials(stock=self.stock, recipe=self.recipe, block=self._widest(kind), kind=kind, device=self.device)
        if what is What.MAP_SOLVE:
            return maps.solves(self._seconds)
        if what is What.MAP_SUMS:
            followed = self.recipe.follows_dense
            return sum(self._sums(inputs, inputs if followed else 0) for inputs in maps.inputs)
        with self._block(kind) as (block, module):
            return sum(
                self._timed(partial(maps.up_to, module, step, partial(self._forward, block))) for step in maps.steps
            )

    def _of_group(self, what: What, group: UnitGroup) -> float:
        inputs, hidden = group.num_units * group.width, self.stock.layout.hidden_size
        if what is What.SUMS:
            return self._sums(inputs, hidden if self.recipe.follows_dense else 0)
        if what is What.CONSUMER:
            weight_OI = self._states(hidden, inputs)[0]
            return self._timed(lambda tokens: partial(nn.functional.linear, self._states(tokens, inputs), weight_OI))
        return self._problem(what, group)

    def _widest(self, kind: SublayerKind | None = None) -> BlockLayout:
        """Return the block with most parameters, of those that have such a sublayer."""
        blocks = self.stock.layout.blocks
        having = [block for block in blocks if kind is None or self.stock.has_sublayer(block.index, kind)]
        return max(having or blocks, key=lambda block: block.num_parameters)

    @contextlib.contextmanager
    def _block(self, kind: SublayerKind | None = None) -> Generator[tuple[BlockLayout, nn.Module]]:
        """Build the stock layer with weights of no meaning; small ones are random, so a router sends everywhere."""
        block = self._widest(kind)
        tensors: dict[str, Tensor] = {}
        for name, shape in block.shapes.items():
            tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
            tensors[name] = tensor.normal_(std=0.02) if tensor.numel() < 2**20 else tensor.fill_(0.01)
        module = self.stock.block(block.index, tensors)
        del tensors
        try:
            yield block, module
        finally:
            del module
            release_free_memory()

    def _states(self, tokens: int, width: int) -> Tensor:
        return torch.randn(1, tokens, width, device=self.device, dtype=self.dtype)

    def _arguments(self, block: BlockLayout, tokens: int) -> dict[str, Any]:
        """Return what the stock model passes to the block for one window; its embeddings are one number, repeated."""
        return block_arguments(self.stock, tokens, self.dtype, self.device)[block.index]

    def _forward(self, block: BlockLayout, module: nn.Module, tokens: int) -> Callable[[], object]:
        hidden_BSD, arguments = self._states(tokens, self.stock.layout.hidden_size), self._arguments(block, tokens)

        @torch.no_grad()
        def run() -> object:
            return module(hidden_BSD, **arguments)

        return run

    def _backward(self, block: BlockLayout, module: nn.Module, tokens: int) -> Callable[[], object]:
        hidden_BSD = self._states(tokens, self.stock.layout.hidden_size).requires_grad_(True)
        arguments = self._arguments(block, tokens)
        weights = [weight for weight in module.parameters() if weight.requires_grad]

        def run() -> object:
            output_BSD = output_tensor(module(hidden_BSD, **arguments))
            return torch.autograd.grad(output_BSD.sum(), [hidden_BSD, *weights], materialize_grads=True)

        return run

    def _head(self, *, differentiated: bool) -> float:
        """Time the head on part of the vocabulary: its time grows with it."""
        vocabulary = min(self.stock.layout.vocab_size, _MOST_VOCABULARY)
        weight_VD = self._states(vocabulary, self.stock.layout.hidden_size)[0]

        def make(tokens: int) -> Callable[[], object]:
            hidden_TD = self._states(tokens, weight_VD.shape[1])[0].requires_grad_(differentiated)
            labels_T = torch.zeros(tokens, dtype=torch.int64, device=self.device)

            def run() -> object:
                loss = nn.functional.cross_entropy((hidden_TD @ weight_VD.T).float(), labels_T)
                return torch.autograd.grad(loss, hidden_TD) if differentiated else loss

            return run

        return self._timed(make) * self.stock.layout.vocab_size / vocabulary

    def _sums(self, inputs: int, outputs: int) -> float:
        """Time the sums on part of the inputs: most of the time grows with their square."""
        measured = min(inputs, 2 * _MOST_INPUTS)

        def make(tokens: int) -> Callable[[], object]:
            accumulator = GramAccumulator(measured, self.device, num_outputs=outputs)
            x_TI = self._states(tokens, measured)[0]
            target_TO = torch.randn(tokens, outputs, device=self.device) if outputs else None
            return lambda: accumulator.update(x_TI, target_TO)

        return self._timed(make) * (inputs / measured) ** 2

    def _basis(self) -> float:
        hidden = self.stock.layout.hidden_size
        measured = min(hidden, _MOST_INPUTS)
        gram_DD = self._gram(measured)
        run = partial(principal_basis, gram_DD, measured // 2, _DAMPING, "a trial")
        return self._seconds(run) * (hidden / measured) ** 3

    def _row_solve(self) -> float:
        """Time it on as many examples as a row has on average, or on part of them: most of the time grows with them."""
        hidden, num_tokens = self.stock.layout.hidden_size, self.recipe.num_samples * self.recipe.seq_len
        num_tokens = min(num_tokens, most_positions(hidden, self.dtype.itemsize))
        rows = likely_rows(missing_tokens(self.stock.reader), self.stock.layout.vocab_size)
        examples = max(1, min(MOST_EXAMPLES, num_tokens, num_tokens * EXAMPLES_PER_POSITION // rows))
        measured, width = min(examples, _MOST_INPUTS), min(hidden, _MOST_INPUTS)
        hidden_ED, weight_E = torch.randn(measured, width), torch.rand(measured)
        seconds = self._seconds(partial(row_steps, hidden_ED, weight_E, weight_E, RIDGES, 1.0))
        return seconds * (examples / measured) * (hidden / width)

    def _problem(self, what: What, group: UnitGroup) -> float:
        """Time a choice, a solve or the costs of removals: for a large problem, on two smaller ones of its shape."""
        assert isinstance(self.recipe, ResolvedUnits)
        if what is What.CHOICE and self.recipe.score not in SELECTORS:
            # A score is a sum or two over what is there.
            return 0.0
        whole = group.num_units * group.width
        if whole <= _MOST_INPUTS:
            return self._problem_of(what, group, group.num_units)[1]
        half, full = (
            self._problem_of(what, group, max(1, round(inputs / group.width / group.partitions)) * group.partitions)
            for inputs in (_MOST_INPUTS // 2, _MOST_INPUTS)
        )
        return extrapolated(half, full, whole)

    def _problem_of(self, what: What, group: UnitGroup, units: int) -> tuple[int, float]:
        """Return the inputs of a problem of so many units, and its seconds."""
        assert isinstance(self.recipe, ResolvedUnits)
        scale = units / group.num_units
        keep = max(1, round(units * (1 - self.recipe.sparsity) / group.partitions)) * group.partitions
        problem = self._small_problem(group, units, max(1, round(self.stock.layout.hidden_size * scale)), what)
        keep_U = torch.arange(units, device=self.device) < keep
        run: Callable[[], object]
        match what:
            case What.COSTS:
                run = partial(removal_path, problem, units)
            case What.CHOICE:
                run = partial(SELECTORS.get(self.recipe.score).keep, problem, keep)
            case _:
                run = partial(SOLVERS.get(self.recipe.solver).solve, problem, keep_U)
        return units * group.width, self._seconds(run)

    def _small_problem(self, group: UnitGroup, units: int, outputs: int, what: What) -> LayerProblem:
        assert isinstance(self.recipe, ResolvedUnits)
        inputs = units * group.width
        weight_OI = torch.randn(outputs, inputs, device=self.device)
        priced, alone = what is What.COSTS, what in (What.COSTS, What.SEARCH_SOLVE)

        def moments() -> Moments:
            gram_II = self._gram(inputs)
            followed = self.recipe.follows_dense and not alone
            return Moments(
                gram_II=gram_II,
                num_tokens=inputs,
                sum_I=torch.zeros(inputs, dtype=torch.float64, device=self.device),
                target_OI=weight_OI @ gram_II if followed else None,
                target_energy=1.0 if followed else None,
            )

        numbers_U = torch.ones(units, dtype=torch.float64, device=self.device)
        num_texts = len(self.recipe.texts) if objective_of(self.recipe).by_text else 1
        held_out = [moments() for _ in range(num_texts)] if self.recipe.chooses_ridge and not alone else []
        return LayerProblem(
            weight_OI=weight_OI,
            fit=moments(),
            held_out=reduce(Moments.__add__, held_out) if held_out else None,
            held_out_by_text=held_out if len(held_out) > 1 else (),
            width=group.width,
            partitions=group.partitions,
            damping=_DAMPING,
            shrinkage=0.0 if priced else self.recipe.shrinkage,
            producer_norms_MU=numbers_U.float()[None],
            sensitivity_OO=torch.eye(outputs, device=self.device) if priced or self.weighs else None,
            taylor=TaylorSums(signed_U=numbers_U, first_U=numbers_U, second_U=numbers_U, mixed_U=numbers_U),
        )

    def _gram(self, width: int) -> Tensor:
        x_TI = torch.randn(width, width, device=self.device)
        return x_TI.T @ x_TI

    def _timed(self, make: Callable[[int], Callable[[], object]]) -> float:
        """Time `make(tokens)()` with more and more tokens, up to a window; return the seconds of a whole window."""
        window, tokens = self.recipe.seq_len, min(_FIRST_TOKENS, self.recipe.seq_len)
        # Not the first time: there libraries load their code.
        make(tokens)()
        while True:
            seconds = self._seconds(make(tokens))
            if seconds >= _LONG_ENOUGH_S or tokens == window:
                return seconds * window / tokens
            tokens = min(window, 4 * tokens)

    def _seconds(self, run: Callable[[], object]) -> float:
        """Time it: the better of two, unless one is long enough; the first one also brings pages of memory."""
        best = float("inf")
        for _ in range(2):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            best = min(best, time.perf_counter() - started)
            if best > _TOO_LONG_S:
                break
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
