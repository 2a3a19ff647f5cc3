"""What the phases of a run on the host are added up from: sizes in bytes that several of them share, from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from structprune.architectures.stock.tiled_attention import scratch_bytes
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.reload import RELOAD_TOKENS
from structprune.engine.planning.shapes import (
    NUM_STAGED,
    SCORE_BYTES,
    activation_bytes,
    embedding_names,
    logit_bytes,
    mask_bytes,
    mixer_bytes,
    most_inputs,
    num_scores,
    numel,
    widest_block,
)
from structprune.memory import HEAP_BLOCK_BYTES, HEAP_END_BYTES
from structprune.types import BlockLayout, UnitKind

# The reader copies large tensors out of the file's mapping in chunks of this size.
CHUNK_BYTES = 16 * 2**20
TOKENIZER_SHARE = 15
"""What a tokenizer takes in memory for each byte of its file: 14 were seen."""
_HEAP_STATES = 8
# Thread stacks, allocator slack, Python objects; readers of parquet files stay once they were used.
_RUNTIME_BYTES = 40 * 2**20
# Code of the libraries at its first use, in builds of torch for GPUs, with or without one: up to 9 MiB were seen.
_GPU_BUILD_BYTES = 16 * 2**20
_TEXT_READER_BYTES = 48 * 2**20
# What the CPU library keeps of its last products in another dtype than float32 (memory.py bounds their number), and its
# code for them. Measured, not derived: on SmolLM2 `fasp` stays 37 MiB under its plan with that. Where a backward pass
# and a search came first, more of the libraries' code is resident and the heap is fuller: `structprune` took between
# 304 and 335 MiB in eight runs of one shape, for which 331 were planned without the second figure, and 751 on a CPU
# with AVX-512 but no AMX, for which 727 were.
_KERNEL_CACHE_BYTES = 48 * 2**20
_SENSITIVITY_KERNEL_BYTES = 40 * 2**20
# In float32 only what a backward pass leaves in the heap, and the code for it: of 20 runs of one small shape three took
# more in some phase than was planned without it, by up to 3 MiB.
_SENSITIVITY_HEAP_BYTES = 16 * 2**20
# Of the exchange between ranks: a piece (engine/ranks/group.py), the library's copy of it, sockets and threads.
_EXCHANGE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class HostChoice:
    """What gives way until the peaks on the host fit the budget."""

    store: Literal["memory", "file"]
    """Where hidden states are between blocks."""
    cached: tuple[UnitKind, ...]
    """Sublayers whose consumer's inputs are kept until it is solved."""
    micro_batch: int
    """Windows that are computed at once."""
    moved: bool
    """Whether blocks run on a device with memory of its own, to which states are moved and from which they come back.
    """


