"""What fitting head rows takes, where tokens are gone and their rows' probability is to stay: bytes and work.

How many rows change is known when the tokenizer is read; here it is bounded by the tokens that stay and those that are
gone, and for times taken as a third of that, as it is for Gemma 3.
"""

from __future__ import annotations

from structprune.engine.planning.pieces import Counts, Piece, What
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.shapes import LOGIT_TOKENS
from structprune.engine.planning.sizes import CHUNK_BYTES, TOKENIZER_SHARE, HostSizes
from structprune.phases import Phase, PhaseBytes
from structprune.vocabulary.merged import (
    EXAMPLE,
    EXAMPLES_PER_POSITION,
    MERGED_BYTES,
    MOST_EXAMPLES,
    PARTS,
    RIDGES,
    ROWS,
    most_positions,
)

# Arrays of probabilities at once, where examples are put down, the choice is measured, and the finished model.
_FITTING, _CHOOSING, _JUDGING = 5, 6, 4
# Logits of missing tokens are added up, of which a loss over them would take half the time.
_ADDED_UP = 0.5
_LIKELY_SHARE = 3


def positions(request: PlanRequest) -> int:
    """Count the positions that are fitted, at most."""
    most = most_positions(request.layout.hidden_size, request.compute_dtype.itemsize)
    return min(most, request.num_windows * request.seq_len)


def judged_windows(request: PlanRequest) -> int:
    """Count the windows that measure, at most: an eighth of each text's, but one at least."""
    return max(1, min(request.num_windows // 2, request.num_windows // 8 + request.num_texts))


def likely_rows(missing_tokens: int, vocab_size: int) -> int:
    """Return how many rows are expected to change."""
    return max(1, min(missing_tokens, vocab_size) // _LIKELY_SHARE)


def _most_rows(request: PlanRequest) -> int:
    return min(request.missing_tokens, request.layout.vocab_size)


def merged_phases(sizes: HostSizes) -> PhaseBytes:
    """Plan the tokenizers, all windows through the pruned model, the fit, the choice, and the shard with the rows."""
    request = sizes.request
    if not request.missing_tokens:
        return {}
    hidden, num_positions, rows = sizes.hidden, positions(request), _most_rows(request)
    beside = sizes.stores_closed + (sizes.store if sizes.choice.store == "memory" else 0)
    tokenizers = TOKENIZER_SHARE * (request.tokenizer_bytes + request.source_tokenizer_bytes)
    passing = sizes.weights + sizes.cast + max(sizes.weights, sizes.activations)
    embedding = sizes.embeddings + CHUNK_BYTES + 2 * sizes.micro_batch_states
    states = num_positions * hidden * sizes.item
    at_once = min(num_positions, max(LOGIT_TOKENS, MERGED_BYTES // 4))
    array = min(max(MERGED_BYTES, 4 * rows * LOGIT_TOKENS), 4 * rows * at_once)
    # The missing tokens' rows of a slice, and their logits at these positions.
    slices = ROWS * (hidden * sizes.item + min(at_once, array // (4 * rows)) * (sizes.item + 2 * 4))
    example = 4 * EXAMPLE.itemsize * num_positions * min(rows, EXAMPLES_PER_POSITION) // PARTS
    examples = min(MOST_EXAMPLES, num_positions)
    solving = example + 3 * 8 * examples * hidden + 4 * 8 * min(examples, hidden) ** 2
    fitting = states + sizes.head + CHUNK_BYTES + max(_FITTING * array + slices + sizes.logits, solving)
    # The states of the windows that measure, before and after.
    judged = judged_windows(request) * request.seq_len * hidden * sizes.item
    choosing = sizes.head + CHUNK_BYTES + 2 * min(states, judged) + slices + sizes.logits
    if sizes.choice.store == "memory":
        choosing += judged + request.num_probe * request.seq_len * hidden * sizes.item
    choosing += max(_CHOOSING * array, sizes.head + _JUDGING * array + sizes.logits)
    writing = sum(sizes.outer.values()) + CHUNK_BYTES
    return {
        Phase.MERGED_ROWS: max(
            sizes.stores_closed + tokenizers, beside + max(passing, embedding, fitting, choosing, writing)
        )
    }


def merged_device_bytes(request: PlanRequest) -> int:
    """Return what a device holds beside the head: probabilities and states of some positions, or the old rows."""
    hidden, item, rows = request.layout.hidden_size, request.compute_dtype.itemsize, _most_rows(request)
    collecting = _CHOOSING * max(MERGED_BYTES, 4 * rows * LOGIT_TOKENS) + ROWS * hidden * item
    return max(collecting, rows * hidden * item + 3 * 4 * ROWS * hidden)


def merged_disk_bytes(sizes: HostSizes) -> int:
    """Return the disk bytes of the missing rows, of examples and steps, of states, and of the shard with the rows."""
    request, rows = sizes.request, _most_rows(sizes.request)
    if not request.missing_tokens:
        return 0
    examples = EXAMPLE.itemsize * positions(request) * min(rows, EXAMPLES_PER_POSITION)
    steps = len(RIDGES) * 4 * rows * sizes.hidden
    states = 2 * sizes.store if sizes.choice.store == "file" else 0
    missing = request.missing_tokens * sizes.hidden * sizes.item
    return missing + examples + steps + states + sum(sizes.outer.values())


def merged_work(request: PlanRequest) -> Counts:
    """Count the logits, of missing tokens too, and the solves; the passes are the caller's.

    One finished model is counted. Up to three are measured, until one is better than the model before.
    """
    windows, judged = positions(request) / request.seq_len, judged_windows(request)
    all_tokens = 1 + _ADDED_UP * request.missing_tokens / request.layout.vocab_size
    return {
        # The choice and the finished model are measured by all tokens too, and the latter by two heads.
        Piece(What.HEAD): windows * all_tokens + judged * (2 * all_tokens + 2),
        Piece(What.ROW_SOLVE): likely_rows(request.missing_tokens, request.layout.vocab_size),
    }
