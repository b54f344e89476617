"""A page that shows plain `generate` and CORAL side by side: `python examples/space/app.py`.

TARGET and DRAFTER name another pair (paths or Hub ids), DTYPE a dtype other than float32 on a CPU.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path


if __name__ == "__main__":  # before gradio, which --help can do without
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; the page contacts no other server

import gradio as gr
import torch
from race import Pair, load_pair, race, render_error, render_lane, render_verdict


EXAMPLES = [
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Give me three tips for staying healthy.",
    "Why is the sky blue?",
]
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
LEGEND = (
    '<div class="legend"><div><span class="drafted">drafted</span>and accepted</div>'
    '<div><span class="own">own</span>chosen by the target</div>'
    "<div>both alternate; each clock counts its own time</div></div>"
)
TITLES = ("Plain generate", "CORAL")


def build(load: Callable[[], Pair] = load_pair) -> gr.Blocks:
    """The page. If `load` fails, the page shows the error and a remedy."""
    try:
        pair, problem = load(), None
    except Exception as error:  # shown on the page
        pair, problem = None, error
    tokenizer = None if pair is None else pair.tokenizer

    def panes(lanes=(None, None)) -> list[str]:
        return [render_lane(title, lane, tokenizer) for title, lane in zip(TITLES, lanes, strict=True)]

    def generate(prompt: str, max_new_tokens: int) -> Iterator[list[str]]:
        try:
            for lanes in race(pair, prompt, int(max_new_tokens)):
                yield [render_verdict(lanes, pair.target.dtype == torch.float32), *panes(lanes)]
        except Exception as error:
            yield [render_error(error), *panes()]

    with gr.Blocks(title="CORAL side by side", analytics_enabled=False) as page:
        subtitle = "No pair is loaded." if pair is None else f"{pair}"
        gr.Markdown(f"# CORAL, side by side\n{subtitle}", elem_id="title")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=3, scale=4, elem_id="prompt")
            with gr.Column(scale=1, min_width=200):
                length = gr.Slider(16, 512, value=128, step=16, label="Tokens", elem_id="length")
                go = gr.Button("Generate", variant="primary", interactive=pair is not None, elem_id="go")
        gr.Examples(EXAMPLES, prompt, cache_examples=False)
        verdict = gr.HTML(render_verdict(None, True) if problem is None else render_error(problem), elem_id="verdict")
        gr.HTML(LEGEND, elem_id="legend")
        with gr.Row():
            outputs = [gr.HTML(pane, elem_id=f"lane-{i}", min_width=340) for i, pane in enumerate(panes())]
        # a second visitor would share the processor and distort both clocks
        one_visitor = {"concurrency_limit": 1, "concurrency_id": "pair"}
        for start in (go.click, prompt.submit):
            start(generate, [prompt, length], [verdict, *outputs], show_progress="hidden", **one_visitor)
    return page


def launch(page: gr.Blocks, **settings):
    """Starts the page with its style. Nothing is loaded from other servers."""
    style = Path(__file__).with_name("style.css")
    return page.launch(theme=gr.themes.Base(**FONTS), css_paths=style, footer_links=[], ssr_mode=False, **settings)


if __name__ == "__main__":
    launch(build())
