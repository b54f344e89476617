"""FeatureCache: the target's features of a data set, computed once and memory-mapped afterwards."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..target_adapter import TargetAdapter


SHARD_ROWS = 256


def _key(input_ids: torch.Tensor) -> str:
    return hashlib.sha1(input_ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


class FeatureCache:
    """Features on disk, in bf16 shards that are written once and read through a memory map.

    A shard `features-NNNNN.safetensors` holds the rows that its `.json` names (by a hash of their token ids, so that
    order and epochs do not matter) and counts only once that `.json`, written last, exists: a killed run loses at most
    one shard. `cache[input_ids]` is `[S, n * H]`.

    Args:
        directory (`str` or `Path`): folder of the cache, made if missing.
        adapter ([`TargetAdapter`]): the target whose features these are.
        target_id (`str`): what identifies that target (name and revision); a cache of another one is refused.

    Raises:
        ValueError: if the folder holds features of another target or other feature layers.
    """

    def __init__(self, directory: str | Path, adapter: TargetAdapter, target_id: str):
        self.directory = Path(directory)
        self.adapter = adapter
        self.directory.mkdir(parents=True, exist_ok=True)
        # A weight sample tells two checkpoints under one name apart.
        sample = adapter.head.weight.detach().flatten()[:4096].float().cpu().numpy().tobytes()
        self._identity = {
            "target": target_id,
            "weights": hashlib.sha1(sample).hexdigest(),
            "feature_layers": adapter.feature_layers,
            "feature_size": adapter.hidden_size * len(adapter.feature_layers),
        }
        meta = self.directory / "meta.json"
        if meta.exists():
            found = json.loads(meta.read_text())
            if found != self._identity:
                raise ValueError(
                    f"{self.directory} caches features of {found}, not of {self._identity}. Use another folder, or "
                    "delete this one."
                )
        else:
            _write_whole(meta, json.dumps(self._identity))
        self._places: dict[str, tuple[str, int, int]] = {}
        self._open: dict[str, object] = {}
        for index in sorted(self.directory.glob("features-*.json")):
            self._read_index(index)

    def _read_index(self, index: Path) -> None:
        for key, start, length in json.loads(index.read_text())["rows"]:
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
        # Memory maps do not travel into data-loader workers.
        return {**self.__dict__, "_open": {}, "adapter": None}

    def fill(self, rows: Iterable[torch.Tensor], tokens_per_batch: int = 4096) -> None:
        """Computes what is missing of `rows` (token ids, each `[S]`); says beforehand what it will cost.

        Raises:
            ValueError: if the disk cannot hold the features.
        """
        missing = list({_key(row): row for row in rows if row not in self}.values())
        if not missing:
            return
        tokens = sum(len(row) for row in missing)
        size = tokens * self._identity["feature_size"] * 2
        free = shutil.disk_usage(self.directory).free
        print(
            f"Feature cache: {tokens:,} tokens, {size / 2**30:.2f} GiB in {self.directory} ({free / 2**30:.0f} free)"
        )
        if size * 1.05 > free:
            raise ValueError(
                f"{self.directory} has {free / 2**30:.2f} GiB free; the features need {size / 2**30:.2f} GiB. "
                "Use another disk, fewer rows, or train without cache_features."
            )
        with tqdm(total=tokens, unit="tok", desc="features") as progress:
            for start in range(0, len(missing), SHARD_ROWS):
                self._write_shard(missing[start : start + SHARD_ROWS], tokens_per_batch, progress)

    def _write_shard(self, rows: list[torch.Tensor], tokens_per_batch: int, progress: tqdm) -> None:
        starts, total = [], 0
        for row in rows:
            starts.append(total)
            total += len(row)
        features = torch.empty(total, self._identity["feature_size"], dtype=torch.bfloat16)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        device = self.adapter.device
        while order:
            # the longest row left sets the width of its batch
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
        self.write_shard(rows, starts, features)

    def write_shard(self, rows: list[torch.Tensor], starts: list[int], features: torch.Tensor) -> None:
        """Stores `features` `[T, n * H]`, row i of `rows` from `starts[i]` on, as one new shard."""
        number = len(list(self.directory.glob("features-*.json")))
        name = f"features-{number:05d}"
        weights = self.directory / f"{name}.safetensors"
        part = weights.with_suffix(".part")
        save_file({"features": features.to(torch.bfloat16)}, part)
        os.replace(part, weights)
        index = [[_key(row), start, len(row)] for row, start in zip(rows, starts, strict=True)]
        _write_whole(weights.with_suffix(".json"), json.dumps({"rows": index, "written": time.time()}))
        self._read_index(weights.with_suffix(".json"))


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


__all__ = ["FeatureCache"]
