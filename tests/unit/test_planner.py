"""The planner: a plan keeps to its budget, gives way in the right order, and a refusal names a budget that does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from structprune.engine.planning.host import make_plan
from structprune.engine.planning.plan import Budgets, DevicePlan, PlanRequest, PrunePlan
from structprune.errors import MemoryBudgetError
from structprune.memory import available_bytes, parse_bytes
from structprune.phases import Phase, SublayerPhase
from structprune.types import AxisSlice, BlockLayout, ModelLayout, UnitGroup


def layout_of(hidden: int, channels: int, num_blocks: int = 2, vocab: int = 1000) -> ModelLayout:
    """A LLaMA by its shapes alone: nothing is allocated, so its size does not matter."""
    group = UnitGroup(
        kind="mlp",
        num_units=channels,
        width=1,
        producers=tuple(AxisSlice(tensor=f"mlp.{m}_proj.weight", axis=0) for m in ("gate", "up")),
        consumer=AxisSlice(tensor="mlp.down_proj.weight", axis=1),
        consumer_module="mlp.down_proj",
        config_fields={"intermediate_size": 1},
        module_prefix="mlp.",
    )
    shapes = {f"self_attn.{m}_proj.weight": (hidden, hidden) for m in "qkvo"}
    shapes |= {f"mlp.{m}_proj.weight": (channels, hidden) for m in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (hidden, channels), "norm.weight": (hidden,)}
    return ModelLayout(
        family="llama",
        config={},
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=4096,
        attention_window=None,
        num_score_heads=0,
        blocks=tuple(
            BlockLayout(index=i, prefix=f"model.layers.{i}.", shapes=shapes, groups=(group,)) for i in range(num_blocks)
        ),
        blocks_module="model.layers",
        embedding_modules=("model.embed_tokens",),
        rotary_module=None,
        final_norm_module="model.norm",
        head_module="lm_head",
        tied_embeddings=True,
        outer_tensors={"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)},
    )


def plan_for(
    layout: ModelLayout,
    memory: int | None = 2**60,
    device: int | None = None,
    *,
    stored: torch.dtype = torch.float32,
    **changes: Any,
) -> PrunePlan:
    shapes = dict(layout.outer_tensors)
    for block in layout.blocks:
        shapes |= {block.prefix + name: shape for name, shape in block.shapes.items()}
    options: dict[str, Any] = {
        "compute_dtype": torch.float32,
        "num_windows": 128,
        "seq_len": 256,
        "num_probe": 8,
        "needs_statistics": True,
        **changes,
    }
    stored_bytes = {name: torch.Size(shape).numel() * stored.itemsize for name, shape in shapes.items()}
    request = PlanRequest(
        layout=layout,
        groups=layout.blocks[0].groups,
        stored_bytes=stored_bytes,
        stored_dtypes=dict.fromkeys(shapes, stored),
        **options,
    )
    return make_plan(request, memory, device)


STATISTICS_MLP, SOLVE_MLP = SublayerPhase.STATISTICS.of("mlp"), SublayerPhase.SOLVE.of("mlp")
SMALL = layout_of(hidden=64, channels=176)
# Activations decide: few weights, a wide MLP, and no Gram.
WIDE = {"layout": layout_of(hidden=16, channels=8192, num_blocks=1), "needs_statistics": False, "num_windows": 256}
LLAMA_7B = layout_of(hidden=4096, channels=11008, num_blocks=32, vocab=32000)


def test_ample_memory_gives_the_fast_plan() -> None:
    plan = plan_for(SMALL)
    assert plan.store == "memory"
    assert plan.micro_batch_windows == 2048 // 256
    assert plan.store_bytes == 128 * 256 * 64 * 4
    assert plan.budget_bytes == 2**60
    assert plan.peak_bytes == max(plan.phases.values())


@pytest.mark.parametrize(("seq_len", "num_windows", "micro_batch"), [(4096, 128, 1), (2048, 128, 1), (64, 5, 5)])
def test_micro_batch_is_at_least_one_and_at_most_all(seq_len: int, num_windows: int, micro_batch: int) -> None:
    plan = plan_for(SMALL, seq_len=seq_len, num_windows=num_windows, num_probe=1)
    assert plan.micro_batch_windows == micro_batch


def test_default_budget_is_a_share_of_what_is_free() -> None:
    budget = plan_for(SMALL, None).budget_bytes
    assert 0.5 * available_bytes() < budget < available_bytes()


def test_micro_batch_shrinks_before_the_store_moves() -> None:
    ample = plan_for(**WIDE)
    assert ample.micro_batch_windows == 8
    plan = plan_for(memory=ample.peak_bytes - 1, **WIDE)
    assert plan.store == "memory"
    assert plan.micro_batch_windows == 4
    assert plan.peak_bytes <= plan.budget_bytes == ample.peak_bytes - 1
    smaller = plan_for(memory=plan.peak_bytes - 1, **WIDE)
    assert (smaller.store, smaller.micro_batch_windows) == ("memory", 1)


def test_activations_are_kept_as_long_as_there_is_room() -> None:
    changes: dict[str, Any] = {"num_windows": 4096, "cacheable": ("mlp",)}
    ample = plan_for(SMALL, **changes)
    assert ample.cached == ("mlp",)
    assert ample.cache_bytes == 4096 * 256 * 176 * 4
    without = plan_for(SMALL, num_windows=4096)
    for phase in (
        Phase.READ_BLOCK,
        Phase.PROPAGATE,
        Phase.WRITE_BLOCK,
        STATISTICS_MLP,
        SOLVE_MLP,
    ):
        assert ample.phases[phase] == without.phases[phase] + ample.cache_bytes
    assert ample.phases[Phase.EMBED] == without.phases[Phase.EMBED]
    # A smaller micro-batch is given up first, and the cache before the hidden states go to a file.
    tighter = plan_for(SMALL, ample.peak_bytes - 1, **changes)
    assert tighter.cached == ("mlp",)
    assert tighter.micro_batch_windows < ample.micro_batch_windows
    plan = plan_for(SMALL, without.peak_bytes, **changes)
    assert (plan.cached, plan.cache_bytes, plan.store) == ((), 0, "memory")
    assert plan.phases == without.phases
    # A device computes them again.
    assert plan_for(SMALL, device=2**40, **changes).cached == ()


def test_store_moves_to_a_file_when_memory_is_tight() -> None:
    changes: dict[str, Any] = {"num_windows": 4096}
    ample = plan_for(SMALL, **changes)
    assert ample.store == "memory"
    assert ample.store_bytes == 4096 * 256 * 64 * 4
    plan = plan_for(SMALL, ample.peak_bytes - ample.store_bytes // 2, **changes)
    assert plan.store == "file"
    assert plan.micro_batch_windows == ample.micro_batch_windows
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.store_bytes == ample.store_bytes
    assert plan.disk_bytes == ample.disk_bytes + plan.store_bytes
    assert all(plan.phases[phase] <= ample.phases[phase] for phase in plan.phases)


@settings(deadline=None)
@given(
    hidden=st.sampled_from([64, 576, 4096]),
    channels=st.sampled_from([100, 1536, 11008]),
    num_windows=st.integers(1, 2000),
    seq_len=st.sampled_from([2, 100, 2048, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    statistics=st.booleans(),
    memory=st.integers(2**26, 2**34),
)
def test_a_plan_keeps_to_its_budget(
    hidden: int, channels: int, num_windows: int, seq_len: int, dtype: torch.dtype, statistics: bool, memory: int
) -> None:
    layout = layout_of(hidden, channels)
    changes: dict[str, Any] = {
        "num_windows": num_windows,
        "seq_len": seq_len,
        "num_probe": 1,
        "compute_dtype": dtype,
        "needs_statistics": statistics,
    }
    try:
        plan = plan_for(layout, memory, **changes)
    except MemoryBudgetError:
        assume(False)
        raise
    assert 0 < plan.peak_bytes <= memory
    assert 1 <= plan.micro_batch_windows <= num_windows


@pytest.mark.parametrize(
    ("hidden", "channels", "seq_len"),
    [
        (64, 176, 256),
        (576, 1536, 2048),
        (4096, 11008, 2048),
        (2048, 5632, 2048),
    ],
)
def test_refusal_names_a_budget_that_works(hidden: int, channels: int, seq_len: int) -> None:
    layout = layout_of(hidden, channels)
    with pytest.raises(MemoryBudgetError, match="does not fit in the memory budget") as caught:
        plan_for(layout, 2**20, seq_len=seq_len)
    assert caught.value.got == "1.0 MiB"
    assert str(caught.value.where).startswith("phase '")
    named = parse_bytes(str(caught.value.wanted).removeprefix("at least "))
    plan = plan_for(layout, named, seq_len=seq_len)
    assert plan.peak_bytes <= named
    # And not much more than is needed.
    with pytest.raises(MemoryBudgetError):
        plan_for(layout, named * 9 // 10, seq_len=seq_len)


def test_statistics_have_their_phases() -> None:
    blind = plan_for(SMALL, needs_statistics=False)
    assert set(plan_for(SMALL).phases) - set(blind.phases) == {
        STATISTICS_MLP,
        SOLVE_MLP,
    }
    # Gram and the solver's squares, at the least.
    gram_bytes = 11008**2 * 4
    assert plan_for(LLAMA_7B).phases[SOLVE_MLP] > 3 * gram_bytes
    assert plan_for(LLAMA_7B, needs_statistics=False).peak_bytes < plan_for(LLAMA_7B).peak_bytes


def test_an_iterative_solver_has_its_phase() -> None:
    plan = plan_for(
        LLAMA_7B, chooses_ridge=True, follows_dense=True, needs_sensitivity=True, sensitivity_windows=4, num_latents=2
    )
    without = plan_for(LLAMA_7B, chooses_ridge=True, follows_dense=True, needs_sensitivity=True, sensitivity_windows=4)
    assert set(plan.phases) - set(without.phases) == {Phase.ITERATE}
    # z and s of 32 windows of 256 tokens, at the least.
    assert plan.phases[Phase.ITERATE] > 2 * 32 * 256 * 11008 * 4
    assert all(plan.phases[name] >= without.phases[name] for name in without.phases)


def test_gradients_by_the_weights_are_counted() -> None:
    plan = plan_for(LLAMA_7B, needs_statistics=False, needs_weight_gradients=True, sensitivity_windows=12)
    without = plan_for(LLAMA_7B, needs_statistics=False)
    assert set(plan.phases) - set(without.phases) == {Phase.SENSITIVITY_BACKWARD, Phase.SENSITIVITY_LOSS}
    # The block, one window's gradients and two sums of the three matrices of the MLP, in float32.
    block, mlp = LLAMA_7B.blocks[0].num_parameters, 3 * 4096 * 11008
    assert plan.phases[Phase.SENSITIVITY_BACKWARD] > (block + 3 * mlp) * 4
    # Attention is not in scope, and no Gram is.
    assert plan.phases[Phase.SENSITIVITY_BACKWARD] < (3 * block + 3 * mlp + 3 * 4096 * 11008) * 4 + 2**30
    assert all(plan.phases[name] == without.phases[name] for name in without.phases)
    # The windows at every boundary, and two generations of the gradient at one.
    assert plan.disk_bytes - without.disk_bytes == (33 + 2) * 12 * 256 * 4096 * 4


def test_what_a_cut_run_goes_on_from_is_counted() -> None:
    plain, both = plan_for(LLAMA_7B), plan_for(LLAMA_7B, follows_dense=True)
    assert plain.disk_bytes > 2 * plain.store_bytes + 2 * 32 * LLAMA_7B.blocks[0].num_parameters * 4
    assert both.disk_bytes - plain.disk_bytes == 2 * plain.store_bytes
    model_bytes = LLAMA_7B.num_parameters * 4
    assert plan_for(LLAMA_7B, num_rehearsals=1).disk_bytes - plain.disk_bytes == model_bytes


def test_duals_are_counted() -> None:
    options: dict[str, Any] = {"chooses_ridge": True, "num_windows": 8}
    plain, duals = (plan_for(LLAMA_7B, num_latents=count, **options) for count in (2, 5))
    assert duals.phases[Phase.ITERATE] - plain.phases[Phase.ITERATE] == 3 * 8 * 256 * 11008 * 4


@pytest.mark.parametrize("choice", [{}, {"score": "greedy"}, {"num_latents": 2}, {"kept": {"mlp": 7000}}])
def test_held_out_sums_cost_one_gram(choice: dict[str, Any]) -> None:
    """No third one is there when units are chosen, ridges are tried and answers are judged."""
    plain, held_out = (plan_for(LLAMA_7B, chooses_ridge=held_out, **choice) for held_out in (False, True))
    for phase in (STATISTICS_MLP, SOLVE_MLP):
        assert held_out.phases[phase] - plain.phases[phase] == 11008**2 * 4


def test_held_out_sums_of_texts_cost_a_gram_each() -> None:
    one, four = (
        plan_for(LLAMA_7B, chooses_ridge=True, follows_dense=True, kept={"mlp": 7000}, held_out_texts=count)
        for count in (1, 4)
    )
    sums = (11008**2 + 11008 * 4096) * 4
    assert four.phases[STATISTICS_MLP] - one.phases[STATISTICS_MLP] == 3 * sums
    assert 3 * sums <= four.phases[SOLVE_MLP] - one.phases[SOLVE_MLP] < 3.5 * sums
    given = [plan_for(LLAMA_7B, held_out_texts=count).phases for count in (1, 4)]
    assert given[0] == given[1]


def test_peak_does_not_grow_with_the_number_of_blocks() -> None:
    shallow = plan_for(layout_of(hidden=64, channels=176, num_blocks=2))
    deep = plan_for(layout_of(hidden=64, channels=176, num_blocks=40))
    assert deep.phases == shallow.phases
    assert deep.disk_bytes > shallow.disk_bytes


def test_a_cast_copy_of_the_block_is_counted() -> None:
    same = plan_for(LLAMA_7B, stored=torch.bfloat16, compute_dtype=torch.bfloat16, needs_statistics=False)
    cast = plan_for(LLAMA_7B, stored=torch.bfloat16, compute_dtype=torch.float32, needs_statistics=False)
    difference = cast.phases[Phase.READ_BLOCK] - same.phases[Phase.READ_BLOCK]
    # The hidden states of the store and of the two probes are twice as wide too.
    states = (128 + 2 * 8) * 256 * 4096 * 2
    # In bfloat16 the CPU library keeps what it prepared for its last products.
    assert difference == LLAMA_7B.blocks[0].num_parameters * 4 + states - 48 * 2**20


def test_a_cast_to_another_dtype_of_the_same_size_is_counted() -> None:
    """OPT as published, in float16, computed in bfloat16."""
    options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "reload_check": True}
    same = plan_for(LLAMA_7B, stored=torch.bfloat16, **options)
    cast = plan_for(LLAMA_7B, stored=torch.float16, **options)
    for phase in (Phase.READ_BLOCK, Phase.PROPAGATE, STATISTICS_MLP, SOLVE_MLP):
        assert cast.phases[phase] - same.phases[phase] == LLAMA_7B.blocks[0].num_parameters * 2
    assert cast.reload is not None
    assert cast.reload.casts
    assert same.reload is not None
    assert not same.reload.casts


def test_embedding_and_head_are_cast_as_they_are_read() -> None:
    """A checkpoint in bfloat16 computed in float32: there is no copy as stored beside the one that is computed with."""
    same = plan_for(LLAMA_7B, needs_statistics=False, needs_sensitivity=True)
    cast = plan_for(LLAMA_7B, needs_statistics=False, needs_sensitivity=True, stored=torch.bfloat16)
    for phase in (Phase.EMBED, Phase.PERPLEXITY):
        assert cast.phases[phase] == same.phases[phase]
    assert cast.phases[Phase.COPY_OUTER] < same.phases[Phase.COPY_OUTER]


def test_every_boundary_that_is_kept_is_counted() -> None:
    """Whole blocks: no Gram, and as many stores as the choice needs, in memory or on disk."""
    options: dict[str, Any] = {"needs_statistics": False, "num_stores": 5}
    one = plan_for(SMALL, needs_statistics=False)
    boundaries, losses = (plan_for(SMALL, compares=kind, **options) for kind in ("boundaries", "losses"))
    assert set(boundaries.phases) - set(one.phases) == {Phase.ANGULAR_DISTANCES}
    assert set(losses.phases) - set(one.phases) == {Phase.MEASURED_LOSSES}
    assert boundaries.phases[Phase.READ_BLOCK] - one.phases[Phase.READ_BLOCK] == 4 * one.store_bytes
    # The head is held beside all of them.
    head_bytes = 1000 * 64 * 4
    assert losses.phases[Phase.MEASURED_LOSSES] - losses.phases[Phase.READ_BLOCK] > head_bytes - 2**20
    many: dict[str, Any] = {**options, "compares": "boundaries", "num_windows": 4096}
    ample = plan_for(SMALL, **many)
    tight = plan_for(SMALL, ample.peak_bytes - ample.store_bytes, **many)
    assert (ample.store, tight.store) == ("memory", "file")
    assert tight.disk_bytes - ample.disk_bytes == 5 * tight.store_bytes
    reported = 2 * 8 * 256 * 64 * 4
    assert ample.phases[Phase.EMBED] - tight.phases[Phase.EMBED] == 5 * tight.store_bytes + reported


def test_what_only_the_end_holds_is_counted_there_alone() -> None:
    """States of the reported windows and the logits of the reload check: not beside a block when stores are files."""
    few, many = (plan_for(LLAMA_7B, 2**33, num_windows=4096, num_probe=num, reload_check=num > 1) for num in (1, 101))
    assert few.store == many.store == "file"
    states = 2 * 100 * 256 * 4096 * 4
    assert few.phases[SOLVE_MLP] == many.phases[SOLVE_MLP]
    end = Phase.PERPLEXITY
    assert many.phases[end] - few.phases[end] == states + 32 * 32000 * 4


def test_held_out_windows_are_counted_at_the_end_alone() -> None:
    """Their states, beside a block, the embeddings or the head, whichever is the most; none where there are none."""
    none = plan_for(SMALL)
    assert Phase.HELD_OUT not in none.phases
    few, many = (plan_for(SMALL, held_out_windows=number) for number in (4, 104))
    states = 100 * 256 * 64 * 4
    assert many.phases[Phase.HELD_OUT] - few.phases[Phase.HELD_OUT] == states
    assert {name: size for name, size in many.phases.items() if name != Phase.HELD_OUT} == none.phases
    # Tight: all states are in files then, one loop's at a time.
    with pytest.raises(MemoryBudgetError) as caught:
        plan_for(SMALL, 2**20, held_out_windows=100_000)
    named = parse_bytes(str(caught.value.wanted).removeprefix("at least "))
    tight, ample = plan_for(SMALL, named, held_out_windows=100_000), plan_for(SMALL, held_out_windows=100_000)
    assert (tight.store, ample.store) == ("file", "memory")
    assert tight.disk_bytes - ample.disk_bytes == 100_000 * 256 * 64 * 4


def test_held_out_windows_pass_the_shortcuts_of_a_sliced_model() -> None:
    plain, shortcuts = (sliced(LLAMA_7B, 3072, kind, held_out_windows=4) for kind in ("one basis", "bases"))
    difference = shortcuts.phases[Phase.HELD_OUT] - plain.phases[Phase.HELD_OUT]
    assert difference == 2 * 3072**2 * 8


def test_embeddings_are_copied_together() -> None:
    """A table of positions lies in one shard with the tokens'."""
    positions = {"model.embed_positions.weight": (2050, 4096)}
    both = replace(
        LLAMA_7B,
        embedding_modules=("model.embed_tokens", "model.embed_positions"),
        outer_tensors=LLAMA_7B.outer_tensors | positions,
    )
    difference = plan_for(both).phases[Phase.COPY_OUTER] - plan_for(LLAMA_7B).phases[Phase.COPY_OUTER]
    assert difference == 2050 * 4096 * 4


