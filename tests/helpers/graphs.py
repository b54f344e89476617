"""Calls under `draft_compile`, traced by the backend "eager", and drafts for them that are mostly right."""

from contextlib import contextmanager

import torch
from helpers.oracle import row_of
from helpers.parity import config_of
from transformers import CompileConfig, set_seed

from coral_hf.generation.compiled.graphed_generator import GraphedGenerator


def traced() -> CompileConfig:
    """Traced as one graph and run uncompiled, which takes a CPU seconds."""
    return CompileConfig(backend="eager", fullgraph=True)


def graphed(tree: dict, **settings):
    """A generation config of a compiled call."""
    return config_of({**tree, "draft_compile": True}, **{"compile_config": traced(), **settings})


@contextmanager
def graph_oracle(continuation: torch.Tensor, probability: float = 0.7, seed: int = 0):
    """While active, each level of a drafted tree's first branch is right with `probability`.

    Args:
        continuation (`torch.LongTensor` of shape `[B, L]`): the whole sequences that plain decoding produces.
    """
    generator, original = torch.Generator().manual_seed(seed), GraphedGenerator.propose

    def propose(self, input_ids, features, max_depth=None, lengths=None, counts=None, *others):
        tree = original(self, input_ids, features, max_depth, lengths, counts)
        starts = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths
        for row, start in enumerate(starts):
            whole = row_of(input_ids[row, :start], continuation)
            node, place = 0, start
            while whole is not None and place < continuation.shape[1]:
                children = (tree.parents[row] == node).nonzero().flatten().tolist()
                if not children or torch.rand((), generator=generator) >= probability:
                    break
                node = children[int(torch.randint(len(children), (), generator=generator))]
                for other in children:  # siblings differ
                    if tree.tokens[row, other] == continuation[whole, place]:
                        tree.tokens[row, other] = tree.tokens[row, node]
                tree.tokens[row, node] = continuation[whole, place]
                place += 1
        return tree

    GraphedGenerator.propose = propose
    try:
        yield
    finally:
        GraphedGenerator.propose = original


def compare_graphed(target, drafter, ids, tree, probability=0.7, **settings):
    """Compares plain output with compiled calls, with random and mostly right drafts; returns it and the statistics."""
    extra = {key: settings.pop(key) for key in ("attention_mask", "tokenizer") if key in settings}
    set_seed(0)
    own = {key: value for key, value in settings.items() if key != "compile_config"}
    plain = target.generate(ids, generation_config=config_of({}, **own), **extra)
    set_seed(0)
    drafts = target.generate(ids, generation_config=graphed(tree, **settings), assistant_model=drafter, **extra)
    assert torch.equal(plain, drafts)
    with graph_oracle(plain, probability):
        set_seed(0)
        drafts = target.generate(ids, generation_config=graphed(tree, **settings), assistant_model=drafter, **extra)
    assert torch.equal(plain, drafts)
    return plain, drafter.last_stats
