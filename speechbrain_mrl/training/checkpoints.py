"""SpeechBrain's checkpoints, each complete or not there, and where a training started."""

import copy
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import nn

from speechbrain_mrl.utils import replacing, writing

logger = logging.getLogger(__name__)

PARTIAL = "partial+"  # in front of a checkpoint's name: none that SpeechBrain lists


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's ``Checkpointer``, whose checkpoints appear when they are complete.

    SpeechBrain's own writes first the file that marks a folder as a checkpoint. What a killed run
    or a full disk left would be loaded. Arguments are those of ``Checkpointer``.

    Example
    -------
    >>> import torch
    >>> folder, layer = getfixture("tmp_path"), torch.nn.Linear(2, 1)
    >>> checkpointer = AtomicCheckpointer(folder, {"layer": layer})
    >>> saved = checkpointer.save_checkpoint(name="first")
    >>> saved.path.name, checkpointer.recover_if_possible().path == saved.path
    ('CKPT+first', True)
    """

    def save_checkpoint(
        self, *arguments: Any, verbosity: int = logging.INFO, **options: Any
    ) -> Any:
        """As SpeechBrain's, which would log the name that the checkpoint has while it is partial.

        Raises
        ------
        OSError
            If it cannot be written; the earlier checkpoints are as they were.
        """
        if if_main_process():
            self._clear()
        try:
            with writing(self.checkpoints_dir):
                saved = super().save_checkpoint(*arguments, **options, verbosity=logging.DEBUG)
                if saved is not None:  # the main process
                    for path in saved.path.iterdir():
                        with open(path, "rb") as file:
                            os.fsync(file.fileno())
                    path = saved.path.with_name(saved.path.name.removeprefix(PARTIAL))
                    os.replace(saved.path, path)
                    logger.log(verbosity, "Saved checkpoint %s", path)
        except OSError:
            self._clear()
            raise
        ddp_barrier()  # SpeechBrain deletes old ones next, for which all must see the same
        if saved is None:
            return None
        paramfiles = {name: path / file.name for name, file in saved.paramfiles.items()}
        return Checkpoint(path, saved.meta, paramfiles)

    def _clear(self) -> None:
        for path in self.checkpoints_dir.glob(f"{PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _new_checkpoint_dirpath(self) -> Any:
        path = super()._new_checkpoint_dirpath()
        return path.with_name(PARTIAL + path.name)

    def _custom_checkpoint_dirpath(self, name: str) -> Any:
        path = super()._custom_checkpoint_dirpath(name)
        return path.with_name(PARTIAL + path.name)


def starting_point(student: nn.Module, checkpointer: Checkpointer) -> nn.Module | None:
    """A copy of a student before its first step, on the CPU; a resumed run has the same.

    It is kept beside the checkpoints. None where there are checkpoints, but no such file.

    Arguments
    ---------
    student : torch.nn.Module
        Where the training has no checkpoint yet, about to begin; else one of the same shapes.
    checkpointer : Checkpointer
        Of the training.

    Example
    -------
    >>> layer, checkpointer = nn.Linear(2, 1), AtomicCheckpointer(getfixture("tmp_path"))
    >>> start = starting_point(layer, checkpointer)
    >>> torch.equal(start.weight, layer.weight), start is layer
    (True, False)
    """
    path = Path(checkpointer.checkpoints_dir, "start.ckpt")
    started = checkpointer.find_checkpoint() is not None
    if started and not path.exists():
        return None
    start = copy.deepcopy(student).cpu()
    if started:
        start.load_state_dict(torch.load(path, weights_only=True))
    elif if_main_process():
        with replacing(path) as part:
            torch.save(start.state_dict(), part)
    return start
