"""FASP: fast and accurate structured pruning (arXiv 2501.09412).

Channels of the MLP are ranked by the Wanda column score on the second matrix; the lowest go, the same share in every
block; the second matrix is restored by least squares on the kept inputs. Blocks are visited in order, each sees the
output of the pruned ones before it. The authors published no code; V/O pairs are not part of this version.
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
)
