"""CoralCandidateGenerator: proposes trees to coral_hf's decode loop and chains to Transformers' stock loop."""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from ..drafter.draft_layer import DraftKeyValues
from ..drafter.modeling_coral import CoralDraftModel
from ..drafter.target_adapter import TargetAdapter, placed
from ..utils.compat import hidden_states_to_ask
from .costs.pace import AnyCosts, Pace
from .draft_levels import LevelDrafter, RotaryTable
from .draft_tree import DraftTree
from .key_values.kept_rows import ReadRows, keep_rows, take_rows
from .lookup.lookup_nodes import Found
from .settings import DraftSettings
from .statistics import DraftStats
from .tree_size import DraftCosts


_PIECE = 1024  # tokens of a prompt that the drafter reads at a time


class CoralCandidateGenerator(CandidateGenerator):
    """Drafts with a CORAL drafter from the target's true features.

    [`propose`] returns a [`DraftTree`]. [`get_candidates`] is its chain case and implements Transformers'
    `CandidateGenerator`. The drafter's KV cache keeps only rows that were built from true features. Drafted rows are
    overwritten at the next step, because keeping them costs 8-15 % of the acceptance length.

    Args:
        drafter ([`CoralDraftModel`])
        target (`PreTrainedModel`): the model that verifies.
        settings ([`DraftSettings`])
        max_length (`int`): the longest sequence that this call can reach. It sets the cache size and limits the last drafts.
        num_padding (`int` or `list[int]`): left padding of the prompt, or of each prompt of a batch ([`padding_of`]). The
            drafter never reads it.
        costs ([`DraftCosts`] or [`MeasuredCosts`], *optional*): times of a step (`costs.tables.draft_costs`), for
            `draft_cost_aware`.

    Raises:
        ValueError: if drafter and target do not belong together, or costs are needed and missing.
    """

    requires_model_outputs = True

    def __init__(
        self,
        drafter: CoralDraftModel,
        target: PreTrainedModel,
        settings: DraftSettings,
        max_length: int,
        num_padding: int | list[int] = 0,
        costs: AnyCosts | None = None,
    ):
        self.drafter = drafter
        self.settings = settings
        self.max_length = max_length
        # for each drafted row
        self.padding = [num_padding] if isinstance(num_padding, int) else list(num_padding)
        self.adapter = TargetAdapter(target, drafter.config.target_feature_layers)
        self.adapter.check_drafter(drafter.config)
        self.adapter.output_hidden_states = hidden_states_to_ask(self.adapter.target, self.adapter.feature_layers)
        self.head = settings.draft_head_of(drafter, self.adapter)
        self.levels = LevelDrafter(drafter, self.adapter, self.head, settings, costs)
        if settings.draft_top_k > self.head.fewest_tokens:
            raise ValueError(
                f"The draft head can be left with {self.head.fewest_tokens} tokens, fewer than "
                f"draft_top_k={settings.draft_top_k} branches. Lower draft_top_k, raise draft_active_groups, or set "
                "draft_head='full'."
            )
        self.model_kwargs_overrides = {"output_hidden_states": True}
        batch = len(self.padding)
        self.stats = DraftStats()
        self.stats.rows = [DraftStats() for _ in range(batch)]
        self._device, self._dtype = self.levels.device, self.levels.dtype
        self._rotary = RotaryTable(drafter)
        scratch = settings.draft_depth * settings.draft_top_k
        slots = min(max_length, 4096) + scratch + 1
        self.cache = DraftKeyValues(drafter.config, slots, self._dtype, self._device, batch)
        # which slots of the cache contain a true row, [B, slots]; None: all slots of every row
        self._filled: torch.Tensor | None = None
        self._pace = Pace()
        self._seen = 0  # columns of the texts that the head has read in every row
        # features that plain steps left for the next draft, [B, n, F] each, and their number in each row
        self._unread: list[tuple[torch.Tensor, list[int]]] = []
        # depth of the stock loop's last draft, for the statistics; None until it has drafted
        self._unverified_depth: int | None = None

    # Drafting --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def propose(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        max_depth: int | None = None,
        lengths: list[int] | None = None,
        counts: list[int] | None = None,
        found: Found | None = None,
    ) -> DraftTree:
        """Extends the cache with newly accepted rows and drafts from the last token.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, L]`): all accepted tokens. The last one is the root, whose feature
                the target has not computed yet.
            features (`torch.Tensor` of shape `[B, n, F]`): the target's features of the n tokens before the root that
                are new since the last call.
            max_depth (`int`, *optional*): the deepest draft.
            lengths (`list[int]`, *optional*): tokens of each row of `input_ids`, including padding; None: all L.
            counts (`list[int]`, *optional*): number of valid features of each row, which come first; None: n.
            found ([`Found`], *optional*): lookup nodes that the tree may contain as well.

        Returns:
            [`DraftTree`] on the device of `input_ids`. It contains only the root if `max_depth` is 0.
        """
        batch, longest = input_ids.shape
        lengths = [longest] * batch if lengths is None else lengths
        counts = [features.shape[1]] * batch if counts is None else counts
        if self.head.reads_text:
            self.head.read(input_ids[:, self._seen :])
            self._seen = min(lengths)
        features, counts = self._with_unread(features, counts)
        # a long prompt in pieces: the layer's activations for all of it at once would be the peak memory of the call
        while max(counts) > _PIECE and min(counts) == features.shape[1] and not any(self.padding):
            rest = features.shape[1] - _PIECE
            read = [length - rest for length in lengths]
            self._extend(input_ids, features[:, :_PIECE], read, [_PIECE] * batch)
            features, counts = features[:, _PIECE:], [rest] * batch
        hidden, feature = self._extend(input_ids, features, lengths, counts)
        depth = self.settings.max_levels if max_depth is None else min(self.settings.max_levels, max_depth)
        root = _roots(input_ids, lengths)
        if depth <= 0:
            return DraftTree.chain(root)
        # Row t contains token x_{t+1}, so the drafts of the root's children are at the root's index.
        places = [length - 1 - padding for length, padding in zip(lengths, self.padding, strict=True)]
        if len(set(places)) == 1:
            rotary = self._rotary.rows(places[0], depth)
        else:
            first = torch.tensor(places, device=self._device)[:, None]
            rotary = self._rotary.at(first + torch.arange(depth, device=self._device), max(places) + depth)
        rule = self.levels.rule_at(batch, longest)
        return self.levels.draft(root, hidden, feature, rotary, self.cache, self._filled, depth, rule, found)

    def pays(self, lengths: list[int]) -> bool:
        """Whether the next step of rows of such lengths drafts, given the time saved so far ([`Pace`])."""
        return self._pace.drafts(self.costs_at(lengths))

    def costs_at(self, lengths: list[int]) -> DraftCosts | None:
        """The costs of a step of rows of such lengths; None if sizes are fixed."""
        rule = self.levels.rule_at(len(lengths), max(lengths))
        return None if rule is None else rule.costs

    def put_off(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        lengths: list[int],
        counts: list[int] | None = None,
        found: Found | None = None,
    ) -> DraftTree:
        """Skips a draft. The next draft reads the new features in one pass.

        Args: as for [`propose`].

        Returns:
            [`DraftTree`] of the roots and the lookup nodes, as chains.
        """
        self._unread.append((features, [features.shape[1]] * len(lengths) if counts is None else counts))
        roots = _roots(input_ids, lengths)
        if found is None:
            return DraftTree.chain(roots)
        return DraftTree.chain(torch.cat([roots, found.tensors(roots.device)[0]], dim=1))

    def verified(self, tree: DraftTree, counts: list[int]) -> None:
        """Records how many tokens each row accepted from a tree, for [`pays`]."""
        if tree.promise is not None:
            self._pace.add(tree.promise, sum(counts) / len(counts) - 1)

    def _with_unread(self, features: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, list[int]]:
        """The postponed features followed by these, and the number that each row has."""
        if not self._unread:
            return features, counts
        blocks, self._unread = [*self._unread, (features, counts)], []
        joined = torch.cat([block for block, _ in blocks], dim=1)
        paths: list[list[int]] = [[] for _ in counts]
        start = 0
        for block, block_counts in blocks:
            for path, count in zip(paths, block_counts, strict=True):
                path.extend(range(start, start + count))
            start += block.shape[1]
        totals = [len(path) for path in paths]
        return (joined if min(totals) == start else nodes_of(joined, paths)), totals

    def keep_rows(self, order: list[int]) -> None:
        """Keeps these rows of the batch, in this order."""
        self.padding = [self.padding[row] for row in order]
        self._unread = [(features[order], [counts[row] for row in order]) for features, counts in self._unread]
        self.cache.keep_rows(order)
        if self._filled is not None:
            self._filled = self._filled[order]

    def resume(self, cache: Cache, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Resumes from the drafter's kept rows of the text in the target's cache, if this call is its next turn.

        Args:
            cache (`Cache`): the target's cache after the prefill of `input_ids` `[1, L]`.
            features (`torch.Tensor` of shape `[1, n, F]`): features of the tokens that were not in the cache.

        Returns:
            `torch.Tensor` of shape `[1, m, F]`: the features for [`propose`], including any that the drafter has not read.
        """
        known = input_ids.shape[1] - features.shape[1]
        if len(self.padding) > 1:
            return features
        read = take_rows(cache, self.drafter, input_ids, known, self.padding[0])
        if read is None:
            return features
        self.cache = read.rows
        return torch.cat([read.features, features], dim=1)

    def keep(self, cache: Cache, input_ids: torch.Tensor, features: torch.Tensor) -> None:
        """Keeps the drafter's rows with the target's cache. `features` `[1, n, F]` are those of its last tokens."""
        known = cache.get_seq_length()
        features, _ = self._with_unread(features, [features.shape[1]])
        # Not for a call whose ids lack the tokens already in the cache, nor for one that ended before a draft.
        if known == input_ids.shape[1] - 1 and self.cache.length:
            keep_rows(cache, self.drafter, ReadRows(input_ids[:, :known], self.padding[0], self.cache, features))

    def features_of(
        self, hidden_states: tuple[torch.Tensor, ...], paths: list[list[int]] | None = None
    ) -> torch.Tensor:
        """The target's features `[B, n, F]` on the drafter's device. With a device_map, layers have different devices.

        Args:
            hidden_states (`tuple` of `torch.Tensor` of shape `[B, N, H]`): one entry per layer, None for layers that are not
                read.
            paths (`list[list[int]]`, *optional*): the nodes to take from each row, at most n. The rest of shorter rows is
                arbitrary. None: all nodes.
        """
        states = list(hidden_states)
        for layer in set(self.adapter.feature_layers):
            if paths is not None:
                states[layer] = nodes_of(states[layer], paths)
            states[layer] = placed(states[layer], self._device)
        return self.adapter.features_of(tuple(states))

    def _extend(
        self, input_ids: torch.Tensor, features: torch.Tensor, lengths: list[int], counts: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new true rows. Returns the last row's head input and fed-back feature, both `[B, 1, H]`."""
        # index of the first new feature's token, and the number of leading features that are padding in all rows
        first = [length - 1 - count for length, count in zip(lengths, counts, strict=True)]
        cut = max(0, min(padding - start for padding, start in zip(self.padding, first, strict=True)))
        features = features[:, cut : max(counts)]
        first, counts = [start + cut for start in first], [count - cut for count in counts]
        width, slot = features.shape[1], self.cache.length
        places = [start - padding for start, padding in zip(first, self.padding, strict=True)]
        alike = len(set(places)) == len(set(counts)) == len(set(first)) == 1
        mask = valid = None
        if alike:
            tokens = input_ids[:, first[0] + 1 : first[0] + 1 + width]
            rotary = self._rotary.rows(places[0], width)
        else:
            steps = torch.arange(width, device=self._device)[None]
            rows = torch.tensor([first, places, counts], device=self._device)[..., None]  # [3, B, 1]
            index = (rows[0] + 1 + steps).to(input_ids.device).clamp(max=input_ids.shape[1] - 1)
            tokens = input_ids.gather(1, index)
            positions = rows[1] + steps
            valid = (positions >= 0) & (steps < rows[2])
            rotary = self._rotary.at(positions.clamp(min=0), max(places) + width)
        if valid is not None or self._filled is not None:
            everywhere = torch.ones(len(counts), max(slot, width), dtype=torch.bool, device=self._device)
            before = everywhere[:, :slot] if self._filled is None else self._filled
            self._filled = torch.cat([before, everywhere[:, :width] if valid is None else valid], dim=1)
            columns = torch.arange(slot + width, device=self._device)
            causal = columns <= columns[slot:, None]  # [n, slot + n]
            # a padding row sees itself, which avoids NaN
            itself = columns == columns[slot:, None]
            mask = (self._filled[:, None] & causal | itself)[:, None]
        projected = self.drafter.project_features(placed(features, self._device, self._dtype))
        embeddings = self.levels.embed(tokens)
        hidden, feature = self.drafter.draft(embeddings, projected, None, self.cache, slot, mask, rotary)
        self.cache.length += width
        if len(set(counts)) == 1:
            return hidden[:, -1:], feature[:, -1:]
        ends = [[count - 1] for count in counts]
        return nodes_of(hidden, ends), nodes_of(feature, ends)

    # Transformers' interface -----------------------------------------------------------------------------------

    def get_candidates(
        self,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Candidate sequence `[1, L + depth]` for the stock loop, without logits, because drafts are argmaxes.

        The first call returns `input_ids` unchanged, so that the target runs its prefill.
        """
        if is_first_iteration or model_outputs is None:
            return input_ids, None
        hidden_states = model_outputs.hidden_states
        # After the prefill, every row is new. Later, the first n_last_matches + 1 are new; the others were rejected.
        of_prefill = self._unverified_depth is None
        count = hidden_states[-1].shape[1] if of_prefill else int(n_last_matches) + 1
        features = self.features_of(tuple(state[:, :count] for state in hidden_states))
        tree = self.propose(input_ids, features, max_depth=self.max_length - input_ids.shape[1] - 1)
        self._unverified_depth = tree.num_nodes - 1
        return torch.cat([input_ids[:, :-1], tree.tokens.to(input_ids.device)], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Records how many tokens the stock loop's last verification accepted."""
        if self._unverified_depth is not None:
            self.stats.add_step(self._unverified_depth, int(num_matches))


def padding_of(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> list[int]:
    """Padding in each row of `input_ids` `[B, L]`. The mask may begin with cached tokens that are not passed again."""
    if attention_mask is None:
        return [0] * input_ids.shape[0]
    return (attention_mask[:, -input_ids.shape[1] :] == 0).sum(dim=1).tolist()


def _roots(input_ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The last token `[B, 1]` of each row of `input_ids` `[B, L]`."""
    if min(lengths) == input_ids.shape[1]:
        return input_ids[:, -1:]
    return input_ids.gather(1, torch.tensor(lengths, device=input_ids.device)[:, None] - 1)


def nodes_of(states: torch.Tensor, paths: list[list[int]]) -> torch.Tensor:
    """Selects each row's path from states `[B, N, H]`: `[B, n, H]` for the longest path. Shorter rows end arbitrarily."""
    batch, nodes, width = states.shape
    longest = max(len(path) for path in paths)
    index = [row * nodes + node for row, path in enumerate(paths) for node in [*path, *[0] * (longest - len(path))]]
    picked = states.flatten(0, 1).index_select(0, torch.tensor(index, device=states.device))
    return picked.view(batch, longest, width)


__all__ = ["CoralCandidateGenerator", "nodes_of", "padding_of"]
