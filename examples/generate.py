"""Generate with a drafter: `python examples/generate.py "Why is the sky blue?"`."""

import argparse

import coral_hf  # noqa: F401  (lets generate() use CORAL drafters)
from coral_hf import demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    question = parser.parse_args().question
    target, tokenizer = demo.load_target()  # or AutoModelForCausalLM.from_pretrained(...)
    drafter = demo.load_drafter(target.dtype)  # or AutoModel.from_pretrained("org/name")

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    stats = drafter.last_stats
    print(f"acceptance length {stats.acceptance_length:.2f} over {stats.steps} target forwards")


if __name__ == "__main__":
    main()
