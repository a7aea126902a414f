"""Every reader, given a damaged file: a result, or one sentence that names the file."""

import functools
import json

import numpy as np
import pytest
import soundfile
import torch
from sounds import encode

from speechbrain_mrl.dataio.audio import audio_info, check_audio, read_audio
from speechbrain_mrl.dataio.clips import read_clips
from speechbrain_mrl.dataio.dataset import ClipDataset, train_dataset
from speechbrain_mrl.dataio.lists import read_clip_list
from speechbrain_mrl.dataio.shards import ShardedClips
from speechbrain_mrl.evaluation.calibration import (
    Calibration,
    read_calibrations,
    write_calibrations,
)
from speechbrain_mrl.evaluation.verification import read_trials
from speechbrain_mrl.inference.search import MANIFEST, MatryoshkaIndex
from speechbrain_mrl.models.redimnet import read_tensors
from speechbrain_mrl.utils import read_json

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
TEXT = {
    "clips.csv": "ID,duration,wav,start,stop\na,0.5,/x/a.wav,0,8000\nb,0.5,/x/b.wav,9,8000\n",
    "trials.txt": "1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n0 a/2.wav b/1.wav\n",
    "cohort.txt": "a/1.wav\nb/1.wav\nc/1.wav\n",
    "any.json": json.dumps({"dims": {"8": {"eer": 0.1}}, "corpus": "demo", "seconds": 2.5}),
}


def _rows(path):
    return list(ClipDataset(path, [], ["id"]))


def _write_tensors(path):
    torch.save({"weight": torch.arange(64.0)}, path)


def _write_calibrations(path):
    write_calibrations({8: Calibration(-1.0, 3.0, (0.5,), ((0.0, 1.0),))}, path)


def _write_text(path):
    path.write_text(TEXT[path.name])


def _write_sound(path):
    if path.suffix in (".m4a", ".webm"):
        noise = np.resize(NOISE, 24000)
        kind = ("aac", "mp4") if path.suffix == ".m4a" else ("libopus", "webm")
        encode(path, noise, *kind, rate=48000)
    else:
        soundfile.write(path, NOISE, 16000)


SOUNDS = ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.m4a", "a.webm"]
READERS = [
    *((name, _write_sound, read) for name in SOUNDS for read in (read_audio, check_audio)),
    *((name, _write_sound, audio_info) for name in SOUNDS),
    ("clips.csv", _write_text, read_clips),
    ("clips.csv", _write_text, _rows),
    ("trials.txt", _write_text, read_trials),
    ("cohort.txt", _write_text, read_clip_list),
    ("any.json", _write_text, read_json),
    ("calibration.json", _write_calibrations, read_calibrations),
    ("model.ckpt", _write_tensors, read_tensors),
]


def damaged(whole, seed=0):
    """Cut, overwritten, doubled, emptied; with bytes flipped near the beginning and anywhere."""
    rng = np.random.default_rng(seed)
    yield from (
        b"",
        b"\0" * len(whole),
        whole * 2,
        whole[::-1],
        b"\xff\xfe" + whole,
        whole + b"\xe9",
    )
    yield from (whole[: round(share * len(whole))] for share in (0.01, 0.1, 0.5, 0.9, 0.99))
    for end in [min(100, len(whole))] * 25 + [len(whole)] * 10:
        flipped = bytearray(whole)
        for place in rng.integers(end, size=3):
            flipped[place] = rng.integers(256)
        yield bytes(flipped)


def result_or_sentence(read, path):
    """Whether there was a result; anything but a sentence that names the file fails the test."""
    try:
        read(path)
        return True
    except (ValueError, FileNotFoundError) as error:
        assert path.name in str(error) and "\n" not in str(error), error
        return False


@pytest.mark.parametrize(
    ("name", "write", "read"), READERS, ids=lambda one: getattr(one, "__name__", one)
)
def test_a_damaged_file_gives_a_result_or_one_sentence_that_names_it(tmp_path, name, write, read):
    if name in ("a.m4a", "a.webm"):
        pytest.importorskip("av")
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    assert result_or_sentence(read, path)
    for data in damaged(whole):
        path.write_bytes(data)
        result_or_sentence(read, path)
    path.write_bytes(b"")
    assert not result_or_sentence(read, path)
    path.unlink()
    assert not result_or_sentence(read, path)


def test_a_damaged_shard_gives_its_clips_or_one_sentence_that_names_it(tmp_path):
    import shards

    pytest.importorskip("webdataset")
    lines = ["ID,duration,wav,start,stop"]
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", NOISE, 16000)
        lines.append(f"c{number},0.5,{tmp_path / f'{number}.wav'},0,8000")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    urls = shards.write_shards(tmp_path / "train.csv", tmp_path / "shards", 1)
    path = next((tmp_path / "shards").glob("*.tar"))
    whole = path.read_bytes()

    @functools.wraps(ShardedClips)
    def read(_):
        clips = train_dataset(tmp_path / "train.csv", 0.25)
        return list(ShardedClips(clips, urls, batch_size=2))

    assert result_or_sentence(read, path)
    for data in damaged(whole):
        path.write_bytes(data)
        result_or_sentence(read, path)


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"file": 3, "ids": 4}', "null"])
def test_a_damaged_manifest_of_an_index_is_refused_by_name(tmp_path, text):
    pytest.importorskip("faiss")
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        MatryoshkaIndex.load(tmp_path)
