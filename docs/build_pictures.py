"""Draws docs/demo.svg and docs/concepts.svg, and records the answer that the first one shows.

python docs/build_pictures.py           # draws both
python docs/build_pictures.py --record  # generates the answer again first (benchmarks/records/demo_answer.json)
"""

import argparse
import json
from html import escape
from typing import Any

from measured import OWN, RECORDS, ROOT, read, rows_of
from running_example import CHOICES, GUESSES, TEXT, kept_nodes, path_chances


ANSWER, BENCHMARK = f"{RECORDS}/demo_answer.json", f"{OWN}/benchmark.json"
PROMPT = "Why is the sky blue?"
NEW_TOKENS = 96
GREEN, GREY, INK, PALE = "#bfe6d8", "#e8e8ee", "#1f2328", "#6e7781"
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
CHARACTER, LINE, COLUMN, PAUSE = 7.23, 19, 420, 2.5


# The demo: one answer, with and without drafts ------------------------------------------------------------------------


def record_answer() -> None:
    """Generates the answer in float32, where both ways give the same tokens, and records the forward pass of each token."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    from coral_hf import coral_generate, demo
    from coral_hf.data.prompts import encode_context
    from coral_hf.evaluation.environment import describe_environment

    class Forwards(BaseStreamer):
        """The forward pass of each token; 0 is the prefill."""

        def __init__(self, drafter: Any = None):
            self.drafter, self.prompt, self.forwards = drafter, True, []

        def put(self, value: Any) -> None:
            if not self.prompt:
                drafted = self.drafter is not None and self.forwards
                # a step is counted after its tokens were streamed
                self.forwards.append(self.drafter.last_stats.steps + 1 if drafted else len(self.forwards))
            self.prompt = False

        def end(self) -> None:
            pass

    target, tokenizer = demo.load_target(torch.float32)
    drafter = demo.load_drafter(torch.float32)
    ids = encode_context(tokenizer, [PROMPT])
    plain, coral = Forwards(), Forwards(drafter)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = target.generate(ids, streamer=plain, **settings)
    # fixed sizes, so that the answer takes the same forward passes on every machine
    found = coral_generate(target, drafter, input_ids=ids, draft_cost_aware=False, streamer=coral, **settings)
    if not torch.equal(expected, found):
        raise ValueError("The two outputs differ, so this answer cannot be shown.")
    record = {
        "prompt": PROMPT,
        "tokens": [tokenizer.decode([token]) for token in found[0, ids.shape[1] :].tolist()],
        "forwards": {"plain": plain.forwards, "coral": coral.forwards},
        "acceptance_length": drafter.last_stats.acceptance_length,
        "environment": describe_environment(target.device, torch.float32),
    }
    (ROOT / ANSWER).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def demo_picture() -> str:
    """Both columns advance at the speeds that the shipped drafter's benchmark measured on chat prompts (MT-bench)."""
    answer, benchmark = read(ANSWER), read(BENCHMARK)
    where, rows = benchmark["environment"], rows_of(benchmark, "mt_bench")
    per_second = {name: rows[name]["tokens_per_second"] for name in ("plain", "coral")}
    seconds = {name: rows[name]["acceptance_length"] / per_second[name] for name in per_second}
    total = seconds["plain"] * len(answer["tokens"]) + PAUSE
    names = {"plain": "The model alone", "coral": "With a drafter"}
    parts, height = [], 0.0
    for index, (name, title) in enumerate(names.items()):
        left = 16 + index * (COLUMN + 12)
        parts += [
            f'<text x="{left}" y="26" class="title">{title}</text>',
            f'<text x="{left}" y="46" class="note">{per_second[name]:.1f} tokens per second</text>',
        ]
        drawn, bottom = _tokens(answer["tokens"], answer["forwards"][name], left, 66, seconds[name], total)
        parts += drawn
        height = max(height, bottom)
    note = (
        f"SmolLM2-135M-Instruct, {where['device']}, {where['threads']} threads, {where['dtype']}. In real time, at the speeds "
        "measured on MT-bench. Green: drafted."
    )
    parts.append(f'<text x="16" y="{height + 26:.0f}" class="note">{escape(note)}</text>')
    return _svg(
        2 * COLUMN + 44, height + 40, parts, "The same answer twice: the model alone, and the model with a drafter"
    )


