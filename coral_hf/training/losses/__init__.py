"""The terms of a drafter's loss, on plain tensors.

Knows no model and no trainer.
"""
