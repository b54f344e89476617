"""How often a rival ran the target."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def counted_forwards(target: Any) -> Iterator[list[int]]:
    """Within it, the list grows by one number for each forward of the target: the tokens that it read."""
    read: list[int] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        read.append(ids.shape[-1])

    hook = target.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()
