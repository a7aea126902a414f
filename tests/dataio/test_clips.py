"""Which files of a folder are recordings."""

import os

import numpy as np
import pytest
import soundfile
from sounds import encode

from speechbrain_mrl.dataio.clips import AUDIO_SUFFIXES, find_clips


def _write(path, seconds=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.ones(16000 * seconds) / 2, 16000, format="WAV")
    return path


def test_stray_files_do_not_stop_a_folder(tmp_path, caplog):
    folder = tmp_path / "data"
    _write(folder / "b.wav")
    _write(folder / "dir.wav" / "a.flac")
    (folder / "._b.wav").write_bytes(b"\0\5\26\7")
    (folder / ".Trash").mkdir()
    _write(folder / ".Trash" / "deleted.wav")
    (folder / "notes.txt").write_text("hello")
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    assert [clip.id for clip in find_clips(folder)] == ["b.wav", "dir.wav/a.flac"]
    assert "gone.wav is left out: it links to no file" in caplog.text


def test_linked_folders_are_followed_once(tmp_path):
    folder = tmp_path / "data"
    _write(folder / "a" / "1.wav")
    _write(tmp_path / "elsewhere" / "2.wav")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert [clip.id for clip in find_clips(folder)] == ["a/1.wav", "b/2.wav"]


def test_name_that_is_not_utf8_is_refused_in_a_sentence(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.wav")
    soundfile.write(tmp_path / "a.wav", np.ones(16000) / 2, 16000)
    os.rename(tmp_path / "a.wav", path)
    with pytest.raises(ValueError, match=r"caf.udce9.wav' is not UTF-8, as lists are; rename it"):
        find_clips(tmp_path)


BY_SOUNDFILE = {
    "wav": "WAV",
    "flac": "FLAC",
    "aif": "AIFF",
    "aiff": "AIFF",
    "au": "AU",
    "sph": "NIST",
}
BY_SOUNDFILE |= {"caf": "CAF", "w64": "W64", "rf64": "RF64", "ogg": "OGG", "mp3": "MP3"}
BY_PYAV = {
    **dict.fromkeys(["m4a", "mp4", "mov", "m4v", "m4b"], ("mp4", "aac")),
    **dict.fromkeys(["mka", "mkv"], ("matroska", "libmp3lame")),
    **dict.fromkeys(["webm", "weba"], ("webm", "libopus")),
    **dict.fromkeys(["wma", "asf"], ("asf", "libmp3lame")),
    **dict.fromkeys(["mpg", "mpeg"], ("mpeg", "mp2")),
    **{
        "opus": ("ogg", "libopus"),
        "aac": ("adts", "aac"),
        "ac3": ("ac3", "ac3"),
        "mp2": ("mp2",) * 2,
    },
    **{
        "wv": ("wv", "wavpack"),
        "tta": ("tta", "tta"),
        "avi": ("avi", "aac"),
        "flv": ("flv", "aac"),
    },
    **dict.fromkeys(["3gp", "3g2"], ("3gp", "aac")),
}


def test_recordings_of_every_kind_are_found_with_their_length(tmp_path):
    for suffix, container in BY_SOUNDFILE.items():
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, 96000)
        soundfile.write(tmp_path / f"a.{suffix}", noise, 48000, format=container)
    for suffix, (container, codec) in BY_PYAV.items():
        encode(tmp_path / f"a.{suffix}", noise, codec, container, 48000)
    found = {clip.id: clip.num_frames for clip in find_clips(tmp_path)}
    assert found.keys() == {f"a.{suffix}" for suffix in [*BY_SOUNDFILE, *BY_PYAV]}
    assert all(abs(length - 32000) <= 2048 for length in found.values()), found
    others = {"aifc", "ape", "oga", "spx", "amr", "awb"}  # which nothing here can write
    assert {suffix[1:] for suffix in AUDIO_SUFFIXES} == {*BY_SOUNDFILE, *BY_PYAV, *others}
