"""Runs in an interpreter with xllamacpp: the server of a printed `llama-server` command, on loopback, until stdin is closed.

    python serve_xllamacpp.py llama-server -m model.gguf --spec-type draft-eagle3 --spec-draft-model drafter.gguf ...

The wheel contains llama.cpp's server as a class and not as a program. Prints the address once it answers. One thread, one
sequence, keys and values in float32, so that both models are computed as exactly as their weights allow.
"""

import argparse
import sys

import xllamacpp


def settings(words: list[str]) -> xllamacpp.CommonParams:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("program", choices=["llama-server"])
    parser.add_argument("-m", dest="model", required=True)
    parser.add_argument("--spec-type", choices=["draft-eagle3"])
    parser.add_argument("--spec-draft-model")
    parser.add_argument("--spec-draft-n-max", type=int)
    given = parser.parse_args(words)
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.n_ctx, params.n_parallel, params.cache_ram_mib, params.warmup = 512, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    caches = [params]
    if given.spec_type:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        params.speculative.draft.mparams.path = given.spec_draft_model
        params.speculative.draft.n_max = given.spec_draft_n_max
        caches.append(params.speculative.draft)
    for cache in caches:
        cache.cache_type_k = cache.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return params


if __name__ == "__main__":
    server = xllamacpp.Server(settings(sys.argv[1:]))
    print(server.listening_address, flush=True)
    sys.stdin.read()
