"""Full disks, folders that cannot be written, and two runs at once."""

import contextlib
import ctypes
import itertools
import json
import logging
import multiprocessing
import resource
import threading
import time

import numpy as np
import pytest
import torch

from speechbrain_mrl import AtomicCheckpointer, ReDimNetMRL, export_model
from speechbrain_mrl.dataio.clips import write_clips
from speechbrain_mrl.evaluation.calibration import Calibration, write_calibrations
from speechbrain_mrl.evaluation.plots import plot_det
from speechbrain_mrl.evaluation.report import write_report
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.utils import only_run, replacing

FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def full_disk(folder, size=20_000):
    """No file may grow past ``size`` bytes, by whatever library it is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    logging.disable()  # pytest keeps it in a file
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only(folder):
    """Nobody may write in ``folder``, nor may root, who gives up the capability to do it all the same."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)  # this thread
    capabilities = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, capabilities) == 0
    effective = capabilities[0]
    capabilities[0] &= ~2  # CAP_DAC_OVERRIDE
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")]}
    for path, mode in modes.items():
        path.chmod(mode & 0o555)
    assert libc.capset(header, capabilities) == 0
    try:
        yield
    finally:
        capabilities[0] = effective
        assert libc.capset(header, capabilities) == 0
        for path, mode in modes.items():
            path.chmod(mode)


def _files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.is_file()
    }


class Encoder(torch.nn.Module):
    """Counts the utterances that it embeds."""

    def __init__(self, size=4, seconds=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(1, size)
        self.seconds, self.clips = seconds, itertools.count()  # not a number: that is a setting

    def forward(self, wavs, wav_lens):
        time.sleep(self.seconds)
        for _ in wavs:
            next(self.clips)
        return self.linear(wavs.square().mean(dim=1, keepdim=True))


@pytest.fixture
def model(tiny_config):
    return ReDimNetMRL(embed_dim=16, mrl_dims=(8, 16), backbone=tiny_config)


def _checkpoint(folder, size, model, clips):
    AtomicCheckpointer(folder, {"student": model}).save_and_keep_only(meta={"size": size})


def _store(folder, size, model, clips):
    TeacherStore(folder / "store").fill({f"t{size}": Encoder(size * 2)}, clips)


def _export(folder, size, model, clips):
    export_model(model, folder / "model")


def _report(folder, size, model, clips):
    write_report({"scores": [0.125] * size}, folder)


def _plot(folder, size, model, clips):
    scores = np.linspace(-1, 1, 100)
    plot_det({8: scores + 0.01 * size}, np.arange(100) % 2 == 1, folder / "det.png")


def _lists(folder, size, model, clips):
    write_clips(clips * (size // 10), folder / "clips.csv")


def _calibration(folder, size, model, clips):
    fitted = {d: Calibration(-2.0, 10.0) for d in range(1, size)}
    write_calibrations(fitted, folder / "calibration.json")


WRITERS = [_checkpoint, _store, _export, _report, _plot, _lists, _calibration]


@pytest.mark.parametrize("trouble", [full_disk, read_only])
@pytest.mark.parametrize("write", WRITERS)
def test_what_cannot_be_written_is_said_and_what_was_there_stays(
    write, trouble, tmp_path, model, small_clips
):
    write(tmp_path, 10, model, small_clips[:4])
    before = _files(tmp_path)
    with trouble(tmp_path), pytest.raises(OSError, match=f"cannot write {tmp_path}.*make room"):
        write(tmp_path, 5000, model, small_clips[:4])
    after = _files(tmp_path)
    assert {path: after[path] for path in before} == before
    new = {path.name for path in after.keys() - before.keys()}
    assert new <= {"manifest.json"}  # of the store: what is to come
    write(tmp_path, 5000, model, small_clips[:4])  # once one can


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_that_cannot_be_written_is_named(write, tmp_path, model, small_clips):
    place = tmp_path / "file" / "folder"
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=f"{tmp_path}/file"):
        write(place, 10, model, small_clips[:4])
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_file_is_replaced_by_a_complete_one_only(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text("ne")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended_or_died(tmp_path):
    locked = FORK.Event()

    def hold():
        with only_run(tmp_path):
            locked.set()
            time.sleep(60)

    holder = FORK.Process(target=hold, daemon=True)
    holder.start()
    locked.wait(10)
    with pytest.raises(ValueError, match="another run works in .* choose another output_folder"):
        with only_run(tmp_path, patience=0.2):
            pass
    holder.kill()
    with only_run(tmp_path, patience=5):
        pass
    holder.join()


def test_two_runs_that_fill_one_store_embed_each_clip_once(tmp_path, small_clips):
    encoder = Encoder(seconds=0.05)
    stores = [TeacherStore(tmp_path) for _ in range(2)]
    runs = [
        threading.Thread(
            target=store.fill,
            args=({"it": encoder}, small_clips[:40]),
            kwargs={"batch_seconds": 2.0},
        )
        for store in stores
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert next(encoder.clips) == 40
    assert torch.equal(stores[0].embeddings["it"], stores[1].embeddings["it"])
    json.loads((tmp_path / "it" / "manifest.json").read_text())
