"""Reads training utterances out of tar shards, from end to end, as network storage likes it.

``recipes/voxceleb/shards.py`` writes them. An utterance is ``<number>.json`` with its id, start and
stop, and ``<number>.<flac|wav|...>``; the number is that of its row in the training list.
"""

import io
import json
import os
import random
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from speechbrain_mrl.dataio.dataset import SeededClips, draw_seed
from speechbrain_mrl.utils import require

SHARD_NAMES = re.compile(r"((?:file|https?)://[^'\"\\`$\s]+)|((?!pipe:)(?!.*://).*)")
BUFFER = 500  # utterances, not decoded, of which a reading process draws the next; some 100 MB


class ShardedClips(IterableDataset[Any]):
    """The items of a dataset in an order of the shards, for ``DataLoader``.

    Each process of a distributed run, and each worker in it, reads whole shards of its own. Every
    epoch draws which ones, and in which order. All give equally many batches: what is over in an
    epoch, as with ``drop_last``, is left out. An item is the dataset's own, chunk and label
    included.

    Arguments
    ---------
    clips : SeededClips
        As from ``train_dataset``, of the list that the shards were written from.
    shards : str
        Their paths or URLs in order, as WebDataset expands them: ``/net/shards/{000..511}.tar``.
    batch_size : int
        Clips of a batch in each process.
    num_workers : int
        Workers at most; there are no more than shards.

    Raises
    ------
    ValueError
        If there are too few shards, or a file is not there; later, if a shard is damaged or was
        written from another list.
    """

    def __init__(
        self, clips: SeededClips, shards: str, batch_size: int, num_workers: int = 0
    ) -> None:
        self.urls = _webdataset().shardlists.expand_urls(shards)
        for url in self.urls:
            if not SHARD_NAMES.fullmatch(url):  # webdataset gives others to a shell
                raise ValueError(
                    f"shards {shards} names {url}; it must be a path or an http(s) address, "
                    "without quotes"
                )
            if "://" not in url and not os.path.isfile(url):
                raise ValueError(
                    f"shards {shards} names {url}, which is not there; write it with "
                    "recipes/voxceleb/shards.py"
                )
        self.clips, self.epoch, self.batch_size = clips, clips.epoch, batch_size
        self.done = torch.zeros((), dtype=torch.int64).share_memory_()  # batches of this epoch
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.passes = len(clips.data_ids) // len(clips.data)
        n_shards = len(self.urls) // self.world_size * self.passes  # of a process
        self.num_workers = min(num_workers, n_shards)
        readers = max(1, self.num_workers)
        fewest = len(clips.data) // len(self.urls)  # utterances of a shard; others have one more
        self.batches = n_shards // readers * fewest // batch_size * readers
        if self.batches == 0:
            raise ValueError(
                f"{len(self.urls)} shards of {fewest} utterances give not one batch of {batch_size} "
                f"to each of {self.world_size} processes with {readers} workers; give a smaller "
                "batch_size or num_workers, or write more shards"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        number = (number + self.done.item()) % count  # workers take turns, the first one begins
        done = len(range(number, self.done.item(), count))
        rank, epoch = int(os.environ.get("RANK", 0)), self.epoch.item()
        rows = self._rows(self._order(epoch)[rank :: self.world_size][number::count])
        draws = random.Random(draw_seed(epoch, rank, number, seed=self.clips.seed))
        rows = _webdataset().shuffle(BUFFER, initial=BUFFER, rng=draws)(rows)
        for position, row in islice(
            rows, done * self.batch_size, self.batches // count * self.batch_size
        ):
            yield self.clips.draw(position, row)

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        """(pass, shard) of all processes, equally many of each."""
        order = []
        for number in range(self.passes):
            shards = list(range(len(self.urls)))
            random.Random(draw_seed(epoch, number, seed=self.clips.seed)).shuffle(shards)
            kept = len(shards) // self.world_size * self.world_size
            order += [(number, shard) for shard in shards[:kept]]
        return order

    def _rows(self, order: list[tuple[int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each utterance's position in the dataset, and its row, the recording for its path."""
        n_clips, n_shards = len(self.clips.data), len(self.urls)
        for number, shard in order:
            url, n_found = self.urls[shard], 0
            expected = (shard + 1) * n_clips // n_shards - shard * n_clips // n_shards
            try:
                for sample in _webdataset().tarfile_samples([{"url": url}]):
                    row, given = self._row(sample)
                    n_found += 1
                    yield number * n_clips + row, given
                if n_found != expected:
                    raise ValueError(f"it holds {n_found} utterances, and should hold {expected}")
            except Exception as error:  # of tarfile, the network, whatever opens the URL
                reason = getattr(error, "strerror", None) or error.args[0]
                raise ValueError(
                    f"cannot read shard {url}: {reason}; see that it is there and whole, or delete "
                    "it and write it again with recipes/voxceleb/shards.py"
                ) from error

    def _row(self, sample: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        key, saved = sample["__key__"], json.loads(sample.get("json", "{}"))
        number = int(key) if key.isdecimal() else len(self.clips.data)
        row = self.clips.data[number] if number < len(self.clips.data) else {}
        if row.get("id") is None or row["id"] != saved.get("id"):
            raise ValueError(f"its utterance {key} is not that of {self.clips.data.path}")
        (suffix,) = (name for name in sample if name != "json" and not name.startswith("__"))
        recording = _Recording(sample[suffix])
        recording.name = f"{sample['__url__']}/{key}.{suffix}"
        return number, {**row, "wav": recording, "start": saved["start"], "stop": saved["stop"]}


class _Recording(io.BytesIO):
    name: str


def shard_loader(
    clips: SeededClips, shards: str, batch_size: int, num_workers: int = 0, **options: Any
) -> DataLoader[Any]:
    """SpeechBrain batches of ``ShardedClips``; ``options`` are others of a ``DataLoader``."""
    dataset = ShardedClips(clips, shards, batch_size, num_workers)
    options |= {"num_workers": dataset.num_workers, "shuffle": False, "drop_last": True}
    return DataLoader(dataset, batch_size, collate_fn=PaddedBatch, **options)


def _webdataset() -> Any:
    return require("webdataset", "reading shards")
