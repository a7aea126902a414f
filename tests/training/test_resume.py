"""Training that is killed and started again ends where an undisturbed one does, bit for bit."""

import csv
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import train
from shards import write_shards
from short_runs import OPTIONS, shorten
from voxceleb_prepare import prepare_voxceleb

from speechbrain_mrl.training.checkpoints import AtomicCheckpointer

# Not forks of this process: torch refuses to train in one if another test's backward had threads.
PROCESSES = multiprocessing.get_context("forkserver")
STAGES = [
    {"stage": "small", "embed_dim": 16, "mrl_dims": [8, 16]},
    {"stage": "full", "embed_dim": 32, "mrl_dims": [8, 16, 32], "taught_by": [-1]},
]


@pytest.fixture
def argv(small_corpus, two_teachers, tiny_config, short_runs):
    """``argv(folder)``: a training of two stages from random weights, with augmentation."""

    def make(folder, **changes):
        options = {
            "data_folder": small_corpus,
            "output_folder": folder,
            "teachers": [str(path) for path in two_teachers],
            "backbone": json.dumps(tiny_config),
            "pretrained": False,
            "stages": json.dumps(STAGES),
            **OPTIONS,
            "number_of_epochs": 2,
            "ckpt_interval_minutes": 0,
            "ckpt_interval_steps": 3,
            **changes,
        }
        return [
            "hparams/mrl_distill.yaml",
            "--noprogressbar",
            *(f"--{k}={v}" for k, v in options.items()),
        ]

    return make


def _child(argv, prepare=None):
    """The command in a process of its own, after ``prepare()`` there."""
    process = PROCESSES.Process(target=_run, args=(argv, prepare))
    process.start()
    return process


