"""`convert --to gguf`: tensors named and ordered as in llama.cpp, the keys that it reads, and unsupported drafters.

The reference at the end is llama.cpp's forward on the file's own tensors, with RoPE over adjacent pairs of rows.
"""

import math
import shlex
import sys

import gguf
import numpy as np
import pytest
import torch
from helpers.engine_drafters import DRAFT_IDS, THREE, eight_layer_target
from helpers.tiny_models import make_drafter, randomize

from coral_hf.cli import main
from coral_hf.conversion import export_gguf
from coral_hf.drafter.target_adapter import TargetAdapter


PRE_NORM = {**THREE, "norm_output": False, "target_name_or_path": "org/target", "draft_depth": 3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "plain": {},
    "normed residual": {"norm_before_residual": True},
    "norm before fc": {"norm_before_fc": True},
    "head of its own": {"draft_vocab_size": 10},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "llama3 RoPE": {"rope_parameters": LLAMA3},
    "layers in another order": {"target_feature_layers": [5, 0, 2]},
}


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


def write_target(path, **changes):
    """The metadata of a target's GGUF file that the export reads."""
    sizes = {"embedding_length": 32, "block_count": 8, "vocab": 128, **changes}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(sizes["embedding_length"])
    writer.add_block_count(sizes["block_count"])
    if ahead := sizes.get("nextn_predict_layers"):
        writer.add_uint32("llama.nextn_predict_layers", ahead)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(sizes["vocab"])])
    writer.add_token_types([1] * sizes["vocab"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return path


@pytest.fixture(scope="module")
def target_file(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target") / "a model.gguf")


def make(target, dtype=torch.float32, **settings):
    drafter = randomize(make_drafter(target, dtype=torch.float32, **{**PRE_NORM, **settings}), scale=0.1).to(dtype)
    if drafter.draft_head is not None and len(drafter.draft_head.token_ids) == len(DRAFT_IDS):
        drafter.draft_head.token_ids.copy_(DRAFT_IDS)
    return drafter


def read(folder):
    """The keys of a file, and its tensors as torch's."""
    reader = gguf.GGUFReader(folder / "drafter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        data = torch.from_numpy(np.array(tensor.data))
        bfloat16 = tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        tensors[tensor.name] = data.view(torch.bfloat16) if bfloat16 else data
    return fields, tensors


def half_pairs(weight, heads):
    """Undoes llama.cpp's order, row by row: rows 2i and 2i + 1 of a head were its rows i and i + d/2."""
    size = len(weight) // heads
    result = torch.empty_like(weight)
    for row in range(len(weight)):
        head, place = divmod(row, size)
        result[head * size + place // 2 + (place % 2) * (size // 2)] = weight[row]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_comes_back(kind, dtype, target, target_file, tmp_path):
    drafter = make(target, dtype, **KINDS[kind])
    export_gguf(drafter, tmp_path / "out", target_file)
    _, tensors = read(tmp_path / "out")
    config = drafter.config
    layer = drafter.layer
    expected = {
        "fc.weight": drafter.fc.weight,
        "output_norm.weight": drafter.norm.weight,
        "blk.0.attn_norm.weight": layer.input_layernorm.weight,
        "blk.0.attn_norm_2.weight": layer.hidden_norm.weight,
        "blk.0.attn_v.weight": layer.self_attn.v_proj.weight,
        "blk.0.attn_output.weight": layer.self_attn.o_proj.weight,
        "blk.0.ffn_norm.weight": layer.post_attention_layernorm.weight,
        "blk.0.ffn_gate.weight": layer.mlp.gate_proj.weight,
        "blk.0.ffn_up.weight": layer.mlp.up_proj.weight,
        "blk.0.ffn_down.weight": layer.mlp.down_proj.weight,
    }
    if kind == "norm before fc":
        expected["enc.output_norm.weight"] = drafter.input_norm.weight
    if kind == "head of its own":
        expected |= {"output.weight": drafter.draft_head.weight, "d2t": DRAFT_IDS}
    for name, tensor in expected.items():
        found = tensors.pop(name)
        assert torch.equal(found, tensor.float() if tensor.is_floating_point() and tensor.dim() == 1 else tensor), name
        assert found.dtype == (dtype if tensor.dim() == 2 else torch.int64 if name == "d2t" else torch.float32), name
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        found = half_pairs(tensors.pop(f"blk.0.attn_{name}.weight"), heads)
        assert torch.equal(found, getattr(layer.self_attn, f"{name}_proj").weight)
    assert set(tensors) == ({"rope_freqs.weight"} if "RoPE" in kind else set())


def test_keys(target, target_file, tmp_path):
    drafter = make(target, norm_before_fc=True)
    export = export_gguf(drafter, tmp_path / "out", target_file)
    fields, _ = read(tmp_path / "out")
    config = drafter.config
    own = {name: value for name, value in fields.items() if name.startswith("eagle3.")}
    assert own == {
        "eagle3.context_length": config.max_position_embeddings,
        "eagle3.embedding_length": config.hidden_size,
        "eagle3.block_count": 1,
        "eagle3.feed_forward_length": config.intermediate_size,
        "eagle3.attention.head_count": config.num_attention_heads,
        "eagle3.attention.head_count_kv": config.num_key_value_heads,
        "eagle3.attention.key_length": config.head_dim,
        "eagle3.attention.value_length": config.head_dim,
        "eagle3.attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "eagle3.rope.dimension_count": config.head_dim,
        "eagle3.rope.freq_base": config.rope_parameters["rope_theta"],
        "eagle3.vocab_size": config.vocab_size,
        "eagle3.target_layers": [2, 4, 5],
        "eagle3.target_hidden_size": config.hidden_size,
        "eagle3.norm_before_residual": False,
        "eagle3.norm_before_fc": True,
    }
    assert fields["general.architecture"] == "eagle3" and "org/target" in fields["general.name"]
    given = {name: field.contents() for name, field in gguf.GGUFReader(target_file).fields.items()}
    copied = {name for name in given if name.startswith("tokenizer.ggml.")}
    assert len(copied) == 4 and {name: fields[name] for name in copied} == {name: given[name] for name in copied}
    assert shlex.split(export.command) == [
        *("llama-server", "-m", str(target_file), "--spec-type", "draft-eagle3"),
        *("--spec-draft-model", str(tmp_path / "out" / "drafter.gguf"), "--spec-draft-n-max", "3"),
    ]
    assert not export.notes


def test_a_whole_head_in_order_needs_no_ids(target, target_file, tmp_path):
    for name, ids in (("whole", torch.arange(128)), ("permuted", torch.arange(128).flip(0))):
        drafter = make(target, draft_vocab_size=128)
        drafter.draft_head.token_ids.copy_(ids)
        export_gguf(drafter, tmp_path / name, target_file)
        _, tensors = read(tmp_path / name)
        assert ("d2t" in tensors) == (name == "permuted") and torch.equal(tensors.get("d2t", ids), ids)


def test_what_is_left_out_is_said(target, target_file, tmp_path):
    drafter = make(target, draft_top_k=2, draft_total_tokens=6)
    drafter.add_shortlist(torch.arange(128), 20)
    drafter.add_router(8)
    drafter.add_low_rank_head(target, 6)
    notes = export_gguf(drafter, tmp_path / "out", target_file).notes
    assert [line.split(";")[0] for line in notes] == [
        "Left out: the LM-head router",
        "Left out: the low-rank head",
        "Left out: the shortlist of 20 ids",
        "llama.cpp drafts a chain of 3, not a tree (draft_top_k=2).",
    ]


REFUSED = {
    "no eagle shape; use --to vllm": {"shape": "eagle", "target_feature_layers": [-1]},
    r"\[-1\]: it reads the inputs of exactly 3": {"target_feature_layers": [-1]},
    r"\[2, 4, -1\]: it reads the inputs": {"target_feature_layers": [2, 4, -1]},
    r"\[1, 2, 4, 5\]: it reads the inputs": {"target_feature_layers": [1, 2, 4, 5]},
    "norm_output=True, it feeds the state before the norm back": {"norm_output": True},
    "fc_norm=True, it has one norm": {"fc_norm": True},
    "hidden_act='gelu', its MLP": {"hidden_act": "gelu"},
    "attention_bias=True, its q/k/v": {"attention_bias": True},
    "rope_type='yarn', only default, linear, llama3": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_llama_cpp_lacks_is_refused(message, target, target_file, tmp_path):
    with pytest.raises(ValueError, match=f"llama.cpp cannot express this drafter: .*{message}"):
        export_gguf(make(target, **REFUSED[message]), tmp_path / "out", target_file)
    assert not list(tmp_path.iterdir())


def test_the_targets_file_is_checked(target, tmp_path):
    drafter = make(target)
    (tmp_path / "damaged").write_bytes(b"GGUF")
    for name, changes, message in (
        ("absent", None, "absent is not a file: give the target's GGUF file"),
        ("damaged", None, "damaged or not the GGUF file"),
        ("width", {"embedding_length": 64}, "hidden_size=64, not 32"),
        ("ids", {"vocab": 100}, "vocab_size=100, not 128"),
        ("depth", {"block_count": 12}, "num_hidden_layers=12, not 8"),
    ):
        path = tmp_path / name
        if changes:
            write_target(path, **changes)
        with pytest.raises(ValueError, match=message):
            export_gguf(drafter, tmp_path / "out", path)
        assert not (tmp_path / "out").exists()
    export_gguf(drafter, tmp_path / "out", write_target(tmp_path / "ahead", block_count=9, nextn_predict_layers=1))


def test_command_line(target, target_file, tmp_path, capsys, monkeypatch):
    make(target, draft_depth=5, draft_top_k=2).save_pretrained(tmp_path / "drafter")
    monkeypatch.chdir(tmp_path)
    convert = ["convert", "--to", "gguf", "drafter", "out"]
    assert main([*convert, "--target", str(target_file), "--draft-depth", "4"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith("--spec-draft-model out/drafter.gguf --spec-draft-n-max 4")
    )
    convert[-1] = "bad"
    named = [*convert, "--target", str(target_file)]
    for wrong, message in (
        (convert, "name the target's GGUF file (--target model.gguf)"),
        ([*convert, "--target", "demo"], "demo is not a file"),
        ([*named, "--draft-top-k", "2"], "--draft_top_k 2: llama.cpp drafts a chain of --draft_depth tokens"),
        ([*named, "--dtype", "float32"], "--dtype float32 is for loading a target"),
        ([*named, "--target-revision", "v1"], "are for loading a target, and this export loads none"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_without_the_package_the_error_names_the_extra(target, target_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'coral-hf\[demo\]'"):
        export_gguf(make(target), tmp_path / "out", target_file)


# llama.cpp's forward, slowly ---------------------------------------------------------------------------------------


def rms_norm(x, weight, epsilon):
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def rotate_adjacent(rows, base, factors):
    """RoPE of one head's rows `[S, d]` at positions 0..S-1, over the pairs (2i, 2i + 1)."""
    result = rows.clone()
    for position in range(len(rows)):
        for i in range(rows.shape[1] // 2):
            angle = position * base ** (-2 * i / rows.shape[1]) / factors[i]
            a, b = rows[position, 2 * i], rows[position, 2 * i + 1]
            result[position, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            result[position, 2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return result


def decode(w, fields, embeds, states):
    """The layer's output before the norm `[S, H]`, from embeddings and features or its own states `[S, H]`."""
    epsilon, size = fields["eagle3.attention.layer_norm_rms_epsilon"], fields["eagle3.attention.key_length"]
    heads, shared = fields["eagle3.attention.head_count"], fields["eagle3.attention.head_count_kv"]
    normed = rms_norm(states, w["blk.0.attn_norm_2.weight"], epsilon)
    x = torch.cat([rms_norm(embeds, w["blk.0.attn_norm.weight"], epsilon), normed], -1)
    factors = w.get("rope_freqs.weight", torch.ones(size // 2))
    q, k, v = (
        (x @ w[f"blk.0.attn_{name}.weight"].T).view(len(x), -1, size).transpose(0, 1) for name in ("q", "k", "v")
    )
    out = []
    for head in range(heads):
        rotated = (
            rotate_adjacent(rows, fields["eagle3.rope.freq_base"], factors)
            for rows in (q[head], k[head * shared // heads])
        )
        query, key = rotated
        scores = (query @ key.T / math.sqrt(size)).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ v[head * shared // heads])
    attended = torch.cat(out, -1) @ w["blk.0.attn_output.weight"].T
    hidden = attended + (normed if fields["eagle3.norm_before_residual"] else states)
    x = rms_norm(hidden, w["blk.0.ffn_norm.weight"], epsilon)
    gate = x @ w["blk.0.ffn_gate.weight"].T
    return hidden + (gate * gate.sigmoid() * (x @ w["blk.0.ffn_up.weight"].T)) @ w["blk.0.ffn_down.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpps_forward_of_the_file_drafts_the_same(kind, target, target_file, tmp_path):
    """Three steps of a chain: the file's tensors alone give the drafter's logits, as llama.cpp would compute them."""
    drafter = make(target, **KINDS[kind])
    export_gguf(drafter, tmp_path / "out", target_file)
    fields, tensors = read(tmp_path / "out")
    w = {name: tensor.double() for name, tensor in tensors.items()}
    epsilon = fields["eagle3.attention.layer_norm_rms_epsilon"]
    ids = [5, 9, 3, 77, 31, 8, 100, 64]
    # the inputs of the layers that the file names, side by side
    streams = target(torch.tensor([ids]), output_hidden_states=True).hidden_states
    features = torch.cat([streams[layer][0, :-1] for layer in fields["eagle3.target_layers"]], -1)
    states = features.double()
    if fields["eagle3.norm_before_fc"]:
        states = rms_norm(states, w["enc.output_norm.weight"], epsilon)
    states = states @ w["fc.weight"].T
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    scored = tensors.get("d2t", torch.arange(len(head)))
    ours = drafter.project_features(
        TargetAdapter(target, drafter.config.target_feature_layers).compute_features(torch.tensor([ids]))[:, :-1]
    )
    for _ in range(3):
        out = decode(w, fields, embedding[ids[1:]].double(), states)
        found = rms_norm(out[-1], w["output_norm.weight"], epsilon) @ w.get("output.weight", head.double()).T
        expected, fed_back = whole_forward(drafter, embedding[ids[1:]], ours, head)
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
        ids.append(int(scored[found.argmax()]))
        states = torch.cat([states, out[-1:]])
        ours = torch.cat([ours, fed_back[:, -1:]], 1)


def whole_forward(drafter, embeds, states, head):
    """The drafter's own logits of the last row, and the states that it feeds back, all rows at once."""
    cos, sin = drafter.rotary(torch.arange(len(embeds))[None], embeds)
    layer = drafter.layer
    inputs, residual = layer.inputs(embeds[None], states, drafter.fc)
    normed, fed_back = drafter._outputs(
        layer.finish(layer.self_attn.attend(*layer.self_attn.project(inputs, cos, sin), None), residual)
    )
    own = drafter.draft_head
    return (normed @ (head if own is None else own.weight).T)[0, -1], fed_back
