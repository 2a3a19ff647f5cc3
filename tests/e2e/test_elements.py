"""Single weights: zeros where the pattern wants them, a stock model that loads as it is, and one clear error else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune import Recipe, prune
from structprune.api import plan, recover
from structprune.architectures.stock.maps import map_steps
from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import SourceContext, draw_windows
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.pipelines.elements_shares import between
from structprune.engine.sensitivity.map_costs import removal_cost
from structprune.errors import InputError, StructPruneError, UnsupportedError
from structprune.patterns import NM, Unstructured
from structprune.recipe.elements import ElementsRecipe
from structprune.recipe.training import RecoverySettings
from structprune.recipe.units import UnitsRecipe
from structprune.results.report import PruneReport
from support.command_line import CommandLine
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "method": "sparsegpt",
        "sparsity": 0.5,
        "calibration": str(text_file),
        "dtype": "float32",
    }
    return Recipe.build(**{**settings, "num_samples": 6, "seq_len": 32, "device": "cpu", **changes})


def matrices(source: Path, output: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (before, after) of all tensors with two dimensions."""
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (source, output))
    assert list(before) == list(after)
    return {name: (tensor, after[name]) for name, tensor in before.items()}


def stock(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)


def is_pruned(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight")


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"method": "magnitude", "pattern": "2:4"}, 0.5),
        ({"method": "wanda"}, 0.5),
        ({"method": "sparsegpt", "pattern": "1:4", "sparsity": 0.75}, 0.75),
        ({"method": "alps", "target": "dense-path", "sparsity": 0.6}, 0.6),
        ({"method": "ria", "pattern": "4:8", "solver": "refit", "damping": 0.1}, 0.5),
        ({"method": "uniprune", "solver": "sweep", "scope": "mlp"}, 0.5),
    ],
    ids=lambda value: str(value.get("method")) if isinstance(value, dict) else "",
)
def test_only_the_matrices_in_scope_have_zeros(
    changes: dict[str, Any], share: float, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = prune(tiny_llama, recipe(text_file, **changes), tmp_path / "out")
    scope = "mlp." if changes.get("scope") == "mlp" else ""
    zeros: dict[str, int] = {}
    for name, (before, after) in matrices(tiny_llama, tmp_path / "out").items():
        if not is_pruned(name) or scope not in name:
            assert torch.equal(before, after), name
            continue
        zero_OI = after == 0
        zeros[name] = int(zero_OI.sum())
        assert not torch.signbit(after[zero_OI]).any()
        if ":" in changes.get("pattern", ""):
            keep, of = map(int, changes["pattern"].split(":"))
            assert NM(keep=keep, of=of).matches(after)
        else:
            scoped = "row" if changes["method"] == "wanda" else "layer"
            assert Unstructured(share=share, scope=scoped).matches(after)
        kept_before = before.to(after.dtype)[~zero_OI]
        if report.recipe.model_dump()["solver"] == "mask-only":
            assert torch.equal(after[~zero_OI], kept_before)
        else:
            assert not torch.equal(after[~zero_OI], kept_before)
    assert report.zeros is not None
    assert report.zeros.zeros == sum(zeros.values())
    assert report.zeros.share == pytest.approx(share, abs=2e-3)
    assert report.zeros.nonzero_parameters == report.size.parameters_after - sum(zeros.values())
    assert report.size.parameters_after == report.size.parameters_before
    manifest = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())
    found = {f"model.layers.{b}.{n}.weight": c for b, maps in manifest["kept_indices"].items() for n, c in maps.items()}
    assert found == zeros
    assert report.reload.mode == "whole"
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes


