"""Random batches x families x trees x {random, oracle} drafters, compared with plain `generate` of the same batch.

    python tests/fuzz/fuzz_batches.py --count 1500 --seed 0

As `fuzz_generation.py`, for 2 to 8 prompts of ragged lengths. Rows that go at their own pace draw other samples than plain
decoding, so that they are drawn with one token to choose from; rows in step draw plain decoding's. `test_fuzz_batches.py` runs
a slice.
"""

import random
import sys
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from unittest.mock import patch

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers

from fuzz_calls import HEADS, VOCAB
from fuzz_driver import Fault, main, run_drawn
from fuzz_generation import _CountingProcessor, drafter_of, target_of, tokenizer_of
from helpers.batches import padded
from helpers.oracle import oracle
from helpers.parity import Recorder
from helpers.tiny_models import FAMILIES, make_drafter
from helpers.unusual_targets import build
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, set_seed

from coral_hf.generation import hook
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.tree_size import DraftCosts


MOE = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}}
WANTED = ("scores", "logits")


@dataclass
class Batch:
    """One random call of several prompts; `generation` is for both sides, `draft` for the drafted one."""

    family: str
    attention: str
    shape: str
    head: str
    lengths: list[int]
    probability: float
    seed: int
    generation: dict
    draft: dict
    extras: dict
    costs: tuple[float, float, float] | None = None  # of a first node, a further one and a level: sizes are weighed


class _CountingCriterion(StoppingCriteria):
    """Ends rows by its own count of calls and their last token."""

    calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return (self.calls > 3) & ((self.calls + input_ids[:, -1]) % 7 == 0)


def draw(seed: int, index: int) -> Batch:
    """Case `index` of a seed."""
    rng = random.Random(f"batch-{seed}-{index}")
    maybe = lambda probability: rng.random() < probability  # noqa: E731
    tokens = lambda most: [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, most))]  # noqa: E731
    generation: dict = {"do_sample": maybe(0.3), "max_new_tokens": rng.choice([1, 2, 8, 16, 16, 24])}
    options = {
        "repetition_penalty": lambda: rng.choice([0.8, 1.1, 1.5]),
        "encoder_repetition_penalty": lambda: 1.3,
        "no_repeat_ngram_size": lambda: rng.randint(1, 3),
        "bad_words_ids": lambda: [tokens(3) for _ in range(rng.randint(1, 4))],
        "suppress_tokens": lambda: tokens(20),
        "begin_suppress_tokens": lambda: tokens(20),
        "sequence_bias": lambda: [[tokens(2), rng.choice([-5.0, 3.0])] for _ in range(3)],
        "renormalize_logits": lambda: True,
        "guidance_scale": lambda: 1.5,
    }
    for name, value in options.items():
        if maybe(0.08):
            generation[name] = value()
    if maybe(0.6):
        generation["eos_token_id"] = sorted(set(tokens(16)))
        generation["pad_token_id"] = rng.choice([0, 0, 77])
        if maybe(0.3):
            generation["min_new_tokens"] = rng.randint(1, generation["max_new_tokens"])
        if maybe(0.1):
            generation["exponential_decay_length_penalty"] = (2, 1.2)
    if maybe(0.2):
        generation["return_dict_in_generate"] = True
        for name in ("output_scores", "output_logits"):
            generation[name] = maybe(0.7)
    chosen = {
        "stop_strings": [chr(rng.randrange(33, 127)) for _ in range(rng.randint(1, 7))] if maybe(0.15) else None,
        "stateful_processor": maybe(0.08),
        "stateful_criterion": maybe(0.08),
        "allowed_tokens": maybe(0.05),
        "streamer": maybe(0.08),
    }
    extras = {name: value for name, value in chosen.items() if value}
    in_step = set(extras) - {"stop_strings"} or {"guidance_scale", "encoder_repetition_penalty"} & set(generation)
    in_step = in_step or ("stop_strings" in extras and "eos_token_id" not in generation)
    if generation["do_sample"]:
        generation["top_k"] = rng.choice([0, 5, 20]) if in_step else 1
        if maybe(0.5):
            generation["temperature"] = rng.choice([0.7, 1.5])
    head = (
        rng.choice([name for name in HEADS if "tiny" not in name and "narrow" not in name]) if maybe(0.4) else "full"
    )
    draft: dict = {"draft_depth": rng.choice([1, 2, 3, 4, 5, 7]), "draft_top_k": rng.choice([1, 1, 2, 3, 4])}
    if maybe(0.6):
        draft["draft_total_tokens"] = rng.randint(2, min(DraftSettings(**draft).max_total_tokens, 40))
    longest = rng.choice([3, 9, 20, 30])
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(2, 8))]
    family = rng.choice([*FAMILIES, *MOE])
    head = "full" if family in MOE else head
    eager = maybe(0.15)  # which makes NaN of a padding row in float64, with or without a drafter
    return Batch(
        family=family,
        attention="eager" if eager else "sdpa",
        shape=HEADS[head].get("shape") or rng.choice(["eagle", "eagle3"]),
        head=head,
        lengths=[longest] * len(lengths) if eager else lengths,
        probability=rng.choice([0.5, 0.8, 0.9, 1.0]),
        seed=rng.randrange(2**31),
        generation=generation,
        draft=draft,
        extras=extras,
        # drawn last: other cases stay what they were
        costs=(rng.uniform(1, 20), rng.choice([0.0, 0.5, 5.0]), rng.choice([0.5, 3.0])) if maybe(0.4) else None,
    )


