"""What a training shows and keeps of each epoch: a line, a text log, a table, TensorBoard's curves."""

import csv
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechbrain.utils.distributed import main_process_only

from speechbrain_mrl.utils import replacing, require, writing

_theirs = logging.getLogger("speechbrain.utils.train_logger")
_theirs.disabled = True  # being imported, it warns of a missing torchvision: for figures
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger  # noqa: E402

_theirs.disabled = False
logger = logging.getLogger(__name__)


class TrainingLog(FileTrainLogger):
    """SpeechBrain's text log, and beside it the same numbers as a CSV and, if wanted, as curves.

    Arguments
    ---------
    save_file : path
        The text log, one line an epoch; the CSV has its name, and ends in ``.csv``.
    tensorboard : bool
        Whether to write TensorBoard's event files to a folder ``tensorboard`` beside it.

    Raises
    ------
    ImportError
        If ``tensorboard`` is not installed and wanted.

    Example
    -------
    >>> log = TrainingLog(getfixture("tmp_path") / "train_log.txt")
    >>> log.log_stats({"epoch": 1, "lr": 0.1}, {"loss": 2.0}, {"loss": 3.0, "eer/64": 0.05})
    >>> log.table.read_text().splitlines()
    ['epoch,lr,train loss,valid loss,valid eer/64', '1,0.1,2.0,3.0,0.05']
    """

    def __init__(self, save_file: str | os.PathLike[str], tensorboard: bool = False) -> None:
        super().__init__(save_file)
        self.table = Path(save_file).with_suffix(".csv")
        if tensorboard:
            require("tensorboard", "the key tensorboard")
        self.wants_curves = tensorboard
        self.curves: Any = None

    @main_process_only
    def log_stats(
        self,
        stats_meta: Mapping[str, Any],
        train_stats: Mapping[str, Any] | None = None,
        valid_stats: Mapping[str, Any] | None = None,
        test_stats: Mapping[str, Any] | None = None,
    ) -> None:
        """An epoch's numbers by name; see ``speechbrain.utils.train_logger.TrainLogger``."""
        with writing(self.save_file):
            super().log_stats(stats_meta, train_stats, valid_stats, test_stats, verbose=False)
        logger.info(progress_line(stats_meta, train_stats or {}, valid_stats or {}))
        row = dict(stats_meta)
        named = {"train": train_stats, "valid": valid_stats, "test": test_stats}
        for dataset, stats in named.items():
            row |= {f"{dataset} {key}": value for key, value in (stats or {}).items()}
        n_rows = self._add_row(row)
        if self.wants_curves:
            self._add_points(n_rows, stats_meta, named)

    def _add_row(self, row: Mapping[str, Any]) -> int:
        """Add a row to the CSV, which gets the columns that it lacks; how many rows it had."""
        rows = []
        if self.table.exists():
            with open(self.table, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        known = dict.fromkeys([*(rows[0] if rows else ()), *row])
        columns = sorted(known, key=_group)
        with replacing(self.table) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows([*rows, row])
        return len(rows)

    def _add_points(
        self, step: int, stats_meta: Mapping[str, Any], named: Mapping[str, Any]
    ) -> None:
        """Resume after ``step`` epochs, and with them the curves of a killed training."""
        folder = self.table.with_name("tensorboard")
        if self.curves is None:
            with writing(folder):
                self.curves = TensorboardLogger(str(folder))
        steps = {name: dict.fromkeys(stats or (), step) for name, stats in named.items()}
        self.curves.global_step = {"meta": step, **steps}
        numbers = {k: v for k, v in stats_meta.items() if not isinstance(v, str)}
        stats = {f"{name}_stats": stats for name, stats in named.items()}
        with writing(folder):
            self.curves.log_stats(numbers, **stats)
            self.curves.writer.flush()


def _group(column: str) -> int:
    """Columns of an epoch itself, then of its training, validation and test."""
    return ["train", "valid", "test"].index(column.split()[0]) + 1 if " " in column else 0


def progress_line(
    stats_meta: Mapping[str, Any], train_stats: Mapping[str, Any], valid_stats: Mapping[str, Any]
) -> str:
    """One epoch in a line for people: losses, EER in percent by size, agreement, speed.

    Example
    -------
    >>> valid = {"loss": 0.1812, "eer/64": 0.0558, "eer/256": 0.0527, "agreement/64": 0.941}
    >>> progress_line({"epoch": 0, "lr": 0.0}, {}, valid)
    'epoch 0 | valid loss 0.1812 | EER % 64: 5.58, 256: 5.27 | agreement 64: 0.941'
    >>> progress_line({"epoch": 3, "lr": 8e-05}, {"loss": 0.1653, "clips_per_second": 212.4}, {})
    'epoch 3 | loss 0.1653 | 212 chunks/s | lr 8e-05'
    """
    stage = f"{stats_meta['stage']}, " if "stage" in stats_meta else ""
    parts = [f"{stage}epoch {stats_meta['epoch']}"]
    if "loss" in train_stats:
        parts.append(f"loss {train_stats['loss']:.4f}")
    if "loss" in valid_stats:
        parts.append(f"valid loss {valid_stats['loss']:.4f}")
    for key, heading, shown in (("eer", "EER %", "{:.2f}"), ("agreement", "agreement", "{:.3f}")):
        by_size = {k: v for k, v in valid_stats.items() if k.startswith(f"{key}/")}
        if by_size:
            factor = 100 if key == "eer" else 1
            cells = [f"{k.split('/')[1]}: {shown.format(factor * v)}" for k, v in by_size.items()]
            parts.append(f"{heading} {', '.join(cells)}")
    if "clips_per_second" in train_stats:
        parts.append(f"{train_stats['clips_per_second']:.0f} chunks/s")
    if stats_meta["lr"]:
        parts.append(f"lr {stats_meta['lr']:.2g}")
    return " | ".join(parts)
