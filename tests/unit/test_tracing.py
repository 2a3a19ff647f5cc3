"""What the tracer says of small modules: families by arithmetic, what is held and by what, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structprune.errors import InputError, UnsupportedError
from structprune.tracing.graph import Traced, state_of, trace
from structprune.tracing.groups import unit_groups
from structprune.tracing.replay import Example, check_removal, cut_state, masked_state, replay
from structprune.tracing.sublayers import find_stream, find_sublayers
from structprune.types import AxisSlice

X_BSD = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Maps(nn.Module):
    """Named linear maps (outputs, inputs) and a function of them."""

    def __init__(self, forward: Callable[[Tensor, Any], Tensor], **maps: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (outputs, inputs) in maps.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))
        self.function = forward
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def traced_maps(forward: Callable[[Tensor, Any], Tensor], **maps: tuple[int, int]) -> Traced:
    return trace(Maps(forward, **maps), (X_BSD,))


def indices(part: AxisSlice, unit: int) -> list[int]:
    return part.indices(torch.tensor([unit])).tolist()


def test_fused_heads_are_counted_out() -> None:
    """Rows of a fused map seen as (3 heads, query and key and value, 4): head 1 owns rows 12 to 23."""

    def forward(x: Tensor, m: Any) -> Tensor:
        q, k, v = m.fused(x).view(2, 5, 3, 12).transpose(1, 2).split(4, -1)
        result = F.scaled_dot_product_attention(q, k, v)
        return x + m.out(result.transpose(1, 2).reshape(2, 5, 12))

    traced = traced_maps(forward, fused=(36, 6), out=(6, 12))
    heads, pairs, values = traced.families
    assert [family.num_units for family in traced.families] == [3, 4, 4]
    rows = next(part for part in heads.members if part.tensor == "fused.weight")
    assert indices(rows, 1) == list(range(12, 24))
    # Query 2 and key 2 of every head, then value 2 and what reads it.
    assert sorted(i for part in pairs.members for i in indices(part, 2)) == [2, 6, 14, 18, 26, 30]
    assert [(part.tensor, indices(part, 2)) for part in values.members] == [
        ("fused.weight", [10, 22, 34]),
        ("out.weight", [2, 6, 10]),
    ]
    assert values.consumers == (values.members[1],)
    assert pairs.consumers == ()


@pytest.mark.parametrize(("together", "num_units", "partitions"), [(False, 12, 3), (True, 4, 1)])
def test_heads_choose_values_of_their_own_unless_a_tensor_has_them_together(
    together: bool, num_units: int, partitions: int
) -> None:
    """With the sum over all heads' values in every output, channel 2 leaves all heads or none."""

    def forward(x: Tensor, m: Any) -> Tensor:
        q, k, v = (each(x).view(2, 5, 3, 4).transpose(1, 2) for each in (m.q, m.k, m.v))
        result = F.scaled_dot_product_attention(q, k, v)
        result = result + v.sum(1, keepdim=True) if together else result
        return x + m.out(result.transpose(1, 2).reshape(2, 5, 12))

    traced = traced_maps(forward, q=(12, 6), k=(12, 6), v=(12, 6), out=(6, 12))
    (group,) = unit_groups(traced, "value-channel")
    assert (group.num_units, group.partitions) == (num_units, partitions)
    assert indices(group.consumer, 2) == ([2, 6, 10] if together else [2])
    (family,) = [each for each in traced.families if each.consumers and each.num_units == 4]
    check_removal(traced, state_of(traced.program), Example(args=(X_BSD,), kwargs={}), {family: [0, 2]})


def test_what_is_held_is_said_with_its_operation() -> None:
    def forward(x: Tensor, m: Any) -> Tensor:
        return m.out(m.up(x).flip(-1) + m.fused(x)[..., :7])

    traced = traced_maps(forward, up=(7, 6), fused=(9, 6), out=(6, 7))
    held = {(axis.tensor, axis.axis, axis.size): axis.reasons for axis in traced.frozen}
    assert held["up.weight", 0, 7] == ("flip (flip)",)
    assert held["up.weight", 1, 6] == ("input x",)
    assert held["fused.weight", 0, 7] == held["out.weight", 1, 7] == ("flip (flip)",)
    assert held["out.weight", 0, 6] == ("output",)
    # The two rows that nothing reads may go.
    assert [(family.num_units, family.members[0].offset) for family in traced.families] == [(2, 7)]


def test_an_unknown_operation_holds_what_goes_in_and_is_named() -> None:
    traced = traced_maps(lambda x, m: m.out(torch.special.i0(m.up(x))), up=(7, 6), out=(6, 7))
    assert traced.unknown == {"special_i0": "special_i0 (special_i0)"}
    assert traced.families == ()
    reasons = {(axis.tensor, axis.axis): axis.reasons for axis in traced.frozen}
    assert reasons["up.weight", 0] == ("special_i0 (special_i0)",)
    assert reasons["out.weight", 1] == ("special_i0 (special_i0)",)


