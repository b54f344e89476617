"""Chat in the terminal. The last line shows tokens per second and acceptance length (tau) live.

python examples/chat.py                                       # the demo pair: SmolLM2-135M-Instruct and its drafter
python examples/chat.py --target my/model --drafter org/name
"""

import shutil
import sys
import time
from dataclasses import dataclass, field

from transformers import TextStreamer

from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.scripts import parse_script, run_script


@dataclass
class ScriptArguments:
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    drafter: str = field(default=DEMO, metadata={"help": "Path or Hub id of its drafter, or 'demo'."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."})


class LiveStreamer(TextStreamer):
    """Prints an answer while it is generated, and its speed in the terminal's last line."""

    def __init__(self, tokenizer, drafter):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.drafter, self.count, self.start = drafter, -1, None  # -1: the prompt comes first

    def put(self, value):
        super().put(value)
        self.count += 1
        if self.count == 0:
            self.start = time.perf_counter()
        elif sys.stdout.isatty():
            rows = shutil.get_terminal_size().lines
            # save the cursor, write the last line, go back
            print(f"\0337\033[{rows};1H\033[2K\033[7m {self.status()} \033[0m\0338", end="", flush=True)

    def status(self) -> str:
        stats = self.drafter.last_stats
        tau = 1.0 if stats is None else stats.acceptance_length
        return f"{self.count / (time.perf_counter() - self.start):.1f} tokens/s, tau {tau:.2f}"


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    target, tokenizer = load_target(script.target, "auto", device_map=None if script.target == DEMO else "auto")
    drafter = load_drafter(script.drafter).to(device=target.device, dtype=target.dtype)
    sampling = {"do_sample": True, "temperature": script.temperature} if script.temperature else {"do_sample": False}
    messages = []
    if sys.stdout.isatty():  # keep the last line out of the scrolling part
        print(f"\n\033[1;{shutil.get_terminal_size().lines - 1}r\033[{shutil.get_terminal_size().lines - 1};1H")
    print("Type a message; an empty line ends the chat.")
    try:
        while question := input("\n> ").strip():
            messages.append({"role": "user", "content": question})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(target.device)
            streamer = LiveStreamer(tokenizer, drafter)
            output = target.generate(
                **inputs,
                assistant_model=drafter,
                streamer=streamer,
                max_new_tokens=script.max_new_tokens,
                **sampling,
            )
            print(f"[{streamer.status()}]")
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        if sys.stdout.isatty():
            print("\033[r", end="")  # the whole screen scrolls again


if __name__ == "__main__":
    run_script(main)
