"""The methods to compare: plain `generate`, a drafter with its settings, or methods of Transformers."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..data.chat import template_kwargs_of
from ..drafter.configuration_coral import check_vocabulary
from ..drafter.hub_names import public_name
from ..drafter.target_adapter import TargetAdapter
from ..generation.drafter_checks import is_coral_drafter
from ..generation.settings import DraftSettings
from ..utils.compat import dflash_obstacle, mtp_obstacle, release_obstacle
from ..utils.hardware import synchronized_clock
from .compiling import COMPILED_SETTINGS, compile_settings, timed_apart


PLAIN = "plain"
PLAIN_COMPILED = "plain_compiled"
# in lower precision, near-ties may differ when several tokens are verified at once
EXACT_DTYPES = ("float32", "float64")
# methods that need no settings, by name
PRESETS: dict[str, dict[str, Any]] = {
    "coral": {},
    "chain": {"draft_top_k": 1},
    "eagle2": {"draft_depth": 6, "draft_top_k": 10, "draft_total_tokens": 60},
    "prompt_lookup": {"prompt_lookup_num_tokens": 10},
    "assistant": {},
    "mtp": {"use_mtp": True},
    "dflash": {"speculation_type": "dflash"},
    PLAIN_COMPILED: COMPILED_SETTINGS,
}
_COUNT = ("an integer of at least 1", lambda value: type(value) is int and value >= 1)
_SCHEDULES = ("constant", "heuristic", "heuristic_transient")
# Transformers' own settings, each with a description and a check, because Transformers rejects wrong values late
LOOKUP_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt_lookup_num_tokens": _COUNT,
    "max_matching_ngram_size": _COUNT,
}
ASSISTANT_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_assistant_tokens": _COUNT,
    "num_assistant_tokens_schedule": (f"one of {', '.join(_SCHEDULES)}", lambda value: value in _SCHEDULES),
    "assistant_confidence_threshold": (
        "a number from 0 to 1",
        lambda value: type(value) in (int, float) and 0 <= value <= 1,
    ),
}


@dataclass
class Measurement:
    """One answer: its new ids, its time and, for a drafter, its acceptance."""

    new_ids: list[int]
    seconds: float
    stats: Any = None  # DraftStats of a CORAL drafter's answer
    prompt: int = 0  # index of its conversation in the run
    compile_seconds: float = 0.0  # time of compiling, not included in its seconds
    served: tuple[int, int] | None = None  # see `count_as_server`

    @property
    def tokens_per_second(self) -> float:
        return len(self.new_ids) / self.seconds


@dataclass
class Method:
    """One way to generate: plain decoding, or a drafter with its settings.

    Args:
        name (`str`): name in the record; "plain" is reserved.
        drafter ([`CoralDraftModel`] or `PreTrainedModel`, *optional*): a drafter, or an ordinary assistant model; None
            for plain decoding and prompt lookup.
        settings (`dict`): [`DraftSettings`] to override, or other fields of a generation config
            (`prompt_lookup_num_tokens` without a drafter is prompt lookup).
    """

    name: str
    drafter: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, drafter: Any, assistant: Any = None) -> "Method":
        """`'tree:draft_top_k=4,draft_total_tokens=16'` -> [`Method`]; a name of `PRESETS` needs no settings.

        Raises:
            ValueError: if it does not parse, is unknown, needs a missing model, or has wrong settings for Transformers' own
                drafting methods.
        """
        name, settings = _split(text)
        if not name or name == PLAIN:
            raise ValueError(f"--method {text!r}: give it a name other than 'plain', which is always measured.")
        if not settings and name not in PRESETS:
            raise ValueError(
                f"--method {text!r} is unknown; choose {', '.join(PRESETS)}, or give its settings as "
                "NAME:setting=value,setting=value."
            )
        settings = {**PRESETS.get(name, {}), **settings}
        known: Iterable[str]
        if name == "prompt_lookup" or "prompt_lookup_num_tokens" in settings:
            model, known = None, LOOKUP_SETTINGS
        elif name == "assistant" or set(settings) & set(ASSISTANT_SETTINGS):
            model, known = assistant, ASSISTANT_SETTINGS
            if assistant is None:
                raise ValueError(f"--method {text!r} needs an ordinary small model: name it with --assistant MODEL.")
        elif name in ("mtp", "dflash"):
            model, known = assistant if name == "dflash" else None, PRESETS[name]
            if settings != PRESETS[name]:
                raise ValueError(f"--method {text!r}: {name} takes no settings.")
            if (missing := release_obstacle(*PRESETS[name])) is not None:
                raise ValueError(f"--method {text!r}: {missing}.")
            if name == "dflash" and assistant is None:
                raise ValueError(f"--method {text!r} needs a DFlash drafter: name it with --assistant MODEL.")
        elif name == PLAIN_COMPILED:
            model, known = None, COMPILED_SETTINGS
        else:
            model, known = drafter, DraftSettings.__dataclass_fields__
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"--method {text!r}: {unknown} are not settings of it; those are {', '.join(known)}.")
        for key, (wanted, fits) in {**LOOKUP_SETTINGS, **ASSISTANT_SETTINGS}.items():
            if key in settings and not fits(settings[key]):
                raise ValueError(f"--method {text!r}: {key}={settings[key]!r} must be {wanted}.")
        return cls(name, model, settings)

    @property
    def is_coral(self) -> bool:
        """Whether it drafts with a CORAL drafter. A record then contains its settings and acceptance."""
        return is_coral_drafter(self.drafter)

    @property
    def is_plain(self) -> bool:
        """Whether it is plain `generate`, compiled or not."""
        return self.name in (PLAIN, PLAIN_COMPILED)

    @property
    def samples_like_plain(self) -> bool:
        """Whether it draws the same tokens as plain `generate` with the same seed.

        Transformers' own assisted loop draws for all candidates at once. Its samples have the same distribution as plain
        `generate`'s, but differ from them.
        """
        return self.is_plain or (self.is_coral and not self.settings.get("draft_stock_loop"))


def parse_methods(texts: Sequence[str], drafters: dict[str, Any], assistant: Any = None) -> list[Method]:
    """Every method with every drafter; several drafters' methods are named `DRAFTER/NAME`.

    Args:
        texts (`list[str]`): see [`Method.parse`].
        drafters (`dict[str, CoralDraftModel]`): drafters by the given names.
        assistant (`PreTrainedModel`, *optional*): an ordinary small model.
    """
    # the shortest last part of the path that distinguishes them
    parts = {name: Path(name).parts for name in drafters}
    for length in range(1, max(map(len, parts.values())) + 1):
        labels = {name: "/".join(path[-length:]) for name, path in parts.items()}
        if len(set(labels.values())) == len(labels):
            break
    methods: dict[str, Method] = {}
    for text in texts:
        for name, drafter in drafters.items():
            method = Method.parse(text, drafter, assistant)
            if len(drafters) > 1 and method.is_coral:
                method.name = f"{labels[name]}/{method.name}"
            elif name != next(iter(drafters)):
                continue  # it needs no drafter, so once is enough
            if method.name in methods:
                raise ValueError(f"Two methods are named {method.name!r}: give each a name of its own.")
            methods[method.name] = method
    return list(methods.values())


def _split(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--method {text!r}: write NAME:setting=value,setting=value.")
        try:
            settings[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key.strip()] = value.strip()
    return name, settings


def measure(
    target: Any,
    ids: torch.Tensor,
    max_new_tokens: int,
    drafter: Any = None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    **settings: Any,
) -> Measurement:
    """Times one `generate` call on ids `[1, L]`, with a drafter if one is given. A temperature of 0 is greedy.

    If something is compiled for the call, it is repeated, and the time of compiling is recorded separately.

    Args:
        target (`PreTrainedModel`), ids (`torch.LongTensor` of shape `[1, L]`), max_new_tokens (`int`)
        drafter ([`CoralDraftModel`] or `PreTrainedModel`, *optional*)
        temperature (`float`): above 0, samples from the whole distribution with the seed.
        seed (`int`): seed of the samples.
        **settings: fields of the generation config.
    """

    def answer() -> tuple[torch.Tensor, float]:
        if temperature > 0:
            torch.manual_seed(seed)
        return timed(target, ids, torch.ones_like(ids), max_new_tokens, drafter, temperature, settings)

    output, seconds, compiling = timed_apart(answer)
    new = output[0, ids.shape[1] :].tolist()
    return Measurement(new, seconds, getattr(drafter, "last_stats", None), compile_seconds=compiling)


def timed(
    target: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    max_new_tokens: int,
    drafter: Any,
    temperature: float,
    settings: dict[str, Any],
) -> tuple[torch.Tensor, float]:
    """The output of `generate` for ids and mask `[B, L]`, and its seconds. Other arguments are those of [`measure`]."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=temperature > 0)
    if temperature > 0:  # 0 and 1 disable top-k and top-p of the target's own config
        config.temperature, config.top_k, config.top_p = temperature, 0, 1.0
    config.eos_token_id = target.generation_config.eos_token_id
    config.pad_token_id = target.generation_config.pad_token_id
    for name in settings.keys() - set(ASSISTANT_SETTINGS):
        setattr(config, name, settings[name])
    vars(config).update(compile_settings(settings, target.device.type))
    ids, mask = ids.to(target.device), mask.to(target.device)
    extra = {} if drafter is None else {"assistant_model": drafter}
    with _assistant_settings(drafter, settings):
        start = synchronized_clock([target.device])
        output = target.generate(ids, attention_mask=mask, generation_config=config, **extra)
        return output, synchronized_clock([target.device]) - start


