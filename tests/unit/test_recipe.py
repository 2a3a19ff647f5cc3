"""The recipe: what is accepted, from flags and from YAML, and a fingerprint over every field."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from structprune.engine.pipelines.registry import PIPELINES
from structprune.errors import InputError, UnsupportedError
from structprune.methods import METHODS
from structprune.recipe import (
    RECIPES,
    RESOLVED,
    Recipe,
    ResolvedRecipe,
    all_fields,
    default_sensitivity_samples,
    flag_name,
)
from structprune.recipe.depth import DepthRecipe
from structprune.recipe.fields import flag_of
from structprune.recipe.limits import TARGETS
from structprune.recipe.units import UnitsRecipe

# A value per field of a recipe that removes units, which differs from the default.
CHANGES: dict[str, Any] = {
    "method": "magnitude",
    "sparsity": 0.25,
    "scope": "all",
    "target_parameters": "1.3B",
    "target_bytes": "4GiB",
    "target_kv_cache": "8192:2GiB",
    "target_latency": "decode:0.75x",
    "latency_table": {"sublayers": [{"kind": "mlp", "units": [0, 48], "prefill": [0, 1], "decode": [0, 1]}]},
    "vocabulary": "64k",
    "vocabulary_text": ["big.txt:2"],
    "drop_reserve": True,
    "head_units": "query-head",
    "calibration": "wikitext2",
    "num_samples": 4,
    "seq_len": 64,
    "held_out": 3,
    "time_budget": "5m",
    "memory": 2**30,
    "device": "cpu",
    "device_memory": 2**30,
    "dtype": "float32",
    "seed": 1,
    "multiple_of": 8,
    "damping": 1e-3,
    "shrinkage": 0.5,
    "score": "l2",
    "allocator": "uniform",
    "search": "evopress",
    "search_generations": 3,
    "search_children": 5,
    "search_anchors": True,
    "solver": "least-squares",
    "target": "dense-path",
    "structure": "per-layer",
    "temperature": 0.5,
    "min_retention": 0.2,
    "max_retention": 0.9,
    "outer_iterations": 1,
    "allow_block_removal": True,
    "protect_first": 1,
    "protect_last": 1,
    "widths": {"blocks": {"0": {"mlp": 3}}},
    "sensitivity_samples": 3,
    "sensitivity_scale": "per-text",
    "repair": "scales",
    "repair_samples": 3,
    "merge_rows": True,
    "repair_epochs": 2,
    "gates": "graspprune",
    "gates_steps": 5,
    "gates_loss": "text",
    "objective": "worst",
    "tensor_parallel": 2,
    "max_shard_size": "1GB",
    "output_dtype": "bfloat16",
    "bos": "yes",
    "merge_adapter": "tuned",
    "reload_check": False,
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("seq_len", "expected"), [(2, 24), (1024, 24), (1025, 23), (2048, 12), (24_576, 1), (131_072, 1)]
)
def test_windows_of_the_backward_pass(seq_len: int, expected: int) -> None:
    assert default_sensitivity_samples(seq_len) == expected


def test_yaml(recipe_file: Path) -> None:
    recipe_file.write_text("method: wanda-sp\nsparsity: 0.2\nmemory: 4GiB\ncalibration: null\n", encoding="utf-8")
    recipe = Recipe.from_yaml(recipe_file)
    assert recipe == Recipe(method="wanda-sp", sparsity=0.2, memory=4 * 2**30)


def test_empty_yaml_is_the_default(recipe_file: Path) -> None:
    recipe_file.write_text("# nothing yet\n", encoding="utf-8")
    assert Recipe.from_yaml(recipe_file) == Recipe()


def test_overrides_win(recipe_file: Path) -> None:
    recipe_file.write_text("sparsity: 0.2\nseed: 5\n", encoding="utf-8")
    recipe = Recipe.from_yaml(recipe_file, sparsity=0.4, memory="1g")
    assert recipe == Recipe(sparsity=0.4, seed=5, memory=2**30)


def test_a_field_that_yaml_has_twice(recipe_file: Path) -> None:
    recipe_file.write_text("sparsity: 0.1\nmethod: fasp\nsparsity: 0.2\n")
    with pytest.raises(InputError, match="the recipe has the field 'sparsity' twice"):
        Recipe.from_yaml(recipe_file)


def test_unknown_field_in_yaml(recipe_file: Path) -> None:
    recipe_file.write_text("sparsty: 0.2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"unknown recipe field 'sparsty'\. Known: method, sparsity") as caught:
        Recipe.from_yaml(recipe_file)
    assert caught.value.where == str(recipe_file)


def test_unknown_field_in_code() -> None:
    with pytest.raises(InputError, match=r"^--sparsty is not usable; got 0\.2"):
        Recipe.build(sparsty=0.2)


@pytest.mark.parametrize(
    "text",
    [
        "sparsity: [0.1",
        "\tsparsity: 0.1",
        "- sparsity",
        "0.3",
        "1: 2",
        "? [a]\n: 2",
        "sparsity: 0.3\n---\nsparsity: 0.4\n",
        "memory: lots",
        "sparsity: half",
    ],
)
def test_unusable_yaml_is_refused(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        Recipe.from_yaml(recipe_file)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("sparsity: 2024-13-45", id="impossible-date"),
        pytest.param("seed: !!int abc", id="tagged-int"),
        pytest.param("seed: !!timestamp abc", id="tagged-timestamp"),
        pytest.param("sparsity: " + "[" * 800 + "]" * 800, id="deep"),
    ],
)
def test_yaml_that_cannot_be_constructed_is_refused(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        Recipe.from_yaml(recipe_file)


def test_nested_aliases_do_not_blow_up_the_message(recipe_file: Path) -> None:
    """Each line stands for nine of the line before; a few more would be gigabytes when written out."""
    lines = ["  a0: &a0 x", *(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 5))]
    recipe_file.write_text("\n".join(["sparsity:", *lines]), encoding="utf-8")
    with pytest.raises(InputError, match=r"^--sparsity is not usable; got ") as caught:
        Recipe.from_yaml(recipe_file)
    assert len(str(caught.value)) < 4000


def test_yaml_that_is_not_text_is_refused(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"sparsity: \xff\xfe\n")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        Recipe.from_yaml(recipe_file)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the recipe file does not exist"):
        Recipe.from_yaml(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot be read as YAML"):
        Recipe.from_yaml(tmp_path)


def test_python_tags_are_never_executed(recipe_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    recipe_file.write_text(f"method: !!python/object/apply:os.mkdir ['{trace}']\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot be read as YAML.*python/object"):
        Recipe.from_yaml(recipe_file)
    assert not trace.exists()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_sparsity_in_bounds(sparsity: float) -> None:
    assert Recipe.build(sparsity=sparsity).sparsity == sparsity


def test_sparsity_as_a_percentage() -> None:
    assert Recipe.build(sparsity="30%").sparsity == 0.3
    assert Recipe.build(sparsity=" 12.5 % ").sparsity == 0.125
    assert Recipe.build(sparsity="0.25").sparsity == 0.25
    with pytest.raises(InputError, match=r"got 30, wanted a share.*Did you mean 0\.3\?$"):
        Recipe.build(sparsity=30)
    with pytest.raises(InputError, match=r"got 1\.2, wanted input should be less than 1\.$"):
        Recipe.build(sparsity="120%")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "half", None, True])
def test_sparsity_out_of_bounds(sparsity: Any) -> None:
    with pytest.raises(InputError, match=r"^--sparsity is not usable; got ") as caught:
        Recipe.build(sparsity=sparsity)
    assert caught.value.got == repr(sparsity)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("num_samples", 0, "--num-samples"),
        ("num_samples", 1.5, "--num-samples"),
        ("seq_len", 1, "--seq-len"),
        ("memory", 0, "--memory"),
        ("device_memory", 0, "--device-memory"),
        ("seed", -1, "--seed"),
        ("multiple_of", 0, "--multiple-of"),
        ("damping", 0, "--damping"),
        ("damping", 2, "--damping"),
        ("dtype", "int8", "--dtype"),
        ("scope", "head", "--scope"),
        ("method", 3, "--method"),
    ],
)
def test_the_error_names_the_flag(field: str, value: Any, flag: str) -> None:
    with pytest.raises(InputError, match=f"^{flag} is not usable; got {value!r}, wanted "):
        Recipe.build(**{field: value})


def test_frozen() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.sparsity = 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_fingerprint_is_stable() -> None:
    recipe = Recipe(**CHANGES)
    again = Recipe.model_validate_json(recipe.model_dump_json())
    shuffled = Recipe(**dict(reversed(CHANGES.items())))
    assert recipe.fingerprint() == again.fingerprint() == shuffled.fingerprint()
    assert len(bytes.fromhex(recipe.fingerprint())) == 32


def test_changes_cover_every_field() -> None:
    assert set(CHANGES) == set(UnitsRecipe.model_fields)
    # A pattern makes another kind of recipe of the same method.
    assert set(all_fields()) == {*CHANGES, "pattern", "permute_channels"}


@pytest.mark.parametrize("field", list(CHANGES))
def test_fingerprint_sees_every_field(field: str) -> None:
    beside = flag_of(all_fields()[field]).beside
    shared = {beside: CHANGES[beside]} if beside else {}
    assert Recipe(**shared, **{field: CHANGES[field]}).fingerprint() != Recipe(**shared).fingerprint()


@pytest.mark.parametrize("field", [name for name, field in all_fields().items() if flag_of(field).beside])
def test_how_something_is_done_is_refused_where_it_is_not(field: str) -> None:
    beside = flag_of(all_fields()[field]).beside
    message = f"{flag_name(field)} says how {flag_name(beside)} is done, which asks for nothing"
    for asked in ({}, {beside: None}, {beside: all_fields()[beside].default}):
        with pytest.raises(UnsupportedError, match=message):
            Recipe(**asked, **{field: CHANGES[field]})
    # What asks for nothing itself, and what reports of runs hold.
    assert Recipe(**{field: all_fields()[field].default}) == Recipe()


# One class per pipeline


METHOD_OF = {"units": "fasp", "depth": "depth", "experts": "reap", "slice": "slicegpt", "elements": "sparsegpt"}


def test_every_pipeline_has_a_recipe() -> None:
    assert list(RECIPES) == list(RESOLVED) == list(PIPELINES) == list(METHOD_OF)
    for pipeline, method in METHOD_OF.items():
        kind, resolved = RECIPES.get(pipeline), RESOLVED.get(pipeline)
        assert type(Recipe(method=method)) is type(kind(method=method)) is kind
        assert kind.pipeline == resolved.pipeline == METHODS.get(method).pipeline
        assert issubclass(resolved, kind)
        assert set(resolved.model_fields) == set(kind.model_fields)
    assert type(Recipe()) is UnitsRecipe
    assert Recipe().method == "structprune"


@pytest.mark.parametrize("pipeline", list(METHOD_OF))
def test_copies_are_of_the_same_class(pipeline: str) -> None:
    recipe = Recipe(method=METHOD_OF[pipeline], sparsity=0.2)
    for copied in (
        Recipe.model_validate(recipe.model_dump()),
        Recipe.model_validate_json(recipe.model_dump_json()),
        pickle.loads(pickle.dumps(recipe)),
        copy.deepcopy(recipe),
        Recipe(**recipe.model_dump()),
    ):
        assert copied == recipe
        assert type(copied) is type(recipe)


@pytest.mark.parametrize("pipeline", list(METHOD_OF))
def test_fields_without_a_meaning_are_one_error(pipeline: str) -> None:
    """All of them at once, with the methods that take them, or what the method takes where none does."""
    kind = RECIPES.get(pipeline)
    changes = {**CHANGES, "allocator": "closed-form"}
    foreign = {name: value for name, value in changes.items() if name not in kind.model_fields}
    if not foreign:
        assert pipeline == "units"
        return
    with pytest.raises(UnsupportedError) as caught:
        Recipe.build(method=METHOD_OF[pipeline], **foreign)
    for name in foreign:
        assert f"--{name.replace('_', '-')}" in caught.value.what
    for name in kind.model_fields:
        assert f"--{name.replace('_', '-')}" not in caught.value.what.replace(",", "").split()
    if caught.value.wanted is None:
        assert all(f"--{name.replace('_', '-')}" in str(caught.value.do) for name in kind.model_fields)
    else:
        others = str(caught.value.wanted).removeprefix("--method ").split(", ")
        assert all(set(foreign) <= set(Recipe.kind_for({**foreign, "method": name}).model_fields) for name in others)
    # None, and the default of those that have one, ask for nothing.
    unsaid = {name: all_fields()[name].default for name in foreign}
    assert Recipe.build(method=METHOD_OF[pipeline], **unsaid) == Recipe(method=METHOD_OF[pipeline])


def test_a_recipe_of_another_pipeline_is_refused() -> None:
    with pytest.raises(InputError, match="method 'fasp' has another kind of recipe; got DepthRecipe"):
        DepthRecipe(method="fasp")


def test_a_yaml_recipe_is_of_its_method(recipe_file: Path) -> None:
    recipe_file.write_text("method: depth\nscore: measured-loss\nprotect_first: 1\n", encoding="utf-8")
    assert Recipe.from_yaml(recipe_file) == DepthRecipe(score="measured-loss", protect_first=1)
    recipe_file.write_text("method: depth\ndamping: 0.1\n", encoding="utf-8")
    with pytest.raises(UnsupportedError, match="--damping has no meaning for method 'depth'"):
        Recipe.from_yaml(recipe_file)
    # A flag changes the method, and with it what has a meaning.
    assert Recipe.from_yaml(recipe_file, method="fasp").method == "fasp"


# What runs of the version before wrote into manifests and reports: every field, whatever the method.
EARLIER: dict[str, Any] = {
    "method": "fasp",
    "sparsity": 0.3,
    "scope": "mlp",
    "head_units": "kv-group",
    "calibration": "wikitext2",
    "num_samples": 128,
    "seq_len": 2048,
    "memory": 2**30,
    "device": "cpu",
    "device_memory": None,
    "dtype": "float32",
    "seed": 0,
    "multiple_of": 1,
    "damping": 1e-4,
    "shrinkage": 0.0,
    "score": "wanda",
    "allocator": "uniform",
    "solver": "mask-only",
    "target": "local",
    "structure": "uniform",
    "temperature": 0.0,
    "min_retention": 0.1,
    "max_retention": 1.0,
    "outer_iterations": 0,
    "allow_block_removal": False,
    "protect_first": 0,
    "protect_last": 0,
    "sensitivity_samples": 12,
    "tensor_parallel": 1,
    "reload_check": True,
}
_OF_UNITS = ("head_units", "shrinkage", "score", "allocator", "solver", "target", "temperature")
_WITHOUT_UNITS = dict.fromkeys((*_OF_UNITS, "protect_first", "protect_last"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "depth", "scope": "all", "score": "angular"},
        {"method": "reap", "score": "router-weighted"},
        {"method": "slicegpt", "scope": "all", "structure": "per-layer", "damping": 0.01, **_WITHOUT_UNITS},
    ],
    ids=lambda changes: changes.get("method", "fasp"),
)
def test_recipes_of_earlier_reports_load(changes: dict[str, Any]) -> None:
    earlier = EARLIER | changes
    resolved = ResolvedRecipe.model_validate(earlier)
    for loaded in (resolved, Recipe(**earlier)):
        found = loaded.model_dump(mode="json")
        assert {name: value for name, value in found.items() if name in earlier} == {
            name: value for name, value in earlier.items() if name in found
        }
    # What is written now keeps the names and can be read again, as what a run worked by and as what to ask for.
    written = resolved.model_dump(mode="json")
    added = {"vocabulary", "max_shard_size", "output_dtype", "bos", "merge_adapter", "held_out", "time_budget"}
    added_later = {
        "widths",
        "latency_table",
        "repair",
        "repair_samples",
        "repair_epochs",
        "objective",
        "sensitivity_scale",
        "gates",
        "gates_steps",
        "gates_loss",
        *TARGETS,
    }
    added_later |= {"vocabulary_text", "drop_reserve", "merge_rows"}
    added_later |= {"search", "search_generations", "search_children", "search_anchors"}
    own = added_later & set(type(resolved).model_fields)
    assert set(written) - set(earlier) == added | own
    assert written["held_out"] == 0
    assert written.get("repair", "none") == "none"
    assert ResolvedRecipe.model_validate(written) == resolved
    assert Recipe(**written).model_dump(mode="json") == written


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("1.5h", 5400), ("90 s", 90), (45, 45), (1.5, 2), (0, 0)])
def test_time_budget(text: str | int, seconds: int) -> None:
    assert Recipe.build(time_budget=text).time_budget == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-1m", "10 parsecs", "1e3s", True])
def test_no_time_budget(text: str | bool) -> None:
    with pytest.raises(InputError, match="a time cannot be read"):
        Recipe.build(time_budget=text)


def test_a_flag_for_the_windows_wins_over_either_in_the_file(recipe_file: Path) -> None:
    recipe_file.write_text("num_samples: 8\n")
    found = Recipe.from_yaml(recipe_file, time_budget="5m")
    assert (found.num_samples, found.time_budget) == (None, 300)
    recipe_file.write_text("time_budget: 5m\n")
    found = Recipe.from_yaml(recipe_file, num_samples=8)
    assert (found.num_samples, found.time_budget) == (8, None)


@pytest.mark.parametrize("pipeline", list(METHOD_OF))
def test_a_resolved_recipe_has_no_none(pipeline: str) -> None:
    for name, field in RESOLVED.get(pipeline).model_fields.items():
        assert type(None) not in get_args(field.annotation), name
