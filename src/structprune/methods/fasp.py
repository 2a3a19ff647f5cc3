"""FASP: fast and accurate structured pruning (arXiv 2501.09412).

Channels of the MLP, and of attention's values, are ranked by the Wanda column score on the second matrix (down_proj,
o_proj); the lowest go, the same share in every block and of both kinds; the second matrix is restored by least squares
on the kept inputs. Blocks are visited in order, each sees the output of the pruned ones before it. The authors
published no code. Derived here: every KV head keeps as many value channels, and one leaves with its columns of all the
group's query heads.
"""

from structprune.methods.method import Method

FASP = Method(
    name="fasp",
    title="FASP: Fast and Accurate Structured Pruning of Large Language Models",
    paper="arXiv 2501.09412",
    summary="Wanda column score, least-squares restoration, uniform, block after block",
    provenance="published formula",
    score="wanda",
    allocator="uniform",
    solver="least-squares",
    needs_statistics=True,
    damping="auto",
    kinds=("attention", "mlp"),
    head_units="value-channel",
)
