"""The dense model's sensitivity: what the removal of each unit costs the loss, by a streamed backward pass.

Read first: `backward_pass.py`, the gradient at every block boundary; then `fisher.py` (StructPrune) and `taylor.py`
(LLM-Pruner).
"""
