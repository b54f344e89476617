"""Plain `generate` and CORAL alternate on one prompt. This module computes everything that the page shows.

Both seem to generate at the same time, but they alternate: each uses the processor for a fifth of a second. Each clock counts
only its own turns, so neither slows the other's figures.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from coral_hf import TargetAdapter, demo
from coral_hf.utils.hardware import default_device


TURN_SECONDS = 0.2
REFRESH_SECONDS = 0.1


@dataclass
class Pair:
    """A target, its tokenizer and its drafter, with the names to show for them."""

    target: Any
    tokenizer: Any
    drafter: Any
    target_name: str
    drafter_name: str

    def __str__(self) -> str:
        dtype = str(self.target.dtype).removeprefix("torch.")
        return f"{self.target_name} with {self.drafter_name}, {dtype} on {self.target.device.type}"


def load_pair(settings: Mapping[str, str] = os.environ) -> Pair:
    """
    Loads the pair named by TARGET, DRAFTER and DTYPE. Default: the demo pair, in float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ValueError: if only one of TARGET and DRAFTER is given, the drafter is not a CORAL drafter, or it belongs to another
            target.
    """
    names = {key: settings.get(key, "") for key in ("TARGET", "DRAFTER")}
    device = default_device()
    dtype = settings.get("DTYPE") or ("float32" if device.type == "cpu" else "bfloat16")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"DTYPE={dtype} is unknown; use float32, bfloat16 or float16.")
    if not any(names.values()):
        (target, tokenizer), drafter = demo.load_target(dtype), demo.load_drafter()
        names = {"TARGET": demo.TARGET_NAME, "DRAFTER": demo.DRAFTER_NAME}
    elif not all(names.values()):
        given, missing = sorted(names, key=names.get, reverse=True)
        raise ValueError(f"{given}={names[given]} is given without {missing}: set both, or neither for the demo pair.")
    else:
        target = AutoModelForCausalLM.from_pretrained(names["TARGET"], dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(names["TARGET"])
        drafter = AutoModel.from_pretrained(names["DRAFTER"])
        if drafter.config.model_type != "coral":
            raise ValueError(
                f"DRAFTER={names['DRAFTER']} is a {drafter.config.model_type} model; name a CORAL drafter."
            )
    TargetAdapter(target).check_drafter(drafter.config)
    target, drafter = target.eval().to(device), drafter.eval().to(device=device, dtype=target.dtype)
    pair = Pair(target, tokenizer, drafter, names["TARGET"], names["DRAFTER"])
    for _ in race(pair, "Hello", 8):  # a warm-up, because the first run of a process is slower
        pass
    return pair


class Stopped(Exception):
    """Raised inside a generation whose visitor has left."""


class Turns:
    """Lets one of several threads run at a time: `running[0]`."""

    def __init__(self, lanes: int):
        self.running = list(range(lanes))
        self.stopped = False
        self._changed = threading.Condition()

    def wait(self, lane: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or self.running[0] == lane)
        if self.stopped:
            raise Stopped

    def pass_on(self, lane: int) -> None:
        with self._changed:
            self.running.append(self.running.pop(0))
            self._changed.notify_all()
        self.wait(lane)

    def leave(self, lane: int) -> None:
        with self._changed:
            self.running.remove(lane)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


class Lane(BaseStreamer):
    """A running generation: its tokens, the target's forward pass of each token, and the seconds of its own turns."""

    def __init__(self, turns: Turns, index: int, drafter: Any = None):
        self.turns, self.index, self.drafter = turns, index, drafter
        self.tokens: list[int] = []
        self.forwards: list[int] = []
        self.seconds = 0.0
        self.acceptance_length = 1.0
        self.done = False
        self.error: Exception | None = None
        self._resumed: float | None = None  # None: the prompt comes first
        self._turn_began = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with every token."""
        now = time.perf_counter()
        if self._resumed is None:
            self._resumed = self._turn_began = now
            return
        self.seconds += now - self._resumed
        forward = self._forward()
        # Only between two forward passes, so that the page never shows half a step for long.
        if now - self._turn_began > TURN_SECONDS and self.forwards and forward != self.forwards[-1]:
            self.turns.pass_on(self.index)
            self._turn_began = time.perf_counter()
        self.tokens.append(int(value))
        self.forwards.append(forward)
        self._resumed = time.perf_counter()

    def end(self) -> None:
        if self.drafter is not None:
            self.acceptance_length = self.drafter.last_stats.acceptance_length

    def _forward(self) -> int:
        """The target's forward pass of the current token; 0 is the prefill."""
        if self.drafter is None or not self.tokens:
            return len(self.tokens)
        # A step is counted after its tokens are streamed, so the current token belongs to the step after the counted ones.
        stats = self.drafter.last_stats
        self.acceptance_length = stats.acceptance_length
        return stats.steps + 1

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def drafted(self) -> list[bool]:
        """Whether a token was drafted. The last token of every forward pass is the target's own."""
        forwards = list(self.forwards)
        return [this == after for this, after in zip_longest(forwards, forwards[1:])]


