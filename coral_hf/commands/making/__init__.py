"""The stages between a target's name and its drafter."""
