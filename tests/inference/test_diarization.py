import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from speechbrain_mrl.inference.diarization import Turn, cluster, diarize, windows


class Level(nn.Module):
    """A window of level a has the embedding (cos 4a, sin 4a)."""

    def forward(self, wavs, wav_lens):
        angle = 4 * wavs.abs().amax(dim=1, keepdim=True)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def write(path, *pieces):
    """Alternating signals, each of a level and seconds."""
    parts = [level * np.resize([1.0, -1.0], int(16000 * seconds)) for level, seconds in pieces]
    soundfile.write(path, np.concatenate(parts), 16000, subtype="FLOAT")
    return path


def test_windows_cover_the_signal():
    assert windows(64000) == [
        (0, 24000),
        (12000, 36000),
        (24000, 48000),
        (36000, 60000),
        (40000, 64000),
    ]


@pytest.mark.parametrize("n_speakers", [2, None])
def test_turns_begin_and_end_where_speakers_change(tmp_path, n_speakers):
    path = write(tmp_path / "call.wav", (0.1, 15), (0.4, 9), (0.1, 12))
    turns = diarize(Level(), path, n_speakers=n_speakers)
    assert [turn.speaker for turn in turns] == [1, 2, 1]
    assert turns[0].start == 0 and turns[-1].end == 36
    for turn, end in zip(turns, (15, 24)):  # a window's half, at most
        assert turn.end == pytest.approx(end, abs=0.75)


def test_silence_is_nobodys(tmp_path):
    path = write(tmp_path / "call.wav", (0.1, 12), (0.0, 6), (0.4, 12))
    one, two = diarize(Level(), path, n_speakers=2)
    assert one.end == pytest.approx(12, abs=0.75) and two.start == pytest.approx(18, abs=0.75)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    class Broken(Level):
        def forward(self, wavs, wav_lens):
            return super().forward(wavs, wav_lens) * torch.nan

    path = write(tmp_path / "call.wav", (0.1, 6))
    with pytest.raises(ValueError, match=f"an embedding that is not finite for {path}"):
        diarize(Broken(), path)


def test_one_speaker_or_one_window_is_one_turn(tmp_path):
    path = write(tmp_path / "short.wav", (0.1, 1.5))
    assert diarize(Level(), path) == [Turn(0.0, 1.5, 1)]
    path = write(tmp_path / "call.wav", (0.1, 6), (0.4, 6))
    assert diarize(Level(), path, n_speakers=1) == [Turn(0.0, 12.0, 1)]


def test_the_generator_of_numpy_is_left_as_it_was():
    embeddings = torch.eye(2).repeat_interleave(20, dim=0)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    cluster(embeddings, windows(492000), 2)
    assert np.random.rand() == expected


@pytest.mark.parametrize(
    ("pieces", "options", "sentence"),
    [
        ([(0.1, 1.4)], {}, "lasts 1.40 s; diarization needs 1.5 s at least"),
        ([(0.0, 5.0)], {}, "holds only silence"),
        ([(0.1, 3.0)], {"n_speakers": 9}, r"n_speakers must be in 1..3, the windows, got 9"),
        ([(0.1, 3.0)], {"n_speakers": 0}, r"n_speakers must be in 1..3, the windows, got 0"),
        ([(0.1, 3.0)], {"target_dim": 3}, r"target_dim must be one of \[2\]"),
    ],
)
def test_what_cannot_be_diarised_is_refused(tmp_path, pieces, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        diarize(Level(), write(tmp_path / "call.wav", *pieces), **options)


def test_seven_windows_of_two_speakers_are_told_apart_with_one_that_holds_both():
    angles = torch.tensor([45.0, 45, 45, -45, -90, -90, -90]).deg2rad()
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    turns = cluster(embeddings, windows(96000), n_speakers=2)
    assert turns == [(0.0, 2.625, 1), (2.625, 6.0, 2)]
