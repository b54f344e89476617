"""The rollout against written-out and slow references, and against what generation computes token by token."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, make_drafter, make_target, randomize
from safetensors.torch import load_file
from transformers import AutoModel

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter
from coral_hf.draft_layer import DraftKeyValues, shift_rows


VARIANTS = {
    "eagle": {"shape": "eagle"},
    "eagle-fc-bias": {"shape": "eagle", "fc_bias": True, "attention_bias": True},
    "eagle3": {"shape": "eagle3"},
    "eagle3-raw-feedback": {"shape": "eagle3", "norm_output": False, "norm_before_residual": True},
    "eagle3-two-features": {"shape": "eagle3", "target_feature_layers": [1, -1]},
}


def build(variant: str, dtype: torch.dtype = torch.float64) -> CoralDraftModel:
    return randomize(make_drafter(make_target(dtype=dtype), **VARIANTS[variant]), scale=0.1)


def random_inputs(
    drafter: CoralDraftModel, batch: int, length: int, seed: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size, dtype = drafter.config.hidden_size, drafter.dtype
    embeds = torch.randn(batch, length, size, generator=generator, dtype=torch.float64).to(dtype)
    width = size * drafter.config.num_target_features
    features = torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)
    return embeds, features


def rotate(x: torch.Tensor, position: int, drafter: CoralDraftModel) -> torch.Tensor:
    """RoPE of `[heads, d]` at one position, written out per pair (i, i + d/2)."""
    half = x.shape[-1] // 2
    angles = (torch.tensor(float(position)) * drafter.rotary_emb.inv_freq.float()).to(torch.float32)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def reference_rollout(drafter, embeds, features, num_steps, documents, detach=True):
    """Every step with its full list of visible keys per row and -inf masks; loops over samples, steps and rows."""
    config, layer, attention = drafter.config, drafter.layer, drafter.layer.self_attn
    groups = config.num_attention_heads // config.num_key_value_heads
    all_outputs = []
    for sample in range(embeds.shape[0]):
        length = embeds.shape[1]
        document = documents[sample]
        feature = drafter.project_features(features[sample])  # [S, H]
        keys, values, outputs = {}, {}, []
        for step in range(1, num_steps + 1):
            if config.shape == "eagle":
                attention_input = residual = drafter.fc(torch.cat([embeds[sample], feature], -1))
            else:
                normed = layer.hidden_norm(feature)
                residual = normed if config.norm_before_residual else feature
                attention_input = torch.cat([layer.input_layernorm(embeds[sample]), normed], -1)
            queries = {}
            for row in range(length):
                heads = attention.q_proj(attention_input[row]).view(-1, config.head_dim)
                queries[row] = rotate(heads, row, drafter)
                heads = attention.k_proj(attention_input[row]).view(-1, config.head_dim)
                keys[step, row] = rotate(heads, row, drafter)
                values[step, row] = attention.v_proj(attention_input[row]).view(-1, config.head_dim)
            every = list(keys)  # all (step, row) so far
            stacked_keys = torch.stack([keys[pair] for pair in every]).repeat_interleave(
                groups, dim=1
            )  # [E, heads, d]
            stacked_values = torch.stack([values[pair] for pair in every]).repeat_interleave(groups, dim=1)
            merged = []
            for row in range(length):
                visible = {(1, c) for c in range(row - (step - 1) + 1) if document[c] == document[row]}
                visible |= {(j, row - (step - j)) for j in range(2, step + 1)}
                mask = torch.tensor([0.0 if pair in visible else float("-inf") for pair in every], dtype=embeds.dtype)
                scores = torch.einsum("hd,ehd->he", queries[row], stacked_keys) / config.head_dim**0.5 + mask
                merged.append(torch.einsum("he,ehd->hd", scores.softmax(-1), stacked_values).flatten())
            hidden = residual + attention.o_proj(torch.stack(merged))
            normed = layer.post_attention_layernorm(hidden)
            mlp = layer.mlp
            hidden = hidden + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
            output = drafter.norm(hidden)
            outputs.append(output)
            fed_back = output if config.norm_output else hidden
            fed_back = fed_back.detach() if detach else fed_back
            feature = torch.cat([torch.zeros_like(fed_back[:1]), fed_back[:-1]])
        all_outputs.append(torch.stack(outputs))
    return torch.stack(all_outputs, dim=1)  # [K, B, S, H]


def expected_valid(documents: torch.Tensor, step: int) -> torch.Tensor:
    valid = torch.zeros_like(documents, dtype=torch.bool)
    for sample in range(documents.shape[0]):
        for row in range(documents.shape[1]):
            chain = range(row - (step - 1), row + 1)
            valid[sample, row] = chain[0] >= 0 and len({int(documents[sample, r]) for r in chain}) == 1
    return valid


# The rollout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["eagle", "eagle3"])
def test_the_example_of_the_method_by_hand(variant, exact_norms, monkeypatch):
    """Ids x0..x3: rows 0..2; what row 2 reads and sees in steps 1, 2 and 3 (method.md, 'Multi-step training')."""
    drafter = build(variant)
    embeds, features = random_inputs(drafter, 1, 3)
    layer, attention = drafter.layer, drafter.layer.self_attn
    read, queries, keys, values, attended = [], [], [], [], []
    inputs, project, finish = layer.inputs, attention.project, layer.finish

    def spy_inputs(embedding, feature, fc):
        read.append((embedding, feature))
        return inputs(embedding, feature, fc)

    def spy_project(x, cos, sin):
        q, k, v = project(x, cos, sin)
        queries.append(q), keys.append(k.repeat_interleave(2, 1)), values.append(v.repeat_interleave(2, 1))
        return q, k, v

    def spy_finish(x, residual):
        attended.append(x)
        return finish(x, residual)

    monkeypatch.setattr(layer, "inputs", spy_inputs)
    monkeypatch.setattr(attention, "project", spy_project)
    monkeypatch.setattr(layer, "finish", spy_finish)
    with torch.no_grad():
        outputs = drafter(embeds, features, num_steps=3)
    h1, h2, _ = outputs.hidden_states

    # rows 0..2 read e(x_{r+1}), and in step 1 f_r
    assert all(torch.equal(embedding, embeds) for embedding, _ in read)
    assert torch.equal(read[0][1], features)
    assert torch.equal(read[1][1][0, 2], h1[0, 1]), "step 2, row 2 reads h1[1]"
    assert torch.equal(read[2][1][0, 2], h2[0, 1]), "step 3, row 2 reads h2[1]"

    def attend(step, row, pairs):
        """One softmax of Q_step[row] over the given (step, row) keys, per head."""
        k = torch.stack([keys[j - 1][0, :, c] for j, c in pairs], dim=1)  # [heads, n, d]
        v = torch.stack([values[j - 1][0, :, c] for j, c in pairs], dim=1)
        scores = (queries[step - 1][0, :, row, None] * k).sum(-1) / drafter.config.head_dim**0.5
        return (scores.softmax(-1)[..., None] * v).sum(1)

    for step, row, pairs in [
        (1, 0, [(1, 0)]),
        (1, 2, [(1, 0), (1, 1), (1, 2)]),
        (2, 1, [(1, 0), (2, 1)]),
        (2, 2, [(1, 0), (1, 1), (2, 2)]),
        (3, 2, [(1, 0), (2, 1), (3, 2)]),
    ]:
        torch.testing.assert_close(attended[step - 1][0, :, row], attend(step, row, pairs), rtol=0, atol=1e-12)
    assert [valid[0].tolist() for valid in outputs.valid] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_equals_the_slow_reference(variant, num_steps, packed, exact_norms):
    drafter = build(variant)
    embeds, features = random_inputs(drafter, 2, 10)
    documents = torch.zeros(2, 10, dtype=torch.long)
    if packed:
        documents[0] = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1, -1])  # two documents, then padding
    with torch.no_grad():
        outputs = drafter(embeds, features, num_steps=num_steps, document_ids=documents if packed else None)
        expected = reference_rollout(drafter, embeds, features, num_steps, documents.tolist())
    assert len(outputs.hidden_states) == len(outputs.valid) == num_steps
    for step in range(1, num_steps + 1):
        hidden, valid = outputs.hidden_states[step - 1], outputs.valid[step - 1]
        assert hidden.isfinite().all(), "rows that mean nothing must not poison gradients either"
        assert torch.equal(valid, expected_valid(documents, step)) or (step == 1 and valid.all())
        torch.testing.assert_close(hidden[valid], expected[step - 1][valid], rtol=0, atol=1e-10)


def test_padding_and_neighbours_do_not_leak(exact_norms):
    """A document's outputs are those it has on its own, whatever lies before and behind it."""
    drafter = build("eagle3")
    embeds, features = random_inputs(drafter, 1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2])
    with torch.no_grad():
        together = drafter(embeds, features, num_steps=3, document_ids=documents)
        # RoPE is relative, so that a later document may start at position 0 again
        alone = drafter(embeds[:, 5:10], features[:, 5:10], num_steps=3)
    for step in range(3):
        torch.testing.assert_close(
            together.hidden_states[step][:, 5 + step : 10], alone.hidden_states[step][:, step:], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_equals_generation_token_by_token(variant, exact_norms):
    """Step k at row r is the k-th draft of a chain that starts at row r-(k-1): true rows, then its own outputs."""
    drafter = build(variant)
    length, num_steps = 9, 4
    embeds, features = random_inputs(drafter, 1, length)
    with torch.no_grad():
        rollout = drafter(embeds, features, num_steps=num_steps)
        projected = drafter.project_features(features)
        for start in range(length - num_steps + 1):
            cache = DraftKeyValues(drafter.config, 4, torch.float64, "cpu")
            # the true rows in two calls, as when the prompt is prefilled and a step then accepts more
            for first, end in ((0, start // 2), (start // 2, start + 1)):
                if first == end:
                    continue
                positions = torch.arange(first, end)[None]
                hidden, feature = drafter.draft(
                    embeds[:, first:end], projected[:, first:end], positions, cache, slot=cache.length
                )
                cache.length = end
                torch.testing.assert_close(hidden, rollout.hidden_states[0][:, first:end], rtol=0, atol=1e-10)
            feature = feature[:, -1:]
            for step in range(2, num_steps + 1):
                row = start + step - 1
                hidden, feature = drafter.draft(
                    embeds[:, row : row + 1], feature, torch.tensor([[row]]), cache, slot=cache.length + step - 2
                )
                expected = rollout.hidden_states[step - 1][:, row : row + 1]
                torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_prompt_and_a_single_row_are_drafted_without_a_mask(exact_norms, monkeypatch):
    """One for a long prompt would be as large as the target; what is computed is what a mask gives."""
    drafter = build("eagle3")
    embeds, features = random_inputs(drafter, 1, 9)
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, mask, **kwargs: masks.append(mask) or attention(query, key, value, mask, **kwargs),
    )
    outputs = []
    for given in (False, True):
        cache, rows = DraftKeyValues(drafter.config, 9, torch.float64, "cpu"), []
        for first, end in ((0, 6), (6, 7), (7, 9)):
            mask = torch.ones(end, end, dtype=torch.bool).tril()[None, None, first:] if given else None
            part = embeds[:, first:end], features[:, first:end], torch.arange(first, end)[None]
            rows += drafter.draft(*part, cache, slot=first, mask=mask)
        outputs.append(rows)
    assert [mask is None for mask in masks] == [True, True, False, False, False, False]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


def test_draft_with_a_mask_ignores_hidden_slots(exact_norms):
    drafter = build("eagle3")
    embeds, features = random_inputs(drafter, 1, 6)
    cache = DraftKeyValues(drafter.config, 6, torch.float64, "cpu")
    plain = DraftKeyValues(drafter.config, 6, torch.float64, "cpu")
    with torch.no_grad():
        for store in (cache, plain):
            drafter.draft(embeds[:, :4], features[:, :4], torch.arange(4)[None], store, slot=0)
        # two siblings at position 4: neither sees the other
        mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]], dtype=torch.bool)[None, None]
        both, _ = drafter.draft(embeds[:, 4:], features[:, 4:], torch.tensor([[4, 4]]), cache, slot=4, mask=mask)
        for index in range(2):
            one, _ = drafter.draft(
                embeds[:, 4 + index : 5 + index],
                features[:, 4 + index : 5 + index],
                torch.tensor([[4]]),
                plain,
                slot=4,
            )
            torch.testing.assert_close(both[:, index : index + 1], one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["eagle", "eagle3", "eagle3-two-features"])
