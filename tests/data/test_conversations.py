"""Conversations -> ids and response masks: schemas, chat templates, where a response begins and ends."""

import json
import random

import pytest
from helpers.tiny_models import make_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coral_hf.data.dataset import ConversationDataset, encode_row, preview
from coral_hf.data.prompts import encode_context
from coral_hf.responses.job_queue import Conversation, PromptQueue


WORDS = ["<unk>", "<s>", "<end>", "<start>", "user", "assistant", "\n", "\n\n", "hi", "you", "good", "day", "to", "ok"]
IDS = {word: index for index, word in enumerate(WORDS)}
CHATML = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def word_tokenizer(chat_template: str | None = CHATML, **kwargs) -> PreTrainedTokenizerFast:
    """One token per word; a line break is a token, two in a row are one (as in BPE vocabularies)."""
    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\s]+"), behavior="removed", invert=True)
    kwargs = {"bos_token": "<s>", "eos_token": "<end>", "unk_token": "<unk>", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<start>"], **kwargs)
    tokenizer.chat_template = chat_template
    return tokenizer


def words(ids) -> list[str]:
    return [WORDS[index] for index in ids]


def trained(ids, mask) -> list[str]:
    return [WORDS[index] for index, flag in zip(ids, mask, strict=True) if flag]


# Rows ----------------------------------------------------------------------------------------------------------


def test_rows_of_prompt_and_response_ids():
    ids, mask = encode_row({"id": "a", "prompt_ids": [5, 6, 7], "response_ids": [8, 9]})
    assert ids == [5, 6, 7, 8, 9]
    assert mask == [False, False, False, True, True]


def test_rows_of_masked_ids():
    ids, mask = encode_row({"input_ids": [5, 6, 7, 8], "response_mask": [0, 1, 0, 1]})
    assert (ids, mask) == ([5, 6, 7, 8], [False, True, False, True])


def test_rows_of_text_mask_the_response_and_its_end():
    ids, mask = encode_row({"turns": ["hi you"], "responses": ["good day"]}, word_tokenizer())
    assert words(ids) == ["<start>", "user", "\n", "hi", "you", "<end>", "\n", "<start>", "assistant", "\n",
                          "good", "day", "<end>"]  # fmt: skip
    assert mask == [False] * 10 + [True] * 3, "the template's last line break is never generated"


def test_every_turn_has_its_response():
    row = {"turns": ["hi", "good day"], "responses": ["hi you", "to you"]}
    ids, mask = encode_row(row, word_tokenizer())
    assert words(ids) == [
        "<start>", "user", "\n", "hi", "<end>", "\n", "<start>", "assistant", "\n", "hi", "you", "<end>", "\n",
        "<start>", "user", "\n", "good", "day", "<end>", "\n", "<start>", "assistant", "\n", "to", "you", "<end>",
    ]  # fmt: skip
    assert trained(ids, mask) == ["hi", "you", "<end>", "to", "you", "<end>"]
    assert [index for index, flag in enumerate(mask) if flag] == [9, 10, 11, 23, 24, 25]


def test_a_token_across_the_border_does_not_hide_a_response():
    """Rendered as a whole, the prompt's last line break and the response's first are one token."""
    tokenizer = word_tokenizer()
    assert words(tokenizer("assistant\n\nok", add_special_tokens=False)["input_ids"]) == ["assistant", "\n\n", "ok"]
    ids, mask = encode_row({"turns": ["hi", "hi"], "responses": ["\nok", "good"]}, tokenizer)
    assert words(ids[6:13]) == ["<start>", "assistant", "\n", "\n", "ok", "<end>", "\n"]
    assert trained(ids, mask) == ["\n", "ok", "<end>", "good", "<end>"]


def test_a_template_without_an_end_token():
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    ids, mask = encode_row({"turns": ["hi"], "responses": ["good day"]}, word_tokenizer(template))
    assert words(ids) == ["user", "hi", "\n", "assistant", "good", "day", "\n"]
    assert trained(ids, mask) == ["good", "day", "\n"]


@pytest.mark.parametrize("tail", ["<end>\n", "<end>", "<end><s>", "<end>\n<end>\n"])
def test_the_targets_eos_ends_a_response_where_its_tokenizers_is_another(tail):
    """Like Gemma's `<end_of_turn>` and a line break, with `<eos>` as the tokenizer's EOS."""
    template = CHATML.replace("<end>\n", tail)
    tokenizer = word_tokenizer(template, eos_token="<s>", pad_token="<end>")
    row = {"turns": ["hi", "you"], "responses": ["good day", "ok"]}
    ids, mask = encode_row(row, tokenizer, eos_ids={IDS["<end>"], IDS["to"]})
    assert trained(ids, mask) == ["good", "day", "<end>", "ok", "<end>"]
    dataset = ConversationDataset([row], tokenizer, eos_ids={IDS["<end>"]})
    assert dataset.num_response_tokens == 5
    ids, mask = encode_row({"turns": ["hi"], "responses": ["good <end> day"]}, tokenizer, eos_ids={IDS["<end>"]})
    assert trained(ids, mask) == ["good", "<end>", "day", "<end>"], "the first after the content"


def test_an_eos_that_the_template_does_not_write_changes_nothing():
    row = {"turns": ["hi"], "responses": ["good day"]}
    assert encode_row(row, word_tokenizer(), eos_ids={IDS["to"]}) == encode_row(row, word_tokenizer())


def test_the_prompts_own_end_token_is_not_the_responses():
    """An empty response after a prompt that ends with EOS leaves nothing to train on, which is reported."""
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    shortened = "{% for m in messages if m.content %}{{ m.content }}<end>{% endfor %}"
    ids, mask = encode_row({"turns": ["hi"], "responses": ["ok"]}, word_tokenizer(template))
    assert trained(ids, mask) == ["ok", "<end>"]
    with pytest.raises(ValueError, match="row 7: empty response mask"):
        encode_row({"turns": ["hi"], "responses": [""]}, word_tokenizer(shortened), where="row 7")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(ValueError, match="row 3: this tokenizer's chat template rewrites earlier turns"):
        encode_row({"turns": ["hi"], "responses": ["ok"]}, word_tokenizer(template), where="row 3")


def test_a_target_without_a_template_reads_plain_text():
    row = {"turns": ["hi you", "good"], "responses": ["day", "ok"]}
    ids, mask = encode_row(row, word_tokenizer(None))
    assert words(ids) == ["hi", "you", "\n\n", "day", "\n\n", "good", "\n\n", "ok", "<end>"]
    assert trained(ids, mask) == ["\n\n", "day", "\n\n", "ok", "<end>"]
    assert words(encode_row(row, word_tokenizer(None), eos_ids={IDS["to"]})[0])[-1] == "to", "the target's own end"
    ids, mask = encode_row(row, word_tokenizer(None, eos_token=None))
    assert trained(ids, mask) == ["\n\n", "day", "\n\n", "ok"]


def test_training_and_generation_give_a_target_without_a_template_one_format():
    tokenizer = make_tokenizer(chat_template=None)  # which has no line breaks: two are one <0>
    tokenizer.eos_token = "<2>"
    turns, answer = ["hi", "and"], "yo"
    conversation = Conversation("a", turns, "be kind", [tokenizer(answer)["input_ids"]])
    prompt = PromptQueue([conversation], tokenizer, {2}, 1, 99, random.Random(0)).pop().prompt_ids
    assert tokenizer.decode(prompt) == "be kind<0>hi<0>yo<0>and"
    ids, _ = encode_row({"system": "be kind", "turns": turns, "responses": [answer, "ok"]}, tokenizer)
    assert tokenizer.decode(ids) == "be kind<0>hi<0>yo<0>and<0>ok<2>" and ids[: len(prompt)] == prompt
    without_system = encode_context(tokenizer, turns, [answer])[0].tolist()
    assert without_system == prompt[len("be kind.") :]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [1], "response_ids": []}, "here: empty response mask"),
        ({"input_ids": [1, 2], "response_mask": [0, 0]}, "here: empty response mask"),
        ({"input_ids": [1, 2], "response_mask": [0, 1, 1]}, "here: 2 input_ids but 3 response_mask entries"),
        ({"prompt_ids": [1], "response_ids": ["hi"]}, "here: token ids must be integers from 0 on"),
        ({"prompt_ids": [1], "response_ids": [2.5]}, "here: token ids must be integers"),
        ({"prompt_ids": [-1], "response_ids": [2]}, "here: token ids must be integers"),
        ({"prompt_ids": [1], "response_ids": [2**31]}, r"here: token ids .* below 2\*\*31; got 2147483648"),
        ({"input_ids": [1, 2], "response_mask": ["0", "1"]}, "here: response_mask must contain 0 and 1.*; got '0'"),
        ({"turns": ["hi", "you"], "responses": ["ok"]}, "here: 2 turns but 1 responses"),
        ({"turns": ["hi"], "responses": [None]}, r"here: \"responses\" must be a list of strings, got '\[None\]'"),
        ({"turns": ["hi"]}, "here contains a prompt without an answer .*coral-hf regenerate"),
        ({"prompt_ids": 3, "response_ids": [1]}, r"here has an unknown format: .*\['prompt_ids', 'response_ids'\]"),
    ],
)
def test_malformed_rows_name_their_place(row, message):
    with pytest.raises(ValueError, match=message):
        encode_row(row, word_tokenizer(), where="here")


