"""The terms of a drafter's loss, one file each, and `terms.TERMS`, the list from which everything else follows.

Plain tensors: knows no model and no trainer.
"""
