"""Reports of a training: metrics, simulated chains, evaluations, the learning curve and the estimate of its costs.

Nothing here changes a training.
"""