@dataclass(frozen=True, kw_only=True)
class HostSizes:
    """Bytes of what is held at once, for one request and one choice."""

    request: PlanRequest
    choice: HostChoice

    @cached_property
    def item(self) -> int:
        """Bytes of a number in the forward passes."""
        return self.request.compute_dtype.itemsize

    @cached_property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.request.layout.hidden_size

    @cached_property
    def micro_batch_tokens(self) -> int:
        """Tokens that are computed at once."""
        return self.choice.micro_batch * self.request.seq_len

    @cached_property
    def micro_batch_states(self) -> int:
        """Hidden states of one micro-batch."""
        return self.micro_batch_tokens * self.hidden * self.item

    @cached_property
    def store(self) -> int:
        """Hidden states of all windows at one boundary."""
        return self.request.num_windows * self.request.seq_len * self.hidden * self.item

    @cached_property
    def held_out_store(self) -> int:
        """Hidden states of the held-out windows at one boundary."""
        return self.request.held_out_windows * self.request.seq_len * self.hidden * self.item

    @cached_property
    def num_stores(self) -> int:
        """Boundaries whose hidden states are kept at once."""
        return self.request.num_stores or (2 if self.request.follows_dense else 1)

    @cached_property
    def runtime(self) -> int:
        """The process itself, whatever the model: libraries as they are used, and the heap's end."""
        total = _RUNTIME_BYTES + HEAP_END_BYTES + (_GPU_BUILD_BYTES if torch.backends.cuda.is_built() else 0)
        narrow = self.item != 4
        total += _KERNEL_CACHE_BYTES if narrow else 0
        if self.request.needs_sensitivity:
            total += _SENSITIVITY_KERNEL_BYTES if narrow else _SENSITIVITY_HEAP_BYTES
        return total + (_TEXT_READER_BYTES if self.request.packaged_text else 0)

    @cached_property
    def final_states(self) -> int:
        """Both models' last states of the windows whose perplexity is reported."""
        return 2 * self.request.num_probe * self.request.seq_len * self.hidden * self.item

    @cached_property
    def _always(self) -> int:
        request = self.request
        total = self.runtime + mask_bytes(request, self.choice.micro_batch) + request.held_bytes
        total += _EXCHANGE_BYTES if request.num_ranks > 1 else 0
        if self.choice.moved:
            # On their way to a device and back: states, or in the backward pass those of one window and gradients.
            numbers = max(self.choice.micro_batch * self.item, self.item + 2 * 4)
            total += NUM_STAGED * numbers * request.seq_len * self.hidden
        return total

    @cached_property
    def stores_closed(self) -> int:
        """What is held before the first block and behind the last one: final states, and the reload check's logits."""
        logits = RELOAD_TOKENS * self.request.layout.vocab_size * 4 if self.request.reload_check else 0
        return self._always + self.final_states + logits

    @cached_property
    def stores_open(self) -> int:
        """What is held beside a block while all windows' states are kept; the final ones are in a store then too."""
        in_memory = self.choice.store == "memory"
        return self._always + (self.num_stores * self.store + self.final_states if in_memory else 0)

    @cached_property
    def cache(self) -> int:
        """Kept inputs of a consumer, one sublayer's at a time, while blocks are pruned."""
        inputs = most_inputs(self.request.layout, self.choice.cached)
        return self.request.num_windows * self.request.seq_len * self.item * inputs

    @cached_property
    def pruning(self) -> int:
        """What is held beside a block while blocks are pruned."""
        return self.stores_open + self.cache

    @cached_property
    def block(self) -> BlockLayout:
        """The block that is counted."""
        return widest_block(self.request)

    @cached_property
    def _block_names(self) -> list[str]:
        return [self.block.prefix + name for name in self.block.shapes]

    @cached_property
    def weights(self) -> int:
        """The block as it is stored."""
        return sum(self.request.stored_bytes[name] for name in self._block_names)

    @cached_property
    def cast(self) -> int:
        """The block's tensors of another dtype once more in that of the forward passes."""
        other = [name for name in self._block_names if self.request.stored_dtypes[name] != self.request.compute_dtype]
        return sum(numel(self.block, name) * self.item for name in other)

    @cached_property
    def widened(self) -> int:
        """A weight in float32, by which a CPU without units for a narrow dtype multiplies."""
        return 0 if self.item == 4 else 4 * max(torch.Size(shape).numel() for shape in self.block.shapes.values())

    @cached_property
    def activations(self) -> int:
        """The forward pass of one micro-batch through the block."""
        scores = num_scores(self.request)
        tiled = self.request.compute_dtype == torch.bfloat16 and not scores
        tiles = scratch_bytes(self.request.seq_len) if tiled else 0
        total = activation_bytes(self.block, self.hidden, self.micro_batch_tokens * self.item, tiles)
        total += self.choice.micro_batch * scores * SCORE_BYTES
        total = max(total, self.choice.micro_batch * mixer_bytes(self.request, self.block).peak)
        # As wide as the stream: small ones leave holes in the heap.
        if self.micro_batch_states < HEAP_BLOCK_BYTES:
            total += _HEAP_STATES * self.micro_batch_states
        return total + self.widened

    @cached_property
    def outer(self) -> dict[str, int]:
        """Tensor outside the blocks -> bytes as it is stored and copied."""
        return {name: self.request.stored_bytes[name] for name in self.request.layout.outer_tensors}

    @cached_property
    def _outer_in_use(self) -> dict[str, int]:
        """Bytes of the tensors outside the blocks as they are computed with: cast as they are read."""
        shapes = self.request.layout.outer_tensors
        return {name: torch.Size(shape).numel() * self.item for name, shape in shapes.items()}

    @cached_property
    def stored_embeddings(self) -> int:
        """The embeddings as they are copied."""
        return sum(self.outer[name] for name in embedding_names(self.request))

    @cached_property
    def embeddings(self) -> int:
        """The embeddings as windows are embedded with them."""
        return sum(self._outer_in_use[name] for name in embedding_names(self.request))

    @cached_property
    def head(self) -> int:
        """The head, or what is larger, as logits are computed with it."""
        return max(self._outer_in_use.values())

    @cached_property
    def both_heads(self) -> int:
        """The heads of two models, where one learns from the other: they stay beside its blocks."""
        return 2 * self.head if self.request.distils else 0

    @cached_property
    def logits(self) -> int:
        """The logits that are there at once, and what a loss makes of them."""
        return logit_bytes(self.request.layout.vocab_size, self.request.compute_dtype)

    @cached_property
    def gradient(self) -> int:
        """Gradients at one block boundary of the windows of the backward pass."""
        return self.request.sensitivity_windows * self.request.seq_len * self.hidden * 4