def test_steps_are_detached_from_each_other(variant, exact_norms):
    """Gradients equal a reference that feeds back constants: step k reaches the features through step-1 columns only."""
    drafter = build(variant)
    embeds, features = random_inputs(drafter, 1, 6)
    weights = torch.randn(3, 1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for step in range(3):
        weights[step, :, :step] = 0.0  # rows without a chain mean nothing

    def gradients(rollout):
        drafter.zero_grad()
        leaf = features.clone().requires_grad_()
        (rollout(leaf) * weights).sum().backward()
        return [leaf.grad, *(parameter.grad.clone() for parameter in drafter.parameters())]

    documents = [[0] * 6]
    found = gradients(lambda leaf: torch.stack(drafter(embeds, leaf, num_steps=3).hidden_states))
    expected = gradients(lambda leaf: reference_rollout(drafter, embeds, leaf, 3, documents))
    attached = gradients(lambda leaf: reference_rollout(drafter, embeds, leaf, 3, documents, detach=False))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[0], attached[0], atol=1e-3)


def test_step_3_reaches_features_of_its_true_columns_only(exact_norms):
    drafter = build("eagle3")
    embeds, features = random_inputs(drafter, 1, 6)
    features.requires_grad_()
    output = drafter(embeds, features, num_steps=3).hidden_states[2]
    (gradient,) = torch.autograd.grad(output[0, 5].sum(), features)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [True, True, True, True, False, False]  # columns <= 5 - 2


