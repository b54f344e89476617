"""Publish a drafter with its card.

hf auth login
coral-hf benchmark --drafter outputs/drafter --data prompts.jsonl --output outputs/drafter/training
python examples/push_to_hub.py --drafter outputs/drafter --repo_id org/name --license apache-2.0
"""

from dataclasses import dataclass, field

from coral_hf import CoralDraftModel, demo
from coral_hf.commands.scripts import parse_script, run_script


@dataclass
class ScriptArguments:
    repo_id: str = field(metadata={"help": "Target repository: 'org/name', or 'name' in your own namespace."})
    drafter: str = field(default="demo", metadata={"help": "Folder of the drafter, or 'demo'."})
    private: bool = field(default=False, metadata={"help": "Create the repository as private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    license: str | None = field(default=None, metadata={"help": "Licence of the weights."})


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    # in the stored dtype, because the records contain the hash of these weights
    folder = demo.drafter_path() if script.drafter == "demo" else script.drafter
    drafter = CoralDraftModel.from_pretrained(folder, dtype="auto")
    stated = {} if script.license is None else {"license": script.license}
    print(drafter.push_to_hub(script.repo_id, private=script.private, revision=script.revision, **stated))
    print(f'Load it with AutoModel.from_pretrained("{script.repo_id}").')


if __name__ == "__main__":
    run_script(main)
