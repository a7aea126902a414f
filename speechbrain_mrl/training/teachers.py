"""Teachers that embed every batch as it is trained on."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_mrl.inference.optimize import arrange
from speechbrain_mrl.inference.store import TeacherStore


class LiveTeachers:
    """Teachers that embed every batch, for data whose utterances have no lasting identity.

    Arguments
    ---------
    teachers : dict of str to torch.nn.Module
        As from ``load_teachers``, on ``device``.
    loader : iterable
        Of batches with ``sig`` (waveforms and relative lengths); the first ``fit_batches`` of it
        give ``embeddings``, on which rotations are fitted.
    device : str
        Where the teachers are.
    fit_batches : int
        How many.
    """

    def __init__(
        self,
        teachers: Mapping[str, nn.Module],
        loader: Iterable[Any],
        device: str = "cpu",
        fit_batches: int = 200,
    ) -> None:
        self.teachers = arrange(teachers, device)
        found = [self.targets(batch.to(device)) for batch in islice(loader, fit_batches)]
        self.embeddings = {name: torch.cat([one[name].cpu() for one in found]) for name in teachers}

    def sample(self, n_clips: int) -> tuple[list[str], dict[str, Tensor]]:
        """No ids, and at most ``n_clips`` of ``embeddings``."""
        step = -(-len(next(iter(self.embeddings.values()))) // n_clips)
        return [], {name: found[::step] for name, found in self.embeddings.items()}

    @torch.no_grad()
    def targets(self, batch: Any) -> dict[str, Tensor]:
        """Embeddings of a SpeechBrain batch's signals, ``sig``; in float32 beside any autocast."""
        with torch.autocast(batch.sig[0].device.type, enabled=False):
            return {name: teacher(*batch.sig) for name, teacher in self.teachers.items()}


class SegmentTeachers(LiveTeachers):
    """Teachers that embed each training segment; fits still read the store of whole utterances.

    ``teachers`` are as for ``LiveTeachers``; ``store`` is filled with the training utterances.
    """

    def __init__(
        self, teachers: Mapping[str, nn.Module], store: TeacherStore, device: str = "cpu"
    ) -> None:
        self.teachers, self.store = arrange(teachers, device), store

    def lookup(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of whole utterances, as the store's."""
        return self.store.lookup(ids)

    def sample(self, n_clips: int) -> tuple[list[str], dict[str, Tensor]]:
        """Ids and embeddings of whole utterances, as the store's."""
        return self.store.sample(n_clips)
