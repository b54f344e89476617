"""Random generation settings x families x trees x {random, oracle} drafters, compared with plain `generate`.

    python tests/fuzz/fuzz_generation.py --count 2000 --seed 0

Case i of a seed is always the same; one that differs is printed with the command that runs it alone. Exit status 1 if
any did. Targets are tiny and in float64, so that there are no near-ties. `tests/fuzz/test_fuzz_generation.py` runs a slice.
"""

import copy
import sys
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers

from fuzz_calls import HEADS, VOCAB, Case, draw
from fuzz_driver import Fault, main, run_drawn
from helpers.oracle import oracle
from helpers.parity import Recorder
from helpers.tiny_models import make_drafter, make_target, make_tokenizer, randomize
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from coral_hf.utils.compat import cache_kwarg, cache_of


@cached
def target_of(family: str, attention: str):
    return make_target(family, attention=attention)


@cached
def drafter_of(family: str, attention: str, shape: str, head: str):
    settings = {name: value for name, value in HEADS[head].items() if name != "shape"}
    size = settings.pop("shortlist_size", None)
    drafter = make_drafter(target_of(family, attention), shape=shape, **settings)
    if drafter.router is not None:
        randomize(drafter.router)
    if size is not None:
        drafter.add_shortlist(torch.rand(VOCAB, generator=torch.Generator().manual_seed(7)), size)
    return drafter


tokenizer_of = cached(make_tokenizer)


class _CountingProcessor(LogitsProcessor):
    """Favours another token at every call: only right if it is called once per token, in order."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, (37 * self.calls + int(input_ids[0, -1])) % VOCAB] += 4.0
        return scores


class _CountingCriterion(StoppingCriteria):
    """Ends the text by its own count of calls and the last token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((1,), self.calls > 4 and (self.calls + int(input_ids[0, -1])) % 7 == 0)


@dataclass
class Outcome:
    """The outputs and side effects of one call."""

    sequences: torch.Tensor
    parts: dict[str, list[torch.Tensor]]
    random_state: torch.Tensor
    streamed: list[int] | None


def _inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(3, VOCAB, (1, case.prompt_length), generator=generator)
    if not case.padding:
        return ids, None
    ids = torch.cat([torch.zeros(1, case.padding, dtype=torch.long), ids], dim=1)
    return ids, (torch.arange(ids.shape[1]) >= case.padding).long()[None]


def _prefill(case: Case, ids: torch.Tensor, mask: torch.Tensor | None):
    """A longer conversation whose first part is in a cache; returns its ids, mask and cache."""
    target = target_of(case.family, case.attention)
    cache = DynamicCache() if case.prefilled == "own cache" else None
    kwargs = {} if cache is None else cache_kwarg(cache)
    if mask is not None:
        kwargs["attention_mask"] = mask
    first = target.generate(
        ids, max_new_tokens=case.seed % 9 + 1, do_sample=False, return_dict_in_generate=True, **kwargs
    )
    more = torch.randint(3, VOCAB, (1, case.seed % 4), generator=torch.Generator().manual_seed(case.seed + 1))
    longer = torch.cat([first.sequences, more], dim=1)
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(1, longer.shape[1] - mask.shape[1])], dim=1)
    return longer, mask, cache_of(first)


