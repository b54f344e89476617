"""CORAL drafters out to vLLM, SGLang, speculators and EAGLE, and back: the same weights, the same tokens.

What the engines' loaders read is in `conversion/schemas.json`, against which every exported folder is checked here as it
lies on disk; `test_engine_loaders*.py` ask vLLM, SGLang and speculators themselves.
"""

import json
import shlex

import pytest
import torch
from helpers.eagle_checkpoints import noise
from helpers.engine_drafters import DRAFTERS, PAIRS, THREE, assert_same_drafter, eight_layer_target, make, read
from helpers.tiny_models import make_drafter, make_target, make_tokenizer, randomize
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from coral_hf import CoralDraftModel, coral_generate, demo
from coral_hf.cli import main
from coral_hf.conversion import export_drafter
from coral_hf.conversion.schema import check_export
from coral_hf.data.prompts import encode_context
from coral_hf.evaluation.demo_run import PROMPTS
from coral_hf.generation.tree_size import chain_depth


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_round_trip(name, engine, dtype, target, tmp_path):
    drafter = make(name, target, dtype)
    export = export_drafter(drafter, engine, tmp_path / "out", target=target)
    check_export(engine, drafter.config, *read(tmp_path / "out"))
    assert not export.notes and sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again = CoralDraftModel.from_eagle(tmp_path / "out", target)
    assert_same_drafter(again, drafter)


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_round_trip_generates_the_same(name, engine, target, tmp_path):
    """Same tokens as plain decoding, and the same drafts accepted on the way."""
    drafter = make(name, target)
    export_drafter(drafter, engine, tmp_path / "out", target=target)
    again = CoralDraftModel.from_eagle(tmp_path / "out", target)
    prompt = torch.tensor([[5, 9, 3, 77, 31, 8, 100, 64]])
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    for assistant in (drafter, again):
        output = target.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False)
        assert torch.equal(output, plain)
    assert again.last_stats == drafter.last_stats


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_config_loads_in_transformers(name, engine, target, tmp_path):
    """All engines read the config through Transformers: old and new keys must not contradict each other."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    drafter = make(name, target)
    for parameters in (drafter.config.rope_parameters, rope):
        drafter.config.rope_parameters = parameters
        folder = tmp_path / parameters["rope_type"]
        export_drafter(drafter, engine, folder, target=target)
        raw = read(folder)[0]
        loaded = LlamaConfig.from_dict(raw.get("transformer_layer_config", raw))
        assert {key: loaded.rope_parameters[key] for key in parameters} == parameters
        assert loaded.num_hidden_layers == 1 and loaded.head_dim == drafter.config.head_dim
        if drafter.config.shape == "eagle3" and engine in ("vllm", "sglang"):
            # SGLang reads the attribute without a default
            assert loaded.draft_vocab_size == drafter.config.draft_vocab_size
        assert CoralDraftModel.from_eagle(folder, target).config.rope_parameters == parameters


def test_permuted_full_head(target, tmp_path):
    """vLLM reads ids for a reduced vocabulary only; SGLang for any."""
    settings = {**THREE, "draft_vocab_size": 128, "target_name_or_path": "org/target"}
    drafter = make_drafter(target, dtype=torch.float32, **settings)
    drafter.draft_head.token_ids.copy_(torch.arange(128).flip(0))
    with pytest.raises(ValueError, match="another order"):
        export_drafter(drafter, "vllm", tmp_path / "vllm")
    export_drafter(drafter, "sglang", tmp_path / "sglang")
    assert_same_drafter(CoralDraftModel.from_eagle(tmp_path / "sglang", target), drafter)


def test_speculators_counts_features_in_the_layer(target, tmp_path):
    """vLLM 0.33 takes three features unless the nested config says otherwise."""
    export_drafter(make("eagle3, two other features", target), "speculators", tmp_path / "out")
    assert read(tmp_path / "out")[0]["transformer_layer_config"]["num_aux_hidden_states"] == 2


def test_layer_ids(target, tmp_path):
    """vLLM names the layers whose input is read; SGLang, one less, those whose output it is."""
    drafter = make("eagle3, two other features", target)
    export_drafter(drafter, "vllm", tmp_path / "vllm")
    export_drafter(drafter, "sglang", tmp_path / "sglang")
    assert read(tmp_path / "vllm")[0]["eagle_aux_hidden_state_layer_ids"] == [1, 6]
    assert read(tmp_path / "sglang")[0]["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [0, 5]}
    for engine in ("vllm", "sglang"):
        # without our own key the engines' keys alone say the same
        path = tmp_path / engine / "config.json"
        config = json.loads(path.read_text())
        del config["coral_config"]
        path.write_text(json.dumps(config))
        assert CoralDraftModel.from_eagle(tmp_path / engine, target).config.target_feature_layers == [1, 6]


def test_shortlist_and_router(target, tmp_path):
    """SGLang stores the shortlist as its token map, and it can be read back; for others a line says it is left out."""
    drafter = make("eagle", target)
    drafter.add_shortlist(torch.arange(128).flip(0), 20)
    export = export_drafter(drafter, "sglang", tmp_path / "sglang")
    map_file = tmp_path / "sglang" / "hot_token_ids.pt"
    assert torch.load(map_file, weights_only=True) == list(range(20))
    assert f"--speculative-token-map {map_file}" in export.command
    assert_same_drafter(CoralDraftModel.from_eagle(tmp_path / "sglang", target), drafter)
    drafter.add_router(8)
    drafter.add_low_rank_head(target, 6)
    for engine in ("vllm", "eagle"):
        notes = export_drafter(drafter, engine, tmp_path / engine).notes
        assert all(any(part in line for line in notes) for part in ("router", "shortlist", "low-rank head"))
        again = CoralDraftModel.from_eagle(tmp_path / engine, target)
        assert_same_drafter(again, drafter, leave_out=("router", "shortlist", "low_rank"))


def test_serve_commands(target, tmp_path):
    eagle, eagle3 = make("eagle", target), make("eagle3, pre-norm state fed back", target)
    words = shlex.split(export_drafter(eagle, "vllm", tmp_path / "a folder").command)
    assert words[:3] == ["vllm", "serve", "org/target"]
    expected = {"method": "eagle", "model": str(tmp_path / "a folder"), "num_speculative_tokens": 3}
    assert json.loads(words[-1]) == expected
    command = export_drafter(eagle3, "sglang", tmp_path / "sglang", target_name="other/target").command
    assert "--model-path other/target --speculative-algorithm EAGLE3" in command
    assert "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4" in command
    assert export_drafter(eagle3, "speculators", tmp_path / "s").command == f"vllm serve {tmp_path / 's'}"
    assert read(tmp_path / "s")[0]["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert "--no-eagle3" in export_drafter(eagle, "eagle", tmp_path / "e").command


def test_command_line(tmp_path, capsys):
    target = make_target(dtype=torch.float32)
    target.save_pretrained(tmp_path / "target")

    make_tokenizer().save_pretrained(tmp_path / "target")
    drafter = make_drafter(target, shape="eagle")
    drafter.save_pretrained(tmp_path / "drafter")
    paths = {name: str(tmp_path / name) for name in ("target", "drafter", "vllm", "back", "bad")}
    assert main(["convert", "--to", "vllm", paths["drafter"], paths["vllm"]]) == 0
    assert "vllm serve" in capsys.readouterr().out.splitlines()[-1]
    arguments = ["convert", "--from", "eagle", paths["vllm"], paths["back"], "--target", paths["target"]]
    assert main([*arguments, "--dtype", "float32"]) == 0
    assert "shape eagle" in capsys.readouterr().out
    assert_same_drafter(CoralDraftModel.from_pretrained(paths["back"]), drafter)
    for wrong in (
        ["--to", "speculators", paths["drafter"], paths["bad"]],
        ["--to", "tgi", paths["drafter"], paths["bad"]],
        ["--to", "vllm", "--from", "eagle", paths["drafter"], paths["bad"]],
        [paths["drafter"], paths["bad"]],
        ["--from", "medusa", paths["vllm"], paths["bad"], "--target", paths["target"]],
        ["--from", "eagle", paths["drafter"], paths["bad"], "--target", paths["target"]],
    ):
        assert main(["convert", *wrong]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("coral-hf convert: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "drafter", "target", "vllm"]


def test_the_shipped_drafter_is_served_with_the_file_it_was_trained_for(tmp_path, capsys, monkeypatch):
    """Its weights are not those of the Hub's model of that name; a named target takes precedence."""
    monkeypatch.setenv("CORAL_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--to", "vllm", "demo", "out"]) == 0
    said = capsys.readouterr().out
    words = shlex.split(said.splitlines()[-1])
    assert words[2] == str(demo.converted_folder()) and "`coral-hf demo` fetches it" in said
    assert json.loads(words[-1])["num_speculative_tokens"] == 3  # of up to 8
    demo.converted_folder().mkdir(parents=True)
    assert main(["convert", "--to", "speculators", "demo", "named"]) == 0
    assert "fetches" not in capsys.readouterr().out
    assert read(tmp_path / "named")[0]["speculators_config"]["verifier"]["name_or_path"] == words[2]
    assert main(["convert", "--to", "vllm", "demo", "other", "--target", "org/other", "--draft_depth", "5"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[2] == "org/other" and json.loads(words[-1])["num_speculative_tokens"] == 5


def test_cost_aware_sizes_are_left_out_with_a_note_and_named_anew(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"draft_depth": 8, "draft_top_k": 2, "draft_total_tokens": 12, "draft_cost_aware": True}
    drafter = make_drafter(make_target(dtype=torch.float32), shape="eagle", target_name_or_path="org/target", **sizes)
    drafter.save_pretrained("drafter")

    def converted(engine, folder, *options):
        assert main(["convert", "--to", engine, "drafter", folder, *options]) == 0
        return capsys.readouterr().out.splitlines(), read(tmp_path / folder)[0]

    lines, config = converted("vllm", "chain-that-pays")
    depth = chain_depth(drafter.config)
    assert (
        depth < 8
        and f"According to the drafter's calibration, a chain of {depth} is fastest" in lines[0]
        and "up to 8 levels" in lines[0]
    )
    assert len(lines) == 2 and f'"num_speculative_tokens": {depth}' in lines[-1]
    assert config["coral_config"]["draft_depth"] == depth
    lines, _ = converted("sglang", "upper-sglang")
    assert (
        "draft_depth=8, draft_top_k=2, draft_total_tokens=12. Name smaller ones with --draft_depth, --dr" in lines[0]
    )
    lines, _ = converted("eagle", "upper-eagle")
    assert lines[0] == "Left out: cost-aware sizes; EAGLE's code chooses its own tree."
    lines, config = converted("vllm", "chain", "--draft-depth", "2")
    assert len(lines) == 1 and '"num_speculative_tokens": 2' in lines[0]
    chosen = {"draft_depth": 2, "draft_top_k": 1, "draft_total_tokens": 3, "draft_cost_aware": False}
    assert {name: config["coral_config"][name] for name in sizes} == chosen
    lines, config = converted(
        "sglang", "tree", "--draft-depth", "3", "--draft-top-k", "2", "--draft-total-tokens", "6"
    )
    assert len(lines) == 1
    assert "--speculative-num-steps 3 --speculative-eagle-topk 2 --speculative-num-draft-tokens 6" in lines[0]
    assert config["coral_config"]["draft_total_tokens"] == 6
    for engine, wrong, message in (
        ("sglang", ["--draft-depth", "0"], "draft_depth=0 must be an integer of at least 1"),
        ("sglang", ["--draft-top-k", "-1"], "draft_top_k=-1 must be"),
        (
            "sglang",
            ["--draft-depth", "2", "--draft-total-tokens", "99"],
            "draft_total_tokens=99 is more than draft_depth=2",
        ),
        ("sglang", ["--draft-top-k", "1", "--draft-total-tokens", "4"], "Choose --draft_depth instead"),
        ("vllm", ["--draft-top-k", "2"], "--draft_top_k 2: vLLM drafts a chain of --draft_depth tokens"),
        ("speculators", ["--draft-total-tokens", "3"], "--draft_total_tokens 3: vLLM drafts a chain"),
        ("vllm", ["--dtype", "float99"], "--dtype float99 is for loading a target, and this export loads none"),
        ("eagle", ["--draft-depth", "3"], "--draft_depth 3: EAGLE's code chooses its own tree"),
    ):
        assert main(["convert", "--to", engine, "drafter", "bad", *wrong]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_speculators_export_names_the_chosen_depth(tmp_path, capsys):
    settings = {**THREE, "target_feature_layers": [1, 2], "target_name_or_path": "org/target", "draft_depth": 6}
    make_drafter(make_target(dtype=torch.float32), **settings).save_pretrained(tmp_path / "drafter")
    arguments = ["convert", "--to", "speculators", str(tmp_path / "drafter"), str(tmp_path / "out")]
    assert main([*arguments, "--draft_depth", "4"]) == 0
    (proposal,) = read(tmp_path / "out")[0]["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == 4


@pytest.fixture(scope="module")
def shipped():
    return CoralDraftModel.from_pretrained(demo.drafter_path(), dtype="auto").eval()


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("vllm", "before the final norm"),
        ("speculators", "before the final norm"),
        ("sglang", "the last layer's output is the input of none"),
        ("eagle", r"reads \[2, 4, 5\]"),
    ],
)
def test_normed_last_state_beside_others_is_refused(engine, reason, target, tmp_path):
    """No engine captures it: each error says what that engine reads instead."""
    drafter = make_drafter(target, shape="eagle3", target_feature_layers=[2, 4, -1])
    expected = rf"\[2, 4, -1\]: the normed last state \(-1\) cannot be captured next to others: .*{reason}"
    with pytest.raises(ValueError, match=expected):
        export_drafter(drafter, engine, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_shipped_drafter_has_no_form_in_eagles_code(shipped, tmp_path):
    with pytest.raises(ValueError, match=r"it reads \[2, 15, 27\] of this target; norm_output=True"):
        export_drafter(shipped, "eagle", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators"])
def test_shipped_round_trip(engine, shipped, tmp_path):
    """Bit for bit; the shortlist, which these formats cannot store, is left out with a note."""
    names = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")
    settings = {name: getattr(shipped.config, name) for name in names}
    with torch.device("meta"):
        # only sizes are asked of the target
        target = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](num_hidden_layers=30, **settings))
    export = export_drafter(shipped, engine, tmp_path / "out")
    assert engine == "speculators" or shipped.config.target_name_or_path in export.command
    assert any("shortlist" in line for line in export.notes)
    again = CoralDraftModel.from_eagle(tmp_path / "out", target)
    assert_same_drafter(again, shipped, leave_out=("shortlist",))


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators"])
def test_shipped_drafter_generates_the_same_after_a_round_trip(engine, shipped, tmp_path):
    """On the real target: plain decoding's tokens, and the same drafts accepted on the way."""
    target, tokenizer = demo.load_target(torch.float32)
    ids = encode_context(tokenizer, [PROMPTS[0]])
    export_drafter(shipped, engine, tmp_path / "out")
    again = CoralDraftModel.from_eagle(tmp_path / "out", target).float()
    settings = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = target.generate(ids, **settings)
    # a fixed tree over the full head, which both have; sizes decided by measured costs may differ from run to run
    tree = {"draft_cost_aware": False, "draft_depth": 4, "draft_top_k": 3, "draft_total_tokens": 12}
    found = []
    for assistant in (demo.load_drafter(torch.float32), again):
        output = coral_generate(target, assistant, input_ids=ids, draft_head="full", **tree, **settings)
        assert torch.equal(output, plain)
        found.append(assistant.last_stats)
    assert found[0] == found[1] and found[0].acceptance_length > 1.5


@pytest.mark.slow
@pytest.mark.real_model
def test_real_model_generates_the_same(tmp_path):
    """A new drafter of the eagle shape for the real target, there and back."""
    target, tokenizer = demo.load_target(torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    drafter = make_drafter(target, shape="eagle", draft_top_k=2, draft_depth=3)
    export_drafter(drafter, "sglang", tmp_path / "out")
    again = CoralDraftModel.from_eagle(tmp_path / "out", target)
    plain = target.generate(ids, max_new_tokens=6, do_sample=False)
    for assistant in (drafter, again):
        assert torch.equal(target.generate(ids, assistant_model=assistant, max_new_tokens=6, do_sample=False), plain)
    assert again.last_stats == drafter.last_stats


def test_noise_is_no_copy(target, tmp_path):
    """A head that is close to the target's, but not equal, survives the round trip."""
    drafter = make("eagle3, head of its own", target)
    settings = {**DRAFTERS["eagle3, head of its own"][0], "draft_vocab_size": 128, "target_name_or_path": "org/target"}
    full = randomize(make_drafter(target, dtype=torch.float32, **settings), scale=0.1)
    head = target.get_output_embeddings().weight
    with torch.no_grad():
        full.draft_head.weight.copy_(head + noise(*head.shape, seed=3, scale=1e-3))
    for each in (drafter, full):
        export_drafter(each, "sglang", tmp_path / str(each.config.draft_vocab_size))
        again = CoralDraftModel.from_eagle(tmp_path / str(each.config.draft_vocab_size), target)
        assert_same_drafter(again, each)
