"""What a training tells: metrics, simulated chains, evaluations, the learning curve, the estimate before it.

Changes nothing in a training.
"""
