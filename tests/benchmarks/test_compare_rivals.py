"""`benchmarks/compare_rivals.py`: the folder that a rival reads, the counting of its answers, and the refusals."""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.engine_drafters import DRAFT_IDS, THREE, eight_layer_target, read
from helpers.tiny_models import make_drafter


PROMPTS = [torch.tensor([[5, 9, 3, 77]]), torch.tensor([[31, 8, 100, 64]])]


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import compare_rivals
    from rivals import economize_eagle3

    return SimpleNamespace(script=compare_rivals, economize=economize_eagle3)


@pytest.fixture(scope="module")
def target():
    return eight_layer_target()


def fake_economize(seen):
    """Decodes one token at a time, as with a drafter that is always wrong."""

    def load(target, folder):
        seen["config"], seen["tensors"] = read(Path(folder))

        def decode(ids, new_tokens, decoding):
            assert decoding == {"cycle_length": 3}  # two drafted tokens and the exact one
            tokens = target.generate(ids[None], max_new_tokens=new_tokens, do_sample=False)[0]
            return SimpleNamespace(tokens=tokens, cost_summary=lambda: {"exact_calls": new_tokens})

        return SimpleNamespace(decode=decode)

    return SimpleNamespace(load=load, DecodeConfig=dict)


def test_answers_and_steps_side_by_side(rivals, target, monkeypatch):
    seen = {}
    monkeypatch.setitem(sys.modules, "economize", fake_economize(seen))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.2")
    drafter = make_drafter(target, dtype=torch.float32, **{**THREE, "norm_output": False})
    rival = rivals.economize.Rival(target, drafter, depth=2)
    rows = rivals.script.compare(target, drafter, {"economize": rival}, PROMPTS, 6, 2)
    assert rival.version == "economize 0.3.2"
    assert list(rows) == ["plain", "coral", "coral chain", "economize"]
    assert all(row["identical"] == 2 for row in rows.values())
    assert rows["plain"]["steps"] == rows["economize"]["steps"] == 10 and rows["economize"]["tokens_per_step"] == 1.0
    for name in ("coral", "coral chain"):
        assert rows[name]["steps"] * rows[name]["tokens_per_step"] == pytest.approx(10)
    # economize takes the head from the folder, and reads the whole vocabulary in order
    assert torch.equal(seen["tensors"]["lm_head.weight"], target.get_output_embeddings().weight)
    assert seen["config"]["draft_vocab_size"] == 128 and "d2t" not in seen["tensors"]


