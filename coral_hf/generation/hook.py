"""The hook into `generate`, and `coral_generate`."""

import copy
import functools
import inspect
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

from ..drafter.configuration_coral import check_vocabulary
from ..drafter.few_rows import few_row_linears
from ..drafter.output_hooks import copied_without_hooks
from ..drafter.target_adapter import TargetAdapter
from ..utils.compat import CACHE_NAME, cache_kwarg, cache_of, default_generation_settings
from .attachment import running, wrap_generate
from .call_checks import check_call
from .candidate_generator import CoralCandidateGenerator, padding_of
from .compiled.plan import graph_plan
from .costs.tables import draft_costs
from .decoding import coral_decoding
from .drafter_checks import check_coral_drafter, check_loaded, check_whole, is_coral_drafter
from .settings import DraftSettings


# Parameters that the wrapped methods must accept. Another signature means an unknown Transformers release.
_DECODING_PARAMETERS = {
    "self",
    "input_ids",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "streamer",
    "assistant_model",
    "model_kwargs",
}
_GENERATOR_PARAMETERS = {"self", "generation_config", "input_ids", "model_kwargs", "assistant_model"}
_SAMPLE_PARAMETERS = _DECODING_PARAMETERS - {"assistant_model"}
_VALIDATION_PARAMETERS = {"self", "generation_mode", "generation_config", "generation_mode_kwargs"}
# Arguments that Transformers only passes to assisted decoding.
_ASSISTED_ALONE = ("inputs_tensor", "assistant_tokenizer", "tokenizer", "assistant_model")
# Settings of other speculation and decoding methods that have no effect with a CORAL drafter, and their remedies.
_SIZES = "set draft_depth, draft_top_k and draft_total_tokens instead"
_OTHER_DRAFTS = "drop it, or generate without a CORAL drafter"
_WITHOUT_EFFECT = {
    "num_assistant_tokens": _SIZES,
    "num_assistant_tokens_schedule": "set draft_cost_aware=True instead",
    "assistant_confidence_threshold": "set draft_cost_aware=True instead",
    "assistant_lookbehind": _OTHER_DRAFTS,
    "target_lookbehind": _OTHER_DRAFTS,
    "assistant_ensemble_weight": _OTHER_DRAFTS,
    "assistant_early_exit": _OTHER_DRAFTS,
    "prompt_lookup_num_tokens": _OTHER_DRAFTS,
    "max_matching_ngram_size": _OTHER_DRAFTS,
    "use_mtp": _OTHER_DRAFTS,
    "speculation_type": _OTHER_DRAFTS,
    "dola_layers": _OTHER_DRAFTS,
}
# Tokenizers passed to calls (weak references), with their sizes and the drafters' hashes that matched.
_known_vocabularies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_MARK = "_coral_hf_original"
_problem: str | None = None


def _check_settings_of_others(generation_config: GenerationConfig) -> None:
    """Raises `ValueError` for settings that Transformers uses with other assistants but that have no effect here."""
    filled_in = default_generation_settings()
    for name, remedy in _WITHOUT_EFFECT.items():
        value = getattr(generation_config, name, None)
        if value not in (None, False, filled_in.get(name)):
            raise ValueError(
                f"{name}={value!r} has no effect with a CORAL drafter: {remedy}. (Where no call sets it, it is in "
                f"the target's own settings: target.generation_config.{name} = None.)"
            )


def _check_tokenizer(drafter: Any, tokenizer: Any) -> None:
    """Runs [`check_vocabulary`] once per pair, because hashing a vocabulary takes as long as several steps."""
    known = _known_vocabularies.setdefault(tokenizer, set())
    pair = len(tokenizer), drafter.config.target_vocab_hash
    if pair not in known:
        check_vocabulary(drafter.config, tokenizer)
        known.add(pair)


