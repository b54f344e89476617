"""Generate with a drafter: `python examples/generate.py "Why is the sky blue?"`."""

import sys

import coral_hf  # noqa: F401  (lets generate() use CORAL drafters)
from coral_hf import demo


target, tokenizer = demo.load_target()  # or AutoModelForCausalLM.from_pretrained(...)
drafter = demo.load_drafter(target.dtype)  # or AutoModel.from_pretrained("org/name")

question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"acceptance length {drafter.last_stats.acceptance_length:.2f} over {drafter.last_stats.steps} target forwards")
