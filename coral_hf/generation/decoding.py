"""The decode loop: prefill -> propose -> verify -> accept -> compact -> propose ..."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..drafter.modeling_coral import CoralDraftModel
from ..utils.compat import cache_kwarg
from .acceptance import accept_greedy, accept_walk
from .candidate_generator import CoralCandidateGenerator, padding_of
from .draft_tree import DraftTree
from .key_values.dynamic import compact_cache
from .settings import DraftSettings
from .target_forward import TargetForward
from .tree_size import DraftCosts


class _Selector:
    """Chooses tokens from the target's logits as plain `generate` does, and keeps what it returns about them."""

    def __init__(self, logits_processor: LogitsProcessorList, generation_config: GenerationConfig):
        self.processors = logits_processor
        self.do_sample = generation_config.do_sample
        wanted = generation_config.return_dict_in_generate
        self.scores: list | None = [] if wanted and generation_config.output_scores else None
        self.logits: list | None = [] if wanted and generation_config.output_logits else None

    @property
    def is_argmax(self) -> bool:
        """Nothing but the argmax is asked for, so that a whole tree is decided at once."""
        return not self.do_sample and not self.processors and self.scores is None and self.logits is None

    def choose(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The next token `[1]` after `input_ids` `[1, L]`, from logits `[1, V]`."""
        raw = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = self.processors(input_ids, raw)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(raw)
        if self.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)


def coral_decoding(
    target: PreTrainedModel,
    drafter: CoralDraftModel,
    settings: DraftSettings,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    costs: DraftCosts | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """Generates with draft trees; the same tokens as plain `generate`, greedy or sampled (same seed, in fp32).

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        input_ids (`torch.LongTensor` of shape `[1, L]`)
        logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: as `generate` prepares them.
        costs ([`DraftCosts`], *optional*): for `draft_cost_aware`.

    Returns:
        As `generate`: ids `[1, L + new]`, or a `GenerateDecoderOnlyOutput` with `return_dict_in_generate`.

    Raises:
        ValueError: if drafter and target, or settings and drafter do not belong together; what else is not supported
            [`call_checks.check_call`] has refused.
    """
    selector = _Selector(logits_processor, generation_config)
    max_length = generation_config.max_length
    padding = padding_of(model_kwargs.get("attention_mask"), input_ids)
    generator = CoralCandidateGenerator(drafter, target, settings, max_length, padding, costs)
    keep_states = bool(generation_config.return_dict_in_generate and generation_config.output_hidden_states)
    verifier = TargetForward(target, model_kwargs, keep_states or generator.adapter.output_hidden_states)
    states: list | None = [] if keep_states else None
    # Nothing refuses from here on: a call that was refused leaves the last one's statistics.
    drafter.last_stats = None

    def is_finished(ids: torch.Tensor) -> bool:
        scores = None if selector.scores is None else tuple(selector.scores)
        return bool(stopping_criteria(ids, scores).all())

    # Other criteria may count their calls, or show the text: they never see tokens behind the end.
    at_once = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria)

    def first_end(ids: torch.Tensor, known: int) -> int | None:
        """The least number of tokens, more than `known`, with which generation ends; None if with none."""
        lengths = range(known + 1, ids.shape[1] + 1)
        if at_once:  # asked on the device for every length, answered once
            ends = torch.stack([stopping_criteria(ids[:, :length], None).all() for length in lengths]).tolist()
            return next((length for length, end in zip(lengths, ends, strict=True) if end), None)
        return next((length for length in lengths if is_finished(ids[:, :length])), None)

    with verifier.recording():
        outputs, features = verifier.prefill(input_ids, generation_config, generator.features_of)
        if states is not None:
            states.append(outputs.hidden_states)
        features = generator.resume(verifier.cache, input_ids, features)
        token = selector.choose(input_ids, outputs.logits[:, -1])
        del outputs  # the states of a prompt
        input_ids = torch.cat([input_ids, token[:, None]], dim=1)
        drafter.last_stats = generator.stats  # from here on, so that a streamer can show it
        if streamer is not None:
            streamer.put(token.cpu())
        finished = is_finished(input_ids)
        while not finished:
            depth, most = max_length - input_ids.shape[1] - 1, verifier.most_depth()
            tree = generator.propose(input_ids, features, max_depth=depth if most is None else min(depth, most))
            outputs = verifier.verify(tree, input_ids)
            path, tokens, finished = _accept(tree, outputs.logits, input_ids, selector, is_finished, first_end)
            compact_cache(verifier.cache, path, tree.num_nodes)
            features = generator.features_of(outputs.hidden_states, path)
            if states is not None:
                accepted = [state.index_select(1, path[0].to(state.device)) for state in outputs.hidden_states]
                states.extend(tuple(state[:, i : i + 1] for state in accepted) for i in range(path.shape[1]))
            input_ids = torch.cat([input_ids, tokens], dim=1)
            if streamer is not None:
                for column in tokens.cpu().unbind(dim=1):
                    streamer.put(column)
            generator.stats.add_step(tree.depth, tokens.shape[1] - 1)
    generator.keep(verifier.cache, input_ids, features)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=None if selector.scores is None else tuple(selector.scores),
        logits=None if selector.logits is None else tuple(selector.logits),
        hidden_states=None if states is None else tuple(states),
        **cache_kwarg(verifier.cache),
    )


def _accept(
    tree: DraftTree,
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    selector: _Selector,
    is_finished: Callable[[torch.Tensor], bool],
    first_end: Callable[[torch.Tensor, int], int | None],
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Accepted path `[1, A + 1]` (on the CPU), new tokens `[1, A + 1]` and whether generation ends with them."""
    if selector.is_argmax:
        # as generate does it, and so that ties fall alike; on a CPU five times as fast as the argmax of bfloat16 values
        choices = logits.float().argmax(dim=-1)
        path, tokens = accept_greedy(tree, choices.to(tree.tokens.device))
        before = input_ids.shape[1]
        end = first_end(torch.cat([input_ids, tokens], dim=1), before)
        count = tokens.shape[1] if end is None else end - before
        return path[:, :count], tokens[:, :count], end is not None

    grown, finished = input_ids, False

    def choose(node: int, _: int) -> torch.Tensor:
        return selector.choose(grown, logits[:, node])

    def stop(token: torch.Tensor) -> bool:
        nonlocal grown, finished
        grown = torch.cat([grown, token[:, None]], dim=1)
        finished = is_finished(grown)
        return finished

    path, tokens = accept_walk(tree, choose, stop)
    return path, tokens, finished


__all__ = ["coral_decoding"]
