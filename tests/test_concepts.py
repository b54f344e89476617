"""The running example of docs/concepts.md matches the code."""

import math
from pathlib import Path

import pytest
import torch
from helpers.rollout_reference import build, random_inputs
from helpers.tiny_models import make_target

from coral_hf import TargetAdapter
from coral_hf.drafter.configuration_checks import group_size
from coral_hf.generation.acceptance import accept_greedy
from coral_hf.generation.draft_tree import DraftTreeBuilder
from coral_hf.training.losses.csra import csra_loss


DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "concepts.md").read_text()


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import running_example

    return running_example


def test_features_give_the_next_token(example):
    target = make_target()
    adapter = TargetAdapter(target)
    with torch.no_grad():
        out = target(torch.tensor([example.IDS]), output_hidden_states=True)
    torch.testing.assert_close(adapter.logits(adapter.features(out)), out.logits)


def test_tree_and_acceptance(example):
    """The kept nodes, their mask, and the path that the target's choices accept."""
    chances = example.path_chances()
    names = list(chances)
    token = {name: index for index, name in enumerate([*names, "the", "is"])}
    builder = DraftTreeBuilder(torch.tensor([[token["blue"]]]), top_k=2)
    levels = (("blue",), ("because", "."))
    for parents in levels:
        children = [[guess for guess in example.GUESSES if guess[1] == parent] for parent in parents]
        tokens = torch.tensor([[[token[name] for name, *_ in row] for row in children]])
        builder.add_level(tokens, torch.tensor([[[math.log(chance) for *_, chance in row] for row in children]]))
    tree = builder.build(total_tokens=example.KEPT)
    kept = [next(name for name in token if token[name] == index) for index in tree.tokens[0].tolist()]
    assert kept == example.kept_nodes() == ["blue", "because", ".", "of", "It"]
    assert tree.scores[0].exp().tolist() == pytest.approx([chances[name] for name in kept])
    for name, chance in zip(kept[1:], tree.scores[0, 1:].exp().tolist(), strict=True):
        assert f"| {name} | " in PAGE and f"| {chance:.2f} |" in PAGE
    choices = torch.tensor([[token[example.CHOICES[name]] for name in kept]])
    (nodes,), (tokens,) = accept_greedy(tree, choices)
    assert [kept[node] for node in nodes] == ["blue", "because", "of"]
    assert tokens == [token[name] for name in ("because", "of", "the")]


def test_costs(example):
    best = {
        machine: max(times, key=lambda nodes, machine=machine: example.tokens_per_ms(machine, nodes))
        for machine, times in example.TARGET_MS.items()
    }
    assert best == {"CPU": 3, "GPU": 5}
    chances = sorted(example.path_chances().values(), reverse=True)
    for nodes in (1, 3, 5):
        cells = [f"{sum(chances[:nodes]):.2f}"]
        for machine, times in example.TARGET_MS.items():
            cells += [f"{times[nodes]} ms", f"{example.tokens_per_ms(machine, nodes):.3f}"]
        assert f"| {' | '.join(cells)} |" in PAGE


def test_rollout_reads_the_rows_of_the_table(example):
    """Step k's output at row 2 gets gradients from the features whose keys it sees; its own chain is detached."""
    drafter = build("eagle")
    embeds, features = random_inputs(drafter, batch=1, length=3)
    features.requires_grad_()
    for step, columns in example.SEEN_BY_ROW_2.items():
        hidden = drafter(embeds, features, num_steps=3).hidden_states[step - 1]
        (gradient,) = torch.autograd.grad(hidden[0, 2].sum(), features, allow_unused=True)
        read = [row for row in range(3) if gradient is not None and gradient[0, row].abs().max() > 0]
        assert read == [row for made, row in columns if made == 1]
        assert f"| {step} | " in PAGE and ", ".join(f"K{made}[{row}]" for made, row in columns) in PAGE


def test_csra_of_the_example():
    steps = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    loss = csra_loss(steps, torch.ones(2, 2, dtype=torch.bool), temperature=1.0).item()
    assert loss == pytest.approx(math.log(1 + 2 / math.e)) and f"= {loss:.2f}." in PAGE


def test_router_groups_of_the_example(example):
    size = group_size(example.VOCABULARY, example.GROUPS)
    active = max(range(example.GROUPS), key=example.GROUP_CHANCES.__getitem__)
    ids = list(range(active * size, (active + 1) * size))
    assert f"rows of ids {ids[0]} and {ids[1]} only" in PAGE and ids == [4, 5]
