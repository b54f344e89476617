"""Tiny random targets of every family, their drafters, and a tokenizer with one token per character."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from coral_hf import CoralDraftModel


COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


# Families by model_type, each with what makes it different.
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
        # Tied and scaled embeddings would make a random model repeat its last token for ever.
        "tie_word_embeddings": False,
        "final_logit_softcapping": 30.0,
    },
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "olmo2": {},
}

# Those that differ most in what generation does. The default run takes them; CI takes the others where plain drafting is tested,
# and `-m ""` takes all everywhere.
QUICK_FAMILIES = ("llama", "mistral", "gemma3_text", "qwen3")


def families(of_the_others):
    """A parametrization over all families, in which those that are not quick have the given mark."""
    marked = [name if name in QUICK_FAMILIES else pytest.param(name, marks=of_the_others) for name in FAMILIES]
    return pytest.mark.parametrize("family", marked)


every_family = families(pytest.mark.slow)
quick_families = families(pytest.mark.exhaustive)


def make_target(family: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "sdpa", seed: int = 0):
    """A tiny random target; float64 has no near-ties."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family]})
    config._attn_implementation = attention
    target = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    # Generation must not stop at an EOS by accident; tests that want one set it.
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target.to(dtype).eval()


def make_drafter(target, shape: str = "eagle3", dtype: torch.dtype | None = None, seed: int = 1, **overrides):
    torch.manual_seed(seed)
    drafter = CoralDraftModel.from_target(target, shape=shape, **overrides)
    return drafter.to(dtype or target.dtype).eval()


def randomize(module: torch.nn.Module, seed: int = 2, scale: float = 0.3) -> torch.nn.Module:
    """Noise on every parameter, so that no test passes because norms are one or an `fc` is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


TEMPLATE = (
    "{% for message in messages %}[{{ message['role'][0] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def make_tokenizer(chat_template=TEMPLATE):
    """One token per character, from id 14 on; lower ids decode to nothing."""
    vocab = {f"<{index}>": index for index in range(14)} | {chr(32 + index): 14 + index for index in range(95)}
    vocab |= {chr(0xC0 + index): 109 + index for index in range(19)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[f"<{index}>" for index in range(14)]
    )
    fast.chat_template = chat_template
    return fast
