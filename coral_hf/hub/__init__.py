"""Records -> card, the files of a published drafter, and pushing.

Knows nothing of how drafters are trained or measured: it reads the records that other rooms wrote.
"""

from .model_card import write_card


__all__ = ["write_card"]
