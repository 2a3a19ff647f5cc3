"""Random: units that leave are drawn from the seed; no data, no weight update. The floor under every other method."""

from structprune.methods.method import Method

RANDOM = Method(
    name="random",
    title="Random units",
    paper="folklore",
    summary="units drawn at random, weights left as they are, uniform",
    provenance="baseline",
    score="random",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=False,
    kinds=("attention", "mlp"),
)
