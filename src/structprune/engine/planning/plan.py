"""What is asked of the planner, and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from structprune.architectures.stock.forward_bytes import ForwardBytes
from structprune.engine.planning.elements import StepMemory
from structprune.engine.planning.pieces import Work
from structprune.engine.planning.reload import ReloadBound, ReloadMode
from structprune.engine.planning.searching import SearchWork
from structprune.phases import PhaseBytes
from structprune.types import BlockLayout, ModelLayout, Stage, UnitGroup, UnitKind

Place = Literal["device", "host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that a run may add; None: a share of what is free."""

    host: int | None = None
    device: int | None = None
    """Budget of a device with memory of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What a run will hold on a device with memory of its own."""

    budget_bytes: int
    phases: PhaseBytes
    """Phase -> peak bytes."""
    sums: Place
    """Where the sums of activations lie while they are taken; on the host every product is moved there."""
    solves: Place
    """Where units are chosen and consumers solved."""

    @property
    def peak_bytes(self) -> int:
        """Bytes of the fullest phase."""
        return max(self.phases.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What a run will hold and how it will go about it."""

    budget_bytes: int
    phases: PhaseBytes
    """Phase -> peak host bytes, the hidden-state store included where it is in memory.

    Where there is a device these are still what a run without one would hold.
    """
    store: str
    """`memory` or `file`."""
    store_bytes: int
    micro_batch_windows: int
    disk_bytes: int
    """Free disk that the run needs at its peak."""
    cached: tuple[UnitKind, ...] = ()
    """Sublayers whose consumer's inputs are kept in memory until it is solved, so that they are computed once."""
    cache_bytes: int = 0
    device: DevicePlan | None = None
    """None: blocks run in host memory."""
    reload: ReloadBound | None = None
    """Bound on the process that loads the result; None: there is none."""
    result_size: tuple[int, int] = (0, 0)
    """Upper bounds of the result's parameters and of the bytes of its files."""
    work: Work | None = None
    """How often the run does what takes its time; None where that cannot be counted beforehand."""

    @property
    def budgets(self) -> Budgets:
        """What the plan was made for."""
        return Budgets(host=self.budget_bytes, device=None if self.device is None else self.device.budget_bytes)

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the run's own process."""
        return max(self.phases.values())

    @property
    def reload_mode(self) -> ReloadMode | None:
        """How the result will be loaded, as far as its size is known beforehand."""
        return None if self.reload is None else self.reload.mode(*self.result_size, self.budget_bytes)

    @property
    def reload_bytes(self) -> int:
        """Bytes of both processes while the result is loaded in the planned mode."""
        mode = self.reload_mode
        return 0 if self.reload is None or mode is None else self.reload.bytes(mode, *self.result_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGates:
    """What gates do, as far as bytes and time depend on it."""

    steps: int
    sets: int
    """Sets of gates that a step runs its window with."""
    backward: bool
    """Whether a step differentiates the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be done, as far as bytes depend on it."""

    layout: ModelLayout
    groups: tuple[UnitGroup, ...]
    """The groups in scope of the block that is planned for."""
    block: BlockLayout | None = None
    """The block whose weights are in memory; None: the widest one."""
    stored_bytes: Mapping[str, int]
    """Checkpoint tensor name -> bytes."""
    stored_dtypes: Mapping[str, torch.dtype]
    """Two dtypes of one size are two: a weight in the other one is cast all the same."""
    compute_dtype: torch.dtype
    num_stages: Mapping[Stage, int] = field(default_factory=dict[Stage, int])
    """Sublayers of a block that read the same state of the stream -> how many blocks have such ones."""
    mixers: Mapping[frozenset[str], ForwardBytes] = field(default_factory=dict[frozenset[str], ForwardBytes])
    """Names of a block's tensors -> what one window holds in what mixes positions there without attention."""
    num_windows: int
    seq_len: int
    num_probe: int
    """Calibration windows whose perplexity is reported, in-sample."""
    held_out_windows: int = 0
    """Windows that both models pass at the end, with nothing else there; 0: there are none."""
    needs_statistics: bool
    needs_sensitivity: bool = False
    """Whether the sensitivity pass brings the gradient of the loss to the consumers' outputs."""
    needs_scores: bool = False
    """Whether the sensitivity pass scores every unit of the dense model, in one forward pass."""
    needs_weight_gradients: bool = False
    """Whether the sensitivity pass sums the gradients by a block's weights."""
    follows_dense: bool = False
    sensitivity_windows: int = 0
    repair_windows: int = 0
    """Windows that the result learns from, and is measured on, behind the last block; 0: it does not."""
    repair_epochs: int = 1
    """Passes over those that it learns from."""
    repair_adds_biases: bool = False
    """Whether its consumers get biases first, where they lack them and can have them."""
    gates: PlannedGates | None = None
    """What learns which units stay before any block is cut; None: nothing does."""
    num_rehearsals: int = 0
    """Passes that come before the one that is written."""
    chooses_ridge: bool = False
    """Whether the sums of some windows are kept apart to choose the ridge."""
    held_out_texts: int = 1
    """Texts that those are kept for, each apart."""
    score: str = "wanda"
    """What decides which units stay."""
    solves: bool = True
    """Whether consumers are solved again, and not only cut."""
    kept: Mapping[str, int] = field(default_factory=dict[str, int])
    """Kind -> most units that any block keeps, where that is known beforehand."""
    missing_tokens: int = 0
    """Tokens that are gone and whose probability the head's rows are to carry; 0: nobody asked for that."""
    num_texts: int = 1
    """Calibration texts."""
    source_tokenizer_bytes: int = 0
    """The tokenizer's files with those tokens."""
    tokenizer_bytes: int = 0
    """Bytes of the tokenizer's files."""
    text_bytes: int = 0
    """Bytes of the largest calibration file."""
    packaged_text: bool = True
    """Whether a text comes from elsewhere: its readers stay in memory."""
    search: SearchWork | None = None
    """What a search over widths does; None: there is none."""
    num_latents: int = 0
    """Tensors as wide as the MLP that an iterative solver holds for all of its tokens; 0: there is none."""
    num_stores: int | None = None
    """Borders whose hidden states are kept at once; None: one, and a second where the dense path is followed."""
    compares: Literal["nothing", "boundaries", "losses"] = "nothing"
    """What whole blocks are chosen by: hidden states at two boundaries, or the losses that follow from them."""
    num_removed_blocks: int = 0
    """Whole blocks that go."""
    slices: Literal["no", "bases", "one basis"] = "no"
    """Whether the residual stream is cut, with a basis for every position or with one for all."""
    sliced_hidden: int = 0
    """Dimensions of the stream that stay."""
    elements: Mapping[frozenset[str], tuple[StepMemory, ...]] = field(
        default_factory=dict[frozenset[str], "tuple[StepMemory, ...]"]
    )
    """Names of a block's tensors -> the steps in which its maps are pruned weight by weight; empty where units go."""
    reload_check: bool = False
    """Whether another process loads the result at the end."""
    other_head_bytes: int = 0
    """Bytes of another model's head and its logits, where the losses of both are measured side by side."""
    num_ranks: int = 1
    """Processes that share the windows; the numbers of windows here are one rank's, the most that any has."""
    cacheable: tuple[UnitKind, ...] = ()
    """Sublayers whose consumer's inputs could be kept until it is solved."""
    distils: bool = False
    """Whether blocks learn from another model's predictions: both heads stay beside the blocks, and logits of both
    are compared while no block is there."""
    held_bytes: int = 0
    """What the caller itself holds, whatever the phase."""