def install() -> None:
    """Makes `generate(assistant_model=drafter)` use CORAL for CORAL drafters. Idempotent.

    Wraps `GenerationMixin._assisted_decoding`, `_get_candidate_generator` (for the stock loop),
    `_validate_generation_mode` (beam search would silently ignore the drafter) and `generate` (for attached drafters). Every
    other assistant reaches the original methods with unchanged arguments. If Transformers' signatures are unknown, nothing is
    wrapped, and `coral_generate` raises.
    """
    global _problem
    if hasattr(GenerationMixin._assisted_decoding, _MARK):
        return
    for name, needed in (
        ("_assisted_decoding", _DECODING_PARAMETERS),
        ("_get_candidate_generator", _GENERATOR_PARAMETERS),
        ("_validate_generation_mode", _VALIDATION_PARAMETERS),
        ("_sample", _SAMPLE_PARAMETERS),
        ("generate", {"self", "generation_config", "assistant_model", "kwargs"}),
    ):
        method = getattr(GenerationMixin, name, None)
        missing = needed - set(inspect.signature(method).parameters) if method is not None else needed
        if missing:
            _problem = f"GenerationMixin.{name} of this Transformers release lacks {sorted(missing)}"
            return
    GenerationMixin._assisted_decoding = _wrap_decoding(GenerationMixin._assisted_decoding)
    GenerationMixin._validate_generation_mode = _wrap_validation(GenerationMixin._validate_generation_mode)
    GenerationMixin._get_candidate_generator = _wrap_candidate_generator(GenerationMixin._get_candidate_generator)
    GenerationMixin.generate = wrap_generate(GenerationMixin.generate, coral_generate)
    setattr(GenerationMixin.generate, _MARK, GenerationMixin.generate.__wrapped__)


def _wrap_decoding(original):
    # functools.wraps keeps the signature that `generate` inspects
    @functools.wraps(original)
    def _assisted_decoding(self, input_ids, *args, **kwargs):
        drafter: Any = kwargs.get("assistant_model")
        if not is_coral_drafter(drafter):
            return original(self, input_ids, *args, **kwargs)
        settings = DraftSettings.resolve(drafter.config, kwargs["generation_config"])
        given = cache_kwarg(cache_of(kwargs))
        try:
            plan = graph_plan(self, settings, input_ids, kwargs["generation_config"], kwargs)
            check_call(self, settings, input_ids, kwargs["generation_config"], kwargs)
        except ValueError as error:
            if (attachment := running.get()) is None or attachment.drafter is not drafter:
                raise
            # The caller did not pass a drafter. Nothing has run yet, and a streamer has received the prompt.
            attachment.tell(str(error))
            kwargs.update(given)  # a static cache may have been replaced
            for name in _ASSISTED_ALONE:
                kwargs.pop(name, None)
            return self._sample(input_ids, *args, **kwargs)
        if kwargs.get("synced_gpus"):
            raise ValueError(
                "synced_gpus=True: CORAL's ranks take different numbers of steps and would wait for each other. Gather "
                "the weights first (e.g. FSDP's summon_full_params) and pass synced_gpus=False."
            )
        if settings.draft_stock_loop and kwargs["generation_config"].stop_strings is not None:
            raise ValueError(
                "draft_stock_loop=True looks for stop_strings only at the end of a block of accepted tokens and may "
                "miss one. Leave draft_stock_loop=False, or drop stop_strings."
            )
        if settings.draft_stock_loop and cache_of(kwargs).get_seq_length() > 0:
            raise ValueError(
                f"draft_stock_loop=True reads the whole prompt again after a prefilled cache ({CACHE_NAME}=...). Leave "
                "draft_stock_loop=False, or drop the cache."
            )
        if settings.draft_stock_loop and getattr(self, "_is_stateful", False):
            raise ValueError(
                f"draft_stock_loop=True crops rejected drafts from the cache, and the recurrent layers of {type(self).__name__} "
                "keep a state that cannot be cropped. Leave draft_stock_loop=False."
            )
        if settings.draft_stock_loop:
            with few_row_linears(self, drafter), copied_without_hooks(self):
                return original(self, input_ids, *args, **kwargs)
        for name in ("synced_gpus", *_ASSISTED_ALONE):
            kwargs.pop(name, None)
        if settings.draft_cost_aware:
            kwargs["costs"] = draft_costs(self, drafter, settings)
            kwargs["costs"].at(*input_ids.shape)  # measured before the call's own keys and values exist
        # Hugging Face's generate runs under no_grad already.
        with few_row_linears(self, drafter), copied_without_hooks(self), plan or nullcontext():
            return coral_decoding(self, drafter, settings, input_ids, *args, **{**kwargs, "plan": plan})

    setattr(_assisted_decoding, _MARK, original)
    return _assisted_decoding


