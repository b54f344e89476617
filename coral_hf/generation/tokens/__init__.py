"""The texts of a batch: choosing their tokens from the target's logits, writing them, ending rows."""
