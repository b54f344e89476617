"""The decode loop: prefill -> propose -> verify -> accept -> compact -> propose ..."""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..drafter.modeling_coral import CoralDraftModel
from ..utils.compat import cache_kwarg, cache_of
from .candidate_generator import padding_of
from .compiled.graphed_generator import generator_of
from .compiled.plan import GraphPlan
from .costs.pace import AnyCosts
from .draft_tree import DraftTree
from .key_values.paths import store_obstacle
from .lookup.lookup_nodes import LookupNodes
from .settings import DraftSettings
from .target_forward import TargetForward
from .tokens.text_rows import KeptStates, TextRows
from .tokens.token_choice import TokenChoice


def coral_decoding(
    target: PreTrainedModel,
    drafter: CoralDraftModel,
    settings: DraftSettings,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    costs: AnyCosts | None = None,
    plan: GraphPlan | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """Generates with draft trees. Returns the same tokens as plain `generate`, greedy or sampled (same seed, in fp32).

    Rows of a batch advance at their own pace, each with its own trees, and leave when they end. Sampled tokens of a batch then
    use different random numbers from plain decoding, which draws for all rows at once. Their distribution is the same.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        input_ids (`torch.LongTensor` of shape `[B, L]`)
        logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: as prepared by `generate`.
        costs ([`DraftCosts`] or [`MeasuredCosts`], *optional*): for `draft_cost_aware`. Steps are plain if no draft saves time.
        plan ([`GraphPlan`], *optional*): how the call is compiled; None: it is not compiled.

    Returns:
        The same as `generate`: ids `[B, L + new]`, or a `GenerateDecoderOnlyOutput` with `return_dict_in_generate`.

    Raises:
        ValueError: if drafter and target, or settings and drafter, do not belong together. [`call_checks.check_call`]
            rejects other unsupported calls beforehand.
    """
    cache, mask = cache_of(model_kwargs), model_kwargs.get("attention_mask")
    max_length = generation_config.max_length
    padding = padding_of(mask, input_ids)
    wanted = generation_config.return_dict_in_generate
    in_store = store_obstacle(target, cache, mask, max_length, returned=bool(wanted)) is None
    pad_token = getattr(generation_config, "_pad_token_tensor", None)
    rows = TextRows(input_ids, padding, 0 if pad_token is None else int(pad_token))
    choice = TokenChoice(logits_processor, stopping_criteria, generation_config, rows, streamer)
    generator = generator_of(plan)(drafter, target, settings, max_length, padding, costs)
    keep_states = bool(wanted and generation_config.output_hidden_states)
    verifier = TargetForward(target, model_kwargs, keep_states or generator.adapter.output_hidden_states)
    states = KeptStates(rows) if keep_states else None
    lookup = None
    if settings.draft_lookup:
        prompts = [ids[count:] for ids, count in zip(input_ids.tolist(), padding, strict=True)]
        lookup = LookupNodes(prompts, settings.draft_total_tokens - 1)
    # No check fails from here on. A rejected call leaves the statistics of the call before.
    drafter.last_stats = None

    with verifier.recording():
        outputs, features = verifier.prefill(input_ids, generation_config, generator.features_of)
        features = generator.resume(verifier.cache, input_ids, features)
        if in_store:
            verifier.enter_store(padding, plan)
        if states is not None:
            states.add_prompt(outputs.hidden_states)
        drafter.last_stats = generator.stats  # from here on, so that a streamer can show it
        root = DraftTree.chain(input_ids[:, -1:])
        _, ended = choice.accept(root, outputs.logits[:, -1:])
        if lookup is not None:
            lookup.extend(rows.take_new())
        del outputs  # the states of a prompt
        counts: list[int] | None = None
        while True:
            order = rows.leave(ended)
            if not order:
                break
            if len(order) < len(ended):
                verifier.keep_rows(order)
                if lookup is not None:
                    lookup.keep_rows(order)
                generator.keep_rows(order)
                features = features[order]
                counts = None if counts is None else [counts[index] for index in order]
            lengths = rows.live_lengths
            depths = [max_length - length - 1 for length in lengths]
            most = verifier.most_depth()
            deepest = max(depths) if most is None else min(max(depths), most)
            plain = not generator.pays(lengths)
            found = None if lookup is None else lookup.find(deepest, generator.costs_at(lengths), not plain)
            alone = found is not None and found.alone
            if alone or plain:
                tree = generator.put_off(rows.live_ids(), features, lengths, counts, found if alone else None)
            else:
                tree = generator.propose(rows.live_ids(), features, deepest, lengths, counts, found)
            outputs = verifier.verify(tree, rows.ids(), None if min(depths) >= tree.num_nodes - 1 else max_length)
            live = list(rows.live)
            paths, ended = choice.accept(tree, outputs.logits)
            verifier.keep(paths, tree.num_nodes)
            features = generator.features_of(outputs.hidden_states, None if tree.num_nodes == 1 else paths)
            counts = [len(path) for path in paths]
            generator.verified(tree, counts)
            if lookup is not None:
                lookup.extend(rows.take_new())
                if not (alone or plain):
                    lookup.drafted(counts, 0.0 if tree.promise is None else tree.promise.step_ms)
            if states is not None:
                states.add(live, lengths, outputs.hidden_states, paths)
            for row, depth, room, count in zip(live, tree.row_depths(), depths, counts, strict=True):
                generator.stats.add_step(min(depth, room), count - 1, row, plain and not alone, alone)
        if len(padding) == 1 and wanted:
            verifier.leave_store()
    sequences = rows.ids().clone()
    if len(padding) == 1 and not (in_store and not wanted):
        generator.keep(verifier.cache, sequences, features)
    if streamer is not None:
        streamer.end()
    if not wanted:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=None if choice.scores is None else tuple(choice.scores),
        logits=None if choice.logits is None else tuple(choice.logits),
        hidden_states=None if states is None else states.returned(),
        # The rows of a batch have left one by one, so no cache remains to continue with.
        **cache_kwarg(verifier.cache if len(padding) == 1 else None),
    )


__all__ = ["coral_decoding"]
