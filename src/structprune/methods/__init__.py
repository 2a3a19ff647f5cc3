"""Methods: a score, an allocator and a solver under the name that a paper gave them. One file per method.

Read first: `method.py`, what a method states; then `structprune.py`.
"""

from structprune.methods.method import Method
from structprune.registry import Registry

METHODS: Registry[Method] = Registry(
    "method",
    Method,
    {
        "structprune": "structprune.methods.structprune:STRUCTPRUNE",
        "spap": "structprune.methods.spap:SPAP",
        "osscar": "structprune.methods.osscar:OSSCAR",
        "flap": "structprune.methods.flap:FLAP",
        "llm-pruner": "structprune.methods.llm_pruner:LLM_PRUNER",
        "fasp": "structprune.methods.fasp:FASP",
        "wanda-sp": "structprune.methods.wanda_sp:WANDA_SP",
        "depth": "structprune.methods.depth:DEPTH",
        "reap": "structprune.methods.reap:REAP",
        "magnitude": "structprune.methods.magnitude:MAGNITUDE",
        "depgraph": "structprune.methods.depgraph:DEPGRAPH",
        "slicegpt": "structprune.methods.slicegpt:SLICEGPT",
        "wanda": "structprune.methods.wanda:WANDA",
        "ria": "structprune.methods.ria:RIA",
        "uniprune": "structprune.methods.uniprune:UNIPRUNE",
        "sparsegpt": "structprune.methods.sparsegpt:SPARSEGPT",
        "thanos": "structprune.methods.thanos:THANOS",
        "apt": "structprune.methods.apt:APT",
        "alps": "structprune.methods.alps:ALPS",
        "fistapruner": "structprune.methods.fistapruner:FISTAPRUNER",
        "fista-refit": "structprune.methods.fista_refit:FISTA_REFIT",
        "random": "structprune.methods.random:RANDOM",
    },
    group="structprune.methods",
)