def race(pair: Pair, prompt: str, max_new_tokens: int) -> Iterator[tuple[Lane, Lane]]:
    """
    Generates with and without the drafter, greedily, and yields both lanes ten times a second while they grow.

    Raises:
        ValueError: for an empty prompt, and any error of either generation.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty: write a question, or choose an example.")
    inputs = encode(pair.tokenizer, prompt).to(pair.target.device)
    turns = Turns(2)
    lanes = Lane(turns, 0), Lane(turns, 1, pair.drafter)

    def run(lane: Lane) -> None:
        assistant = {} if lane.drafter is None else {"assistant_model": lane.drafter}
        try:
            turns.wait(lane.index)
            pair.target.generate(
                **inputs, **assistant, streamer=lane, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
            )
        except Stopped:
            pass
        except Exception as error:  # raised again in the page's thread
            lane.error = error
        finally:
            lane.done = True
            turns.leave(lane.index)

    threads = [threading.Thread(target=run, args=(lane,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        while not all(lane.done for lane in lanes):
            yield lanes
            time.sleep(REFRESH_SECONDS)
        for lane in lanes:
            if lane.error is not None:
                raise lane.error
        yield lanes
    finally:  # also when the visitor leaves
        turns.stop()
        for thread in threads:
            thread.join()


def encode(tokenizer: Any, prompt: str) -> Any:
    """The prompt rendered with the target's chat template, or unchanged without one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def pieces(decode: Callable[[list[int]], str], tokens: list[int]) -> list[str]:
    """The text that each token adds. A character of several tokens appears with its last one."""
    texts, shown = [], ""
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count])
        complete = not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(shown) :] if complete else "")
        shown = text if complete else shown
    return texts


def render_lane(title: str, lane: Lane | None, tokenizer: Any) -> str:
    """One pane: its figures above its tokens."""
    if lane is None:
        figures, text = ("-", "-", "-"), '<span class="empty">Its tokens appear here.</span>'
    else:
        tokens, drafted = list(lane.tokens), lane.drafted
        figures = f"{lane.tokens_per_second:.1f}", f"{lane.acceptance_length:.2f}", f"{len(tokens)}"
        decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
        text = "".join(
            f'<span class="{"drafted" if by_drafter else "own"}">{escape(piece)}</span>'
            for piece, by_drafter in zip(pieces(decode, tokens), drafted, strict=False)
            if piece
        )
        text += "" if lane.done else '<span class="caret"></span>'
    names = ("tokens per second", "tokens per target forward (tau)", "tokens")
    cells = "".join(
        f'<div class="figure"><b>{value}</b><small>{name}</small></div>'
        for value, name in zip(figures, names, strict=True)
    )
    return f'<section class="lane"><h3>{title}</h3><div class="figures">{cells}</div><div class="text"><div>{text}</div></div></section>'


def render_verdict(lanes: tuple[Lane, Lane] | None, float32: bool) -> str:
    """One line with the speedup, and whether both texts are equal."""
    if lanes is None:
        return '<div class="verdict">Greedy decoding of one prompt, twice: alone, and with a drafter.</div>'
    plain, coral = lanes
    if not (plain.done and coral.done):
        ahead = len(coral.tokens) - len(plain.tokens)
        return f'<div class="verdict">Generating … CORAL is {max(ahead, 0)} tokens ahead.</div>'
    speedup = coral.tokens_per_second / plain.tokens_per_second
    share = sum(coral.drafted) / len(coral.tokens)
    parted = next(
        (i for i, both in enumerate(zip(plain.tokens, coral.tokens, strict=False)) if len(set(both)) > 1), None
    )
    if parted is None and len(plain.tokens) == len(coral.tokens):
        same = f"the same {len(plain.tokens)} tokens"
    else:
        place = min(len(plain.tokens), len(coral.tokens)) if parted is None else parted
        why = "which must not happen in float32" if float32 else "a near-tie, which rounding decides outside float32"
        same = f"texts that differ from token {place + 1} on, {why}"
    return f'<div class="verdict done"><b>{speedup:.2f}&times;</b> as fast, {same}; {share:.0%} of them were drafted.</div>'


def render_error(error: Exception) -> str:
    """An error in the place of the verdict."""
    return f'<div class="verdict error" role="alert"><b>{type(error).__name__}</b> {escape(str(error))}</div>'