def sliced(layout: ModelLayout, width: int, kind: str = "bases", **changes: Any) -> PrunePlan:
    return plan_for(layout, slices=kind, sliced_hidden=width, **changes)


def test_slicing_has_its_phases_and_no_units() -> None:
    plan = sliced(LLAMA_7B, 3072)
    own = {
        Phase.SLICE_STATISTICS,
        Phase.SLICE_EIGENVECTORS,
        Phase.ROTATE_BLOCK,
        Phase.ROTATE_EMBEDDINGS,
        Phase.ROTATE_HEAD,
    }
    common = set(plan_for(LLAMA_7B, needs_statistics=False).phases)
    assert set(plan.phases) == common | own
    square = 4096**2
    # Gram in float32; shifted, eigenvectors and workspace in float64; the bases before, between and after.
    assert plan.phases[Phase.SLICE_EIGENVECTORS] > 4 * square + 4 * 8 * square + 3 * 8 * 4096 * 3072
    one = sliced(LLAMA_7B, 3072, "one basis")
    assert set(one.phases) == set(plan.phases)
    # The sum over all positions instead of two more bases.
    difference = plan.phases[Phase.SLICE_EIGENVECTORS] - one.phases[Phase.SLICE_EIGENVECTORS]
    assert difference == 2 * 8 * 4096 * 3072 - 8 * square
    assert one.phases[Phase.ROTATE_BLOCK] < plan.phases[Phase.ROTATE_BLOCK]
    # The model, a head of its own, and where there are several bases, two shortcuts per block.
    dense = plan_for(LLAMA_7B, needs_statistics=False).disk_bytes
    assert one.disk_bytes == dense + 2 * 32000 * 4096 * 4 + 2 * 8 * square
    assert plan.disk_bytes == one.disk_bytes + 2 * 32 * 2 * 3072**2 * 8