def _wrap_validation(original):
    @functools.wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        drafter = generation_mode_kwargs.get("assistant_model")
        check_loaded(drafter)
        if is_coral_drafter(drafter):
            if running.get() is None:  # a caller who does not pass a drafter may set options that it ignores
                _check_settings_of_others(generation_config)
            check_whole(drafter)
            if generation_mode != GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"CORAL drafts for greedy decoding and sampling, not for {generation_mode.value} "
                    f"(num_beams={generation_config.num_beams}). Set num_beams=1, or drop assistant_model."
                )
            # Transformers would ask for two tokenizers where the vocabularies differ.
            TargetAdapter(self).check_drafter(drafter.config)
            if (tokenizer := generation_mode_kwargs.get("tokenizer")) is not None:  # given for stop strings
                _check_tokenizer(drafter, tokenizer)
            # There is one vocabulary. `pipeline` asks for a second tokenizer where special ids differ, and Transformers
            # then refuses it.
            generation_mode_kwargs.pop("assistant_tokenizer", None)
            # Transformers' own assistants take no batches. `generate` repeats the prompts later in any mode.
            generation_config = copy.copy(generation_config)
            generation_config.num_return_sequences = 1
            # Nor do they take recurrent layers. The other checks do not depend on the mode.
            sampled = generation_config.do_sample
            generation_mode = GenerationMode.SAMPLE if sampled else GenerationMode.GREEDY_SEARCH
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    setattr(_validate_generation_mode, _MARK, original)
    return _validate_generation_mode


def _wrap_candidate_generator(original):
    @functools.wraps(original)
    def _get_candidate_generator(self, generation_config, input_ids, *args, **kwargs):
        drafter: Any = kwargs.get("assistant_model")
        if not is_coral_drafter(drafter):
            return original(self, generation_config, input_ids, *args, **kwargs)
        settings = DraftSettings.resolve(drafter.config, generation_config)
        padding = padding_of(kwargs.get("model_kwargs", {}).get("attention_mask"), input_ids)
        costs = draft_costs(self, drafter, settings) if settings.draft_cost_aware else None
        generator = CoralCandidateGenerator(drafter, self, settings, generation_config.max_length, padding, costs)
        drafter.last_stats = generator.stats
        return generator

    setattr(_get_candidate_generator, _MARK, original)
    return _get_candidate_generator


def coral_generate(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    *,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> Any:
    """`target.generate(assistant_model=drafter)` with draft settings as arguments.

    Args:
        target (`PreTrainedModel`): the model that generates.
        drafter ([`CoralDraftModel`])
        generation_config ([`GenerationConfig`], *optional*)
        **kwargs: any argument of `generate`, and any `draft_*` setting of [`DraftSettings`].

    Returns:
        The same as `generate`.

    Raises:
        ValueError: if `drafter` is not a CORAL drafter, sizes contradict each other, or the call is not supported.
        RuntimeError: if this Transformers release is not one the hook knows.
    """
    if _problem is not None:
        raise RuntimeError(f"{_problem}: CORAL cannot generate with it. Install transformers>=5.17,<6.")
    if isinstance(drafter, torch.Tensor):
        raise ValueError(
            f"coral_generate was given a tensor of shape {tuple(drafter.shape)} as its drafter: call "
            "coral_generate(target, drafter, input_ids=...)."
        )
    check_coral_drafter(drafter, "coral_generate")
    # A copy, so that the caller's config and the target's defaults stay unchanged.
    generation_config = copy.deepcopy(target.generation_config if generation_config is None else generation_config)
    for key in [key for key in kwargs if key.startswith("draft_")]:
        setattr(generation_config, key, kwargs.pop(key))
    # Passing a config and generation arguments together is deprecated, so the arguments are set in the config. Those that are
    # None (eos_token_id=None) are not: `generate` would treat them as unset and use the target's defaults.
    nones = {key: value for key, value in kwargs.items() if value is None}
    kwargs = nones | generation_config.update(**{key: value for key, value in kwargs.items() if value is not None})
    return target.generate(assistant_model=drafter, generation_config=generation_config, **kwargs)


__all__ = ["coral_generate", "install", "is_coral_drafter"]
