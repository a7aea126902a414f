import os
import signal
import subprocess
import sys

import embed
import pytest
import torch

from speechbrain_mrl import bulk, embed_folder, export_model, read_embeddings, teachers
from speechbrain_mrl.embedding import embed_clips, find_clips
from speechbrain_mrl.fast import optimize_for_inference

KILLED_AFTER_TWO_SHARDS = """
import os, signal, sys
from speechbrain_mrl import bulk, embed_folder, teachers
teachers.SHARD_SIZE = 16
calls = 0
def encoder(wavs, wav_lens):
    global calls
    calls += len(wavs)
    if calls > 32:
        os.kill(os.getpid(), signal.SIGKILL)
    return wavs.abs().sum(dim=1, keepdim=True)
encoder.fingerprint = "sums"
embed_folder(encoder, sys.argv[1], sys.argv[2])
"""


class Sums:
    """Sum of magnitudes; counts the clips that it was asked for."""

    def __init__(self, fingerprint="sums"):
        self.fingerprint, self.clips = fingerprint, 0

    def __call__(self, wavs, wav_lens):
        self.clips += len(wavs)
        return wavs.abs().sum(dim=1, keepdim=True)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(teachers, "SHARD_SIZE", 16)
    monkeypatch.setattr(bulk, "SHARD_SIZE", 16)


def as_dict(folder):
    return {i: x for ids, found in read_embeddings(folder) for i, x in zip(ids, found, strict=True)}


def test_every_recording_has_its_embedding(small_corpus, small_shards, tmp_path):
    found = as_dict(embed_folder(Sums(), small_corpus, tmp_path, num_workers=1))
    clips = find_clips(small_corpus)
    expected = embed_clips({"sums": Sums()}, clips)["sums"]
    assert found.keys() == {clip.id for clip in clips}
    for clip, embedding in zip(clips, expected):
        torch.testing.assert_close(found[clip.id], embedding)


def test_a_killed_call_goes_on_at_its_shard(small_corpus, small_shards, tmp_path):
    command = [sys.executable, "-c", KILLED_AFTER_TWO_SHARDS, str(small_corpus), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    again = Sums()
    embed_folder(again, small_corpus, tmp_path)
    assert again.clips == len(find_clips(small_corpus)) - 32
    assert len(as_dict(tmp_path)) == again.clips + 32


def test_embeddings_of_another_encoder_are_not_mixed_in(small_corpus, tmp_path):
    embed_folder(Sums(), small_corpus, tmp_path)
    with pytest.raises(ValueError, match="filled with other teacher"):
        embed_folder(Sums("others"), small_corpus, tmp_path)
    with pytest.raises(ValueError, match="attribute fingerprint"):
        embed_folder(lambda wavs, wav_lens: wavs, small_corpus, tmp_path)


def test_a_copy_made_for_inference_embeds_a_folder(
    small_corpus, random_model, tiny_config, tmp_path
):
    model = random_model(tiny_config)
    found = as_dict(embed_folder(optimize_for_inference(model), small_corpus, tmp_path))
    clips = find_clips(small_corpus)[:3]
    expected = embed_clips({"model": model}, clips)["model"]
    for clip, embedding in zip(clips, expected):
        torch.testing.assert_close(found[clip.id], embedding, atol=1e-4, rtol=0)


def test_the_command_embeds_with_a_model_folder(
    small_corpus, random_model, tiny_config, tmp_path, capsys
):
    model = random_model(tiny_config)
    folder = export_model(model, tmp_path / "model")
    embed.main([str(folder), str(small_corpus), str(tmp_path / "out"), "--num_workers=0"])
    found = as_dict(tmp_path / "out")
    clips = find_clips(small_corpus)[:3]
    expected = embed_clips({"model": model}, clips)["model"]
    for clip, embedding in zip(clips, expected):
        assert torch.cosine_similarity(found[clip.id], embedding, dim=0) > 0.9999


def test_the_command_takes_the_fast_form_of_a_redimnet_only(random_model, tiny_config, tmp_path):
    folder = export_model(random_model(tiny_config), tmp_path / "model")
    encoder = teachers.load_teacher(folder)
    weights = teachers.fingerprint(encoder)
    fast, batch_seconds = embed.fast_form(encoder, "float32")
    assert type(encoder.encoder.mods.embedding_model.backbone).__module__ == "speechbrain_mrl.fast"
    assert teachers.fingerprint(fast) == weights and batch_seconds > 0
    other = torch.nn.Identity()
    assert embed.fast_form(other, "float32")[0] is other
    with pytest.raises(TypeError, match="must be a ReDimNet"):
        embed.fast_form(other, "bfloat16")
    rough, _ = embed.fast_form(teachers.load_teacher(folder), "bfloat16")
    assert teachers.fingerprint(rough) != weights  # is no part of an interrupted float32 run