def call(case: Case, ids, mask, cache, drafter=None) -> Outcome:
    """Generates, with the drafter if there is one."""
    config = GenerationConfig(pad_token_id=0, **case.generation)
    if drafter is not None:
        for name, value in case.draft.items():
            setattr(config, name, value)
    kwargs: dict = {} if drafter is None else {"assistant_model": drafter}
    if mask is not None:
        kwargs["attention_mask"] = mask
    if cache is not None:
        kwargs |= cache_kwarg(copy.deepcopy(cache))
    if "stop_strings" in case.extras:
        config.stop_strings = case.extras["stop_strings"]
        kwargs["tokenizer"] = tokenizer_of()
    if "stateful_processor" in case.extras:
        kwargs["logits_processor"] = LogitsProcessorList([_CountingProcessor()])
    if "stateful_criterion" in case.extras:
        kwargs["stopping_criteria"] = StoppingCriteriaList([_CountingCriterion()])
    if "allowed_tokens" in case.extras:
        kwargs["prefix_allowed_tokens_fn"] = lambda _, text: [3 + (int(text[-1]) * 5 + i) % 120 for i in range(40)]
    recorder = Recorder() if "streamer" in case.extras else None
    if recorder is not None:
        kwargs["streamer"] = recorder
    set_seed(case.seed)
    output = target_of(case.family, case.attention).generate(ids, generation_config=config, **kwargs)
    state = torch.get_rng_state()
    if recorder is not None:
        assert recorder.ended == 1, "the streamer was not ended once"
    streamed = None if recorder is None else recorder.tokens
    if isinstance(output, torch.Tensor):
        return Outcome(output, {}, state, streamed)
    parts = {name: list(getattr(output, name) or ()) for name in ("scores", "logits")}
    parts["hidden_states"] = [layer for step in output.hidden_states or () for layer in step]
    parts["cache"] = [states[:, :, -16:] for layer in cache_of(output).layers for states in (layer.keys, layer.values)]
    return Outcome(output.sequences, parts, state, streamed)


def difference(drafted: Outcome, plain: Outcome, stock: bool) -> str | None:
    """The part of a drafted outcome that differs from the plain one; None if they are equal."""
    if not torch.equal(drafted.sequences, plain.sequences):
        return f"tokens {drafted.sequences.tolist()} instead of {plain.sequences.tolist()}"
    if drafted.streamed != plain.streamed:
        return f"streamed {drafted.streamed} instead of {plain.streamed}"
    if stock:  # Transformers' own loop answers for the rest
        return None
    if not torch.equal(drafted.random_state, plain.random_state):
        return "random numbers spent"
    for name, expected in plain.parts.items():
        found = drafted.parts[name]
        if len(found) != len(expected):
            return f"{len(found)} {name} instead of {len(expected)}"
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            # norms go through float32 whatever the target's dtype
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
                return f"{name}[{index}]"
    return None


def run_case(case: Case) -> dict[str, int]:
    """The accepted tokens; raises [`Fault`] if a drafted outcome differs from the plain one."""
    counts = {"random_accepted": 0, "random_steps": 0, "oracle_accepted": 0, "oracle_steps": 0}
    drafter = drafter_of(case.family, case.attention, case.shape, case.head)
    ids, mask = _inputs(case)
    cache = None
    if case.prefilled:
        ids, mask, cache = _prefill(case, ids, mask)
    try:
        plain = call(case, ids, mask, cache)
    except (RuntimeError, ValueError) as error:
        return _fails_alike(case, (ids, mask, cache, drafter), error)
    stock = case.draft.get("draft_stock_loop", False)
    for kind in ("random", "oracle"):
        if kind == "random":
            try:
                drafted = call(case, ids, mask, cache, drafter)
            except ValueError as error:
                if "fewer than draft_top_k" not in str(error):
                    raise
                return {"refused": 1}
        else:
            with oracle(plain.sequences, case.probability, case.seed):
                drafted = call(case, ids, mask, cache, drafter)
        counts[f"{kind}_accepted"] += drafter.last_stats.n_accepted
        counts[f"{kind}_steps"] += drafter.last_stats.steps
        found = difference(drafted, plain, stock)
        if found is not None:
            raise Fault(f"{kind} drafter: {found[:600]}\n    {case}")
    return counts


def _fails_alike(case: Case, inputs: tuple, plain: Exception) -> dict[str, int]:
    """Processors of Transformers can leave plain decoding no token to draw: then drafting must fail equally."""
    try:
        call(case, *inputs)
    except type(plain) as error:
        if str(error).splitlines()[0] == str(plain).splitlines()[0]:
            return {"failed_alike": 1}
    raise Fault(f"plain generate fails with {plain}, the drafted one does not\n    {case}")


def run(seed: int, start: int, count: int, verbose: bool = False) -> dict:
    """Runs cases of a seed and returns their counts, see [`run_cases`]."""
    return run_drawn(Path(__file__).name, draw, run_case, ("refused", "failed_alike"), seed, start, count, verbose)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, count=2000))
