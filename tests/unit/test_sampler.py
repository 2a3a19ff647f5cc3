"""Drawing tokens: what plain inversion of the cumulated probabilities gives, for any size of the vocabulary.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from structprune.architectures.stock.sampler import draw_tokens


@pytest.mark.parametrize("vocab_size", [1, 5, 255, 256, 257, 512, 1000])
def test_equals_inversion_of_all_probabilities(vocab_size: int) -> None:
    logits_RV = 3 * torch.randn(400, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    probabilities_RV = logits_RV.softmax(dim=-1)
    found = draw_tokens(probabilities_RV, torch.Generator().manual_seed(7))[:, 0]
    threshold_R = torch.rand(400, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(7))[:, 0]
    cumulated_RV = probabilities_RV.double().cumsum(dim=-1)
    upper_R = cumulated_RV.gather(1, found[:, None])[:, 0]
    lower_R = upper_R - probabilities_RV.double().gather(1, found[:, None])[:, 0]
    # Up to the rounding of the segments' float32 sums.
    assert (threshold_R * cumulated_RV[:, -1] >= lower_R - 1e-6).all()
    assert (threshold_R * cumulated_RV[:, -1] <= upper_R + 1e-6).all()


def test_certain_tokens_at_the_edges_of_segments() -> None:
    tokens = torch.tensor([0, 1, 255, 256, 511, 512, 599])
    probabilities_RV = torch.zeros(len(tokens), 600)
    probabilities_RV[torch.arange(len(tokens)), tokens] = 1.0
    assert torch.equal(draw_tokens(probabilities_RV, torch.Generator().manual_seed(0))[:, 0], tokens)
