"""The drafter: exactly the files that a published drafter carries, flat, with relative imports only.

Knows nothing of generation, training or the Hub; what the package adds to a drafter is attached from above.
"""
