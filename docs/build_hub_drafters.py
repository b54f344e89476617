"""Writes docs/hub_drafters.md from docs/hub_drafters.json.

python docs/build_hub_drafters.py
"""

import json
from typing import Any

from measured import ROOT

from coral_hf.hub.card_tables import table


FACTS = ROOT / "docs" / "hub_drafters.json"
PAGE = ROOT / "docs" / "hub_drafters.md"


def page() -> str:
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    tested = [
        [_id(drafter), f"`{drafter['target']}`", *_shape(drafter), _license(drafter), drafter["config_from"]]
        for drafter in facts["drafters"]
    ]
    refused = [[_id(drafter), drafter["refusal"], drafter["remedy"]] for drafter in facts["refused"]]
    named = [
        [_id(drafter), f"`{drafter['target']}`", _license(drafter), drafter["listed_in"]] for drafter in facts["named"]
    ]
    return f"""# EAGLE and HASS drafters on the Hub

`docs/build_hub_drafters.py` writes this page from `docs/hub_drafters.json`, which was compiled from public pages on
{facts["read_on"]}. Find your target, then load its drafter:

<!-- not run: needs the network and the weights of an 8B model -->
```python
drafter = CoralDraftModel.from_eagle("yuhuili/EAGLE-LLaMA3-Instruct-8B", target)
```

`coral-hf convert --from eagle ID OUTPUT --target TARGET` does the same on the command line and saves the result. EAGLE-2
uses EAGLE-1's weights.

A licence is named where the repository's own page or metadata names it. "-" means that the pages read did not name one:
look at the repository before you use the weights. The target has its own licence.

## Loaded from the published config

`tests/conversion/test_hub_drafters.py` loads each of these on the meta device: the config as published, tensors of the shapes
that the method's code saves, and one drafting step. **The weights themselves were not downloaded.** For the EAGLE-1 drafters the
number of parameters equals the one in EAGLE's README.

{table(["drafter", "target", "method", "drafter's vocabulary", "licence", "config read from"], tested)}

## Refused

{table(["drafter", "message", "remedy"], refused)}

## Named by their authors

The configs of these were not available when this page was written. They claim one of the layouts above, and `from_eagle` lists
any differences.

{table(["drafter", "target", "licence", "named in"], named)}
"""


def _id(drafter: dict[str, Any]) -> str:
    return f"[`{drafter['id']}`](https://huggingface.co/{drafter['id']})"


def _shape(drafter: dict[str, Any]) -> tuple[str, str]:
    config = drafter["config"]
    rows = config.get("draft_vocab_size")
    if rows is None:
        return "EAGLE-1/2", "the target's"
    layout = " (speculators)" if "speculators_model_type" in config else ""
    return f"EAGLE-3{layout}", f"{rows:,} ids"


def _license(drafter: dict[str, Any]) -> str:
    return drafter["license"] or "-"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
