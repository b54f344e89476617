"""Templates that leave out earlier thinking: each answer is trained as the target wrote it, after its own prompt."""

import pytest
from helpers.thinking_templates import TEMPLATES, thinking_tokenizer
from helpers.tiny_models import make_tokenizer

from coral_hf.data.chat import UnusableRow
from coral_hf.data.dataset import ConversationDataset, encode_row, encode_row_parts


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
# how a family writes the answer TEXT with the thinking "hm", and one without any
THOUGHT = {
    "qwen3": "<think> hm </think> TEXT{e}",
    "glm45": " <think>hm</think> TEXT",
    "harmony": "|channel|analysis|message|hm|end||start|assistant|channel|final|message|TEXT|return|",
}
PLAIN = {
    "qwen3": "<think>  </think> TEXT{e}",
    "glm45": " <think></think> TEXT",
    "harmony": "|channel|final|message|TEXT|return|",
}
MESSAGES = [
    {"role": role, "content": text}
    for role, text in zip(["user", "assistant"] * 3, ["one", "yes", "two", "no", "three", "so"], strict=True)
]


def texts(tokenizer, row):
    """For each row with training tokens: its text, and the part that is trained."""
    parts, unusable = encode_row_parts(row, tokenizer, "here", {tokenizer.convert_tokens_to_ids("}")})
    assert not unusable
    return [
        (tokenizer.decode(ids), tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on]))
        for ids, mask in parts
    ]


def prompt_of(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


@pytest.mark.parametrize("family", THOUGHT)
@pytest.mark.parametrize("form", ["content", "reasonings", "messages"])
def test_each_answer_is_trained_after_its_own_prompt(family, form):
    tokenizer, answers = thinking_tokenizer(family), ["yes", "no", "so"]
    row = {"turns": ["one", "two", "three"], "responses": answers, "reasonings": ["hm"] * 3}
    if form == "content" and family != "harmony":  # as a server without a reasoning parser answers
        row = {**row, "responses": [f"<think> hm </think> {answer}" for answer in answers], "reasonings": None}
    if form == "messages":
        row = {"messages": [{**m, "reasoning_content": "hm" if m["role"] == "assistant" else None} for m in MESSAGES]}
    found = texts(tokenizer, row)
    assert len(found) == 3
    for number, (text, trained) in enumerate(found):
        assert trained == THOUGHT[family].replace("TEXT", answers[number])
        assert text == prompt_of(tokenizer, MESSAGES[: 2 * number + 1]) + trained, "what the target saw and said"
    if form != "messages":
        assert texts(tokenizer, {**row, "first_turn": 2}) == found[2:]


@pytest.mark.parametrize("family", THOUGHT)
def test_answers_without_thinking(family):
    tokenizer = thinking_tokenizer(family)
    found = texts(tokenizer, {"messages": MESSAGES})
    trained = [PLAIN[family].replace("TEXT", answer) for answer in ("yes", "no", "so")]
    # GLM's history has the same empty blocks, so that one row contains all answers
    assert [part for _, part in found] == (["".join(trained)] if family == "glm45" else trained)
    assert found[-1][0].startswith(prompt_of(tokenizer, MESSAGES[:-1]))


@pytest.mark.parametrize("family", TEMPLATES)
def test_one_turn_is_one_row(family):
    tokenizer = thinking_tokenizer(family)
    ((text, trained),) = texts(tokenizer, {"turns": ["one"], "responses": ["yes"], "reasonings": ["hm"]})
    assert text == prompt_of(tokenizer, MESSAGES[:1]) + trained
    # the tokenizer has no line breaks: however many are one token
    assert trained == THOUGHT.get(family, "hm<0></think><0>TEXT<|eos|>").replace("TEXT", "yes")


def test_thinking_that_the_template_never_keeps():
    """DeepSeek-R1: the prompt opens the block, and the row must bring what follows."""
    tokenizer = thinking_tokenizer("deepseek_r1")
    row = {"turns": ["one", "two"], "responses": ["hm</think> yes", "<think>well</think> no"]}
    first, second = texts(tokenizer, row)
    assert first == ("<|User|>one<|Assistant|><think> hm</think> yes<|eos|>", "hm</think> yes<|eos|>")
    assert second[0] == "<|User|>one<|Assistant|>yes<|eos|><|User|>two<|Assistant|><think> well</think> no<|eos|>"
    assert second[1] == "well</think> no<|eos|>"
    with pytest.raises(
        UnusableRow, match=r"here: .*\(their thinking\), and the row has none.*--endpoint_token_ids true"
    ):
        encode_row({"turns": ["one"], "responses": ["yes"]}, tokenizer, "here")


@pytest.mark.parametrize("family", THOUGHT)
@pytest.mark.parametrize("thought", [True, False])
def test_tool_calls_with_and_without_thinking(family, thought):
    tokenizer = thinking_tokenizer(family)
    thinking = {"reasoning_content": "hm"} if thought else {}
    messages = [
        {"role": "user", "content": "sum"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], **thinking},
    ]
    messages += [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "it is 3", **thinking}]
    found = texts(tokenizer, {"messages": messages, "tools": TOOLS})
    for number, place in ((0, 1), (-1, 3)):
        assert found[number][0].startswith(prompt_of(tokenizer, messages[:place], tools=TOOLS))
    trained = [part for _, part in found]
    assert "add" in trained[0] and '{"a": 1}' in trained[0] and "it is 3" in trained[-1]
    assert "".join(trained).count("hm") == 2 * thought
    assert not any(word in part for part in trained for word in ("tools:", "tool_response", "sum"))