@contextmanager
def _assistant_settings(assistant: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Sets an assistant's settings in its own generation config temporarily, because others share it."""
    own = getattr(assistant, "generation_config", None)  # drafters that do not generate have none
    if own is None:
        yield
        return
    assistant.generation_config = copy.deepcopy(own)
    for name in settings.keys() & set(ASSISTANT_SETTINGS):
        setattr(assistant.generation_config, name, settings[name])
    try:
        yield
    finally:
        assistant.generation_config = own


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Index of the first different token, or the length of the shorter list if the other begins with it; None if equal."""
    if one == other:
        return None
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(map(len, (one, other)))
    )


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Raises `ValueError` for an invalid temperature."""
    for temperature in temperatures:
        if not math.isfinite(temperature) or temperature < 0:
            raise ValueError(f"temperature={temperature} must be a finite number of at least 0 (0 is greedy).")


def check_drafter(target: Any, tokenizer: Any, method: Method) -> None:
    """Raises `ValueError` for a drafter or an assistant of another target, and for settings that it cannot draft with."""
    if method.is_coral:
        config = method.drafter.config
        adapter = TargetAdapter(target)
        adapter.check_drafter(config)
        check_vocabulary(config, tokenizer)
        DraftSettings.resolve(config, None, method.settings).draft_head_of(method.drafter, adapter)
    elif method.name == "mtp":
        if (missing := mtp_obstacle(target)) is not None:
            raise ValueError(f"--method mtp: {missing}.")
    elif method.name == "dflash":
        if (missing := dflash_obstacle(target, method.drafter)) is not None:
            raise ValueError(f"--method dflash: {missing}.")
    elif method.drafter is not None:
        sizes = [model.config.get_text_config().vocab_size for model in (method.drafter, target)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The assistant has a vocabulary of {sizes[0]}, but the target has one of {sizes[1]}: choose an --assistant of "
                "the target's family."
            )


def other_mode(drafter: Any, tokenizer: Any) -> str | None:
    """A warning if a drafter was trained with different chat-template variables from those of this run."""
    trained, here = drafter.config.chat_template_kwargs, template_kwargs_of(tokenizer)
    if trained is None or trained == here:
        return None
    name = public_name(drafter.config._name_or_path) or "the drafter"
    return (
        f"warning: {name} was trained with the chat-template variables {json.dumps(trained)}, but this run has "
        f"{json.dumps(here)}: it may accept fewer tokens than in its own mode (--chat_template_kwargs '{json.dumps(trained)}')."
    )


def draft_settings(method: Method) -> dict[str, Any]:
    """A method's draft settings: the drafter's own, with the method's overrides."""
    overrides = {key: value for key, value in method.settings.items() if key.startswith("draft_")}
    return vars(DraftSettings.resolve(method.drafter.config, None, overrides))


__all__ = [
    "EXACT_DTYPES",
    "PLAIN",
    "PRESETS",
    "Measurement",
    "Method",
    "check_drafter",
    "check_temperatures",
    "draft_settings",
    "first_difference",
    "measure",
    "other_mode",
    "parse_methods",
    "timed",
]