def test_rows_of_text_need_a_tokenizer():
    with pytest.raises(ValueError, match="need the target's tokenizer"):
        encode_row({"turns": ["hi"], "responses": ["ok"]})


def test_preview_brackets_what_is_trained():
    tokenizer = word_tokenizer()
    dataset = ConversationDataset([{"turns": ["hi", "you"], "responses": ["good", "ok"]}], tokenizer)
    text = preview(dataset[0], tokenizer)
    assert text == (
        "<start>user\nhi<end>\n<start>assistant\n⟦good<end>⟧\n<start>user\nyou<end>\n<start>assistant\n⟦ok<end>⟧"
    )


# System texts, messages, plain texts ---------------------------------------------------------------------------


def test_messages_and_system_texts_render_as_turns_do():
    tokenizer = word_tokenizer()
    turns = {"system": "good", "turns": ["hi", "you"], "responses": ["ok", "day"]}
    messages = [
        {"role": "system", "content": "good"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "you"},
        {"role": "assistant", "content": "day"},
        {"role": "user", "content": "never answered"},
    ]
    ids, mask = encode_row({"messages": messages}, tokenizer)
    assert (ids, mask) == encode_row(turns, tokenizer)
    assert (ids, mask) == encode_row({"messages": messages[1:], "system": "good"}, tokenizer)
    assert trained(ids, mask) == ["ok", "<end>", "day", "<end>"]
    assert words(ids[:6]) == ["<start>", "<unk>", "\n", "good", "<end>", "\n"], "system is not in this vocabulary"