def test_a_head_of_the_drafters_own_stays(rivals, target, tmp_path):
    settings = {**THREE, "norm_output": False, "draft_vocab_size": 10}
    drafter = make_drafter(target, dtype=torch.float32, **settings)
    drafter.draft_head.token_ids.copy_(DRAFT_IDS)
    config, tensors = read(rivals.economize.write_folder(drafter, target, tmp_path / "out"))
    assert config["draft_vocab_size"] == 10 and torch.equal(tensors["lm_head.weight"], drafter.draft_head.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_output"] is False


def test_a_shortlist_becomes_rows_of_the_head(rivals, target, tmp_path):
    drafter = make_drafter(target, dtype=torch.float32, **{**THREE, "norm_output": False, "shortlist_size": 10})
    drafter.shortlist.token_ids.copy_(DRAFT_IDS)
    config, tensors = read(rivals.economize.write_folder(drafter, target, tmp_path / "out"))
    assert config["draft_vocab_size"] == 10
    assert torch.equal(torch.arange(10) + tensors["d2t"], DRAFT_IDS)
    assert torch.equal(tensors["lm_head.weight"], target.get_output_embeddings().weight[DRAFT_IDS])


class FakeEagle3Drafter:
    """Doubles the state of the rows that draft, as economize's draft step replaces it by its output."""

    def __init__(self, technique):
        self.technique, self._state = technique, torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def step(self, tokens, positions, valid):
        out = 2 * self._state
        self._state = out if valid is None else torch.where(valid[:, None], out, self._state)
        return out.sum(-1)


def test_a_drafter_that_feeds_back_the_normed_state(rivals, target, monkeypatch):
    package = fake_economize(seen := {})
    technique = SimpleNamespace(norm=lambda state: state - 100)
    load = package.load
    package.load = lambda *given: SimpleNamespace(**vars(load(*given)), techniques={"eagle3": technique})
    monkeypatch.setitem(sys.modules, "economize", package)
    monkeypatch.setitem(sys.modules, "economize.techniques", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "economize.techniques.eagle3", SimpleNamespace(Eagle3Drafter=FakeEagle3Drafter))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.2")
    rival = rivals.economize.Rival(target, make_drafter(target, dtype=torch.float32, **THREE), depth=2)
    assert rival.adapted == ["norm_output"] and seen["config"]["norm_output"] is False
    drafting = technique.drafter(None)
    assert drafting.step(None, None, None).tolist() == [6.0, 14.0]  # the logits are those of the output itself
    assert drafting._state.tolist() == [[-98.0, -96.0], [-94.0, -92.0]]
    drafting.step(None, None, torch.tensor([True, False]))
    assert drafting._state.tolist() == [[-296.0, -292.0], [-94.0, -92.0]]
    plain = make_drafter(target, dtype=torch.float32, **{**THREE, "norm_output": False})
    assert rivals.economize.Rival(target, plain, depth=2).adapted == []


def test_what_economize_lacks_is_refused(rivals, target, monkeypatch):
    monkeypatch.setitem(sys.modules, "economize", fake_economize({}))
    for settings, message in (
        ({**THREE, "norm_before_fc": True}, "norm_before_fc=True"),
        ({"shape": "eagle"}, "shape='eagle'"),
    ):
        with pytest.raises(ValueError, match=f"economize cannot express this drafter: {message}"):
            rivals.economize.Rival(target, make_drafter(target, dtype=torch.float32, **settings), depth=2)
    monkeypatch.setitem(sys.modules, "economize", None)
    with pytest.raises(ImportError, match=r"pip install economize==0\.3\.2"):
        rivals.economize.Rival(target, make_drafter(target, dtype=torch.float32, **THREE), depth=2)


@pytest.mark.slow
def test_prompt_lookup_over_its_lengths(rivals, target):
    found = rivals.script.make_rivals(["prompt_lookup"], target, None, 2)
    assert len(found) == 8 and found["prompt_lookup: 5 after 3-grams"].settings["prompt_lookup_num_tokens"] == 5
    repeated = [torch.tensor([[5, 9, 3, 77, 5, 9, 3, 77, 5, 9]])]
    drafter = make_drafter(target, dtype=torch.float32, **THREE)
    rows = rivals.script.compare(target, drafter, found, repeated, 8, 2)
    assert all(row["identical"] == 1 and 1 <= row["steps"] <= 7 for row in rows.values())
    rows["prompt_lookup: 3 after 2-grams"]["cpu_seconds"] = 0.0
    assert rivals.script.fastest_variants(["economize", "prompt_lookup"], rows) == {
        "prompt_lookup": "prompt_lookup: 3 after 2-grams"
    }


def test_forwards_are_counted_with_what_they_read(rivals, target):
    from rivals.forwards import counted_forwards

    with counted_forwards(target) as read:
        target.generate(PROMPTS[0], max_new_tokens=3, do_sample=False)
    target(PROMPTS[0])
    assert read == [4, 1, 1]


def test_unknown_and_missing_rivals(rivals, target, monkeypatch):
    with pytest.raises(ValueError, match="--rival 'medusa' is unknown; choose from economize, prompt_lookup"):
        rivals.script.make_rivals(["medusa"], target, None, 2)
    for name in ("dejavuu", "flashspec"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"--rival {name} needs the package: pip install"):
            rivals.script.make_rivals([name], target, None, 2)