def _tokens(
    tokens: list[str], forwards: list[int], left: float, top: float, seconds: float, total: float
) -> tuple[list[str], float]:
    """Tokens in lines, one group per forward pass. The last token of a group is the target's own."""
    columns = int(COLUMN / CHARACTER) - 2
    groups: dict[int, list[str]] = {}
    column, line = 0, 0
    for index, (token, forward) in enumerate(zip(tokens, forwards, strict=True)):
        own = index + 1 == len(tokens) or forwards[index + 1] != forward
        for number, piece in enumerate(token.split("\n")):
            if number or column + len(piece) > columns:
                column, line = 0, line + 1
            if piece:
                x, y, width = left + column * CHARACTER, top + line * LINE, len(piece) * CHARACTER
                groups.setdefault(forward, []).append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="16" rx="2" fill="{GREY if own else GREEN}"/>'
                    f'<text x="{x:.1f}" y="{y + 12:.1f}" xml:space="preserve" textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs">'
                    f"{escape(piece)}</text>"
                )
                column += len(piece)
    drawn = []
    for forward, pieces in groups.items():
        share = min(0.999, max(0.001, forward * seconds / total))
        joined = "".join(pieces)
        drawn.append(
            f'<g>{joined}<animate attributeName="opacity" values="0;0;1;1" keyTimes="0;{share:.4f};{share:.4f};1" '
            f'dur="{total:.2f}s" repeatCount="indefinite"/></g>'
        )
    return drawn, top + (line + 1) * LINE


# The concepts: a draft tree --------------------------------------------------------------------------------------------


def tree_picture() -> str:
    """The running example: text, guesses, verified nodes and accepted nodes."""
    chances, kept = path_chances(), kept_nodes()
    accepted, node = [], TEXT[-1]
    while node in CHOICES and CHOICES[node] in chances:
        node = CHOICES[node]
        accepted.append(node)
    places = {name: (16 + index * 84.0, 110.0) for index, name in enumerate(TEXT)}
    levels: dict[int, list[str]] = {}
    depth = {TEXT[-1]: 0}
    for name, parent, _ in GUESSES:
        depth[name] = depth[parent] + 1
        levels.setdefault(depth[name], []).append(name)
    for level, names in levels.items():
        for index, name in enumerate(names):
            places[_key(name)] = (
                268 + level * 150.0,
                110 + (index - (len(names) - 1) / 2) * (112 if level == 1 else 56),
            )
    parts = []
    for name, parent, _ in GUESSES:
        (x, y), (a, b) = places[_key(name)], places[parent if parent == TEXT[-1] else _key(parent)]
        style = f'stroke="{INK}"' if name in kept else f'stroke="{PALE}" stroke-dasharray="4 3"'
        parts.append(f'<path d="M{a + 72:.0f} {b + 14:.0f} L{x:.0f} {y + 14:.0f}" {style} fill="none"/>')
    for name in TEXT:
        parts.append(_box(*places[name], name, GREY, 72))
    for name, _, _ in GUESSES:
        fill = GREEN if name in accepted else "#ffffff"
        parts.append(_box(*places[_key(name)], name, fill, 90, f"{chances[name]:.2f}", dashed=name not in kept))
    x, y = places[_key(accepted[-1])]
    parts.append(f'<path d="M{x + 90:.0f} {y + 14:.0f} L{x + 150:.0f} {y + 14:.0f}" stroke="{INK}" fill="none"/>')
    parts.append(_box(x + 150, y, CHOICES[accepted[-1]], GREY, 72))
    labels = ((16, "text so far"), (418, "level 1"), (568, "level 2"), (718, "bonus token"))
    parts += [f'<text x="{x}" y="250" class="note">{label}</text>' for x, label in labels]
    key = "green: accepted; white: verified and rejected; dashed: guessed, not verified; numbers: path probabilities"
    parts.append(f'<text x="16" y="276" class="note">{key}</text>')
    return _svg(
        806, 290, parts, 'A draft tree after "The sky is blue": the target accepts "because of" and adds "the"'
    )


def _key(name: str) -> str:
    """A guess may repeat a word of the text."""
    return f"guess {name}"


def _box(x: float, y: float, name: str, fill: str, width: int, note: str = "", dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    text = f'<rect x="{x:.0f}" y="{y:.0f}" width="{width}" height="28" rx="5" fill="{fill}" stroke="{PALE}"{dash}/>'
    text += f'<text x="{x + width / 2:.0f}" y="{y + 18:.0f}" text-anchor="middle">{escape(name)}</text>'
    if note:
        text += f'<text x="{x + width / 2:.0f}" y="{y + 42:.0f}" text-anchor="middle" class="note">{note}</text>'
    return text


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    style = (
        f"text {{ font: 12px {FONT}; fill: {INK} }} .title {{ font: bold 15px sans-serif }} "
        f".note {{ font: 12px sans-serif; fill: {PALE} }}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img">\n<title>{escape(title)}</title>\n<style>{style}</style>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


PICTURES = {"demo.svg": demo_picture, "concepts.svg": tree_picture}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="Generate the answer again before drawing it.")
    if parser.parse_args().record:
        record_answer()
    for name, picture in PICTURES.items():
        (ROOT / "docs" / name).write_text(picture(), encoding="utf-8")
