"""Attaches a drafter to a target, so that every `target.generate(...)` drafts, whoever calls it."""

import copy
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..drafter.target_adapter import TargetAdapter
from .call_checks import check_ids
from .drafter_checks import check_coral_drafter, is_coral_drafter
from .settings import DraftSettings


logger = logging.get_logger(__name__)

# In the target's `__dict__`, not among its modules, so that it is never saved, moved or trained with the target.
_NAME = "_coral_attachment"
# Decoding and speculation methods that a caller selects with other settings.
_OTHER_WAYS = ("prompt_lookup_num_tokens", "use_mtp", "speculation_type", "assistant_early_exit", "dola_layers")
# The attachment whose `generate` call is running.
running: ContextVar["Attachment | None"] = ContextVar("coral_hf_attachment", default=None)


class Attachment:
    """The return value of [`attach`]: the drafter of a target, and a context manager that detaches it on exit.

    A `copy.deepcopy` of the target shares the drafter. An unpickled target has none.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`])
        settings (`dict`): `draft_*` settings of every call.
    """

    def __init__(self, target: PreTrainedModel, drafter: Any, settings: dict[str, Any]):
        self.target, self.drafter, self.settings = target, drafter, settings
        self._told: set[str] = set()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: Any) -> None:
        if attachment_of(self.target) is self:
            detach(self.target)

    def __deepcopy__(self, memo: dict) -> "Attachment":
        return Attachment(memo.get(id(self.target), self.target), self.drafter, dict(self.settings))

    def __reduce__(self) -> tuple:
        return type(None), ()

    def obstacle(self, given: dict[str, Any]) -> str | None:
        """Why a call with these arguments is not drafted; None if it is drafted, or if only its tensors can tell."""
        for name in ("assistant_model", "custom_generate"):
            if given.get(name) is not None:
                return f"the call has its own {name}"
        if given.get("synced_gpus"):
            return "synced_gpus=True keeps all processes in step"
        base = given.get("generation_config")
        config = copy.deepcopy(self.target.generation_config if base is None else base)
        config.update(**{name: value for name, value in given.items() if value is not None})
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"the call decodes by {mode.value}"
        own: GenerationConfig = self.target.generation_config
        for name in _OTHER_WAYS:
            if (value := getattr(config, name, None) or getattr(own, name, None)) not in (None, False):
                return f"{name}={value!r}"
        if given.get("use_cache", config.use_cache) is False:
            return "use_cache=False"
        if (implementation := config.cache_implementation) not in (None, "dynamic", "static"):
            return f"cache_implementation={implementation!r}"
        return None

    def tell(self, obstacle: str) -> None:
        """Logs why a call is not drafted, once for each reason."""
        if obstacle not in self._told:
            self._told.add(obstacle)
            logger.warning(f"Generating without the attached CORAL drafter: {obstacle}")


def attach(target: Any, drafter: Any, **draft_settings: Any) -> Attachment:
    """Attaches a drafter to a target. Every later `target.generate(...)` drafts with it.

    Use it for pipelines, trainers and evaluation harnesses, which call `generate` themselves and take no drafter. A call that
    cannot be drafted (beam search, another assistant, a quantised cache) runs as plain `generate` and logs the reason once.
    The drafter follows the target to another device.

    Args:
        target (`PreTrainedModel`): the model whose calls are drafted. For a PEFT or DDP wrapper, the inner model is used.
        drafter ([`CoralDraftModel`])
        **draft_settings: `draft_*` settings of [`DraftSettings`] for every call.

    Returns:
        [`Attachment`]: also a context manager, which detaches the drafter on exit.

    Raises:
        ValueError: if the drafter does not fit the target, a setting is unknown, or a drafter is attached already.

    Example:

        >>> with coral_hf.attach(target, drafter):  # doctest: +SKIP
        ...     pipeline("text-generation", model=target, tokenizer=tokenizer)("Hello")
    """
    inner = generating_model(target)
    check_coral_drafter(drafter, "attach")
    if attachment_of(inner) is not None:
        raise ValueError(f"{type(inner).__name__} has a drafter attached already: call coral_hf.detach(target) first.")
    DraftSettings.resolve(drafter.config, None, draft_settings)
    TargetAdapter(inner, drafter.config.target_feature_layers).check_drafter(drafter.config)
    attachment = Attachment(inner, drafter, draft_settings)
    inner.__dict__[_NAME] = attachment
    return attachment


def detach(target: Any) -> None:
    """Detaches the drafter from a target.

    Args:
        target (`PreTrainedModel`): as given to [`attach`].

    Raises:
        ValueError: if none is attached.
    """
    inner = generating_model(target)
    if attachment_of(inner) is None:
        raise ValueError(f"No drafter is attached to this {type(inner).__name__}: nothing to detach.")
    del inner.__dict__[_NAME]


def attachment_of(target: Any) -> Attachment | None:
    """The attachment of a model; None if there is none."""
    return target.__dict__.get(_NAME)


def generating_model(target: Any) -> PreTrainedModel:
    """The model whose `generate` runs when a wrapper's `generate` is called.

    Raises:
        ValueError: if `target` is not a model that generates.
    """
    inner = extract_model_from_parallel(target)
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    if not isinstance(inner, GenerationMixin):
        raise ValueError(
            f"target is a {type(target).__name__}, not a model that generates: pass the causal LM that "
            "AutoModelForCausalLM.from_pretrained returned."
        )
    return inner


def wrap_generate(original: Callable[..., Any], drafted: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `generate`. Only targets with an attached drafter behave differently.

    Args:
        original (`Callable`): Transformers' `generate`.
        drafted (`Callable`): `coral_generate`.
    """
    parameters = [name for name in inspect.signature(original).parameters if name not in ("self", "kwargs")]

    @functools.wraps(original)
    def generate(self, *args, **kwargs):
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        # before Transformers, which first looks at the last token of a batch; not if the caller did not pass a drafter
        drafts = is_coral_drafter(kwargs.get("assistant_model")) and running.get() is None
        if drafts and isinstance(ids, torch.Tensor) and ids.ndim == 2:
            check_ids(ids)
        attachment = attachment_of(self)
        if attachment is None or running.get() is attachment:
            return original(self, *args, **kwargs)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        if (obstacle := attachment.obstacle(given)) is not None:
            attachment.tell(obstacle)
            return original(self, *args, **kwargs)
        attachment.drafter.to(self.get_input_embeddings().weight.device)
        token = running.set(attachment)
        try:
            return drafted(self, attachment.drafter, **{**attachment.settings, **given})
        finally:
            running.reset(token)

    return generate


__all__ = ["Attachment", "attach", "attachment_of", "detach", "generating_model", "running", "wrap_generate"]
