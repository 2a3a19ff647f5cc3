"""Values that cross the floors: how a block's axes shrink together, and one block's problem and its answer.

Shape suffixes: U units, I inputs of the consumer (U * width), O outputs of the consumer, K kept inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from structprune.kinds import UNIT_KINDS as UNIT_KINDS
from structprune.kinds import HeadUnits as HeadUnits
from structprune.kinds import SublayerKind as SublayerKind
from structprune.kinds import UnitKind
from structprune.rows import Rows, RowSum

Render = Callable[[Sequence[Mapping[str, Any]]], str]
"""Turns of a chat, each {"role": ..., "content": ...} -> its text by a model's chat template. Raises InputError."""
Statistic = Literal["gram", "sums", "tokens", "gradients", "sensitivity"]
"""What is measured for a problem beside its weights: sums of products of the consumer's inputs, or of the inputs alone,
the tokens themselves, gradients of the loss by the weights, or by the consumer's output."""
Stage = tuple[SublayerKind, ...]
"""Sublayers of a block that read the same state of the residual stream: one of them, or all that are parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSlice:
    """Unit u of a group owns `width` indices of `tensor` along `axis`, from `offset + u * width`.

    With `repeat` > 1 it owns as many again `stride` further on, and so forth. With `run` > 0 the units come in runs of
    so many, and `gap` indices more lie between the starts of two runs.
    """

    tensor: str
    """Name relative to the block, e.g. `mlp.up_proj.weight`."""
    axis: int
    width: int = 1
    offset: int = 0
    repeat: int = 1
    stride: int = 0
    run: int = 0
    gap: int = 0

    def indices(self, units: Tensor) -> Tensor:
        """Return the indices along the axis that belong to `units`, one unit after the other."""
        firsts = self.offset + units * self.width + (units // self.run * self.gap if self.run else 0)
        starts = firsts[:, None, None] + torch.arange(self.repeat, device=units.device)[:, None] * self.stride
        return (starts + torch.arange(self.width, device=units.device)).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGroup:
    """Units of one kind in one block that can be removed, and every axis that shrinks with them.

    The consumer is the linear map that reads the units' activations (`down_proj`, `fc2`, `o_proj`); it is the
    only weight that is re-solved. Producers only lose rows.
    """

    kind: UnitKind
    expert: int | None = None
    """Which one, where the sublayer has several groups of as many units each: the experts of a mixture."""
    num_units: int
    width: int
    """Consumer inputs per unit (1 for an MLP channel, query heads per unit times head_dim for heads, query heads of the
    group for a value channel)."""
    partitions: int = 1
    """Runs of equal length that the units come in, of which each keeps as many: one per KV head for value channels."""
    producers: tuple[AxisSlice, ...]
    consumer: AxisSlice
    consumer_module: str
    consumer_bias: str | None = None
    config_fields: Mapping[str, int] = field(default_factory=dict[str, int])
    """Config entry -> value per unit that a partition keeps: `{"num_key_value_heads": 1, "num_attention_heads": 3}`."""
    fixed_fields: Mapping[str, int] = field(default_factory=dict[str, int])
    """Global config entries that have to be there once those of `config_fields` change in some block: left out, stock
    code would derive them from others, or lack them where a block keeps its own."""
    module_prefix: str = ""
    """Tensors of the block that start with this make the denominator of `--sparsity`."""
    norm_modules: tuple[str, ...] = ()
    """Norms that only this sublayer of the block has, before it, and behind it where it is normed; they go with it."""
    multiple_of: int = 1
    """What stock kernels want the number of kept units to be a multiple of."""
    output_module: str | None = None
    """Module whose output is the sum of what the consumers of several parts give."""
    output_norm_eps: float | None = None
    """Epsilon of the RMSNorm between the consumer's output and the stream's sum; None: there is no norm."""
    output_scale: float = 1.0
    """What the consumer's output is multiplied by before the stream's sum, where there is no norm between."""
    bias_field: str | None = None
    """Config entry that gives the maps of `bias_modules` a bias, where they have none."""
    bias_modules: tuple[str, ...] = ()
    up_module: str | None = None
    """Module of an MLP's up map: consumer(activation(up x)), or with a gate consumer(activation(gate x) * up x)."""
    gate_module: str | None = None
    activation: str | None = None
    """Name of the activation in the config."""
    held: str | None = None
    """Why no unit of the sublayer can leave, where that is known: it is one unit then."""

    @property
    def name(self) -> str:
        """The kind, and with several parts the part's number: `mlp.3`."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"

    @property
    def bias_name(self) -> str:
        """Name of the consumer's bias, whether it has one yet or not."""
        return self.consumer_bias or f"{self.consumer_module}.bias"

    @property
    def output_normed(self) -> bool:
        """Whether the consumer's output passes a norm before it is added to the stream."""
        return self.output_norm_eps is not None

    @property
    def slices(self) -> tuple[AxisSlice, ...]:
        return (*self.producers, self.consumer)

    def config_values(self, num_keep: int) -> dict[str, int]:
        """Return the entries of `config_fields` with `num_keep` units, a multiple of `partitions`."""
        assert num_keep % self.partitions == 0
        return {name: num_keep // self.partitions * factor for name, factor in self.config_fields.items()}

    def fixed_changes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Return the fixed entries that config.json lacks: what is said already stays, as blocks may have their own."""
        return {name: value for name, value in self.fixed_fields.items() if config.get(name) is None}

    def config_changes(self, num_keep: int) -> dict[str, int]:
        """Return all that a config of `num_keep` units has to say: `config_values` and the fixed entries."""
        return {**self.fixed_fields, **self.config_values(num_keep)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """One decoder block: where its tensors live in the checkpoint and what can be removed."""

    index: int
    prefix: str
    """Checkpoint prefix of the block's tensors, with the final dot, e.g. `model.layers.3.`."""
    shapes: Mapping[str, tuple[int, ...]]
    """Relative tensor name -> shape."""
    groups: tuple[UnitGroup, ...]
    """Groups of the sublayers that the block still has."""

    @property
    def num_parameters(self) -> int:
        return sum(_numel(shape) for shape in self.shapes.values())

    def group(self, kind: str) -> UnitGroup:
        """Return the sublayer's group, the first of several."""
        return next(group for group in self.groups if group.kind == kind)

    def groups_of(self, kind: str) -> tuple[UnitGroup, ...]:
        """Return all groups of the sublayer: one, or as many as there are experts."""
        return tuple(group for group in self.groups if group.kind == kind)

    def has(self, kind: str) -> bool:
        """Whether the block still has its sublayer of this kind."""
        return any(group.kind == kind for group in self.groups)

    def sublayer_tensors(self, kind: str) -> list[str]:
        """List the relative names of the tensors that are removed with all units of `kind`: its modules and norms."""
        group = self.group(kind)
        norms = tuple(f"{module}." for module in group.norm_modules)
        return [name for name in self.shapes if name.startswith((group.module_prefix, *norms))]

    def sublayer_parameters(self, kind: str) -> int:
        """Count the parameters removed with the sublayer: units, norms, and the biases that belong to no unit."""
        return sum(_numel(self.shapes[name]) for name in self.sublayer_tensors(kind))

    def module_tensors(self, group: UnitGroup) -> list[str]:
        """List the relative names of the tensors of the module that holds `group`."""
        return [name for name in self.shapes if name.startswith(group.module_prefix)]

    def module_parameters(self, group: UnitGroup) -> int:
        """Count the parameters of the module that holds `group`: the denominator of `--sparsity`."""
        return sum(_numel(self.shapes[name]) for name in self.module_tensors(group))

    def unit_parameters(self, group: UnitGroup) -> int:
        """Count the parameters that are removed with one unit of `group`."""
        total = 0
        for part in group.slices:
            shape = self.shapes[part.tensor]
            total += _numel(shape) // shape[part.axis] * part.width * part.repeat
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What an image-text checkpoint holds beside its text model, and is copied as it is: vision tower, projector."""

    parameters: int = 0
    num_bytes: int = 0
    """Bytes in the files."""
    dtypes: frozenset[torch.dtype] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """A model as data: the blocks, the tensors around them, and the names of the stock modules."""

    family: str
    config: Mapping[str, Any]
    hidden_size: int
    vocab_size: int
    max_positions: int
    attention_window: int | None
    """The shortest window of attention in any block; None: all blocks see all tokens."""
    num_score_heads: int
    """Query heads whose scores are held as matrices; 0 where attention is computed without them."""
    blocks: tuple[BlockLayout, ...]
    blocks_module: str
    embedding_modules: tuple[str, ...]
    rotary_module: str | None
    final_norm_module: str | None
    head_module: str
    tied_embeddings: bool
    outer_tensors: Mapping[str, tuple[int, ...]]
    """Checkpoint tensors outside the blocks (embeddings, final norm, head), copied unchanged."""
    around: Around = Around()
    """What is there beside this model; no count of its own parameters has them."""
    notes: tuple[str, ...] = ()
    """What was found in the checkpoint that a person should know, a sentence each."""

    @property
    def num_parameters(self) -> int:
        return sum(b.num_parameters for b in self.blocks) + sum(_numel(s) for s in self.outer_tensors.values())

    @property
    def all_parameters(self) -> int:
        """Parameters of the whole checkpoint, what is around a text model included."""
        return self.num_parameters + self.around.parameters

    @property
    def block_parameters(self) -> int:
        return sum(b.num_parameters for b in self.blocks)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Checkpoint names of all tensors."""
        return (*self.outer_tensors, *(block.prefix + name for block in self.blocks for name in block.shapes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Sums over some calibration tokens of a consumer's inputs x and targets y."""

    gram_II: Rows
    """Sum of x x^T, float32 or wider."""
    num_tokens: int
    sum_I: Tensor | None = None
    """Sum of x, float64; None where nothing is measured."""
    target_OI: Rows | None = None
    """Sum of y x^T; None for the local target, where it is W G."""
    target_energy: float | None = None
    """Sum of |y|^2; None for the local target."""
    residual_energy: float = 0.0
    """Sum of |h|^2, h the residual stream before the consumer's output is added."""

    def reordered(self, order_I: Tensor) -> Moments:
        """Return the same sums with the inputs in another order."""
        return replace(
            self,
            gram_II=self.gram_II[order_I][:, order_I],
            sum_I=None if self.sum_I is None else self.sum_I[order_I],
            target_OI=None if self.target_OI is None else self.target_OI[:][:, order_I],
        )

    def to(self, device: torch.device) -> Moments:
        """Return the same sums on `device`."""
        return replace(
            self,
            gram_II=self.gram_II.to(device),
            sum_I=None if self.sum_I is None else self.sum_I.to(device),
            target_OI=None if self.target_OI is None else self.target_OI.to(device),
        )

    def __add__(self, other: Moments) -> Moments:
        """Add the sums over the tokens of both.

        Matrices are added row by row whenever they are read: no third one is made.
        """
        target_OI, energy = self.target_OI, self.target_energy
        if target_OI is not None and energy is not None:
            assert other.target_OI is not None
            assert other.target_energy is not None
            target_OI = RowSum(first=target_OI, second=other.target_OI)
            energy += other.target_energy
        return Moments(
            gram_II=RowSum(first=self.gram_II, second=other.gram_II),
            num_tokens=self.num_tokens + other.num_tokens,
            sum_I=None if self.sum_I is None or other.sum_I is None else self.sum_I + other.sum_I,
            target_OI=target_OI,
            target_energy=energy,
            residual_energy=self.residual_energy + other.residual_energy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaylorSums:
    """Sums over all weights w of each unit's slices, per unit, float64.

    g is the mean over calibration windows of the gradient of the window's mean loss, g2 the mean of its square.
    """

    signed_U: Tensor
    """Sum of w g."""
    first_U: Tensor
    """Sum of |w g|."""
    second_U: Tensor
    """Sum of w^2 g2."""
    mixed_U: Tensor
    """Sum of |w g - 1/2 w^2 g2|."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What the sensitivity pass of the dense model leaves for one sublayer of a block, beside the cost of its
    removals.
    """

    sensitivity_OO: Tensor | None = None
    """E[g g^T], g the gradient of the summed loss by the consumer's output at one token."""
    taylor: TaylorSums | None = None

    def to(self, device: torch.device) -> Sensitivity:
        """Return the same sensitivity on `device`."""
        sums = self.taylor
        return Sensitivity(
            sensitivity_OO=None if self.sensitivity_OO is None else self.sensitivity_OO.to(device),
            taylor=None
            if sums is None
            else TaylorSums(
                signed_U=sums.signed_U.to(device),
                first_U=sums.first_U.to(device),
                second_U=sums.second_U.to(device),
                mixed_U=sums.mixed_U.to(device),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """min over V of sum |V x - y|^2 + delta |V - W|^2 where removed inputs of V are zero: all that a solver may see.

    All tensors lie on one device, and so does what scores and solvers make of them.

    The target y is W x (local), or on the dense path what the dense model has at this point of the residual stream
    minus what the pruned one has before the consumer's sum. Where the output is normed before the sum the target is the
    dense model's W x, and x and y of each token are divided by the root mean square of the wanted output.
    """

    weight_OI: Tensor
    fit: Moments
    """Sums over the calibration tokens, or over those that no ridge is chosen by."""
    held_out: Moments | None = None
    """Sums over the other windows, which choose the ridge; None: there are none, and `damping` is the ridge."""
    held_out_by_text: Sequence[Moments] = ()
    """Sums of `held_out` for each of several texts, where the text that fares worst decides; empty: all together do."""
    width: int
    partitions: int = 1
    """Runs of equal length that the units come in, of which each keeps as many."""
    damping: float
    """Ridge, as a share of the mean diagonal of the Gram."""
    shrinkage: float = 0.0
    """Share of the correlations between units that greedy removal does not count on, from 0 to 1."""
    producer_norms_MU: Tensor
    """L2 norm of the unit's slice of each producer's weight, (producers, units)."""
    seed: int = 0
    """Differs between blocks, kinds and parts; for what is drawn at random."""
    sensitivity_OO: Tensor | None = None
    """E[g g^T], g the gradient of the summed loss by the consumer's output at one token; None where not measured."""
    taylor: TaylorSums | None = None
    """None where no gradient by the weights was measured."""

    @property
    def num_units(self) -> int:
        return self.weight_OI.shape[1] // self.width

    @property
    def device(self) -> torch.device:
        return self.weight_OI.device

    def total(self) -> Moments:
        """Return the sums over all calibration tokens, by which units are chosen and answers solved.

        They cost no memory; where windows are held out every read of a row adds two.
        """
        return self.fit if self.held_out is None else self.fit + self.held_out

    def without_held_out(self) -> LayerProblem:
        """Return the same problem on the fitted windows only."""
        return replace(self, held_out=None, held_out_by_text=())

    def kept_inputs(self, keep_U: Tensor) -> Tensor:
        """Return the indices of the consumer inputs that belong to kept units, ascending."""
        return torch.nonzero(keep_U.repeat_interleave(self.width)).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveResult:
    """New consumer weight on the kept inputs, and how it was found."""

    weight_OK: Tensor
    status: Literal["ok", "damping-raised"]
    statistics: Mapping[str, float]
    bias_O: Tensor | None = None
    """What is to be added to the consumer's output; None: nothing."""

    def to(self, device: torch.device) -> SolveResult:
        """Return the same result on `device`."""
        bias_O = None if self.bias_O is None else self.bias_O.to(device)
        return replace(self, weight_OK=self.weight_OK.to(device), bias_O=bias_O)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