def test_a_call_followed_by_an_answer_without_thinking():
    """The empty block of the call is not in the prompt of the answer: two rows."""
    tokenizer = thinking_tokenizer("qwen3")
    messages = [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    messages += [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]
    (_, call), (text, answer) = texts(tokenizer, {"messages": messages})
    assert call.startswith('<think>  </think>  <tool_call>add {"a": 1}')
    assert answer == "<think>  </think> 3{e}" and text.count("<think>") == 1


@pytest.mark.parametrize("family", ["qwen3", "glm45"])
@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_the_mode_of_a_row_is_its_column(family, kwargs):
    """With thinking off, the empty block belongs to the prompt and is not trained."""
    tokenizer, row = thinking_tokenizer(family), {"turns": ["one"], "responses": ["yes"]}
    ((_, thinking),) = texts(tokenizer, row)
    ((text, trained),) = texts(tokenizer, {**row, "chat_template_kwargs": kwargs})
    assert text == prompt_of(tokenizer, MESSAGES[:1], enable_thinking=False) + trained
    assert "<think>" in thinking and "<think>" not in trained


def test_thinking_that_was_cut_off_is_trained_as_it_was_said():
    tokenizer = thinking_tokenizer("qwen3")
    row = {"turns": ["one", "two"], "responses": ["yes", "<think> long"], "finish_reasons": ["stop", "length"]}
    _, (text, trained) = texts(tokenizer, row)
    assert trained == "<think> long" and text.count("<think>") == 1
    row = {"turns": ["one"], "responses": ["<think> hm </think> yes, and"], "finish_reasons": ["length"]}
    assert texts(tokenizer, row)[0][1] == "<think> hm </think> yes, and"


def test_what_cannot_be_trained_is_counted_and_left_out():
    tokenizer = thinking_tokenizer("deepseek_r1")
    good = {"turns": ["one"], "responses": ["hm</think> yes"]}
    odd = {"id": "odd", "turns": ["one", "two"], "responses": ["yes", "hm</think> no"]}
    dataset = ConversationDataset([good, odd, good], tokenizer)
    assert len(dataset) == 3 and dataset.unusable == 1 and "row 'odd'" in dataset.left_out[0]
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refusing = make_tokenizer(template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = [{"turns": ["a"], "responses": ["bcd"]}, {"turns": ["a"], "responses": ["b"], "system": "c"}]
    assert ConversationDataset(rows, refusing).unusable == 1
    with pytest.raises(ValueError, match=r"nothing to train on \(row 0: the target's chat template rejects the roles"):
        ConversationDataset(rows[1:], refusing)
