import itertools
import json
import sys

import numpy as np
import pytest
import soundfile
from demo_voices import _draw_voices, make_demo_corpus
from test_utils import full_disk
from voxceleb_prepare import prepare_voxceleb


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("demo")
    return make_demo_corpus(folder, n_speakers=12, clips_per_speaker=5, seconds=2)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("wav/*/*/*")
    }


def mean_log_spectrum(path):
    """Average over time in 32 bands, without the level."""
    frames = np.lib.stride_tricks.sliding_window_view(soundfile.read(path)[0], 512)[::256]
    power = np.abs(np.fft.rfft(frames * np.hanning(512)))[:, 1:] ** 2
    bands = np.log(power.mean(axis=0).reshape(32, 8).mean(axis=1))
    return bands - bands.mean()


def test_corpus_has_the_promised_clips_two_to_a_session(corpus):
    expected = {
        f"wav/demo{speaker:04d}/s{clip // 2:02d}/{clip:05d}.wav"
        for speaker, clip in itertools.product(range(12), range(5))
    }
    assert set(contents(corpus)) == expected


def test_a_full_disk_is_one_sentence_that_names_the_folder(tmp_path):
    pytest.importorskip("espeakng_loader")
    message = f"cannot write {tmp_path}/wav/demo0000/s00: .*make room"
    with full_disk(tmp_path), pytest.raises(OSError, match=message):
        make_demo_corpus(tmp_path, n_speakers=2, clips_per_speaker=1)


def test_clips_are_16_khz_mono_of_the_asked_length_and_a_sane_level(corpus):
    for path in corpus.glob("wav/*/*/*"):
        wav, sample_rate = soundfile.read(path)
        assert sample_rate == 16000 and wav.ndim == 1
        assert 1.5 <= len(wav) / sample_rate <= 2.5
        level_db = 10 * np.log10(np.mean(wav**2))
        assert -31 < level_db < -21
        assert np.abs(wav).max() <= 0.951


def test_clips_of_a_speaker_are_more_alike_than_those_of_others(corpus):
    clips = [
        [mean_log_spectrum(path) for path in sorted(folder.rglob("*.wav"))]
        for folder in sorted(corpus.glob("wav/*"))
    ]
    flat = np.array(clips)  # (speakers, clips, bands)
    distances = np.linalg.norm(flat[:, None, :, None] - flat[None, :, None], axis=-1)
    same = np.eye(12, dtype=bool)
    # Of the 25 distances in a speaker's own block, 5 are of a clip to itself.
    assert distances[same].sum() / (12 * 20) < 0.8 * distances[~same].mean()


def test_same_seed_same_clips_and_another_seed_others(corpus, tmp_path):
    again = make_demo_corpus(tmp_path / "again", n_speakers=12, clips_per_speaker=5, seconds=2)
    assert contents(again) == contents(corpus)
    other = make_demo_corpus(tmp_path / "other", 2, 1, seconds=2, seed=1)
    assert contents(other)["wav/demo0000/s00/00000.wav"] not in contents(corpus).values()


def test_complete_corpus_is_kept_and_half_a_corpus_is_made_again(tmp_path):
    pytest.importorskip("espeakng_loader")
    make_demo_corpus(tmp_path, n_speakers=3, clips_per_speaker=1, seconds=1)
    before = contents(tmp_path)
    clip = tmp_path / "wav/demo0001/s00/00000.wav"
    written = clip.stat().st_mtime_ns
    make_demo_corpus(tmp_path, n_speakers=3, clips_per_speaker=1, seconds=1)
    assert clip.stat().st_mtime_ns == written
    for lost in (clip, tmp_path / "demo.json"):
        lost.unlink()
        make_demo_corpus(tmp_path, n_speakers=3, clips_per_speaker=1, seconds=1)
        assert contents(tmp_path) == before
    make_demo_corpus(tmp_path, n_speakers=2, clips_per_speaker=1, seconds=1)
    assert len(contents(tmp_path)) == 2
    assert json.loads((tmp_path / "demo.json").read_text())["n_speakers"] == 2


def test_corpus_can_be_prepared(corpus, tmp_path):
    prepared = prepare_voxceleb(str(corpus), str(tmp_path / "lists"), test_speakers=4)
    assert [prepared.counts[part]["speakers"] for part in ("train", "valid", "test")] == [5, 3, 4]
    # 5 clips in sessions of 2, 2 and 1: eight pairs cross sessions
    assert prepared.counts["test"]["target"] == 32


def test_folder_of_other_speakers_is_refused_and_untouched(tmp_path):
    pytest.importorskip("espeakng_loader")
    (tmp_path / "wav" / "id10001").mkdir(parents=True)
    (tmp_path / "wav" / "demo0000").mkdir()
    with pytest.raises(ValueError, match="holds other speakers, such as id10001"):
        make_demo_corpus(tmp_path)
    assert (tmp_path / "wav" / "demo0000").is_dir()


def test_no_accent_and_variant_is_in_two_groups_or_twice_in_the_demo():
    names = [{voice.name for voice in _draw_voices(400, 0, group)} for group in range(4)]
    assert all(not (one & other) for one, other in itertools.combinations(names, 2))
    assert sum(map(len, names)) == 8 * 58  # every accent with every variant
    demo = [voice.name for voice in _draw_voices(210, 0, 0)]
    assert len(set(demo)) == len(demo)


def test_a_group_has_speakers_of_its_own(corpus, tmp_path):
    teachers = make_demo_corpus(tmp_path, n_speakers=2, clips_per_speaker=1, seconds=2, group=1)
    assert not set(contents(teachers).values()) & set(contents(corpus).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_speakers": 1}, "n_speakers must be 2 or more"),
        ({"seconds": 0.5}, "seconds 1 or more"),
        ({"group": 4}, "group must be 0 to 3, got 4"),
    ],
)
def test_argument_out_of_range_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_demo_corpus(tmp_path, **arguments)


def test_missing_espeak_names_the_extra_before_anything_is_removed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install espeakng_loader"):
        make_demo_corpus(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