def test_shift_rows():
    x = torch.arange(1, 5)
    assert shift_rows(x, 0, dim=0).tolist() == [1, 2, 3, 4]
    assert shift_rows(x, 1, dim=0).tolist() == [0, 1, 2, 3]
    assert shift_rows(x, 3, dim=0, fill=-2).tolist() == [-2, -2, -2, 1]
    assert shift_rows(x, 9, dim=0).tolist() == [0, 0, 0, 0]
    assert shift_rows(x[None, :, None], 1, dim=1)[0, :, 0].tolist() == [0, 1, 2, 3]


def test_a_rollout_deeper_than_the_sequence_is_finite():
    drafter = build("eagle3")
    embeds, features = random_inputs(drafter, 1, 2)
    outputs = drafter(embeds, features, num_steps=5)
    assert all(hidden.isfinite().all() for hidden in outputs.hidden_states)
    assert [int(valid.sum()) for valid in outputs.valid] == [2, 1, 0, 0, 0]


def test_bfloat16_rollout_is_close_to_float32():
    drafter = randomize(make_drafter(make_target(dtype=torch.float32), "eagle3"), scale=0.05)
    embeds, features = random_inputs(drafter, 2, 12)
    with torch.no_grad():
        exact = drafter(embeds, features, num_steps=3)
        coarse = drafter.to(torch.bfloat16)(embeds.bfloat16(), features.bfloat16(), num_steps=3)
    for step in range(3):
        ours, theirs = coarse.hidden_states[step][:, step:].float(), exact.hidden_states[step][:, step:]
        assert torch.cosine_similarity(ours, theirs, dim=-1).min() > 0.98


