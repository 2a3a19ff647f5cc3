"""The cells of a comparison: what their recipes are, and when two are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from structprune.api import inspect
from structprune.comparison.cells import cell_key, cell_recipe, fitted, parse_settings, parse_variant, settings_of
from structprune.errors import InputError
from structprune.methods import METHODS
from structprune.recipe import Recipe

BASE = Recipe(num_samples=4, seq_len=32, damping=0.01)


def test_a_variant_changes_only_what_it_names() -> None:
    variant = parse_variant("fasp:target=dense-path,multiple-of=8,temperature=0.5")
    recipe = cell_recipe(BASE, variant, 0.4)
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
        cell_recipe(BASE, parse_variant("fasp:damping=7"), 0.5)


def test_the_key_follows_what_decides_and_nothing_else(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first.txt", "second.txt", "other.txt"))
    for path, text in ((first, "one"), (second, "one"), (other, "two")):
        path.write_text(text, encoding="utf-8")
    fasp = cell_recipe(BASE, parse_variant("fasp"), 0.5)
    keys = {
        name: cell_key(fasp.model_copy(update={"calibration": str(path)}), {"source": "a"})
        for name, path in (("first", first), ("second", second), ("other", other))
    }
    # A text counts by its content, not by its place.
    assert keys["first"] == keys["second"] != keys["other"]
    assert cell_key(fasp, {"source": "a"}) != cell_key(fasp, {"source": "b"})
    assert cell_key(fasp, {"source": "a"}) != cell_key(cell_recipe(BASE, parse_variant("fasp"), 0.4), {"source": "a"})
    explicit = cell_recipe(BASE, parse_variant("fasp:seed=0"), 0.5)
    assert cell_key(explicit, {"source": "a"}) == cell_key(fasp, {"source": "a"})


def test_settings_name_no_paths_and_no_columns(tmp_path: Path) -> None:
    recipe = Recipe(method="flap", sparsity=0.5, scope="all", calibration=str(tmp_path / "some.txt"), seed=3)
    assert settings_of(recipe) == {"calibration": "some.txt", "seed": 3}
    assert parse_settings(["seed=3", "allow-block-removal=true"], "--set") == {"seed": 3, "allow_block_removal": True}


def test_a_method_without_units_takes_as_many_parameters(tiny_llama: Path) -> None:
    layout = inspect(tiny_llama)
    asked = cell_recipe(BASE, parse_variant("depth"), 0.5)
    recipe = fitted(asked, METHODS.get("depth"), layout)
    mlp = sum(block.module_parameters(block.group("mlp")) for block in layout.blocks)
    assert recipe.sparsity * layout.block_parameters == pytest.approx(0.5 * mlp)
    assert recipe.scope == "all"
    whole = fitted(asked.model_copy(update={"scope": "all"}), METHODS.get("slicegpt"), layout)
    assert recipe.sparsity < whole.sparsity < 0.5
    assert fitted(asked, METHODS.get("fasp"), layout) is asked
