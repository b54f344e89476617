"""The code version in a record."""

import shutil
import subprocess

import pytest

from coral_hf.utils.code_version import code_commit


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_commit_whose_code_was_changed_says_so(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert code_commit(tmp_path) is None  # an installed package
    code, record = tmp_path / "coral_hf" / "module.py", tmp_path / "examples" / "records" / "record.json"
    for path in (code, record):
        path.parent.mkdir(parents=True)
        path.write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = code_commit(tmp_path)
    assert len(clean) == 12 and set(clean) <= set("0123456789abcdef")
    record.write_text("2\n")
    assert code_commit(tmp_path) == clean
    code.write_text("2\n")
    assert code_commit(tmp_path) == f"{clean}-dirty"
    git("checkout", "coral_hf")
    (tmp_path / "coral_hf" / "other.py").write_text("not committed yet\n")
    assert code_commit(tmp_path) == f"{clean}-dirty"
