"""Head rows that carry missing tokens: the problem of one row, and where its examples are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.calibration.store import MemoryStore
from structprune.engine.run import row_fit
from structprune.vocabulary.first_pieces import first_pieces
from structprune.vocabulary.merged import MOST_EXAMPLES, Examples, lifts, most_positions, row_steps
from structprune.vocabulary.model import TOKEN_MODELS
from structprune.vocabulary.tokenizer_json import shrunk
from support.vocabularies import KINDS


def test_the_lift_is_the_logit_of_the_piece_and_its_missing_tokens_together() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5)
    # Rows 0 to 3 stay; 4 and 5 begin with piece 1, 6 with piece 2.
    logits_kept, lse = logits[:4], logits[:4].logsumexp(0)
    own = (logits_kept - lse).exp()[1:3]
    missing = torch.stack([(logits[4:6] - lse).exp().sum(0), (logits[6] - lse).exp()])
    weight, lift = lifts(own, missing)
    merged = logits_kept.clone()
    merged[1:3] += lift
    wanted = logits.softmax(0)
    torch.testing.assert_close(merged.softmax(0)[1], wanted[[1, 4, 5]].sum(0))
    torch.testing.assert_close(merged.softmax(0)[2], wanted[[2, 6]].sum(0))
    torch.testing.assert_close(merged.softmax(0)[0], wanted[0])
    torch.testing.assert_close(weight, merged.softmax(0)[1:3])


@pytest.mark.parametrize("examples", [5, 40])
def test_a_row_gives_the_lifts_that_one_row_can_give(examples: int) -> None:
    """With fewer examples than numbers and with more; without a ridge exactly."""
    torch.manual_seed(0)
    hidden, step = torch.randn(examples, 12), torch.randn(12)
    (found,) = row_steps(hidden, torch.rand(examples) + 0.1, hidden @ step, [1e-6], 1.0)
    torch.testing.assert_close(hidden @ found, hidden @ step, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("examples", [5, 40])
def test_it_is_the_least_of_the_weighted_squares(examples: int) -> None:
    torch.manual_seed(0)
    hidden, weight, lift = torch.randn(examples, 12), torch.rand(examples), torch.randn(examples)
    ridges = [0.01, 0.5]
    for ridge, found in zip(ridges, row_steps(hidden, weight, lift, ridges, 2.0), strict=True):
        found.requires_grad_(True)
        loss = (weight * (hidden @ found - lift).square()).sum() + ridge * 2.0 * found.square().sum()
        (gradient,) = torch.autograd.grad(loss, found)
        assert gradient.abs().max() < 1e-4


def test_examples_come_back_by_piece_the_heaviest_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    num_pieces = 600
    weight, lift = torch.rand(num_pieces, 30), torch.randn(num_pieces, 30)
    weight[7] = 1e-6
    examples = Examples(tmp_path, num_pieces)
    examples.add(0, weight[:, :20], lift[:, :20])
    examples.add(20, weight[:, 20:], lift[:, 20:])
    # Of each position the 256 likeliest.
    most = weight.topk(256, dim=0).indices
    found = {piece: rest for piece, *rest in examples.by_piece()}
    assert sorted(found) == [piece for piece in range(num_pieces) if piece in most and weight[piece].max() >= 3e-5]
    assert 7 not in found
    for piece, (position, heavy, by) in found.items():
        wanted = {t for t in range(30) if piece in most[:, t]}
        assert set(position.tolist()) == wanted
        assert heavy.tolist() == sorted(heavy.tolist(), reverse=True)
        torch.testing.assert_close(heavy, weight[piece, position])
        torch.testing.assert_close(by, lift[piece, position])
    examples.remove()
    assert not list(tmp_path.iterdir())


def test_a_row_is_fitted_on_so_many_at_most(tmp_path: Path) -> None:
    examples = Examples(tmp_path, 1)
    weight = torch.linspace(0.1, 1, MOST_EXAMPLES + 50)[None]
    examples.add(0, weight, weight)
    ((_, position, *_),) = examples.by_piece()
    assert sorted(position.tolist()) == list(range(50, MOST_EXAMPLES + 50))


def test_positions_are_bounded_by_what_their_states_take() -> None:
    assert most_positions(576, 2) == 65_536
    assert most_positions(8192, 2) * 8192 * 2 == 128 * 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_piece_is_the_one_that_a_text_has_there(kind: str) -> None:
    """The spelling of a missing token, encoded with the tokens that stay, begins with it."""
    tokenizer: dict[str, Any] = json.loads(KINDS[kind]().to_str())
    model = TOKEN_MODELS[tokenizer["model"]["type"]]
    ids = model.tokens(tokenizer["model"])
    needed = model.needed(tokenizer["model"])
    order = model.most_likely_first(tokenizer["model"])
    closure = model.closure(tokenizer["model"])
    kept = {ids[token] for token in needed} | {entry["id"] for entry in tokenizer["added_tokens"]}
    for token in order[: len(order) // 2]:
        kept |= {ids[token], *(ids[part] for part in closure(token))}
    new = {number: place for place, number in enumerate(sorted(kept))}
    after = shrunk(tokenizer, new, "here")
    found = first_pieces(tokenizer, after, new, "here")
    assert found
    names = {number: token for token, number in model.tokens(after["model"]).items()}
    spelled = {number: token for token, number in ids.items()}
    for number, piece in found.items():
        assert number not in new
        assert spelled[number].startswith(names[piece]) or names[piece].startswith("<0x")


@pytest.mark.parametrize("most", [3, 10, 1000])
def test_positions_are_spread_over_all_windows(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_fit, "most_positions", lambda hidden, item: most)
    store = MemoryStore((4, 6, 8), torch.float32)
    taken = row_fit._spread(store, 4).tolist()
    assert taken == sorted(set(taken))
    assert len(taken) == min(most, 24)
    assert {number // 6 for number in taken} >= ({0, 1, 2, 3} if most > 3 else {0})
    assert taken[0] == 0
    assert taken[-1] < 24


def test_states_with_a_strong_direction_in_common_can_be_solved() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2000, 60) @ torch.randn(60, 512) + 30 * torch.randn(512)
    lift = torch.rand(2000)
    (found,) = row_steps(hidden, torch.full((2000,), 0.95), lift, [0.03], float(hidden.square().mean()))
    assert found.isfinite().all()
    assert (hidden @ found - lift).square().mean() < 0.9 * lift.square().mean()


def test_a_scale_of_the_logits_is_followed_and_a_cap_is_limited() -> None:
    def by(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda logits: logits * factor

    class Changes(torch.nn.Module):
        def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.forward = change

    products = torch.tensor([[0.0, 1.0, 400.0]])
    for factor in (0.0625, 4.0):
        torch.testing.assert_close(row_fit._slope(Changes(by(factor)), products), torch.full((1, 3), factor))
    capped = row_fit._slope(Changes(lambda logits: torch.tanh(logits / 30) * 30), products)
    torch.testing.assert_close(capped, torch.tensor([[1.0, 1 - float(torch.tanh(torch.tensor(1 / 30))) ** 2, 0.1]]))
