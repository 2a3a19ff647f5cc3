"""What a search over widths measures: solved variants, and their divergence from the dense model, alone and together.

Shape suffixes: N windows, S positions, D hidden size, V vocabulary, T tokens, I consumer inputs, K kept inputs,
P removed inputs, U units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from structprune.calibration import snapshots
from structprune.engine.pipelines.units import allocate
from structprune.engine.run.context import RunContext
from structprune.engine.search import fitness as fitness_module
from structprune.engine.search.fitness import Fitness, Measurement
from structprune.engine.search.statistics import load_statistics, measure_statistics
from structprune.engine.search.variants import Variants
from structprune.engine.search.windows import SearchWindows, shared_out
from structprune.engine.sensitivity.cache import SensitivityPass, measure_sensitivity
from structprune.engine.streaming.propagate import observed
from structprune.kinds import HeadUnits
from structprune.runs.journal import Journal
from structprune.scores.selection import keep_best, removal_order
from structprune.types import BlockLayout
from support.contexts import SEQ_LEN, context_for
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_WINDOWS = 12
KINDS = ("attention", "mlp")


def with_windows(context: RunContext) -> RunContext:
    ids_NS = torch.randint(0, 250, (NUM_WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    return replace(context, windows=replace(context.windows, ids_NS=ids_NS))


class Prepared:
    """A tiny model whose menu is measured."""

    def __init__(self, context: RunContext, journal: Journal, found: SensitivityPass) -> None:
        self.context, self.journal, self.folder = context, journal, journal.folder
        self.windows: SearchWindows = shared_out(context.windows, context.num_backward)
        self.fitted = context.on_windows(self.windows.fitted)
        measure_statistics(self.fitted, journal, found)
        self.widths = allocate(context, found.costs)

    @contextlib.contextmanager
    def fitness(self) -> Generator[Fitness]:
        with contextlib.closing(Fitness(self.context, self.folder, self.journal, self.windows.unfitted)) as fitness:
            yield fitness


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    folder = tmp_path_factory.mktemp("search")
    context = context_for(save_tiny("llama", folder / "model", num_blocks=3), scope="all", sparsity=0.3)
    context = with_windows(context)
    context.run.staging.mkdir()
    found = measure_sensitivity(context, context.run.staging / "survey")
    assert found is not None
    with contextlib.closing(Journal(context.run.staging / "search")) as journal:
        yield Prepared(context, journal, found)


def candidates(prepared: Prepared) -> list[dict[str, list[int]]]:
    """Choices that begin alike, one with a sublayer gone, one twice, and the dense model."""
    dense = {group.kind: [group.num_units] * 3 for group in prepared.context.stock.groups}
    start = prepared.widths
    return [
        start,
        {**start, "mlp": [*start["mlp"][:2], 7]},
        {**start, "mlp": [start["mlp"][0], 0, 31]},
        start,
        {**start, "attention": [dense["attention"][0], 1, 1]},
        dense,
    ]


def measurement(widths: Sequence[dict[str, list[int]]], windows: tuple[int, ...], draw: int = 0) -> Measurement:
    return Measurement(widths=widths, draws=[draw] * len(widths), windows=windows, description="candidates")


@pytest.mark.parametrize("at_once", [6, 2])
def test_together_as_alone(prepared: Prepared, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, wanted = prepared.windows.measured[0][:3], candidates(prepared)
    monkeypatch.setattr(fitness_module, "stores_at_once", lambda *_: at_once)
    with prepared.fitness() as fitness:
        fitness._count = 100 * at_once  # pyright: ignore[reportPrivateUsage]
        together = fitness.measure(measurement(wanted, windows))
        alone = [fitness.measure(measurement([one], windows))[0] for one in wanted]
    assert together == alone
    assert together[0] == together[3]
    assert len(set(together)) == 5
    # Sums in float32.
    assert max(map(abs, together[5])) < 1e-6
    assert min(together[0]) > 1e-4


def test_the_divergence_is_that_of_the_whole_models(prepared: Prepared) -> None:
    context, windows = prepared.context, prepared.windows.judged[0]
    wanted = candidates(prepared)[:3]
    variants = Variants(context, prepared.folder)
    dense = AutoModelForCausalLM.from_pretrained(context.stock.reader.directory).eval()
    pruned = AutoModelForCausalLM.from_pretrained(context.stock.reader.directory).eval()
    ids_NS = context.windows.ids_NS[list(windows)]
    with prepared.fitness() as fitness:
        fitness._count = 5000  # pyright: ignore[reportPrivateUsage]
        found = fitness.measure(measurement(wanted, windows))
    for widths, losses in zip(wanted, found, strict=True):
        for block in context.stock.layout.blocks:
            pruned.model.layers[block.index] = variants.build(
                block, {kind: widths[kind][block.index] for kind in KINDS}
            )
        with torch.no_grad():
            wanted_NSV = dense(ids_NS).logits.double().log_softmax(-1)
            found_NSV = pruned(ids_NS, use_cache=False).logits.double().log_softmax(-1)
        expected_N = (wanted_NSV.exp() * (wanted_NSV - found_NSV)).sum(-1).mean(1)
        assert losses == pytest.approx(expected_N.tolist(), rel=1e-3)


def test_a_variant_has_the_least_squares_consumer(prepared: Prepared) -> None:
    context = prepared.context
    model = AutoModelForCausalLM.from_pretrained(context.stock.reader.directory).eval()
    block = context.stock.layout.blocks[1]
    group = block.group("mlp")
    received: list[Tensor] = []
    with observed(model, f"{block.prefix}{group.consumer_module}", received.append), torch.no_grad():
        model(context.windows.ids_NS[list(prepared.windows.fitted)])
    x_TI, found = received[0].double(), load_statistics(prepared.folder, block, group)
    assert torch.allclose(found.moments.gram_II[:].double(), x_TI.T @ x_TI, rtol=1e-4, atol=1e-4)
    assert sorted(found.order_U.tolist()) == list(range(group.num_units))
    keep = sorted(found.order_U[group.num_units - 20 :].tolist())
    gone = sorted(set(range(group.num_units)) - set(keep))
    module = Variants(context, prepared.folder).build(block, {"mlp": 20})
    weight_OI = model.get_parameter(f"{block.prefix}{group.consumer_module}.weight").double()
    gram_II = x_TI.T @ x_TI
    gram_KK = gram_II[keep][:, keep]
    ridge = context.damping * gram_KK.diagonal().mean()
    right_OK = weight_OI[:, gone] @ gram_II[gone][:, keep]
    expected_OK = weight_OI[:, keep] + right_OK @ torch.linalg.inv(gram_KK + ridge * torch.eye(20).double())
    solved_OK = module.get_parameter(f"{group.consumer_module}.weight")
    assert torch.allclose(solved_OK.double(), expected_OK, rtol=1e-3, atol=1e-4)


def test_only_the_newest_widths_stay_on_disk(prepared: Prepared) -> None:
    variants, block = Variants(prepared.context, prepared.folder), prepared.context.stock.layout.blocks[0]
    for keep in range(1, 21):
        variants.build(block, {"mlp": keep})
    first = variants.build(block, {"mlp": 20}).get_parameter("mlp.down_proj.weight")
    kept = sorted(int(path.stem.rpartition("-")[2]) for path in prepared.folder.glob("solved-*"))
    assert kept == [*range(5, 21)]
    again = Variants(prepared.context, prepared.folder).build(block, {"mlp": 20})
    assert torch.equal(first, again.get_parameter("mlp.down_proj.weight"))


def test_draws_keep_other_units_of_the_same_width(prepared: Prepared) -> None:
    variants, block = Variants(prepared.context, prepared.folder), prepared.context.stock.layout.blocks[0]
    rows: list[Tensor] = []
    for draw in (0, 2, 3, 4, 5, 2):
        rows.append(variants.build(block, {"mlp": 24}, draw).get_parameter("mlp.up_proj.weight"))
    source_KD = prepared.context.reader.read(["mlp.up_proj.weight"], block.prefix)["mlp.up_proj.weight"]
    kept = [{row for row in range(48) if bool((source_KD[row] == part).all(dim=1).any())} for part in rows]
    assert all(len(units) == 24 for units in kept)
    assert kept[1] == kept[5]
    # A little by chance: most units stay.
    same = [len(kept[0] & other) for other in kept[1:5]]
    assert min(same) > 16
    assert sum(count < 24 for count in same) > 1


def test_what_was_measured_is_not_measured_again(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, wanted = prepared.windows.measured[0][:2], candidates(prepared)
    with prepared.fitness() as fitness:
        fitness._count = 7000  # pyright: ignore[reportPrivateUsage]
        first = fitness.measure(measurement(wanted, windows))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    with prepared.fitness() as fitness:
        fitness._count = 7000  # pyright: ignore[reportPrivateUsage]
        with monkeypatch.context() as patch:
            patch.setattr(fitness_module, "CandidateStreams", refuse)
            assert fitness.measure(measurement(wanted, windows)) == first
        # Other windows are another question.
        fitness._count = 7000  # pyright: ignore[reportPrivateUsage]
        assert fitness.measure(measurement(wanted, prepared.windows.measured[0][1:3])) != first


def test_a_measurement_that_was_cut_goes_on_where_it_was(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hidden states that were kept of the candidates behind the newest block."""
    windows, wanted = prepared.windows.measured[0][:3], candidates(prepared)
    with prepared.fitness() as fitness:
        fitness._count = 8000  # pyright: ignore[reportPrivateUsage]
        expected = fitness.measure(measurement(wanted, windows))
    monkeypatch.setattr(snapshots, "SHARE", 1e9)
    build, built = Variants.build, list[int]()

    def cut(self: Variants, block: BlockLayout, *rest: Any) -> Any:
        if block.index == 2 and 2 not in built:
            built.append(2)
            raise KeyboardInterrupt
        built.append(block.index)
        return build(self, block, *rest)

    monkeypatch.setattr(Variants, "build", cut)
    with prepared.fitness() as fitness:
        fitness._count = 8001  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(KeyboardInterrupt):
            fitness.measure(measurement(wanted, windows))
    assert set(built) == {0, 1, 2}
    built[:] = [2]
    with prepared.fitness() as fitness:
        fitness._count = 8001  # pyright: ignore[reportPrivateUsage]
        assert fitness.measure(measurement(wanted, windows)) == expected
        assert set(built) == {2}
        # What was kept is of no use to another measurement.
        assert fitness.measure(measurement(wanted[:2], windows)) == expected[:2]
        assert set(built) == {0, 1, 2}


