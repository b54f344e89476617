"""The rollout against written-out and slow references, and against generation token by token."""

import pytest
import torch
from helpers.rollout_reference import VARIANTS, build, expected_valid, random_inputs, reference_rollout
from helpers.tiny_models import make_drafter, make_target, randomize

from coral_hf.drafter.draft_layer import DraftKeyValues, shift_rows


@pytest.mark.parametrize("variant", ["eagle", "eagle3"])
def test_the_example_of_the_method_by_hand(variant, exact_norms, monkeypatch):
    """Ids x0..x3: rows 0..2; the inputs and keys of row 2 in steps 1, 2 and 3 (method.md, 'Multi-step training')."""
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
    """A document has the outputs that it would have alone, whatever comes before and after it."""
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
    """A mask for a long prompt would be as large as the target; the results equal those with a mask."""
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
