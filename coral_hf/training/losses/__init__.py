"""The terms of a drafter's loss, one file each, and `terms.TERMS`, the list from which everything else follows.

Losses work on plain tensors, independently of models and trainers.
"""
