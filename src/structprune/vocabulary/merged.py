"""Head rows that take on what tokens that are gone would have been given: least squares, one row at a time.

Where a token is gone a text has its pieces, and the first of them is to be as likely as the piece and all missing
tokens that begin with it were together. With h the normalised last hidden state, w_g the row of piece g and M(g) the
missing tokens, the logit that would do so is log(exp(w_g h) + sum_{m in M(g)} exp(w_m h)), for every piece at once: the
other logits stay, and the softmax shares out what it did. One row cannot give it for all h. The step d_g is that which

    sum_t q_gt (d_g h_t - lift_gt)^2 + ridge e |d_g|^2

is least for, where lift is the wanted logit minus the one that is there, q the probability that the piece is to have,
and e the mean square of the entries of h. It is our own; no paper's.

Shape suffixes: G pieces, T positions, E examples of one piece, D hidden size, R ridges, C positions computed at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RIDGES = (0.03, 0.3)
"""Each gives steps of its own: 0.03 was best on Gemma 3 270M, by little."""
SHARES = (1.0, 0.7, 0.4)
"""How much of the steps is taken: with few positions less is better."""
ROWS = 1024
"""Rows that are read, written or changed at once."""
EXAMPLES_PER_POSITION = 256
"""Pieces that are fitted at one position, the likeliest ones."""
MOST_EXAMPLES = 4096
"""Positions that one row is fitted on, those with most weight."""
MERGED_BYTES = 32 * 2**20
"""Bytes of probabilities of all pieces at the positions that are computed at once."""
PARTS = 16
"""Files that examples are put down in, so that one of them is in memory; each has every sixteenth piece."""
# Below, a piece is not fitted at a position: 3e-5 lost less on text than 1e-4 did.
_LEAST_SHARE = 3e-5
# Where a piece was hardly possible and a missing token was, its logit would have to rise without end.
_MOST_LIFT = 8.0
_MOST_POSITIONS, _STATE_BYTES = 65_536, 128 * 2**20
EXAMPLE = np.dtype([("piece", "<i4"), ("position", "<i4"), ("weight", "<f4"), ("lift", "<f4")])
"""One piece at one position."""


def lifts(own_GC: Tensor, missing_GC: Tensor) -> tuple[Tensor, Tensor]:
    """Return (probability that a piece is to have, what its logit is to rise by) at each position.

    `own_GC` is the probability that it has among the tokens that stay, `missing_GC` what the missing tokens that begin
    with it would have beside these, on the same scale.
    """
    lift_GC = (missing_GC / own_GC.clamp_min(torch.finfo(own_GC.dtype).tiny)).log1p_().clamp_(max=_MOST_LIFT)
    return (own_GC + missing_GC) / (1 + missing_GC.sum(0)), lift_GC


def most_positions(hidden_size: int, item_bytes: int) -> int:
    """Return how many positions are fitted at most: their states are in memory together."""
    return min(_MOST_POSITIONS, max(1, _STATE_BYTES // (hidden_size * item_bytes)))


class Examples:
    """Examples in files of `folder`, all of one piece in the same file."""

    def __init__(self, folder: Path, num_pieces: int) -> None:
        folder.mkdir(exist_ok=True)
        self.num_pieces = num_pieces
        self._paths = [folder / f"examples-{part}.bin" for part in range(PARTS)]
        for path in self._paths:
            path.write_bytes(b"")

    def add(self, first: int, weight_GC: Tensor, lift_GC: Tensor) -> None:
        """Put down the likeliest pieces at these positions, the first of which has the number `first`."""
        most_KC, piece_KC = weight_GC.topk(min(EXAMPLES_PER_POSITION, len(weight_GC)), dim=0)
        lift_KC = lift_GC.gather(0, piece_KC)
        rank, place = torch.nonzero(most_KC >= _LEAST_SHARE, as_tuple=True)
        found = np.empty(len(rank), dtype=EXAMPLE)
        found["piece"] = piece_KC[rank, place].cpu().numpy()
        found["position"] = (place + first).cpu().numpy()
        found["weight"] = most_KC[rank, place].float().cpu().numpy()
        found["lift"] = lift_KC[rank, place].float().cpu().numpy()
        # Common pieces have low numbers: neighbours go to different files.
        parts = found["piece"] % PARTS
        for part, path in enumerate(self._paths):
            with path.open("ab") as file:
                file.write(found[parts == part].tobytes())

    def by_piece(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (piece, positions E, weights E, lifts E) of every piece that has examples."""
        for path in self._paths:
            found = np.fromfile(path, dtype=EXAMPLE)
            found = found[np.lexsort((-found["weight"], found["piece"]))]
            pieces, starts, counts = np.unique(found["piece"], return_index=True, return_counts=True)
            for piece, start, count in zip(pieces, starts, counts, strict=True):
                part = found[start : start + min(count, MOST_EXAMPLES)]
                yield (
                    int(piece),
                    torch.from_numpy(part["position"].astype(np.int64)),
                    torch.from_numpy(part["weight"].copy()),
                    torch.from_numpy(part["lift"].copy()),
                )

    def remove(self) -> None:
        """Remove the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def row_steps(hidden_ED: Tensor, weight_E: Tensor, lift_E: Tensor, ridges: Sequence[float], energy: float) -> Tensor:
    """Return the steps of one row (R, D), float32, for each of the ridges; `energy` is e above."""
    # States have a strong direction in common, beside which a ridge is lost in float32.
    root_E1 = weight_E.double().sqrt()[:, None]
    scaled_ED, wanted_E1 = hidden_ED.double().mul_(root_E1), lift_E.double()[:, None] * root_E1
    # The smaller of the two systems, of the examples or of the hidden size.
    few = len(scaled_ED) < scaled_ED.shape[1]
    gram = scaled_ED @ scaled_ED.T if few else scaled_ED.T @ scaled_ED
    right = wanted_E1 if few else scaled_ED.T @ wanted_E1
    found: list[Tensor] = []
    for ridge in ridges:
        ridged = gram.clone()
        ridged.diagonal().add_(ridge * energy)
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(ridged))
        found.append((scaled_ED.T @ solved if few else solved)[:, 0].float())
    return torch.stack(found)