def test_an_unknown_form_of_a_known_operation_is_as_unknown() -> None:
    def forward(x: Tensor, m: Any) -> Tensor:
        return m.out(torch.einsum("...i,oi->...o", m.up(x), torch.eye(7, dtype=x.dtype)))

    traced = traced_maps(forward, up=(7, 6), out=(6, 7))
    assert "einsum" in traced.unknown
    assert traced.families == ()


def test_an_unknown_operation_on_what_is_held_anyway_is_no_news() -> None:
    """It scales whole positions: no axis of a parameter hangs on it."""
    traced = traced_maps(lambda x, m: m.out(m.up(x)) * torch.special.i0(x[..., :1]), up=(7, 6), out=(6, 7))
    assert traced.unknown == {}
    assert [family.num_units for family in traced.families] == [7]


def test_tied_parameters_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 7, bias=False)
            self.b = nn.Linear(6, 7, bias=False)
            self.b.weight = self.a.weight
            self.out = nn.Linear(7, 6)
            self.other = nn.Linear(7, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x)) + self.other(self.b(x))

    traced = trace(Tied().double(), (X_BSD,))
    (family,) = traced.families
    assert {part.tensor for part in family.members} == {"a.weight", "b.weight", "out.weight", "other.weight"}


def test_a_parameter_that_is_not_used_says_so() -> None:
    traced = traced_maps(lambda x, m: m.out(m.up(x)), up=(7, 6), out=(6, 7), spare=(4, 5))
    assert {axis.reasons for axis in traced.frozen if axis.tensor == "spare.weight"} == {("not used",)}


def test_a_tensor_written_over_is_no_longer_zero() -> None:
    """The sum over units sees what was written in place of the zeros that a removed unit would leave."""

    def forward(x: Tensor, m: Any) -> Tensor:
        units = m.up(x)
        units[:, :2].add_(1.0)
        return m.out(units) * units.sum(-1, keepdim=True)

    traced = traced_maps(forward, up=(7, 6), out=(6, 7))
    (family,) = traced.families
    assert not family.is_exact
    with pytest.raises(UnsupportedError, match=r"^sum \(sum_1\): without these units"):
        check_removal(traced, state_of(traced.program), Example(args=(X_BSD,), kwargs={}), {family: [0, 1, 2, 3]})


def test_a_norm_over_units_is_refused_with_its_name() -> None:
    def forward(x: Tensor, m: Any) -> Tensor:
        return m.out(F.rms_norm(m.up(x), (7,)))

    traced = traced_maps(forward, up=(7, 6), out=(6, 7))
    (family,) = traced.families
    assert family.couplings == ("rms_norm (rms_norm)",)
    with pytest.raises(UnsupportedError, match=r"^rms_norm \(rms_norm\): .*Leave these units in\.$"):
        check_removal(traced, state_of(traced.program), Example(args=(X_BSD,), kwargs={}), {family: [0, 2, 3]})


def test_what_is_cut_and_what_is_masked_are_the_same_indices() -> None:
    traced = traced_maps(lambda x, m: m.out(m.up(x).relu()), up=(7, 6), out=(6, 7))
    state, (family,) = state_of(traced.program), traced.families
    cut, masked = (change(traced, state, {family.atom: [1, 5]}) for change in (cut_state, masked_state))
    torch.testing.assert_close(cut["up.weight"], state["up.weight"][[1, 5]])
    torch.testing.assert_close(cut["out.weight"], state["out.weight"][:, [1, 5]])
    assert masked["out.weight"].count_nonzero(dim=0).gt(0).nonzero().flatten().tolist() == [1, 5]
    smaller = replay(traced, cut, Example(args=(X_BSD,), kwargs={}), {family.atom: [1, 5]})
    torch.testing.assert_close(smaller[0], (X_BSD @ cut["up.weight"].T).relu() @ cut["out.weight"].T)


@pytest.mark.parametrize("units", [[], [2, 1], [1, 1], [6, 7], [-1, 2]])
def test_units_that_are_not_there_are_an_error(units: list[int]) -> None:
    traced = traced_maps(lambda x, m: m.out(m.up(x).relu()), up=(7, 6), out=(6, 7))
    with pytest.raises(InputError, match=r"these units cannot stay; got .*, wanted some of 0 \.\.\. 6, ascending"):
        check_removal(traced, state_of(traced.program), Example(args=(X_BSD,), kwargs={}), {traced.families[0]: units})


def test_arguments_of_another_form_are_an_error() -> None:
    traced = traced_maps(lambda x, m: m.out(m.up(x)), up=(7, 6), out=(6, 7))
    with pytest.raises(InputError, match="the arguments have another form"):
        replay(traced, state_of(traced.program), Example(args=(X_BSD, X_BSD), kwargs={}))


def test_shapes_that_depend_on_the_data_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="the shape of a result depends on the data") as caught:
        traced_maps(lambda x, m: m.up(x)[m.up(x) > 0], up=(7, 6))
    assert "index" in str(caught.value.where) or "nonzero" in str(caught.value.where)


