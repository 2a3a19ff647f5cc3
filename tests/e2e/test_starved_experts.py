"""Mixtures of many experts and few tokens: every method finishes, and says which experts it knew too little of.

Shape suffixes: N windows, S positions, T tokens, E experts, U units.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from structprune import Recipe, prune
from structprune.results.report import PruneReport
from structprune.results.summary import summary_rows, warnings
from support.models import COMMON, TINY_MODELS, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_EXPERTS, WIDTH, NUM_WINDOWS, SEQ_LEN = 32, 24, 2, 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of 32 experts of 24 channels; a token is sent to two of them."""
    sizes: dict[str, Any] = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
    sizes |= {"head_dim": 16, "norm_topk_prob": True}
    with pytest.MonkeyPatch.context() as patch:
        config = Qwen3MoeConfig(**COMMON, **sizes)
        patch.setitem(TINY_MODELS, "many-experts", lambda: Qwen3MoeForCausalLM(config))
        return save_tiny("many-experts", tmp_path_factory.mktemp("many") / "model")


def run(source: Path, text_file: Path, output: Path, **changes: Any) -> PruneReport:
    """24 tokens: most experts of a block get one, two or none."""
    settings: dict[str, Any] = {"sparsity": 0.4, "calibration": str(text_file), "dtype": "float32", "scope": "mlp"}
    return prune(
        source, Recipe.build(**{**settings, "num_samples": NUM_WINDOWS, "seq_len": SEQ_LEN, **changes}), output
    )


def tokens_of_the_first_block(source: Path, text_file: Path, num_windows: int = NUM_WINDOWS) -> Tensor:
    """How many tokens the stock router sends to each expert, (E,)."""
    ids = AutoTokenizer.from_pretrained(source)(text_file.read_text(), add_special_tokens=False)["input_ids"]
    windows_NS = torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).reshape(-1, SEQ_LEN)
    order = torch.randperm(len(windows_NS), generator=torch.Generator().manual_seed(0))
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    found: list[Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: found.append(output[2]))
    with torch.no_grad():
        model(input_ids=windows_NS[order[:num_windows]])
    return torch.bincount(found[0].flatten(), minlength=NUM_EXPERTS)


def check_written(report: PruneReport, output: Path) -> None:
    """Stock code loads it, and every number is finite."""
    for name, tensor in load_file(output / "model.safetensors").items():
        assert torch.isfinite(tensor).all(), name
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 20)[None]).logits
    assert torch.isfinite(logits).all()
    for block in report.blocks:
        assert all(torch.isfinite(torch.tensor(value)) for value in block.statistics.values()), block.statistics


UNITS: dict[str, dict[str, Any]] = {
    "structprune": {"method": "structprune"},
    "structprune-outer": {"method": "structprune", "outer_iterations": 1},
    "structprune-scores": {"method": "structprune", "score": "loss"},
    "osscar": {"method": "osscar"},
    "osscar-auto": {"method": "osscar", "damping": "auto"},
    "fasp": {"method": "fasp"},
    "fasp-auto": {"method": "fasp", "damping": "auto"},
    "fasp-obs": {"method": "fasp", "score": "obs", "allocator": "standardised"},
    "fasp-fluctuation": {"method": "fasp", "score": "fluctuation", "allocator": "closed-form"},
    "fasp-penalty": {"method": "fasp", "score": "penalty"},
    "wanda-sp": {"method": "wanda-sp"},
    "llm-pruner": {"method": "llm-pruner", "protect_first": 0, "protect_last": 0},
    "llm-pruner-ranked": {"method": "llm-pruner", "allocator": "closed-form", "protect_first": 0, "protect_last": 0},
    "magnitude": {"method": "magnitude"},
    "random": {"method": "random"},
}


