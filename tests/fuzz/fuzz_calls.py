"""The random calls of `fuzz_generation.py`: case i of a seed is always the same."""

import random
from dataclasses import dataclass, field

from helpers.tiny_models import FAMILIES
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

from coral_hf.generation.settings import DraftSettings


VOCAB = 128
# what a drafter has besides its layer, and the shape it needs
HEADS = {
    "full": {},
    "features": {"shape": "eagle3", "target_feature_layers": [1, 3, -1]},
    "own": {"shape": "eagle3", "draft_vocab_size": 40},
    "shortlist": {"shortlist_size": 24},
    "tiny_shortlist": {"shortlist_size": 3},
    "router": {"router_groups": 12, "router_active_groups": 4},
    "narrow_router": {"router_groups": 64, "router_active_groups": 1},
    "both": {"router_groups": 26, "router_active_groups": 3, "shortlist_size": 10},
    "narrow_both": {"router_groups": 43, "router_active_groups": 1, "shortlist_size": 2},
    "low_rank": {"low_rank_size": 6, "low_rank_candidates": 12},
}


@dataclass
class Case:
    """One random call; `generation` is for both sides, `draft` for the drafted one."""

    family: str
    attention: str
    shape: str
    head: str
    prompt_length: int
    padding: int
    prefilled: str | None
    probability: float
    seed: int
    generation: dict
    draft: dict
    extras: dict = field(default_factory=dict)


def draw(seed: int, index: int) -> Case:
    """Case `index` of a seed."""
    rng = random.Random(f"{seed}-{index}")
    maybe = lambda probability: rng.random() < probability  # noqa: E731
    tokens = lambda most: [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, most))]  # noqa: E731
    generation: dict = {"do_sample": maybe(0.5), "max_new_tokens": rng.choice([1, 2, 3, 8, 16, 24])}
    if generation["do_sample"]:
        generation["top_k"] = rng.choice([0, 0, 1, 5, 20])
        options = {
            "temperature": lambda: rng.choice([0.3, 0.7, 1.0, 1.5]),
            "top_p": lambda: rng.choice([0.5, 0.9, 0.99]),
            "min_p": lambda: rng.choice([0.02, 0.1]),
            "typical_p": lambda: 0.9,
            "epsilon_cutoff": lambda: 0.005,
            "eta_cutoff": lambda: 0.005,
        }
        for name, value in options.items():
            if maybe(0.6 if name == "temperature" else 0.2):
                generation[name] = value()
    options = {
        "repetition_penalty": lambda: rng.choice([0.8, 1.1, 1.5]),
        "encoder_repetition_penalty": lambda: 1.3,
        "no_repeat_ngram_size": lambda: rng.randint(1, 3),
        "bad_words_ids": lambda: [tokens(3) for _ in range(rng.randint(1, 4))],
        "suppress_tokens": lambda: tokens(20),
        "begin_suppress_tokens": lambda: tokens(20),
        "sequence_bias": lambda: [[tokens(2), rng.choice([-5.0, 3.0])] for _ in range(3)],
        "forced_eos_token_id": lambda: rng.randrange(3, VOCAB),
        "renormalize_logits": lambda: True,
        "remove_invalid_values": lambda: True,
        "guidance_scale": lambda: 1.5,
        "watermarking_config": lambda: WatermarkingConfig(bias=2.0, context_width=rng.randint(1, 2)),
    }
    for name, value in options.items():
        if maybe(0.1):
            generation[name] = value()
    if generation.get("forced_eos_token_id") in generation.get("suppress_tokens", []):
        del generation["forced_eos_token_id"]  # refused by Transformers
    if generation["do_sample"] and maybe(0.05):
        generation["watermarking_config"] = SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)
    if maybe(0.4):
        generation["eos_token_id"] = sorted(set(tokens(12)))
        if maybe(0.4):
            generation["min_new_tokens"] = rng.randint(1, generation["max_new_tokens"])
        if maybe(0.15):
            generation["exponential_decay_length_penalty"] = (2, 1.2)
    if maybe(0.3):
        generation["return_dict_in_generate"] = True
        for name in ("output_scores", "output_logits", "output_hidden_states"):
            generation[name] = maybe(0.6)
    extras = {
        "stop_strings": [chr(rng.randrange(33, 127)) + (chr(rng.randrange(33, 127)) if maybe(0.2) else "")]
        + [chr(rng.randrange(33, 127)) for _ in range(rng.randint(0, 6))]
        if maybe(0.15)
        else None,
        "stateful_processor": maybe(0.1),
        "stateful_criterion": maybe(0.1),
        "allowed_tokens": maybe(0.05),
        "streamer": maybe(0.15),
    }
    head = rng.choice(list(HEADS)) if maybe(0.6) else "full"
    depth = rng.choice([1, 2, 3, 4, 5, 7])
    # the smallest heads can fill two branches or three; more is refused
    top_k = rng.choice([1, 1, 2, 2, 2, 3, 4] if "narrow" in head or "tiny" in head else [1, 1, 2, 3, 4, 6, 10])
    draft: dict = {"draft_depth": depth, "draft_top_k": top_k}
    most = DraftSettings(**draft).max_total_tokens
    if maybe(0.7):
        draft["draft_total_tokens"] = rng.randint(2, min(most, 60))
    if "router" in head or "both" in head:
        if maybe(0.5):
            draft["draft_active_groups"] = rng.randint(1, 12)
        draft["draft_groups_per_row"] = maybe(0.5)
        if "router" in head and maybe(0.4):
            draft["draft_scoring"] = "router"
    if "shortlist" in head and maybe(0.3):
        draft["draft_head"] = "context"
    if "both" in head and maybe(0.3):
        draft["draft_head"] = rng.choice(["router", "both"])
    # Transformers' own loop: chains, and what it calls a processor for is not one token after the other
    stateful = extras["stateful_processor"] or extras["stateful_criterion"] or extras["stop_strings"]
    stateful = stateful or {"guidance_scale", "watermarking_config"} & set(generation)
    if top_k == 1 and not generation["do_sample"] and not stateful and maybe(0.4):
        draft["draft_stock_loop"] = True
    padding = rng.randint(1, 9) if maybe(0.2) else 0
    prefilled = rng.choice(["whole", "whole", "own cache"]) if maybe(0.2) else None
    if prefilled:
        draft.pop("draft_stock_loop", None)
    if "draft_stock_loop" not in draft and maybe(0.3):
        draft["draft_lookup"] = True
    return Case(
        family=rng.choice(list(FAMILIES)),
        # eager attention in float64 makes NaN of a padding row, with or without a drafter
        attention="eager" if maybe(0.25) and not padding else "sdpa",
        shape=HEADS[head].get("shape") or rng.choice(["eagle", "eagle3"]),
        head=head,
        prompt_length=rng.choice([1, 2, 5, 9, 15, 16, 17, 30]),
        padding=padding,
        prefilled=prefilled,
        probability=rng.choice([0.3, 0.7, 0.9, 1.0]),
        seed=rng.randrange(2**31),
        generation=generation,
        draft=draft,
        extras={name: value for name, value in extras.items() if value},
    )