# Starting weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["eagle", "eagle3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_target_starts_finite(family, shape):
    target = make_target(family)
    drafter = make_drafter(target, shape, torch.float32)
    embeds, features = random_inputs(drafter, 1, 7)
    with torch.no_grad():
        outputs = drafter(embeds, features, num_steps=3)
    assert all(hidden.isfinite().all() for hidden in outputs.hidden_states)
    assert 0 < drafter.layer.self_attn.q_proj.weight.std() < 0.05
    assert CoralDraftModel.from_target(target, shape=shape).dtype == torch.float32, "whatever the target's dtype"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_the_final_norm_does_what_the_targets_does(family):
    """Gemma stores weight - 1: the copy must act the same, not look the same."""
    target = randomize(make_target(family, dtype=torch.float32))
    drafter = make_drafter(target, "eagle3")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(drafter.norm(x), target.get_decoder().norm(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drafter.norm.weight, torch.ones(32), atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_the_eagle_fc_starts_as_the_feature_and_a_share_of_the_embedding(family):
    target = randomize(make_target(family, dtype=torch.float32))
    drafter = make_drafter(target, "eagle")
    embeds = TargetAdapter(target).embed(torch.arange(128))[None]
    with torch.no_grad():
        features = target(torch.arange(128)[None], output_hidden_states=True).hidden_states[-1]
        of_embedding = drafter.fc(torch.cat([embeds, torch.zeros_like(features)], -1))
        of_feature = drafter.fc(torch.cat([torch.zeros_like(embeds), features], -1))
    assert torch.equal(of_feature, features)
    share = of_embedding.square().mean().sqrt() / features.square().mean().sqrt()
    assert 0.15 < share < 0.4


def test_several_features_start_as_the_last_one_and_a_share_of_the_others():
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, target_feature_layers=[1, 2, -1])
    blocks = drafter.fc.weight.unflatten(1, (3, 32))  # [H, n, H]
    assert torch.equal(blocks[:, -1], torch.eye(32))
    features = TargetAdapter(target, [1, 2, -1]).compute_features(torch.arange(3, 120)[None])
    sizes = features.unflatten(-1, (3, 32))[0].square().mean(-1).sqrt().median(0).values  # [n]
    assert sizes[:2].max() > 1.5 * sizes[2] or sizes[:2].min() < sizes[2] / 1.5  # layers of unlike size
    for index in (0, 1):
        part = features.unflatten(-1, (3, 32))[0, :, index] @ blocks[:, index].T
        assert 0.12 < part.square().mean(-1).sqrt().median() / sizes[2] < 0.5


def test_from_target_leaves_the_target_alone():
    target = make_target(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    drafter = randomize(CoralDraftModel.from_target(target))
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    shared = {parameter.data_ptr() for parameter in target.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in drafter.parameters()}


# Saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_exact(variant, dtype, tmp_path):
    drafter = build(variant, dtype)
    embeds, features = random_inputs(drafter, 1, 40)
    with torch.no_grad():
        before = drafter(embeds, features, num_steps=2).hidden_states[1]
    drafter.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {name for name, _ in drafter.named_parameters()}
    assert not any("embed" in name or "head" in name for name in stored)
    for loaded in (CoralDraftModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path, dtype=dtype)):
        assert type(loaded) is CoralDraftModel and loaded.dtype == dtype
        for name, parameter in drafter.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
        with torch.no_grad():
            assert torch.equal(loaded(embeds, features, num_steps=2).hidden_states[1], before)


def test_rope_survives_a_cast():
    """A bf16 `inv_freq` would turn far positions by a radian: casting the drafter must not touch it."""
    drafter = make_drafter(make_target(dtype=torch.float32))
    exact = drafter.rotary_emb.inv_freq.clone()
    for cast in (drafter.to(torch.bfloat16), drafter.half(), drafter.float()):
        assert torch.equal(cast.rotary_emb.inv_freq.float(), exact)


def test_round_trip_with_remote_code(tmp_path):
    """The saved folder loads where coral_hf cannot be imported, and drafts where it can."""
    code = f"""
    import sys
    import torch
    from pathlib import Path
    from safetensors.torch import load_file
    folder, target_folder = {str(tmp_path / "drafter")!r}, {str(tmp_path / "target")!r}
    sys.modules["coral_hf"] = None
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    drafter = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(drafter).__module__.startswith("transformers_modules"), type(drafter)
    stored = load_file(Path(folder) / "model.safetensors")
    assert set(stored) == {{name for name, _ in drafter.named_parameters()}}
    assert all(torch.equal(drafter.get_parameter(name), tensor) for name, tensor in stored.items())
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 32
    embeds = torch.zeros(1, 5, 32)
    assert drafter(embeds, embeds, num_steps=3).hidden_states[2].isfinite().all()
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    assert type(drafter).from_target(target).config.hidden_size == 32
    try:
        target.generate(torch.tensor([[5, 9, 3, 77]]), max_new_tokens=4, assistant_model=drafter)
    except AttributeError as error:
        assert "pip install coral-hf" in str(error), error
    else:
        raise AssertionError("Transformers' own loop took a drafter")
    drafter.save_pretrained(folder + "-saved")

    del sys.modules["coral_hf"]
    import coral_hf
    ids = torch.tensor([[5, 9, 3, 77]])
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    drafted = target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(plain, drafted)
    assert drafter.last_stats.steps > 0
    """
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")
    drafter = randomize(make_drafter(target))
    auto_classes = CoralDraftConfig._auto_class, CoralDraftModel._auto_class
    try:
        CoralDraftConfig.register_for_auto_class()
        CoralDraftModel.register_for_auto_class("AutoModel")
        drafter.save_pretrained(tmp_path / "drafter")
    finally:
        CoralDraftConfig._auto_class, CoralDraftModel._auto_class = auto_classes
    written = {path.name for path in (tmp_path / "drafter").glob("*.py")}
    assert {"configuration_coral.py", "modeling_coral.py"} <= written
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


# The cache -----------------------------------------------------------------------------------------------------


def test_draft_key_values_grow_and_keep_what_they_hold():
    config = CoralDraftConfig(hidden_size=8, num_attention_heads=2, head_dim=4, vocab_size=8)
    cache = DraftKeyValues(config, 3, torch.float64, "cpu")
    first = torch.arange(1, 17, dtype=torch.float64).view(1, 2, 2, 4)
    cache.write(0, first, -first)
    cache.length = 2
    assert cache.max_length == 3
    more = torch.full((1, 2, 5, 4), 7.0, dtype=torch.float64)
    cache.write(2, more, -more)
    assert cache.max_length == 7 and cache.length == 2
    assert torch.equal(cache.keys[:, :, :2], first) and torch.equal(cache.values[:, :, :2], -first)
    assert torch.equal(cache.keys[:, :, 2:7], more) and torch.equal(cache.values[:, :, 2:7], -more)
    cache.write(7, more[:, :, :1], more[:, :, :1])
    assert cache.max_length == 14, "one token too many doubles the buffer, so that growing stays rare"
    cache.write(2, -more, more)
    assert torch.equal(cache.keys[:, :, 2:7], -more), "scratch is overwritten"