def test_a_cut_response_does_not_end():
    """The template closes it, but the target did not: that end must not be trained on."""
    row = {"turns": ["hi", "you"], "responses": ["good day", "ok"], "finish_reasons": ["length", "stop"]}
    ids, mask = encode_row(row, word_tokenizer())
    assert trained(ids, mask) == ["good", "day", "ok", "<end>"]
    assert words(ids).count("<end>") == 4, "it stays in the context"
    row["finish_reasons"] = ["stop", "length"]
    assert trained(*encode_row(row, word_tokenizer())) == ["good", "day", "<end>", "ok"]
    assert trained(*encode_row(row, word_tokenizer(None))) == ["\n\n", "good", "day", "\n\n", "ok"]


@pytest.mark.parametrize("before", ["", " ", "\n", "day\n\n"])
def test_a_cut_response_is_found_where_the_template_trims_or_prefixes_it(before):
    template = CHATML.replace("{{ m.content }}", "{{ X if m.role == 'assistant' else '' }}{{ m.content | trim }}")
    tokenizer = word_tokenizer(template.replace("X", repr(before)))
    prefix = {"": [], " ": [], "\n": ["\n"], "day\n\n": ["day", "\n\n"]}[before]
    row = {"turns": ["hi", "you"], "responses": [" good\nto  ", "ok"], "finish_reasons": ["length", "stop"]}
    assert trained(*encode_row(row, tokenizer)) == [*prefix, "good", "\n", "to", *prefix, "ok", "<end>"]
    alone = {"turns": ["hi"], "responses": ["\nok"], "finish_reasons": ["length"]}
    assert trained(*encode_row(alone, tokenizer)) == [*prefix, "ok"]


