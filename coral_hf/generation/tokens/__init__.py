"""The texts of a batch: choosing tokens from the target's logits, writing them, and ending rows."""
