"""Bad recordings among good ones: refused with their path and reason, or left out by an option."""

import csv
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
from folder_prepare import prepare_folder
from voxceleb_prepare import prepare_voxceleb

from speechbrain_mrl.dataio.audio import check_audio, read_audio
from speechbrain_mrl.dataio.clips import Clip
from speechbrain_mrl.inference.extract import embed_clips


def _voice(seconds=1.2, rate=16000):
    times = np.arange(round(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * 220 * times) + 0.1 * np.sin(2 * np.pi * 1310 * times)


def _with(value):
    samples = _voice()
    samples[9000] = value
    return samples


def _truncated(path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32000)  # FLAC cannot make it shorter
    soundfile.write(path, noise, 16000)
    path.write_bytes(path.read_bytes()[:20000])


def _wrong_header(path):
    soundfile.write(path, _voice(), 16000)
    path.write_bytes(b"RIFX" + path.read_bytes()[4:])


BAD = {
    "empty.wav": (lambda path: path.write_bytes(b""), "cannot decode"),
    "text.wav": (lambda path: path.write_text("not audio\n" * 99), "cannot decode"),
    "header.wav": (_wrong_header, "cannot decode"),
    "truncated.flac": (_truncated, "cannot decode|ends after"),
    "nan.wav": (lambda path: soundfile.write(path, _with(np.nan), 16000, "FLOAT"), "NaN"),
    "inf.wav": (lambda path: soundfile.write(path, _with(np.inf), 16000, "FLOAT"), "infinite"),
    "zeros.wav": (lambda path: soundfile.write(path, np.zeros(20000), 16000), "only zeros"),
    "short.wav": (lambda path: soundfile.write(path, _voice(0.02), 16000), "0.02 s, min_seconds"),
}
GOOD = {
    "8k.wav": (lambda path: soundfile.write(path, _voice(rate=8000), 8000)),
    "44k.wav": (lambda path: soundfile.write(path, _voice(rate=44100), 44100)),
    "48k.flac": (lambda path: soundfile.write(path, _voice(rate=48000), 48000)),
    "stereo.wav": (lambda path: soundfile.write(path, np.stack([_voice()] * 2, 1), 16000)),
    "24bit.wav": (lambda path: soundfile.write(path, _voice(), 16000, "PCM_24")),
    "clipped.wav": (lambda path: soundfile.write(path, (9 * _voice()).clip(-1, 1), 16000)),
    "hour.flac": (lambda path: soundfile.write(path, np.tile(_voice(60, 8000), 60), 8000)),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, small_corpus):
    """The small corpus, with every kind of bad and unusual recording as further clips."""
    folder = tmp_path_factory.mktemp("mixed") / "data"
    (folder / "wav" / "id00" / "odd").mkdir(parents=True)
    for speaker in sorted((small_corpus / "wav").iterdir()):
        for session in speaker.iterdir():
            place = folder / "wav" / speaker.name / session.name
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(session)
    for name, make in {**{n: m for n, (m, _) in BAD.items()}, **GOOD}.items():
        make(folder / "wav" / "id00" / "odd" / name)
    return folder


def _ids(path):
    with open(path, newline="") as file:
        return [row["ID"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("prepare", [prepare_voxceleb, prepare_folder])
def test_preparation_lists_each_bad_file_with_its_reason(prepare, mixed, tmp_path):
    options = {"test_speakers": 2, "seed": 1} if prepare is prepare_voxceleb else {}
    arguments = {"data_folder": str(mixed), "save_folder": str(tmp_path / "lists"), **options}
    with pytest.raises(ValueError, match="files are bad; skip_bad_files=True"):
        prepare(**arguments)
    lists = prepare(**arguments, skip_bad_files=True)
    listed = (tmp_path / "lists" / "bad_files.txt").read_text().splitlines()
    for name, (_, reason) in BAD.items():
        if prepare is prepare_folder and name == "short.wav":
            continue  # left out by min_seconds, which is no fault of a file
        (line,) = [line for line in listed if f"/{name}" in line]
        assert any(part in line for part in reason.split("|")), line
    ids = [i for path in lists[:3] if path is not None for i in _ids(path)]
    names = {i.rsplit("/", 1)[1] for i in ids if "/odd/" in i}
    assert names <= set(GOOD)
    assert prepare is prepare_voxceleb or names == set(GOOD)  # all are in some list


@pytest.mark.parametrize("prepare", [prepare_voxceleb, prepare_folder])
def test_a_name_that_is_not_utf8_stops_or_is_listed_escaped(prepare, small_corpus, tmp_path):
    shutil.copytree(small_corpus, tmp_path / "data", symlinks=False)
    path = next((tmp_path / "data").rglob("*.wav"))
    os.rename(path, os.path.join(os.fsencode(path.parent), b"caf\xe9.wav"))
    options = {"test_speakers": 2} if prepare is prepare_voxceleb else {}
    arguments = {"data_folder": str(tmp_path / "data"), "save_folder": str(tmp_path / "l")}
    with pytest.raises(ValueError, match=r"caf.udce9.wav' is not UTF-8, as lists are"):
        prepare(**arguments, **options)
    lists = prepare(**arguments, **options, skip_bad_files=True)
    (line,) = (tmp_path / "l" / "bad_files.txt").read_text(encoding="utf-8").splitlines()
    assert r"caf\udce9.wav' is not UTF-8" in line
    n_clips = sum(1 for _ in small_corpus.rglob("*.wav"))
    found = [i for path in (lists.train_csv, lists.valid_csv) for i in _ids(path)]
    if prepare is prepare_folder:
        assert len(found) == n_clips - 1
    else:
        assert lists.counts["left_out"]["bad"] == 1


@pytest.mark.parametrize("name", [name for name in BAD if name != "short.wav"])
def test_embedding_stops_with_the_path_of_a_bad_clip(name, mixed, random_model, tiny_config):
    path = mixed / "wav" / "id00" / "odd" / name
    good = Clip("good", str(mixed / "wav" / "id00" / "s0" / "0.wav"), 0, 19200)
    bad = Clip("bad", str(path), 0, 19200)
    if name == "truncated.flac":
        bad = bad._replace(start=12000, stop=32000)
    with pytest.raises(ValueError, match=f"{name}"):
        embed_clips({"it": random_model(tiny_config)}, [good, bad])


@pytest.mark.parametrize("name", GOOD)
def test_unusual_recordings_sound_as_the_usual_one(name, mixed):
    path = mixed / "wav" / "id00" / "odd" / name
    check_audio(path)
    wav = read_audio(path, 1600, 12800).double()
    expected = torch.from_numpy(_voice())[1600:14400]
    assert torch.cosine_similarity(wav, expected, dim=0) > (0.9 if name == "clipped.wav" else 0.99)
