"""FeatureCache: the target's features of a data set, computed once and then read through a memory map."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..data.response_origin import weight_sample
from ..drafter.target_adapter import TargetAdapter
from ..drafter.weight_files import file_sha256, follow_umask
from ..utils.jsonl import read_json
from ..utils.whole_files import write_whole


SHARD_ROWS = 256


def _key(input_ids: torch.Tensor) -> str:
    return hashlib.sha1(input_ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _same_target(found: Any, target_id: str) -> bool:
    """Whether targets are equal, or equal except for an unknown commit (`"NAME None"`); the weights' hash decides."""
    pairs = ((found, target_id), (target_id, found))
    return found == target_id or any(
        isinstance(one, str) and one.endswith(" None") and str(other).startswith(one.removesuffix("None"))
        for one, other in pairs
    )


class FeatureCache:
    """Features on disk, in bf16 shards that are written once and read through a memory map.

    A shard `features-NNNNN.safetensors` contains the rows that its `.json` names by a hash of their token ids, so that order
    and epochs do not matter. The `.json` is written last and contains the shard's checksum. A shard without it does not count.
    An interrupted run therefore loses at most one shard, and a damaged shard is computed again. `cache[input_ids]` is
    `[S, n * H]`.

    Args:
        directory (`str` or `Path`): folder of the cache, created if missing.
        adapter ([`TargetAdapter`]): the target that computes the features.
        target_id (`str`): name and revision of the target. A cache of another target is rejected.

    Raises:
        ValueError: if the folder contains features of another target or other feature layers.
    """

    def __init__(self, directory: str | Path, adapter: TargetAdapter, target_id: str):
        self.directory = Path(directory)
        self.adapter = adapter
        self.directory.mkdir(parents=True, exist_ok=True)
        self._identity: dict[str, Any] = {
            "target": target_id,
            "weights": weight_sample(adapter.target),
            "feature_layers": adapter.feature_layers,
            "feature_size": adapter.hidden_size * len(adapter.feature_layers),
        }
        meta = self.directory / "meta.json"
        if meta.exists():
            found = read_json(meta)
            if not _same_target(found.get("target"), target_id) or {**found, "target": target_id} != self._identity:
                raise ValueError(
                    f"{self.directory} contains features of {found}, not of {self._identity}. Use another folder, or "
                    "delete this one."
                )
        else:
            write_whole(meta, json.dumps(self._identity), shared=True)
        self.refresh()

    def refresh(self) -> None:
        """Reads the indices again, to find what other processes wrote."""
        self._places: dict[str, tuple[str, int, int]] = {}
        self._open: dict[str, Any] = {}
        for index in sorted(self.directory.glob("features-*.json")):
            self._read_index(index)

    def _read_index(self, index: Path) -> None:
        for key, start, length in _sound_index(index).get("rows", ()):
            self._places[key] = (index.stem, start, length)

    def __contains__(self, input_ids: torch.Tensor) -> bool:
        return _key(input_ids) in self._places

    def __getitem__(self, input_ids: torch.Tensor) -> torch.Tensor:
        shard, start, length = self._places[_key(input_ids)]
        if shard not in self._open:
            handle = safe_open(self.directory / f"{shard}.safetensors", framework="pt")
            self._open[shard] = handle.get_slice("features")
        return self._open[shard][start : start + length]

    def __getstate__(self):
        # Memory maps cannot be pickled for data-loader workers.
        return {**self.__dict__, "_open": {}, "adapter": None}

    def fill(
        self,
        rows: Iterable[torch.Tensor],
        tokens_per_batch: int = 4096,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] | None = None,
    ) -> None:
        """Computes the missing features of `rows` (token ids, each `[S]`). First prints a forecast of time and disk space.

        Args:
            rows: the same rows on all processes.
            tokens_per_batch (`int`): tokens in one forward pass of the target.
            rank (`int`), world_size (`int`): this process computes every `world_size`-th missing row.
            barrier (*optional*): waits for the other processes, which must call it equally often.

        Raises:
            ValueError: if the disk is too small for the features, or another training is writing to the folder.
            OSError: if the disk fills up. Finished shards are kept.
        """
        wait = barrier or (lambda: None)
        if rank == 0:
            self.drop_damaged()
        wait()  # until the first process has dropped damaged shards, so that all divide the same rows
        self.refresh()
        missing = list({_key(row): row for row in rows if row not in self}.values())
        wait()  # until all have read, before one writes
        if not missing:
            return
        tokens = sum(len(row) for row in missing)
        size = tokens * self._identity["feature_size"] * 2
        free = shutil.disk_usage(self.directory).free
        if size * 1.05 > free:
            raise ValueError(
                f"{self.directory} has {free / 2**30:.2f} GiB free; the features need {size / 2**30:.2f} GiB. "
                "Use another disk, fewer rows, or train without cache_features."
            )
        if rank == 0:
            speed = self._measure(missing, tokens_per_batch) * world_size
            print(
                f"Feature cache (forecast): {tokens:,} tokens, {size / 2**30:.2f} GiB in {self.directory} "
                f"({free / 2**30:.0f} free), about {tokens / speed / 3600:.2f} hours at {speed:,.0f} tokens/s",
                flush=True,
            )
        mine = missing[rank::world_size]
        with self._alone(rank):
            wait()  # no process writes if the first one was rejected
            self._write(mine, tokens_per_batch, rank, world_size)
            wait()  # the folder stays locked until all have written

    def _write(self, rows: list[torch.Tensor], tokens_per_batch: int, rank: int, world_size: int) -> None:
        with tqdm(total=sum(map(len, rows)), unit="tok", desc="features", disable=rank > 0) as progress:
            for start in range(0, len(rows), SHARD_ROWS):
                self._write_shard(rows[start : start + SHARD_ROWS], tokens_per_batch, progress, rank, world_size)

    @contextlib.contextmanager
    def _alone(self, rank: int) -> Iterator[None]:
        """Locks the folder in the first process, because two trainings could use the same shard number."""
        if rank:
            yield
            return
        try:
            lock = FileLock(f"{self.directory}.lock", timeout=0).acquire()
        except Timeout as error:
            raise ValueError(
                f"another training is writing features to {self.directory}: wait for it, or give another folder "
                "(cache_features)."
            ) from error
        with lock:
            yield

    def _measure(self, rows: list[torch.Tensor], tokens_per_batch: int) -> float:
        """The target's tokens per second on one batch of rows of typical length, after a warm-up batch."""
        usual = sorted(rows, key=len)[len(rows) // 2]
        ids = usual[: min(len(usual), tokens_per_batch)][None].to(self.adapter.device)
        ids = ids.expand(max(1, min(len(rows), tokens_per_batch // ids.shape[1])), -1)
        for _ in range(2):
            start = time.perf_counter()
            self.adapter.compute_features(ids, attention_mask=torch.ones_like(ids))[..., :1].cpu()  # waits for a GPU
            seconds = time.perf_counter() - start
        return ids.numel() / max(seconds, 1e-9)

    def drop_damaged(self) -> list[str]:
        """Drops shards whose file is missing or has a wrong checksum, prints this, and returns their names."""
        damaged = []
        for index in sorted(self.directory.glob("features-*.json")):
            weights = index.with_suffix(".safetensors")
            found = _sound_index(index)
            if not found or not weights.is_file() or found["sha256"] != file_sha256(weights):
                damaged.append(index.stem)
                index.unlink()
        if damaged:
            print(f"{self.directory}: {', '.join(damaged)} damaged (checksum); computing these features again.")
            self.refresh()
        return damaged

    def _write_shard(
        self, rows: list[torch.Tensor], tokens_per_batch: int, progress: tqdm, rank: int = 0, world_size: int = 1
    ) -> None:
        starts, total = [], 0
        for row in rows:
            starts.append(total)
            total += len(row)
        features = torch.empty(total, self._identity["feature_size"], dtype=torch.bfloat16)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        device = self.adapter.device
        while order:
            # the longest remaining row sets the width of its batch
            width = len(rows[order[-1]])
            count = max(1, tokens_per_batch // width)
            batch, order = order[-count:], order[:-count]
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, index in enumerate(batch):
                ids[place, : len(rows[index])] = rows[index]
                mask[place, : len(rows[index])] = 1
            computed = self.adapter.compute_features(ids.to(device), attention_mask=mask.to(device))
            for place, index in enumerate(batch):
                length = len(rows[index])
                features[starts[index] : starts[index] + length] = computed[place, :length].cpu()
                progress.update(length)
        self.write_shard(rows, starts, features, rank, world_size)

    def write_shard(
        self, rows: list[torch.Tensor], starts: list[int], features: torch.Tensor, rank: int = 0, world_size: int = 1
    ) -> None:
        """Stores `features` `[T, n * H]`, row i of `rows` from `starts[i]` on, as one new shard.

        Raises:
            OSError: if it cannot be written. Nothing remains of it.
        """
        # the first free number of this process
        number = rank
        while (self.directory / f"features-{number:05d}.json").exists():
            number += world_size
        weights = self.directory / f"features-{number:05d}.safetensors"
        part = weights.with_suffix(".part")
        index = weights.with_suffix(".json")
        places = [[_key(row), start, len(row)] for row, start in zip(rows, starts, strict=True)]
        try:
            save_file({"features": features.to(torch.bfloat16)}, part)
            follow_umask(part)
            checksum = file_sha256(part)
            os.replace(part, weights)
            write_whole(index, json.dumps(_index_of(places, checksum)), shared=True)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise OSError(
                f"{weights} could not be written ({error}). Free the disk and run again: the "
                f"{len(self._places):,} rows cached so far are kept."
            ) from error
        self._read_index(index)


def _index_of(rows: list[list], sha256: str) -> dict:
    """The content of a shard's index: its rows, its checksum, and a checksum of both."""
    both = hashlib.sha256(json.dumps([rows, sha256]).encode()).hexdigest()
    return {"rows": rows, "sha256": sha256, "index_sha256": both, "written": time.time()}


def _sound_index(index: Path) -> dict:
    """A shard's index, or an empty one if it is damaged."""
    try:
        found = read_json(index)
        sound = found["index_sha256"] == _index_of(found["rows"], found["sha256"])["index_sha256"]
    except (KeyError, ValueError):
        return {}
    return found if sound else {}


__all__ = ["FeatureCache"]