@cached
def pair_of(family: str, attention: str, shape: str, head: str):
    """A target and its drafter."""
    if family in MOE:
        target = build(family, MOE[family], attention)
        target.config._experts_implementation = "eager"  # the others know no float64
        return target, make_drafter(target, shape=shape)
    return target_of(family, attention), drafter_of(family, attention, shape, head)


def call(case: Batch, drafter=None):
    """Generates, with the drafter if there is one; returns the outcome and the input of a streamer."""
    target, own = pair_of(case.family, case.attention, case.shape, case.head)
    config = GenerationConfig(**{"pad_token_id": 0, **case.generation})
    kwargs: dict = {}
    if drafter:
        for name, value in {**case.draft, "draft_cost_aware": case.costs is not None}.items():
            setattr(config, name, value)
        kwargs["assistant_model"] = own
    if "stop_strings" in case.extras:
        config.stop_strings = case.extras["stop_strings"]
        kwargs["tokenizer"] = tokenizer_of()
    if "stateful_processor" in case.extras:
        kwargs["logits_processor"] = LogitsProcessorList([_CountingProcessor()])
    if "stateful_criterion" in case.extras:
        kwargs["stopping_criteria"] = StoppingCriteriaList([_CountingCriterion()])
    if "allowed_tokens" in case.extras:
        kwargs["prefix_allowed_tokens_fn"] = lambda row, text: [
            3 + (int(text[-1]) * 5 + row + i) % 120 for i in range(40)
        ]
    recorder = Recorder() if "streamer" in case.extras else None
    if recorder is not None:
        kwargs["streamer"] = recorder
    ids, mask = padded(case.lengths, case.seed)
    set_seed(case.seed)
    first, further, level = case.costs or (1.0, 1.0, 1.0)
    costs = DraftCosts(tuple(first + further * node for node in range(512)), level, level)
    with patch.object(hook, "draft_costs", lambda *_: costs):
        output = target.generate(ids, attention_mask=mask, generation_config=config, **kwargs)
    return output, None if recorder is None else recorder.puts, own


def difference(case: Batch, drafted, plain) -> str | None:
    """The part of a drafted outcome that differs from the plain one, or None. Scores count up to the end of a row."""
    ours, theirs = (getattr(output[0], "sequences", output[0]) for output in (drafted, plain))
    if not torch.equal(ours, theirs):
        return f"tokens {ours.tolist()} instead of {theirs.tolist()}"
    if drafted[1] != plain[1]:
        return f"streamed {drafted[1]} instead of {plain[1]}"
    if isinstance(drafted[0], torch.Tensor):
        return None
    eos = set(case.generation.get("eos_token_id", ()))
    new = theirs[:, max(case.lengths) :].tolist()
    ends = [next((place for place, token in enumerate(row, 1) if token in eos), len(row)) for row in new]
    if case.extras.keys() & {"stop_strings", "stateful_criterion"}:
        ends = [1] * len(ends)  # rows end where only the criteria know
    for name in WANTED:
        found, expected = getattr(drafted[0], name), getattr(plain[0], name)
        if (found is None) != (expected is None) or len(found or ()) != len(expected or ()):
            return f"number of {name}"
        for step, (a, b) in enumerate(zip(found or (), expected or (), strict=True)):
            rows = [row for row, end in enumerate(ends) if step < end]
            # norms go through float32 whatever the target's dtype
            if a.shape != b.shape or not torch.allclose(a[rows], b[rows], rtol=1e-4, atol=1e-4):
                return f"{name}[{step}]"
    return None


def run_case(case: Batch) -> dict[str, int]:
    """The accepted tokens; raises [`Fault`] if a drafted outcome differs from the plain one."""
    counts = {"random_accepted": 0, "oracle_accepted": 0, "oracle_steps": 0, "plain_steps": 0}
    plain = call(case)
    for kind in ("random", "oracle"):
        if kind == "random":
            drafted = call(case, drafter=True)
        else:
            with oracle(getattr(plain[0], "sequences", plain[0]), case.probability, case.seed):
                drafted = call(case, drafter=True)
            stats = drafted[2].last_stats
            counts["oracle_steps"] += stats.steps - stats.plain_steps  # those that drafted
        counts[f"{kind}_accepted"] += drafted[2].last_stats.n_accepted
        counts["plain_steps"] += drafted[2].last_stats.plain_steps
        found = difference(case, drafted, plain)
        if found is not None:
            raise Fault(f"{kind} drafter: {found[:600]}\n    {case}")
    return counts


def run(seed: int, start: int, count: int, verbose: bool = False) -> dict:
    """Runs cases of a seed and returns their counts, see [`run_cases`]."""
    return run_drawn(Path(__file__).name, draw, run_case, ("plain_steps",), seed, start, count, verbose)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, count=1500))