def _run(argv, prepare):
    os.setsid()
    # Readers are this process' own, as a user's are, and end with it; the server's would stay.
    multiprocessing.set_start_method("fork", force=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    shorten()
    if prepare is not None:
        prepare()
    train.main(argv)


def _result(folder):
    """Weights and report of a finished run."""
    tensors = torch.load(folder / "model" / "embedding_model.ckpt", weights_only=True)
    report = json.loads((folder / "report.json").read_text())
    del report["seconds"]
    return tensors, report


def _assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    for key, value in expected[0].items():
        assert torch.equal(found[0][key], value), key
    assert found[1] == expected[1]


def _die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(owner, name, number, act):
    """Before the call of that number, ``act`` on its arguments."""
    owner, calls = resolve_name(owner), []
    real = getattr(owner, name)

    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            act(*arguments, **options)
        return real(*arguments, **options)

    setattr(owner, name, counted)


def _write_half(tensors, path, *_, **__):
    Path(path).write_bytes(b"\x80 half a file")
    _die()


def _no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


BRAIN = "speechbrain_mrl.training.distill:MRLBrain"
LOGGER = "speechbrain.utils.train_logger:FileTrainLogger"
CHECKPOINTER = "speechbrain.utils.checkpoints:Checkpointer"
MOMENTS = {
    "the store's second shard": ("speechbrain_mrl.inference.store", "save_file", 2, _write_half),
    "the student before its first step": ("torch", "save", 1, _write_half),
    "its validation, epoch 0": (BRAIN, "evaluate_batch", 1, _die),
    "the first step": (BRAIN, "optimizers_step", 1, _die),
    "a step after a checkpoint": (BRAIN, "optimizers_step", 5, _die),
    "the first file of a checkpoint": ("torch", "save", 1, _write_half),
    "the last file of a checkpoint": ("torch", "save", 3, _write_half),
    "a full disk": ("torch", "save", 2, _no_room),
    "the end of an epoch, unsaved": (LOGGER, "log_stats", 1, _die),
    "the end of an epoch, saved": (CHECKPOINTER, "delete_checkpoints", 2, _die),
    "the second stage": (BRAIN, "optimizers_step", 11, _die),
    "the second stage's validation": (BRAIN, "evaluate_batch", 1, _die),
    "the plots": ("training_results", "write_plots", 1, _die),
    "the export": ("training_results", "export_model", 1, _die),
}


def test_a_run_killed_at_every_kind_of_moment_ends_as_one_that_was_not(argv, tmp_path):
    train.main(argv(tmp_path / "whole"))
    for moment, (owner, name, number, act) in MOMENTS.items():
        dies = partial(_at_call, owner, name, number, act)
        process = _child(argv(tmp_path / "killed"), dies)
        process.join()
        assert process.exitcode == (1 if act is _no_room else -signal.SIGKILL), moment
    process = _child(argv(tmp_path / "killed", num_workers=1))  # whoever reads
    process.join()
    assert process.exitcode == 0
    _assert_same(_result(tmp_path / "killed"), _result(tmp_path / "whole"))
    starts = [_epoch_0(tmp_path / folder) for folder in ("killed", "whole")]
    assert starts[0] == starts[1] and [row["stage"] for row in starts[0]] == ["small", "full"]


def _epoch_0(folder):
    """The log's rows of students before their first step; each comes once."""
    with open(folder / "train_log.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] == "0"]
    assert all(row["valid loss"] and row["valid eer/8"] and not row["train loss"] for row in rows)
    return rows


def test_a_training_from_shards_goes_on_with_the_clips_that_come_next(argv, small_corpus, tmp_path):
    lists = prepare_voxceleb(
        str(small_corpus), str(tmp_path / "lists"), valid_speakers=4, test_speakers=6, seed=1986
    )
    changes = {"shards": write_shards(lists.train_csv, tmp_path / "shards", 5), "num_workers": 2}
    changes |= {"stages": "null", "embed_dim": 16, "mrl_dims": [8, 16], "number_of_epochs": 1}
    for folder, number in (("whole", None), ("killed", 6)):
        dies = number and partial(_at_call, BRAIN, "optimizers_step", number, _die)
        process = _child(argv(tmp_path / folder, **changes), dies)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if number else 0)
    process = _child(argv(tmp_path / "killed", **changes))
    process.join()
    assert process.exitcode == 0
    _assert_same(_result(tmp_path / "killed"), _result(tmp_path / "whole"))


def _two_processes(argv, prepare=None):
    """The command as two ranks, the second after ``prepare()``; their exit codes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        _child(argv, partial(_join, rank, port, prepare if rank == 1 else None)) for rank in (0, 1)
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _join(rank, port, prepare):
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    places |= {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in places.items()})
    if prepare is not None:
        prepare()


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_as_two_that_were_not(argv, tmp_path):
    changes = {"distributed_backend": "gloo", "stages": "null"}
    changes |= {"embed_dim": 16, "mrl_dims": [8, 16], "batch_size": 4}
    assert _two_processes(argv(tmp_path / "whole", **changes)) == [0, 0]
    killed = argv(tmp_path / "killed", **changes)
    dies = partial(_at_call, BRAIN, "optimizers_step", 5, _die)
    assert _two_processes(killed, dies) == [1, -signal.SIGKILL]
    assert (
        list((tmp_path / "killed").glob("**/CKPT+*")) and not (tmp_path / "killed/model").exists()
    )
    assert _two_processes(killed) == [0, 0]
    _assert_same(_result(tmp_path / "killed"), _result(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_one_that_was_not(argv, tmp_path):
    started = time.time()
    process = _child(argv(tmp_path / "whole"))
    process.join()
    seconds = time.time() - started
    expected = _result(tmp_path / "whole")
    moments, folder, killed = random.Random(0), tmp_path / "killed", 0
    while killed < 20:
        process = _child(argv(folder, num_workers=killed % 2))
        process.join(timeout=moments.uniform(0, seconds))
        if process.is_alive():
            alone = os.getpgid(process.pid) != process.pid  # it has only just begun
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        if process.exitcode == 0:
            _assert_same(_result(folder), expected)
            shutil.rmtree(folder)
        else:
            assert process.exitcode == -signal.SIGKILL
    process = _child(argv(folder))
    process.join()
    assert process.exitcode == 0
    _assert_same(_result(folder), expected)


def test_a_checkpoint_is_listed_when_it_is_complete(tmp_path, monkeypatch):
    layer = torch.nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    checkpointer.save_checkpoint(meta={"number": 1})
    seen = []

    def save(tensors, path):
        seen.append([found.meta["number"] for found in checkpointer.list_checkpoints()])
        Path(path).write_bytes(b"")

    monkeypatch.setattr(torch, "save", save)
    checkpointer.save_checkpoint(meta={"number": 2})
    assert seen == [[1]]
    assert sorted(found.meta["number"] for found in checkpointer.list_checkpoints()) == [1, 2]


def test_two_processes_keep_the_same_checkpoints(tmp_path):
    """However long the first takes to give one its name; else they wait for each other for ever."""
    processes = [PROCESSES.Process(target=_save, args=(tmp_path, rank)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def _save(folder, rank):
    replace = os.replace
    os.replace = lambda *paths: (time.sleep(0.2), replace(*paths))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=20)
    torch.distributed.init_process_group("gloo", rendezvous, patience, 2, rank)
    checkpointer = AtomicCheckpointer(folder / "saved", {"layer": torch.nn.Linear(2, 2)})
    for number in range(3):
        checkpointer.save_and_keep_only(meta={"number": number})
    assert [found.meta["number"] for found in checkpointer.list_checkpoints()] == [2]
