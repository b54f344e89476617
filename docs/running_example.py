"""The example that docs/concepts.md explains, its figure shows, and tests/test_concepts.py proves."""

# The text so far, x0 to x3, as token ids of a toy vocabulary.
TEXT = ("The", "sky", "is", "blue")
IDS = (5, 9, 3, 77)

# Two levels of guesses after x3: a token's name, its parent's and its probability given the parent.
GUESSES = (
    ("because", "blue", 0.6),
    (".", "blue", 0.3),
    ("of", "because", 0.6),
    ("sunlight", "because", 0.2),
    ("It", ".", 0.8),
    ("The", ".", 0.1),
)
KEPT = 5  # nodes of the tree, including the root
# The target's own choices after each node of the accepted path.
CHOICES = {"blue": "because", "because": "of", "of": "the", ".": "It", "It": "is"}

# Rollout: the columns whose keys row 2 sees in steps 1 to 3, as (step that made the key, row).
SEEN_BY_ROW_2 = {1: [(1, 0), (1, 1), (1, 2)], 2: [(1, 0), (1, 1), (2, 2)], 3: [(1, 0), (2, 1), (3, 2)]}

# Router: eight ids in four groups, and the probability that the router gives to each group.
VOCABULARY, GROUPS = 8, 4
GROUP_CHANCES = (0.1, 0.2, 0.6, 0.1)

# Costs in milliseconds: a pass of the target over n tokens on two machines, and a level of drafts.
TARGET_MS = {"CPU": {1: 10, 3: 11, 5: 15}, "GPU": {1: 10, 3: 10, 5: 10}}
LEVEL_MS = 1


def path_chances() -> dict[str, float]:
    """The chance of each guess with everything above it."""
    chances = {TEXT[-1]: 1.0}
    for name, parent, chance in GUESSES:
        chances[name] = chances[parent] * chance
    return chances


def kept_nodes() -> list[str]:
    """The most likely nodes, in the order of their levels: the root, "because", ".", "of" and "It"."""
    chances = path_chances()
    best = sorted(chances, key=chances.__getitem__, reverse=True)[:KEPT]
    return [name for name in chances if name in best]


def tokens_per_ms(machine: str, nodes: int) -> float:
    """Expected tokens of a step that verifies the most likely nodes, divided by its time."""
    chances = sorted(path_chances().values(), reverse=True)[:nodes]
    levels = 0 if nodes == 1 else 2
    return sum(chances) / (TARGET_MS[machine][nodes] + levels * LEVEL_MS)