def test_a_better_method_has_a_smaller_error(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def errors(method: str) -> tuple[float, float]:
        report = prune(tiny_llama, recipe(text_file, method=method, num_samples=24, damping=1e-2), tmp_path / method)
        # Behind the first maps every method sees streams of its own.
        first = next(block for block in report.blocks if block.kind == "self_attn.q_proj")
        assert first.error is not None
        assert first.error_mask_only is not None
        return first.error_mask_only, first.error

    (cut, sparsegpt), (_, alps) = errors("sparsegpt"), errors("alps")
    assert cut > sparsegpt > alps > 0
    # Without products of inputs nothing is known of the outputs.
    wanda = prune(tiny_llama, recipe(text_file, method="wanda"), tmp_path / "wanda")
    assert {block.error for block in wanda.blocks} == {None}


def test_the_error_is_that_of_the_stock_model(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The report's error of the first map, from the stock model's own activations on the same windows."""
    report = prune(tiny_llama, recipe(text_file, held_out=0), tmp_path / "out")
    block = next(block for block in report.blocks if block.kind == "self_attn.q_proj" and block.block == 0)
    model, pruned = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tiny_llama, tmp_path / "out")
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    def no_sampling(*_: object) -> Tensor:
        raise AssertionError("the text is given")

    context = SourceContext(encode=encode, render=str, sample=no_sampling, num_samples=6, seq_len=32, seed=0)
    ids_NS = draw_windows(text_file.read_text(), "text", context).ids_NS
    inputs: list[Tensor] = []
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids_NS)
        x_TI = inputs[0].double()
        wanted, found = (x_TI @ m.model.layers[0].self_attn.q_proj.weight.double().T for m in (model, pruned))
    relative = float((found - wanted).square().sum() / wanted.square().sum())
    assert block.error == pytest.approx(relative, rel=1e-4)


def test_blocks_with_more_outliers_keep_more(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Shares by OWL from the stock model's own activations: in proportion, 0.16 apart, and of all as many as asked."""
    changes: dict[str, Any] = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.6, "allocator": "owl"}
    report = prune(tiny_llama, recipe(text_file, **changes, held_out=0), tmp_path / "out")
    model, layers = stock(tiny_llama), dict[int, list[Tensor]]()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    context = SourceContext(
        encode=lambda text: torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]),
        render=str,
        sample=lambda *_: torch.zeros(0),
        num_samples=6,
        seq_len=32,
        seed=0,
    )
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            block = int(name.partition(".")[0])

            def score(linear: Any, args: Any, block: int = block) -> None:
                norm_I = args[0].flatten(0, 1).square().sum(dim=0).sqrt()
                layers.setdefault(block, []).append((linear.weight.abs() * norm_I).flatten())

            module.register_forward_pre_hook(score)
    with torch.no_grad():
        model(draw_windows(text_file.read_text(), "text", context).ids_NS)
    outliers = [float((all_N > 5 * all_N.mean()).double().mean()) for all_N in map(torch.cat, layers.values())]
    assert max(outliers) > min(outliers)
    kept = [0.16 * (each - min(outliers)) / (max(outliers) - min(outliers)) for each in outliers]
    expected = [0.6 - each + sum(kept) / len(kept) for each in kept]
    for number, share in enumerate(expected):
        parts = [block for block in report.blocks if block.block == number]
        for part in parts:
            assert 1 - part.kept_units / part.num_units == pytest.approx(share, abs=1 / part.num_units)
    assert report.zeros is not None
    assert report.zeros.share == pytest.approx(0.6, abs=1e-3)
    assert report.memory.measured_phases["sensitivity: scores"] > 0
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes


