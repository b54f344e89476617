"""`coral-hf push`: publishes a drafter's folder on the Hub, or writes the files without sending them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from .loading import DEMO, load_drafter
from .outputs import finished


@dataclass
class PushCommand:
    """Publish a drafter with its card, its code and the records for its figures.

    Examples:
        coral-hf push outputs/drafter org/name
        coral-hf push outputs/drafter org/name --private true --license apache-2.0
        coral-hf push outputs/drafter org/name --dry-run outputs/for-the-hub
    """

    POSITIONAL: ClassVar[dict[str, str]] = {
        "folder": "Folder of the drafter; its records are in FOLDER/training.",
        "repo_id": "Where it goes: org/name, or name in your own namespace.",
    }

    dry_run: str | None = field(
        default=None, metadata={"help": "Write the files to this new or empty folder and send nothing."}
    )
    private: bool = field(default=False, metadata={"help": "Create the repository as private."})
    license: str | None = field(default=None, metadata={"help": "Licence on the card, for example apache-2.0."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to push to; created if it does not exist (default: main)."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    message: str | None = field(default=None, metadata={"help": "Commit message."})

    def run(self, positional) -> int:
        from huggingface_hub.utils import validate_repo_id

        from ..hub.publish import push_drafter, require_token, write_publication

        validate_repo_id(positional.repo_id)
        if positional.folder != DEMO and not Path(positional.folder).is_dir():
            raise ValueError(f"{positional.folder} is not a folder here: give the folder of a drafter.")
        stated = {} if self.license is None else {"license": self.license}
        if self.dry_run is not None:
            place = Path(self.dry_run)
            if place.is_file() or (place.is_dir() and any(place.iterdir())):
                raise ValueError(f"--dry-run {place} exists already; name a new or an empty folder.")
            write_publication(load_drafter(positional.folder), place, positional.repo_id, stated=stated)
            for path in sorted(path for path in place.rglob("*") if path.is_file()):
                print(f"{path.stat().st_size:>12,}  {path.relative_to(place)}")
            finished(place, then=f"coral-hf push {positional.folder} {positional.repo_id}")
            return 0
        require_token(None)
        drafter = load_drafter(positional.folder)
        url = push_drafter(
            drafter,
            positional.repo_id,
            private=self.private or None,
            revision=self.revision,
            create_pr=self.create_pr,
            commit_message=self.message,
            **stated,
        )
        finished(url)
        return 0
