"""Ways to generate by their names: what a method parses to, what is refused, and those that are Transformers' own."""

import json

import pytest
import torch
from helpers.tiny_models import COMMON, make_drafter, make_target, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coral_hf.cli import main
from coral_hf.evaluation.methods import PRESETS, Method, check_drafter, measure, parse_methods
from coral_hf.utils import compat


PROMPT = torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fly", "choose coral, chain, eagle2, prompt_lookup, assistant"),
        ("plain", "always measured"),
        ("tree:draft_top_k", "NAME:setting=value"),
        ("tree:draft_width=3", "draft_top_k"),
        ("assistant", "--assistant MODEL"),
        ("prompt_lookup:draft_depth=3", "prompt_lookup_num_tokens"),
        ("plain_compiled:draft_depth=3", "cache_implementation"),
        ("mtp:draft_depth=3", "mtp takes no settings"),
        ("dflash", "needs a DFlash drafter: name it with --assistant MODEL"),
        (
            "prompt_lookup:prompt_lookup_num_tokens=abc",
            "prompt_lookup_num_tokens='abc' must be an integer of at least 1",
        ),
        (
            "x:prompt_lookup_num_tokens=0",
            "--method 'x:prompt_lookup_num_tokens=0': .*=0 must be an integer of at least 1",
        ),
        ("prompt_lookup:max_matching_ngram_size=2.5", "max_matching_ngram_size=2.5 must be an integer"),
        ("prompt_lookup:max_matching_ngram_size=true", "max_matching_ngram_size=True must be an integer"),
    ],
)
def test_methods_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(text, object())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_assistant_tokens=-3", "num_assistant_tokens=-3 must be an integer of at least 1"),
        ("num_assistant_tokens_schedule=fast", "'fast' must be one of constant, heuristic, heuristic_transient"),
        ("num_assistant_tokens_schedule=[]", r"\[\] must be one of"),
        ("assistant_confidence_threshold=1.5", "assistant_confidence_threshold=1.5 must be a number from 0 to 1"),
        ("assistant_confidence_threshold=NaN", "assistant_confidence_threshold=nan must be"),
    ],
)
def test_settings_that_an_assistant_cannot_have(setting, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(f"assistant:{setting}", object(), object())
    good = "assistant:num_assistant_tokens=3,num_assistant_tokens_schedule=constant,assistant_confidence_threshold=0.5"
    assert len(Method.parse(good, object(), object()).settings) == 3


def test_presets_and_several_drafters():
    drafter = make_drafter(make_target())
    texts = ["coral", "chain:draft_depth=2", "eagle2", "prompt_lookup:max_matching_ngram_size=3"]
    methods = {method.name: method for method in parse_methods(texts, {"demo": drafter})}
    assert methods["coral"].settings == {}
    assert methods["chain"].settings == {"draft_top_k": 1, "draft_depth": 2}
    assert methods["eagle2"].settings["draft_total_tokens"] == 60
    assert methods["prompt_lookup"].settings == {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}
    assert methods["prompt_lookup"].drafter is None
    two = parse_methods(["coral", "prompt_lookup"], {"a/eagle": drafter, "b/hass": drafter})
    assert [method.name for method in two] == ["eagle/coral", "hass/coral", "prompt_lookup"]
    same = parse_methods(["coral"], {"a/last": drafter, "b/last": drafter})
    assert [method.name for method in same] == ["a/last/coral", "b/last/coral"]
    with pytest.raises(ValueError, match="'coral'"):
        parse_methods(["coral", "coral:draft_depth=2"], {"demo": drafter})


def needs(setting):
    missing = compat.release_obstacle(setting)
    return pytest.mark.skipif(missing is not None, reason=str(missing))


@needs("speculation_type")
class TestDFlash:
    """A DFlash drafter of Transformers' own, tiny and random."""

    def drafter(self, **settings):
        from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

        sizes = {name: COMMON[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "block_size": 4}
        config = MuseGlimmerAssistantConfig(**{**sizes, "mask_token_id": 3, "target_layer_ids": [0, 2], **settings})
        torch.manual_seed(0)
        return MuseGlimmerAssistantModel(config).eval()

    def test_the_same_tokens_as_plain(self):
        target, drafter = make_target(dtype=torch.float32), self.drafter()
        (method,) = parse_methods(["dflash"], {"demo": make_drafter(target)}, drafter)
        assert method.drafter is drafter and not method.samples_like_plain
        check_drafter(target, make_tokenizer(), method)
        read = []
        hook = drafter.register_forward_pre_hook(lambda *_: read.append(1))
        found = measure(target, PROMPT, 12, drafter, **method.settings)
        hook.remove()
        assert found.new_ids == measure(target, PROMPT, 12).new_ids and read

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"hidden_size": 64}, "hidden_size=64 does not fit a target of hidden_size=32"),
            ({"mask_token_id": 128}, "mask_token_id=128 does not fit a target of vocab_size=128"),
            ({"target_layer_ids": [1, 4]}, r"target_layer_ids=\[1, 4\] does not fit a target of num_hidden_layers=4"),
        ],
    )
    def test_the_drafter_of_another_target(self, settings, message):
        method = Method("dflash", self.drafter(**settings), PRESETS["dflash"])
        with pytest.raises(ValueError, match=message):
            check_drafter(make_target(), make_tokenizer(), method)

    def test_on_the_command_line(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        target = make_target(dtype=torch.float32)
        target.save_pretrained("target")
        make_tokenizer().save_pretrained("target")
        make_drafter(target).save_pretrained("coral")
        self.drafter().save_pretrained("dflash")
        arguments = [
            "benchmark",
            "--target",
            "target",
            "--drafter",
            "coral",
            "--assistant",
            "dflash",
            "--dtype",
            "float32",
        ]
        arguments += ["--method", "coral", "dflash", "--quick", "--max-new-tokens", "6", "--output", "out"]
        assert main(arguments) == 0
        record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
        assert record["methods"]["dflash"] == {"assistant": "dflash", "speculation_type": "dflash"}
        rows = {row["method"]: row for row in record["runs"] if row["benchmark"] == "all"}
        assert rows["dflash"]["identical"] == rows["dflash"]["n_turns"] and rows["dflash"]["acceptance_length"] is None


@needs("use_mtp")
def test_mtp_layers_of_the_target(tmp_path):
    """Mellum's checkpoints have one; Transformers reads it beside the target's own weights."""
    pytest.importorskip("transformers.models.mellum", reason="this release has no target with an MTP layer so small")
    from transformers import MellumConfig
    from transformers.modeling_layers import MtpModel

    sizes = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "sliding_window": 64,
    }
    sizes["layer_types"] = [
        "full_attention",
        "sliding_attention",
    ] * 2  # the MTP layer takes its positions as the second does
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(MellumConfig(**{**COMMON, **sizes}, num_mtp_layers=1))
    made.save_pretrained(tmp_path)
    own = {
        f"mtp.{name}": value for name, value in MtpModel(made, 1).state_dict().items() if name.startswith("layers.")
    }
    save_file({**load_file(tmp_path / "model.safetensors"), **own}, tmp_path / "model.safetensors", {"format": "pt"})
    target = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    target.generation_config.eos_token_id = None
    method = Method.parse("mtp", None)
    check_drafter(target, make_tokenizer(), method)
    assert measure(target, PROMPT, 12, **method.settings).new_ids == measure(target, PROMPT, 12).new_ids
    target.config.num_mtp_layers = None
    with pytest.raises(ValueError, match="--method mtp: MellumForCausalLM has no layers for multi-token prediction"):
        check_drafter(target, make_tokenizer(), method)


@pytest.mark.parametrize(("name", "setting"), [("mtp", "use_mtp"), ("dflash", "speculation_type")])
def test_a_release_without_them(name, setting, monkeypatch):
    monkeypatch.setattr(compat, "GenerationConfig", lambda: object())
    with pytest.raises(ValueError, match=rf"--method '{name}': this Transformers release \(5.* has no {setting}"):
        Method.parse(name, object(), object())


def test_one_assistant_is_not_both(tmp_path, capsys):
    arguments = [
        "benchmark",
        "--assistant",
        "a/model",
        "--method",
        "assistant",
        "dflash",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    assert "one --assistant is not both" in capsys.readouterr().err
