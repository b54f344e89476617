"""Files -> conversations -> rows of prompts or of training.

Knows nothing of drafters or trainers: a target's tokenizer and chat template are all it asks for.
"""
