"""Files -> conversations -> rows of prompts or of training.

This package does not depend on drafters or trainers. It only needs a target's tokenizer and chat template.
"""