@pytest.mark.parametrize("kind", ["bases", "one basis"])
def test_slicing_keeps_to_its_budget_and_names_one(kind: str) -> None:
    with pytest.raises(MemoryBudgetError, match="does not fit") as caught:
        sliced(LLAMA_7B, 3072, kind, memory=2**20)
    named = parse_bytes(str(caught.value.wanted).removeprefix("at least "))
    assert sliced(LLAMA_7B, 3072, kind, memory=named).peak_bytes <= named
    with pytest.raises(MemoryBudgetError):
        sliced(LLAMA_7B, 3072, kind, memory=named * 9 // 10)


def test_slicing_peak_grows_with_the_width_not_with_the_blocks() -> None:
    shallow, deep = (sliced(layout_of(hidden=64, channels=176, num_blocks=n), 48) for n in (2, 40))
    assert deep.phases == shallow.phases
    narrow, wide = sliced(LLAMA_7B, 2048), sliced(LLAMA_7B, 4096)
    assert all(narrow.phases[name] <= wide.phases[name] for name in wide.phases)
    assert narrow.phases[Phase.SLICE_EIGENVECTORS] < wide.phases[Phase.SLICE_EIGENVECTORS]


def on_device(device: int, layout: ModelLayout = LLAMA_7B, **changes: Any) -> DevicePlan:
    found = plan_for(layout, device=device, **{"compute_dtype": torch.bfloat16, "seq_len": 2048, **changes}).device
    assert found is not None
    assert found.peak_bytes <= found.budget_bytes == device
    return found


def test_without_a_device_there_is_no_budget_for_one() -> None:
    assert plan_for(SMALL).device is None
    assert plan_for(SMALL).budgets == Budgets(host=2**60)
    assert plan_for(SMALL, device=2**40).budgets == Budgets(host=2**60, device=2**40)


def test_a_device_holds_blocks_and_sums_and_no_stores() -> None:
    found = on_device(2**40, follows_dense=True, needs_sensitivity=True, sensitivity_windows=12)
    assert set(found.phases) == {
        Phase.EMBED,
        Phase.READ_BLOCK,
        Phase.PROPAGATE,
        Phase.PERPLEXITY,
        Phase.SENSITIVITY_BACKWARD,
        Phase.SENSITIVITY_LOSS,
        STATISTICS_MLP,
        SOLVE_MLP,
        SublayerPhase.REMOVAL_COSTS.of("mlp"),
    }
    assert (found.sums, found.solves) == ("device", "device")
    # One inverse in float64 at least, beside the sums.
    assert found.phases[SOLVE_MLP] > 11008**2 * (8 + 4)
    block, gram, cross = LLAMA_7B.blocks[0].num_parameters * 2, 11008**2 * 4, 4096 * 11008 * 4
    assert found.phases[STATISTICS_MLP] > block + gram + cross
    # One module of a block at a time.
    assert block < found.phases[Phase.READ_BLOCK] <= found.phases[Phase.PROPAGATE]
    # The stores stay on the host.
    assert on_device(2**40, num_windows=4096).phases == on_device(2**40).phases


def test_a_smaller_micro_batch_before_sums_on_the_host_and_these_before_a_refusal() -> None:
    options: dict[str, Any] = {"seq_len": 256, "num_windows": 128}
    places = [("device", "device"), ("device", "host"), ("host", "host")]
    seen = [(size, *place) for place in places for size in (8, 4, 1)]
    # Whichever is smaller than all before it can come next.
    device, found = 2**40, list[tuple[int, str, str]]()

    def shrink() -> None:
        nonlocal device
        while True:
            plan = plan_for(LLAMA_7B, device=device, compute_dtype=torch.bfloat16, **options)
            assert plan.device is not None
            found.append((plan.micro_batch_windows, plan.device.sums, plan.device.solves))
            device = plan.device.peak_bytes - 1

    with pytest.raises(MemoryBudgetError, match="does not fit in the device's memory budget") as caught:
        shrink()
    named = parse_bytes(str(caught.value.wanted).removeprefix("at least "))
    assert found == [each for each in seen if each in found]
    assert found[0] == seen[0]
    assert found[-1] == seen[-1]
    assert {place[1:] for place in found} == set(places)
    # What the refusal names does.
    assert on_device(named, **options).sums == "host"
    assert named - device < 2**20


def test_the_host_is_refused_for_its_own_reasons() -> None:
    with pytest.raises(MemoryBudgetError, match="does not fit in the memory budget"):
        plan_for(LLAMA_7B, 2**20, 2**40)
    with pytest.raises(MemoryBudgetError, match="Raise --device-memory"):
        plan_for(LLAMA_7B, 2**60, 2**20)


def test_every_phase_of_a_pipeline_that_uses_the_device_is_there() -> None:
    plain: dict[str, Any] = {"needs_statistics": False}
    assert Phase.SENSITIVITY_SCORES in on_device(2**40, needs_scores=True).phases
    assert Phase.MEASURED_LOSSES in on_device(2**40, compares="losses", **plain).phases
    assert Phase.ANGULAR_DISTANCES in on_device(2**40, compares="boundaries", **plain).phases
    assert Phase.SLICE_EIGENVECTORS in on_device(2**40, slices="bases", sliced_hidden=2048, **plain).phases
    assert Phase.ITERATE in on_device(2**40, num_latents=2, chooses_ridge=True).phases
    gradients = on_device(2**40, needs_weight_gradients=True, sensitivity_windows=4, **plain)
    # The block, two sums of the MLP's three matrices in float32, and their gradients in bfloat16.
    block, mlp = LLAMA_7B.blocks[0].num_parameters, 3 * 4096 * 11008
    assert gradients.phases[Phase.SENSITIVITY_BACKWARD] > 2 * block + (2 * 4 + 2) * mlp