def test_maps_share_the_zeros_by_the_loss(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Shares within reach, not all alike, and together as many zeros as asked for."""
    changes: dict[str, Any] = {"method": "wanda", "pattern": "unstructured:layer", "sparsity": 0.6}
    settings = recipe(text_file, **changes, allocator="dp", held_out=0)
    report = prune(tiny_llama, settings, tmp_path / "out")
    shares = [1 - part.kept_units / part.num_units for part in report.blocks]
    assert min(shares) >= 0.45 - 1e-3
    assert max(shares) <= 0.75 + 1e-3
    assert max(shares) - min(shares) > 0.1
    assert report.zeros is not None
    assert report.zeros.share == pytest.approx(0.6, abs=2e-3)
    assert report.memory.measured_phases["sensitivity: backward"] > 0
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes


def test_what_a_mask_costs_by_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_IT = torch.randn(5, 8, generator=generator), torch.randn(8, 30, generator=generator)
    fisher_O, pattern = torch.rand(5, generator=generator, dtype=torch.float64), Unstructured(share=0.5, scope="row")
    keep_OI = pattern.keep_largest(weight_OI.abs() * x_IT.norm(dim=1))
    missed_OT = (weight_OI * ~keep_OI) @ x_IT
    expected = 0.5 * float((fisher_O[:, None] * missed_OT.double().square()).sum())
    assert removal_cost(weight_OI, x_IT @ x_IT.T, fisher_O, pattern) == pytest.approx(expected, rel=1e-5)
    assert removal_cost(weight_OI, x_IT @ x_IT.T, 0 * fisher_O, pattern) == 0
    # Between measured shares the logarithm is on a line.
    assert between([0.4, 0.5, 0.6], [1.0, 10.0, 100.0], [0.45, 0.5]) == pytest.approx([10**0.5, 10.0])


def test_experts_do_not_share_by_the_loss(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model")
    with pytest.raises(UnsupportedError, match="what zeros of experts add to the loss is not measured"):
        prune(source, recipe(text_file, method="wanda", pattern="unstructured", allocator="dp"), tmp_path / "out")


def test_experts_have_zeros_by_their_own_tokens(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "mixture")
    report = prune(source, recipe(text_file, pattern="2:4"), tmp_path / "out")
    for name, (before, after) in matrices(source, tmp_path / "out").items():
        if "experts" in name:
            assert NM(keep=2, of=4).matches(after), name
        elif ".mlp.gate.weight" in name:
            assert torch.equal(before, after)
    kinds = {block.kind for block in report.blocks}
    assert "mlp.experts.*.down_proj" in kinds
    with pytest.raises(UnsupportedError, match="sends other tokens to its experts"):
        prune(source, recipe(text_file, target="dense-path"), tmp_path / "other")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi3", "gemma2"])
def test_families(family: str, text_file: Path, tmp_path: Path) -> None:
    """Whichever way round a matrix is stored, groups are of consecutive inputs of one output."""
    source = save_tiny(family, tmp_path / family)
    prune(source, recipe(text_file, pattern="2:4", reload_check=False), tmp_path / "out")
    model = StockModel(CheckpointReader(tmp_path / "out"))
    block = model.layout.blocks[0]
    tensors = model.reader.read(block.shapes, block.prefix)
    names = [name for step in map_steps(model, ("attention", "mlp"))[0] for group in step.groups for name in group.maps]
    assert len(names) >= 4
    for name in names:
        weight = tensors[f"{name}.weight"]
        assert NM(keep=2, of=4).matches(weight.T if model.family.inputs_first else weight)


def test_the_card_says_what_gets_faster_and_what_does_not(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    for pattern, sentence in (
        ("2:4", "decoding at batch 1 is not faster"),
        ("unstructured", "research kernels only"),
        ("4:8", "No known kernel multiplies 4:8 matrices faster"),
    ):
        output = tmp_path / pattern.replace(":", "of")
        report = prune(tiny_llama, recipe(text_file, method="magnitude", pattern=pattern), output)
        card = (output / "README.md").read_text(encoding="utf-8")
        assert sentence in card
        assert "neither smaller nor faster" in card
        assert report.zeros is not None
        assert f"{report.zeros.nonzero_parameters:,}" in card
        assert "- mlp.down_proj: 50.00% zeros in" in card
        assert "structured-pruning" not in card
        page = (output / "pruning_report.html").read_text(encoding="utf-8")
        assert "50.00% zeros in the matrices of" in page


def test_the_plan_says_what_is_summed(tiny_llama: Path, text_file: Path) -> None:
    def found(**changes: Any) -> Any:
        return plan(tiny_llama, recipe(text_file, **changes))

    weights, energies, products = (
        found(method="magnitude", pattern="2:4"),
        found(method="wanda"),
        found(method="alps", sparsity=0.5),
    )
    assert weights.forecast.zeros.sums == "none: the weights alone decide"
    assert energies.forecast.zeros.sums == "squares of the inputs, without a Gram matrix"
    assert products.forecast.zeros.sums == "products of all pairs of inputs"
    assert energies.plan.phases["solve (mlp)"] < products.plan.phases["solve (mlp)"]


def test_a_pattern_makes_another_recipe_of_the_same_name() -> None:
    assert type(Recipe(method="magnitude")) is UnitsRecipe
    assert type(Recipe(method="magnitude", pattern="2:4")) is ElementsRecipe
    assert Recipe(method="wanda").scope == "all"
    assert Recipe.build(method="wanda", pattern="1:4").sparsity == 0.75
    assert Recipe.build(method="wanda", pattern="1:4", sparsity="75%").model_dump()["pattern"] == "1:4"
    with pytest.raises(
        InputError, match=r"the pattern says itself what share goes; got --pattern 2:4, --sparsity 0\.3"
    ):
        Recipe.build(method="wanda", pattern="2:4", sparsity=0.3)
    # YAML reads 2:4 as minutes and seconds.
    with pytest.raises(InputError, match=r"got --pattern 2:4, --sparsity 0\.3"):
        Recipe.build(method="wanda", pattern=124, sparsity=0.3)
    for sparsity in ("abc", "0.3,0.5", 2):
        with pytest.raises(InputError, match="--sparsity is not usable"):
            Recipe.build(method="wanda", pattern="2:4", sparsity=sparsity)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "fasp", "--pattern", "2:4"), "--pattern has no meaning for method 'fasp'"),
        (("--method", "wanda", "--pattern", "4:3"), "--pattern keeps all of a group or nothing of it"),
        (("--method", "wanda", "--pattern", "half"), "--pattern is not usable"),
        (("--method", "wanda", "--pattern", "5:10"), "a pattern of 5:10 needs rows of a multiple of 10 weights"),
        (("--method", "wanda", "--allocator", "milp"), "unknown allocator of zeros 'milp'"),
        (("--method", "wanda", "--allocator", "dp", "--sparsity", "0.9"), "shares of blocks may be 0.15 from"),
        (("--method", "wanda", "--allocator", "owl", "--pattern", "2:4"), "every block has the share that the pattern"),
        (("--method", "wanda", "--allocator", "owl", "--sparsity", "0.1"), "shares of blocks may be 0.16 from"),
        (("--method", "wanda", "--solver", "refitt"), "unknown update 'refitt'"),
        (("--method", "wanda", "--damping", "0.1"), "method 'wanda' solves no weight again"),
        (("--method", "sparsegpt", "--scope", "heads"), "--scope is not usable"),
    ],
)
def test_what_does_not_fit_is_one_error(
    flags: tuple[str, ...], message: str, command_line: CommandLine, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    code, _, said = command_line("prune", tiny_llama, "-o", tmp_path / "out", "--calibration", text_file, *flags)
    assert code == 2
    assert message in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_flags_of_the_command_line(
    command_line: CommandLine, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    code, out, said = command_line(
        "prune", tiny_llama, "-o", tmp_path / "out", "--json", "--method", "sparsegpt", "--pattern", "2:4",
        "--calibration", text_file, "--num-samples", "4", "--seq-len", "32", "--dtype", "float32", "--no-reload-check",
    )  # fmt: skip
    assert code == 0, said
    found = json.loads(out)
    assert (found["recipe"]["pattern"], found["recipe"]["sparsity"], found["zeros"]["pattern"]) == ("2:4", 0.5, "2:4")
    assert PruneReport.model_validate(found).zeros is not None
    again = tmp_path / "recipe.yaml"
    again.write_text("method: wanda\npattern: 2:4\n")
    assert Recipe.from_yaml(again) == Recipe(method="wanda", pattern="2:4")


def test_one_window_cannot_choose_the_ridge(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(StructPruneError, match="one window cannot both fit and choose the ridge"):
        prune(tiny_llama, recipe(text_file, method="alps", num_samples=1, held_out=0), tmp_path / "out")


def test_what_would_fill_the_zeros_is_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    prune(tiny_llama, recipe(text_file, method="magnitude", pattern="2:4", reload_check=False), tmp_path / "out")
    windows: dict[str, Any] = {
        "calibration": (str(text_file),),
        "num_samples": 6,
        "seq_len": 32,
        "dtype": "float32",
        "reload_check": False,
    }
    for mode in ("stream", "blocks", "lora"):
        settings = RecoverySettings.build(mode=mode, **windows)
        with pytest.raises(UnsupportedError, match="would fill the zeros of pattern 2:4"):
            recover(tmp_path / "out", tiny_llama, settings, tmp_path / mode)
    recover(tmp_path / "out", tiny_llama, RecoverySettings.build(mode="scales", **windows), tmp_path / "scales")
    found = [(name, after) for name, (_, after) in matrices(tmp_path / "out", tmp_path / "scales").items()]
    assert all(NM(keep=2, of=4).matches(after) for name, after in found if is_pruned(name))


@pytest.mark.usefixtures("modules_cache")
def test_after_whole_units(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """A source of uneven widths, without some sublayer, keeps its structure and its modelling file."""
    settings: dict[str, Any] = {"method": "structprune", "scope": "all", "multiple_of": 4, "sparsity": 0.6}
    uneven = Recipe.build(
        **settings, calibration=str(text_file), num_samples=6, seq_len=32, dtype="float32", allow_block_removal=True
    )
    prune(tiny_llama, uneven, tmp_path / "uneven")
    report = prune(tmp_path / "uneven", recipe(text_file, pattern="2:4"), tmp_path / "out")
    assert report.reload.mode == "whole"
    assert report.recipe.per_layer
    assert (tmp_path / "out" / "modeling_structprune.py").is_file()
    found = matrices(tmp_path / "uneven", tmp_path / "out")
    assert all(NM(keep=2, of=4).matches(after) for name, (_, after) in found.items() if is_pruned(name))
    with pytest.raises(UnsupportedError, match="so does the structure"):
        prune(tiny_llama, recipe(text_file, structure="per-layer"), tmp_path / "other")


def test_several_shares(command_line: CommandLine, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    code, out, said = command_line(
        "prune", tiny_llama, "-o", tmp_path / "out", "--method", "magnitude", "--pattern", "unstructured",
        "--sparsity", "0.25,0.5", "--calibration", text_file, "--num-samples", "2", "--seq-len", "32",
        "--dtype", "float32", "--no-reload-check",
    )  # fmt: skip
    assert code == 0, said
    assert "25.00%" in out
    assert "50.00%" in out
