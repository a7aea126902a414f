import csv
import errno
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speechbrain_mrl.training import logger
from speechbrain_mrl.training.logger import TrainingLog


def log_epochs(log, epochs, **more):
    for epoch in epochs:
        train = {"loss": 1 / epoch, "clips_per_second": 100.0}
        valid = {"eer/64": 0.1 / epoch, "agreement/64": 0.9}
        log.log_stats({"epoch": epoch, "lr": 0.1, **more}, train, valid)


def table(folder):
    with open(folder / "train_log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_and_a_line_an_epoch_also_where_another_process_goes_on(tmp_path):
    log_epochs(TrainingLog(tmp_path / "train_log.txt"), [1, 2])
    log_epochs(TrainingLog(tmp_path / "train_log.txt"), [4])
    assert [row["epoch"] for row in table(tmp_path)] == ["1", "2", "4"]
    assert float(table(tmp_path)[2]["valid eer/64"]) == 0.025
    assert len((tmp_path / "train_log.txt").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train_log.csv", "train_log.txt"]


def test_a_later_stage_adds_its_columns(tmp_path):
    log = TrainingLog(tmp_path / "train_log.txt")
    log_epochs(log, [1])
    log.log_stats({"epoch": 1, "lr": 0.1}, {"loss": 1.0}, {"eer/128": 0.2})
    first, second = table(tmp_path)
    assert first["valid eer/128"] == "" and second["valid eer/128"] == "0.2"


def test_curves_go_on_after_a_kill_and_leave_out_names(tmp_path):
    log_epochs(TrainingLog(tmp_path / "train_log.txt", tensorboard=True), [1, 2], stage="head")
    log_epochs(TrainingLog(tmp_path / "train_log.txt", tensorboard=True), [3], stage="head")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"epoch", "lr", "loss/train", "clips_per_second/train"}
    assert set(found.Tags()["scalars"]) == tags | {"eer/64/valid", "agreement/64/valid"}
    points = [(point.step, round(point.value, 4)) for point in found.Scalars("eer/64/valid")]
    assert points == [(1, 0.1), (2, 0.05), (3, 0.0333)]


def test_curves_that_cannot_be_begun_are_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger, "TensorboardLogger", full)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/tensorboard: .*No space left"):
        log_epochs(TrainingLog(tmp_path / "train_log.txt", tensorboard=True), [1])


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TrainingLog(tmp_path / "train_log.txt", tensorboard=True)


def test_a_full_disk_is_named_with_the_log(tmp_path, monkeypatch):
    log = TrainingLog(tmp_path / "train_log.txt")
    log.save_file = "/dev/full"
    with pytest.raises(OSError, match="cannot write /dev/full: .*No space left"):
        log.log_stats({"epoch": 1}, {"loss": 2.0}, {"loss": 3.0})
