"""The paper's targets by their published configs, and the parameters of EAGLE's drafters for them."""

from transformers import LlamaConfig, Qwen2Config


TARGETS = {
    "llama-2-7b-chat": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "llama-3-8b-instruct": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen2.5-7b-instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}

# fc + q, k, v, o + gate, up, down + the norm, by hand from the configs above
EAGLE_PARAMETERS = {
    "llama-2-7b-chat": 2 * 4096**2 + 4 * 4096**2 + 3 * 4096 * 11008 + 4096,
    "llama-3-8b-instruct": 2 * 4096**2 + 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 4096,
    "qwen2.5-7b-instruct": 2 * 3584**2 + 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944 + 3584,
}