@pytest.mark.parametrize(
    ("reason", "cut"),
    [(None, False), ("stop", False), ("eos_token", False), ("STOP", False), ("length", True), ("abort", True),
     ("content_filter", True)],
)  # fmt: skip
def test_every_reason_but_an_end_is_a_cut(reason, cut):
    row = {"turns": ["hi"], "responses": ["ok"], "finish_reasons": [reason]}
    assert trained(*encode_row(row, word_tokenizer())) == (["ok"] if cut else ["ok", "<end>"])


TOOLS = "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.who }}{% endfor %}"
)


@pytest.mark.parametrize("arguments", ['{"who": "good"}', {"who": "good", "of another call": None}])
def test_tool_calls_and_tools_reach_the_template(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "ok", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": "day", "tool_calls": None},
        {"role": "assistant", "content": "you"},
    ]
    tools = [{"type": "function", "function": {"name": "to", "description": None}}]
    tokenizer = word_tokenizer(TOOLS + CALLS)
    for given in (tools, json.dumps(tools)):
        ids, mask = encode_row({"messages": messages, "tools": given}, tokenizer, eos_ids={IDS["<end>"]})
        assert trained(ids, mask) == ["good", "<end>", "you", "<end>"] and words(ids[:2]) == ["to", "\n"]


def test_content_in_parts_of_text_is_joined():
    parts = [{"type": "text", "text": "good"}, {"type": "text", "text": "day", "image_url": None}]
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts}]}
    assert trained(*encode_row(row, word_tokenizer())) == ["good", "\n", "day", "<end>"]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_rows_of_tensors_and_arrays(form):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt_ids": [5, 6], "response_ids": [7, 8]}, {"prompt_ids": [5], "response_ids": [7]}]
    masked = [{"input_ids": [5, 6, 7, 8], "response_mask": [False, False, True, True]}] * 2
    for given in (rows, masked):
        (first, _) = datasets.Dataset.from_list(given).with_format(form)
        assert encode_row(first) == ([5, 6, 7, 8], [False, False, True, True])


def test_plain_texts_are_trained_whole():
    ids, mask = encode_row({"text": "hi you good"}, word_tokenizer(None))
    assert words(ids) == ["hi", "you", "good"] and all(mask)


ANSWERED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}]}, "here: message 0 must be an object with the strings role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "here: message 0 must .*tool_calls instead of content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "here: message 0 .* type 'image_url'"),
        ({"messages": ANSWERED, "tools": "{"}, "here: tools is not JSON"),
        ({"messages": ANSWERED, "tools": 3}, "here: tools must be a list of tools; got '3'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "here contains a prompt without an answer"),
        ({"messages": []}, 'here: "messages" must be a non-empty list of objects'),
        (
            {"messages": [{"role": "system", "content": "a"}], "system": "b"},
            "here has both a system text and a system",
        ),
        ({"turns": ["hi"], "responses": ["ok"], "system": 3}, "here: system must be a string; got 3"),
        ({"turns": ["hi"], "responses": ["ok"], "finish_reasons": ["stop"] * 2}, "here: 2 finish_reasons but 1 resp"),
        ({"text": ["hi"]}, 'here: "text" must be a text, got .*An example'),
    ],
)
def test_malformed_texts_name_their_place(row, message):
    with pytest.raises(ValueError, match=message):
        encode_row(row, word_tokenizer(), where="here")


def test_a_template_that_refuses_a_role_says_so():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    row = {"turns": ["hi"], "responses": ["ok"], "system": "good"}
    with pytest.raises(
        ValueError, match=r"here: the target's chat template rejects the roles system, user .*no system"
    ):
        encode_row(row, word_tokenizer(template), where="here")
