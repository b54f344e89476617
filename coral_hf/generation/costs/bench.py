"""A target and a drafter in the middle of a generation, set up for timing the parts of a step."""

from dataclasses import replace

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ...drafter.modeling_coral import CoralDraftModel
from ...utils.compat import cache_kwarg
from ..acceptance import accept_greedy
from ..candidate_generator import CoralCandidateGenerator
from ..draft_tree import DraftTree, ancestors_of
from ..key_values.paths import store_obstacle
from ..key_values.recurrent_layers import crop, is_linear
from ..settings import DraftSettings
from ..target_forward import TargetForward


NEW_ROWS = 2  # true rows that the drafter reads before it drafts: about as many as a step accepts


class Bench:
    """A prefilled target, and a drafter that has read the same text.

    Only the first `read` tokens are read, because times depend on the number of keys and values and not on their content.
    A batch or a long context repeats the keys and values of one short text.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        rows (`int`): batch size B. More than one needs a target that the store supports.
        context (`int`): tokens of each row before the root. More than `read` also needs such a target.
        read (`int`): the most tokens to read.
        levels (`int`): levels of the deepest draft to time.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: CoralDraftModel,
        settings: DraftSettings,
        rows: int,
        context: int,
        read: int,
        levels: int,
    ):
        self.rows = rows
        self.settings = settings
        self.device = target.get_input_embeddings().weight.device
        vocab_size = target.config.get_text_config().vocab_size
        # regardless of the total, so that all timed levels are drafted
        total = max(settings.draft_total_tokens, 1 + levels)
        fixed = replace(settings, draft_cost_aware=False, draft_total_tokens=total)
        # before any forward pass, because it checks that the models fit together
        padding = [0] * rows
        self.generator = CoralCandidateGenerator(drafter, target, fixed, context + settings.draft_depth + 1, padding)
        ids = (1 + torch.arange(context, device=self.device) * 7919 % (vocab_size - 1))[None]  # 0 is padding
        cache = DynamicCache(config=target.config)
        self.by_levels = any(map(is_linear, cache.layers))
        in_store = store_obstacle(target, cache, None, context + total) is None
        cache.activate_past_recording()
        asked = self.generator.adapter.output_hidden_states
        text = {"input_ids": ids[:, -read:], "use_cache": True, "output_hidden_states": asked, **cache_kwarg(cache)}
        outputs = target(**text)
        for layer in cache.layers:
            crop(layer, 0)
        self.verifier = TargetForward(target, cache_kwarg(cache), asked)
        if in_store:
            _repeat(cache, rows, context)
            self.verifier.enter_store(padding)
        features = self.generator.features_of(outputs.hidden_states)[:, -NEW_ROWS:]
        self.features = features.expand(rows, -1, -1)
        self.ids = torch.cat([ids, ids[:, :1]], dim=1).expand(rows, -1)  # the root follows the context
        # The drafter's rows before those stay zeros, because reading the context of a large batch would take seconds.
        self.generator.cache.length = context - NEW_ROWS
        self.generator.propose(self.ids, self.features, max_depth=0)

    def star(self, size: int) -> DraftTree:
        """Trees that consist of a root and leaves, because times depend only on the number of nodes.

        Recurrent layers are an exception: they read level by level. For them, one path is as deep as drafts get, and the
        other nodes are leaves.
        """
        depth = min(self.settings.draft_depth, size - 1) if self.by_levels else min(1, size - 1)
        if self.by_levels and self.settings.is_chain:
            return DraftTree.chain(self.ids[:, :size])
        parents = torch.zeros(self.rows, size, dtype=torch.long, device=self.device)
        parents[:, : depth + 1] = torch.arange(-1, depth, device=self.device)
        depths = (parents >= 0).long()
        depths[:, : depth + 1] = torch.arange(depth + 1, device=self.device)
        return DraftTree(self.ids[:, :size], parents, depths, depths.float(), ancestors_of(parents, max(depth, 1)))

    def verify(self, tree: DraftTree) -> None:
        """Verifies a tree as a step does, from its mask to the features of the kept nodes. Restores the cache afterwards."""
        outputs = self.verifier.verify(tree)
        paths, _ = accept_greedy(tree, outputs.logits.float().argmax(dim=-1).to(tree.tokens.device))
        self.generator.features_of(outputs.hidden_states, paths)
        # Keeps no node, because rows dropped by a sliding window could not be restored.
        self.verifier.keep([[] for _ in paths], tree.num_nodes)

    def propose(self, levels: int) -> None:
        """Reads the newest rows again, then drafts this many levels."""
        self.generator.cache.length -= self.features.shape[1]
        self.generator.propose(self.ids, self.features, max_depth=levels)


def _repeat(cache: Cache, rows: int, context: int) -> None:
    """Repeats the keys and values of one text for `rows` texts of `context` tokens."""
    for layer in cache.layers:
        width = context
        if layer.is_sliding:
            width = min(context, max(layer.keys.shape[2], layer.sliding_window - 1))
            layer.cumulative_length = context
        times = -(-width // layer.keys.shape[2])
        layer.keys, layer.values = (
            states.repeat(rows, 1, times, 1)[:, :, :width] for states in (layer.keys, layer.values)
        )


__all__ = ["NEW_ROWS", "Bench"]