@pytest.mark.parametrize("partitions", [1, 3])
def test_the_order_of_removal_leaves_the_best(partitions: int) -> None:
    score_U = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(1)).float()
    order_U = removal_order(score_U, partitions)
    for num_keep in range(0, 13, partitions):
        keep_U = torch.ones(12, dtype=torch.bool)
        keep_U[order_U[: 12 - num_keep]] = False
        assert torch.equal(keep_U, keep_best(score_U, num_keep, partitions))


def test_models_with_experts_and_with_narrow_values(tmp_path: Path) -> None:
    """Every sort of group can be a variant: the experts of a mixture, channels of the values."""
    sorts: list[tuple[str, HeadUnits]] = [("qwen3_moe", "kv-group"), ("llama", "value-channel")]
    for kind, head_units in sorts:
        context = context_for(save_tiny(kind, tmp_path / kind / "model"), head_units=head_units, scope="all")
        context = with_windows(context)
        context.run.staging.mkdir()
        found = measure_sensitivity(context, context.run.staging / "survey")
        assert found is not None
        with contextlib.closing(Journal(context.run.staging / "search")) as journal:
            prepared = Prepared(context, journal, found)
            with prepared.fitness() as fitness:
                dense = {group.kind: [group.num_units] * 2 for group in context.stock.groups}
                halved = {kind: [counts[0] // 2, counts[1]] for kind, counts in dense.items()}
                few, none = fitness.measure(measurement([halved, dense], prepared.windows.judged[0]))
        assert max(map(abs, none)) < 1e-6 < 1e-5 < min(few)