def test_a_branch_on_the_data_is_refused() -> None:
    def forward(x: Tensor, m: Any) -> Tensor:
        return m.up(x) if x.sum() > 0 else m.up(-x)

    with pytest.raises(UnsupportedError, match=r"^Maps: torch\.export cannot make a graph of this module; got "):
        traced_maps(forward, up=(7, 6))


def test_a_module_without_a_residual_stream_is_no_block() -> None:
    """A norm behind the sum is what comes out: nothing says what a sublayer adds to."""
    forward: Callable[[Tensor, Any], Tensor] = lambda x, m: F.layer_norm(x + m.out(m.up(x).relu()), (6,))  # noqa: E731
    traced = traced_maps(forward, up=(7, 6), out=(6, 7))
    with pytest.raises(UnsupportedError, match=r"^layer_norm \(layer_norm\): the output is not the input plus"):
        find_stream(traced)


def test_a_sublayer_that_reads_two_states_is_refused() -> None:
    def forward(x: Tensor, m: Any) -> Tensor:
        after = x + m.a(x)
        return after + m.out((m.up(x) * m.gate(after)).relu())

    traced = traced_maps(forward, a=(6, 6), up=(7, 6), gate=(7, 6), out=(6, 7))
    with pytest.raises(UnsupportedError, match=r"several states of the residual stream.*got \[0, 1\]"):
        find_sublayers(traced, find_stream(traced))


def test_a_map_in_front_of_another_one_is_no_consumer() -> None:
    """Its output is as wide as the stream, but what is added to the stream is the other map's."""

    def forward(x: Tensor, m: Any) -> Tensor:
        return x + m.out(m.gate(m.up(x).relu()) * x)

    traced = traced_maps(forward, up=(7, 6), gate=(6, 7), out=(6, 6))
    (sublayer,) = find_sublayers(traced, find_stream(traced))
    assert sublayer.consumer.origins == ("out.weight",)
    # The 7 units may leave, but no pipeline can solve the map behind them for what is added.
    assert [family.num_units for family in traced.families] == [7]
    assert unit_groups(traced, "kv-group") == ()


def test_linear_attention_is_a_mixer_and_no_mlp() -> None:
    """Positions see each other by sums of outer products, without a softmax: no pipeline has units of that."""

    def forward(x: Tensor, m: Any) -> Tensor:
        state = m.k(x).transpose(1, 2) @ m.v(x)
        x = x + m.out(m.q(x) @ state)
        return x + m.down(m.up(x).relu())

    traced = traced_maps(forward, q=(4, 6), k=(4, 6), v=(7, 6), out=(6, 7), up=(8, 6), down=(6, 8))
    assert [each.kind for each in find_sublayers(traced, find_stream(traced))] == ["mixer", "mlp"]
    assert [group.consumer_module for group in unit_groups(traced, "kv-group")] == ["down"]


def test_positions_that_are_taken_one_by_one_make_a_mixer() -> None:
    """A recurrence has no sum over positions: each is taken out, and put back behind the others."""

    def forward(x: Tensor, m: Any) -> Tensor:
        state, states = torch.zeros(2, 7, dtype=x.dtype), list[Tensor]()
        for position in range(5):
            state = torch.tanh(state + m.up(x)[:, position])
            states.append(state)
        return x + m.out(torch.stack(states, 1))

    traced = traced_maps(forward, up=(7, 6), out=(6, 7))
    (sublayer,) = find_sublayers(traced, find_stream(traced))
    assert sublayer.kind == "mixer"
    assert unit_groups(traced, "kv-group") == ()
    assert [(family.num_units, family.is_exact) for family in traced.families] == [(7, True)]


def test_several_streams_side_by_side_are_refused() -> None:
    traced = trace(Maps(lambda x, m: x + m.out(m.up(x).relu()), up=(7, 6), out=(6, 7)), (X_BSD[:, :, None],))
    with pytest.raises(UnsupportedError, match="wanted a decoder block with one residual stream"):
        find_stream(traced)


def test_a_block_at_true_width_is_traced_without_its_weights() -> None:
    """On `meta` nothing is computed: the groups of a 70B LLaMA's block in a second."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).eval()
        hidden, turns = torch.empty(2, 7, 8192), (torch.empty(1, 7, 128), torch.empty(1, 7, 128))
    traced = trace(block, (hidden,), {"position_embeddings": turns, "attention_mask": None}, num_outputs=1)
    mlp, attention = unit_groups(traced, "value-channel")
    assert (mlp.num_units, mlp.up_module, mlp.gate_module) == (28672, "mlp.up_proj", "mlp.gate_proj")
    assert (attention.num_units, attention.width, attention.partitions) == (1024, 8, 8)
    # Channel 3 of KV head 1 is column 3 of query heads 8 to 15, each 128 wide.
    assert indices(attention.consumer, 128 + 3) == [1024 + head * 128 + 3 for head in range(8)]