# Second ways to combine scores, allocators and dampings that others here go through.
SECOND = ("structprune-scores", "osscar-auto", "fasp-obs", "llm-pruner-ranked", "random")


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SECOND else ()) for name in UNITS]
)
def test_every_method_finishes(name: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run(source, text_file, output, multiple_of=8, **UNITS[name])
    check_written(report, output)
    if UNITS[name]["method"] in ("magnitude", "random"):
        assert not any("tokens" in statistic for block in report.blocks for statistic in block.statistics)
        return
    tokens_E = tokens_of_the_first_block(source, text_file)
    first = report.blocks[0].statistics
    assert (tokens_E == 0).any()
    if UNITS[name]["method"] == "llm-pruner":
        # A gradient of zero: no token that any loss depends on. The last of a window is predicted for nothing.
        assert first["experts_without_tokens"] >= int((tokens_E == 0).sum())
        return
    assert first["experts_without_tokens"] == int((tokens_E == 0).sum())
    assert first["experts_with_few_tokens"] == int(((tokens_E > 0) & (tokens_E < WIDTH)).sum())
    assert (first["least_expert_tokens"], first["enough_expert_tokens"]) == (0, WIDTH)


def largest(score_U: Tensor, num_keep: int) -> list[int]:
    return sorted(score_U.topk(num_keep).indices.tolist())


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        # sum_i |W_ij| |x_j| with equal inputs
        ({"method": "fasp"}, lambda down, _: down.abs().sum(dim=0)),
        ({"method": "fasp", "damping": "auto"}, lambda down, _: down.abs().sum(dim=0)),
        ({"method": "wanda-sp"}, lambda down, _: down.abs().sum(dim=0)),
        # Half the squared error of a removal, with an inverse that is the identity
        ({"method": "osscar"}, lambda down, _: down.square().sum(dim=0)),
        # Without gradients the product of the channel's norms
        ({"method": "llm-pruner", "protect_first": 0, "protect_last": 0}, lambda down, norms: down.norm(dim=0) * norms),
    ],
    ids=["fasp", "fasp-auto", "wanda-sp", "osscar", "llm-pruner"],
)
def test_an_expert_without_tokens_is_pruned_by_its_weights(
    settings: dict[str, Any], score: Any, source: Path, text_file: Path, tmp_path: Path
) -> None:
    """The largest channels stay, and their weights are the source's."""
    report = run(source, text_file, tmp_path / "out", multiple_of=8, **settings)
    num_keep = report.blocks[0].kept_units
    kept = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())["kept_indices"]["0"]
    before = load_file(source / "model.safetensors")
    if "model.layers.0.mlp.experts.0.down_proj.weight" not in before:
        pytest.fail("the source's experts are stacked")
    after = load_file(tmp_path / "out" / "model.safetensors")
    without = torch.nonzero(tokens_of_the_first_block(source, text_file) == 0).flatten().tolist()
    assert without
    for number in without:
        gate, up, down = (
            before[f"model.layers.0.mlp.experts.{number}.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        units = kept[f"mlp.{number}"]
        assert units == largest(score(down, gate.norm(dim=1) * up.norm(dim=1)), num_keep)
        for name, wanted in (("gate", gate[units]), ("up", up[units]), ("down", down[:, units])):
            assert torch.equal(after[f"model.layers.0.mlp.experts.{number}.{name}_proj.weight"], wanted), name


def test_the_report_says_which_and_what_would_do(source: Path, text_file: Path, tmp_path: Path) -> None:
    report = run(source, text_file, tmp_path / "out", method="fasp", multiple_of=8)
    without = [int(block.statistics["experts_without_tokens"]) for block in report.blocks]
    few = [int(block.statistics["experts_with_few_tokens"]) for block in report.blocks]
    counted = f"without any: {sum(without)} in blocks 0, 1; with too few: {sum(few)} in blocks 0, 1"
    assert ("experts with few tokens", counted) in summary_rows(report)
    (warning,) = (text for text in warnings(report) if text.startswith("Experts were sent too few"))
    assert counted.removeprefix("w") in warning
    # Not one of 24 tokens: more than 24 times the channels of an expert.
    assert "(24 are enough for one)" in warning
    assert "More than 576 tokens would do instead of 24" in warning
    assert warning in (tmp_path / "out" / "pruning_report.html").read_text(encoding="utf-8")


def test_the_estimate_goes_by_the_least_used_expert(source: Path, text_file: Path, tmp_path: Path) -> None:
    """With more text every expert has some; what is named is what gives the least used one as many as channels."""
    report = run(source, text_file, tmp_path / "out", method="fasp", multiple_of=8, num_samples=60)
    tokens_E = tokens_of_the_first_block(source, text_file, 60)
    first = report.blocks[0].statistics
    assert first["least_expert_tokens"] == int(tokens_E.min())
    assert first["wanted_tokens"] == max(720, -(-720 * WIDTH // max(1, int(tokens_E.min()))))


def test_whole_experts_say_it_too(source: Path, text_file: Path, tmp_path: Path) -> None:
    report = run(source, text_file, tmp_path / "out", method="reap")
    check_written(report, tmp_path / "out")
    tokens_E = tokens_of_the_first_block(source, text_file)
    first = report.blocks[0].statistics
    assert first["experts_without_tokens"] == int((tokens_E == 0).sum())
    assert first["experts_with_few_tokens"] == int((tokens_E > 0).sum())
    # Those that no token was sent to go first.
    kept = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())["kept_indices"]["0"]["expert"]
    num_sent = int((tokens_E > 0).sum())
    assert sum(bool(tokens_E[number] > 0) for number in kept) == min(num_sent, len(kept))
    assert any("100 are enough for one" in text for text in warnings(report))
