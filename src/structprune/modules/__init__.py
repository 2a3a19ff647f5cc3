"""Pruning of any torch module, whole in memory: families of units from its graph, importance, choice, repair, smaller
modules and programs.

Read first: `layout.py`, what can leave a module; then `prune.py`, the steps of a run; then `compaction.py`, how a
module is made smaller and how that is proved.
"""
