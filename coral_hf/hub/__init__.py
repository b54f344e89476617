"""Records -> card, the files of a published drafter, and pushing.

This package does not depend on training or measuring. It reads the records that other packages wrote.
"""

from .model_card import write_card


__all__ = ["write_card"]
