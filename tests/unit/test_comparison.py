"""The cells of a comparison: what their recipes are, and when two are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from structprune.api import inspect
from structprune.comparison.cells import (
    cell_key,
    cell_recipe,
    fitted,
    is_limited,
    parse_settings,
    parse_variant,
    settings_of,
    shared_settings,
)
from structprune.errors import InputError, UnsupportedError
from structprune.methods import METHODS
from structprune.recipe import Recipe

SHARED = {"num_samples": 4, "seq_len": 32, "damping": 0.01}


def test_a_variant_changes_only_what_it_names() -> None:
    variant = parse_variant("fasp:target=dense-path,multiple-of=8,temperature=0.5")
    recipe = cell_recipe(SHARED, variant, 0.4)
    assert recipe == Recipe(
        method="fasp",
        sparsity=0.4,
        num_samples=4,
        seq_len=32,
        damping=0.01,
        target="dense-path",
        multiple_of=8,
        temperature=0.5,
    )
    assert parse_variant("fasp").changes == {}


@pytest.mark.parametrize("text", ["fasp:target", "fasp:=1", "fasp:target=", "fasp:colour=red", "fasp:method=flap"])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="fasp:"):
        parse_variant(text)
    with pytest.raises(InputError, match="--damping"):
        cell_recipe(SHARED, parse_variant("fasp:damping=7"), 0.5)


def test_the_key_follows_what_decides_and_nothing_else(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first.txt", "second.txt", "other.txt"))
    for path, text in ((first, "one"), (second, "one"), (other, "two")):
        path.write_text(text, encoding="utf-8")
    fasp = cell_recipe(SHARED, parse_variant("fasp"), 0.5)
    keys = {
        name: cell_key(fasp.model_copy(update={"calibration": (str(path),)}), {"source": "a"})
        for name, path in (("first", first), ("second", second), ("other", other))
    }
    # A text counts by its content, not by its place.
    assert keys["first"] == keys["second"] != keys["other"]
    assert cell_key(fasp, {"source": "a"}) != cell_key(fasp, {"source": "b"})
    assert cell_key(fasp, {"source": "a"}) != cell_key(cell_recipe(SHARED, parse_variant("fasp"), 0.4), {"source": "a"})
    explicit = cell_recipe(SHARED, parse_variant("fasp:seed=0"), 0.5)
    assert cell_key(explicit, {"source": "a"}) == cell_key(fasp, {"source": "a"})


def test_settings_name_no_paths_and_no_columns(tmp_path: Path) -> None:
    recipe = Recipe(method="flap", sparsity=0.5, scope="all", calibration=str(tmp_path / "some.txt"), seed=3)
    assert settings_of(recipe) == {"calibration": "some.txt", "seed": 3}
    assert parse_settings(["seed=3", "allow-block-removal=true"], "--set") == {"seed": 3, "allow_block_removal": True}


def test_a_method_without_units_takes_as_many_parameters(tiny_llama: Path) -> None:
    layout = inspect(tiny_llama)
    asked = cell_recipe(SHARED, parse_variant("depth"), 0.5)
    recipe = fitted(asked, METHODS.get("depth"), layout)
    mlp = sum(block.module_parameters(block.group("mlp")) for block in layout.blocks)
    assert recipe.sparsity * layout.block_parameters == pytest.approx(0.5 * mlp)
    assert recipe.scope == "all"
    # Shared settings count where the method has them.
    assert (recipe.num_samples, recipe.seq_len) == (4, 32)
    whole = fitted(asked.model_copy(update={"scope": "all"}), METHODS.get("slicegpt"), layout)
    assert recipe.sparsity < whole.sparsity < 0.5
    units = cell_recipe(SHARED, parse_variant("fasp"), 0.5)
    assert fitted(units, METHODS.get("fasp"), layout) is units


def test_shared_settings_of_what_only_some_do() -> None:
    shared = {"gates_steps": 8, "seed": 1}
    variants = [parse_variant("structprune"), parse_variant("structprune:gates=graspprune")]
    assert shared_settings(shared, variants) == {"structprune": ["--gates-steps"]}
    assert [getattr(cell_recipe(shared, v, 0.3), "gates_steps", None) for v in variants] == [128, 8]
    with pytest.raises(InputError, match="--gates-steps has no meaning for any of the methods"):
        shared_settings(shared, variants[:1])


def test_shared_settings_count_where_they_have_a_meaning() -> None:
    variants = [parse_variant(name) for name in ("fasp", "depth", "slicegpt:multiple_of=4")]
    shared = {"seq_len": 32, "multiple_of": 1, "shrinkage": 0.0, "sparsity": 0.5}
    assert shared_settings(shared, variants) == {
        "depth": ["--multiple-of", "--shrinkage"],
        "slicegpt:multiple_of=4": ["--shrinkage"],
    }
    assert cell_recipe(shared, variants[2], 0.3) == Recipe(
        method="slicegpt", sparsity=0.3, scope="mlp", num_samples=128, seq_len=32, multiple_of=4
    )
    with pytest.raises(InputError, match="--shrinkage has no meaning for any of the methods"):
        shared_settings(shared, variants[1:])
    with pytest.raises(UnsupportedError, match="--shrinkage has no meaning for method 'depth'"):
        cell_recipe(shared, parse_variant("depth:shrinkage=0.5"), 0.3)


def test_the_method_counts_for_the_key() -> None:
    keys = {cell_key(cell_recipe({}, parse_variant(name), 0.3), {}) for name in ("structprune", "fasp", "osscar")}
    assert len(keys) == 3


def test_limits_take_the_place_of_a_share() -> None:
    limited = parse_variant("structprune:target_parameters=100M")
    assert is_limited({}, limited)
    assert is_limited({"target_bytes": "1GiB"}, parse_variant("fasp"))
    assert not is_limited({}, parse_variant("fasp"))
    recipe = cell_recipe({}, limited, None)
    assert "sparsity" not in recipe.model_fields_set
    assert cell_recipe({}, parse_variant("fasp"), 0.0).sparsity == 0
    with pytest.raises(UnsupportedError, match="--target-bytes has no meaning for one of the methods; got reap"):
        is_limited({"target_bytes": "1GiB"}, parse_variant("reap"))
