"""What a user of the recipes' scripts sees: a mistake in one sentence, a log that is for people."""

import os
import subprocess
import sys

import command
import embed
import publish
import pytest
import torch
import train
import verify

from speechbrain_mrl.utils import TRACEBACK

MISTAKES = {
    "a YAML that is not there": (train, ["hparams/mrl_distil.yaml"], "mrl_distil.yaml"),
    "a wrong key": (train, ["hparams/mrl_distill.yaml", "--chunk_secs=2"], "chunk_seconds"),
    "a value that is no YAML": (
        train,
        ["hparams/mrl_distill.yaml", "--mrl_dims=[8, 16"],
        "the YAML cannot be read, line",
    ),
    "a YAML without its keys": (train, ["{half}"], "the YAML lacks"),
    "a value of another type": (train, ["hparams/mrl_distill.yaml", "--lr=abc"], "lr must be"),
    "no such folder": (train, ["hparams/mrl_distill.yaml", "--data_folder=/gone"], "data_folder"),
    "no such device": (train, ["hparams/mrl_distill.yaml", "--device=gpu"], "device 'gpu'"),
    "compiled and recomputed": (
        train,
        ["hparams/mrl_distill.yaml", "--compile", "--gradient_checkpointing=True"],
        "gradient_checkpointing does not go with --compile",
    ),
    "no model to verify": (verify, ["hparams/verify.yaml"], "source"),
    "a list that is not there": (
        verify,
        ["hparams/verify.yaml", "--source=b2", "--data_folder=/", "--trials=/gone.txt"],
        "trials",
    ),
    "no model to publish": (publish, ["/gone", "org/name"], "/gone"),
    "no model to embed with": (embed, ["/gone.pt", ".", "/tmp/out"], "/gone.pt"),
    "no recordings": (embed, ["{tiny}", "{empty}", "{empty}/out"], "holds no recording"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    mistake, release_file, tiny_config, tmp_path, capsys
):
    script, argv, said = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.yaml").write_text("output_folder: results\n")
    places = {"tiny": release_file(tiny_config), "empty": tmp_path / "empty"}
    places["half"] = tmp_path / "half.yaml"
    with pytest.raises(SystemExit) as exit_:
        command.run_command(script.main, [part.format(**places) for part in argv])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_script_prints_no_traceback_unless_it_is_asked_for(monkeypatch):
    argv = ["hparams/mrl_distill.yaml", "--epochs=1"]
    call = [sys.executable, "recipes/voxceleb/train.py", *argv]
    environment = {**os.environ, TRACEBACK: ""}
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "epochs" in done.stderr
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="epochs"):
        command.run_command(train.main, argv)


def test_an_interrupted_script_says_so_without_a_traceback(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        command.run_command(main, [])
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: interrupted\n"


def test_a_full_gpu_is_a_sentence_that_says_what_to_lower(capsys):
    def main(argv):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB\nGPU 0 has ..."
        )

    with pytest.raises(SystemExit):
        command.run_command(main, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert "batch_size" in line and "--precision=bf16" in line


def test_a_fault_of_the_program_keeps_its_traceback():
    def main(argv):
        raise AttributeError("not a user's mistake")

    with pytest.raises(AttributeError):
        command.run_command(main, [])


def test_workers_are_no_more_than_the_processors_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    loader = {"batch_size": 2, "num_workers": 4}
    hparams = {"num_workers": 4, "train_loader": loader, "valid_loader": {"num_workers": 0}}
    command.limit_workers(hparams)
    assert hparams["num_workers"] == loader["num_workers"] == 3
    assert hparams["valid_loader"]["num_workers"] == 0
    verification = {"num_workers": 2}
    command.limit_workers(verification)
    assert verification == {"num_workers": 2}


@pytest.mark.parametrize("argv", [["--help"], ["hparams/mrl_supervised.yaml", "-h"]])
def test_help_lists_the_keys_of_the_yaml_with_their_comments(argv, capsys):
    command.run_command(train.main, argv)
    shown = capsys.readouterr().out
    assert shown.startswith("Train a Matryoshka student")
    supervised = len(argv) == 2
    assert ("--margins=0.2" in shown) == supervised
    assert ("--teachers=[b0, b1, b2, b6]" in shown) != supervised
    (line,) = (line for line in shown.splitlines() if line.startswith("  --augment_prob"))
    assert line.split(maxsplit=1) == [
        "--augment_prob=0.8",
        "of an utterance; the others stay clean",
    ]
    assert "--precision" in shown
