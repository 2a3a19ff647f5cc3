"""What a run is to search for: the search by its name, its settings, and what the planner has to know of it."""

from __future__ import annotations

from structprune.allocation.proposers import SEARCHES, Search
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.searching import SearchWork, search_work, window_shares
from structprune.engine.planning.shapes import by_kind
from structprune.errors import InputError, UnsupportedError
from structprune.methods.method import Method, SensitivityKind
from structprune.recipe.limits import targets_of
from structprune.recipe.units import ResolvedUnits, UnitsRecipe


def search_of(recipe: UnitsRecipe) -> Search | None:
    """Find the search that a recipe asks for. Raises InputError for an unknown name."""
    none = UnitsRecipe.model_fields["search"].default
    return None if recipe.search == none else SEARCHES.get(recipe.search)


def search_settings(recipe: UnitsRecipe, search: Search | None) -> dict[str, int]:
    """Fill what the recipe leaves to the search; zeros where there is none."""
    asked = {name: getattr(recipe, name) for name in ("search_generations", "search_children")}
    if search is None:
        return dict.fromkeys(asked, 0)
    options = search.options(*asked.values(), seed=recipe.seed)
    return {"search_generations": options.generations, "search_children": options.children}


def check_search(recipe: UnitsRecipe, method: Method, allocator: str) -> None:
    """Raise UnsupportedError where a search has nothing to start from, InputError for too few calibration windows."""
    if method.sensitivity_for(allocator) is not SensitivityKind.LOSS:
        raise UnsupportedError(
            f"a search over widths starts from predicted losses, which {method.name!r} with the {allocator} allocator "
            "does not measure",
            got=f"--search {recipe.search}",
            wanted="--method structprune, or an allocator that compares losses, such as closed-form",
        )
    if recipe.sparsity == 0 and not targets_of(recipe):
        raise InputError("nothing is to go, so there are no widths to search for", got=f"--search {recipe.search}")
    num_texts = len(recipe.texts)
    window_shares(recipe.most_samples // num_texts, 1, num_texts, recipe.seq_len)


def planned_search(request: PlanRequest, recipe: ResolvedUnits) -> SearchWork | None:
    """Count what a search does; None where there is none. Raises UnsupportedError on several ranks."""
    search = search_of(recipe)
    if search is None:
        return None
    if request.num_ranks > 1:
        raise UnsupportedError(
            "a search over widths is not for several ranks",
            got=f"--search {recipe.search}, {request.num_ranks} ranks",
            do="run it in one process, or leave --search out",
        )
    return search_work(
        search,
        search.options(recipe.search_generations, recipe.search_children, recipe.seed),
        num_windows=request.num_windows,
        backward=recipe.backward_samples,
        num_texts=len(recipe.texts),
        seq_len=recipe.seq_len,
        num_anchors=_num_anchors(request, recipe),
    )


def _num_anchors(request: PlanRequest, recipe: ResolvedUnits) -> int:
    """Count the measurements of single sublayers, at most; with each that may go, and each two that follow."""
    kinds = by_kind(request.groups)
    sublayers = sum(block.has(kind) for block in request.layout.blocks for kind in kinds)
    return sublayers * (3 if recipe.allow_block_removal else 1) if recipe.search_anchors else 0
