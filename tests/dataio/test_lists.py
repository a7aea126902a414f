"""Lists as spreadsheets, pandas and people write them: read right, or refused with file and line."""

import os

import numpy as np
import pytest
import soundfile
import torch
from folder_prepare import prepare_folder
from speechbrain.dataio.dataset import DynamicItemDataset
from voxceleb_prepare import prepare_voxceleb

from speechbrain_mrl.dataio.clips import Clip, find_listed, read_clips, stem_of
from speechbrain_mrl.dataio.dataset import ClipDataset, train_dataset, valid_dataset
from speechbrain_mrl.dataio.lists import read_clip_list
from speechbrain_mrl.evaluation.verification import read_trials
from speechbrain_mrl.training.augment import Noise

GOOD = "ID,duration,wav,start,stop,spk_id\na/0/1.wav,1.0,{wav},0,16000,a\n"
TRIALS = "1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n"


@pytest.fixture
def clips_csv(tmp_path):
    """``clips_csv(text)``: a CSV's path; ``{wav}`` in the text is a recording's."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(tmp_path / "a.wav", noise, 16000)

    def write(text):
        path = tmp_path / "clips.csv"
        data = text.replace("{wav}", str(tmp_path / "a.wav"))
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [GOOD, "\ufeff" + GOOD, GOOD.replace(",", ", "), GOOD.replace("\n", "\r\n"), GOOD + "\n"],
    ids=["plain", "byte order mark", "spaces", "windows", "empty line"],
)
def test_every_reader_gives_the_same_clip(clips_csv, text):
    path = clips_csv(text)
    (clip,) = read_clips(path)
    assert clip == Clip("a/0/1.wav", str(path.with_name("a.wav")), 0, 16000)
    assert ClipDataset(path, [], ["id", "wav"])[0] == {"id": clip.id, "wav": clip.wav}
    assert train_dataset(path, 0.5)[0]["id"] == valid_dataset(path, 0.5)[0]["id"] == clip.id
    assert Noise(path).paths == [clip.wav]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: must have a column"),
        (
            "id,wav,start,stop\na,{wav},0,9\n",
            "line 1: must have a column ID, its columns are .'id'",
        ),
        ("ID,wav,start\na,{wav},0\n", "line 1: must have a column stop"),
        ("ID;wav;start;stop\na;{wav};0;9\n", "line 1: must have a column ID"),
        ("ID,wav,start,stop\n", "has no row"),
        ("ID,wav,start,stop\na,{wav},0,9\nb,,0,9\n", "line 3: wav is empty"),
        ("ID,wav,start,stop\na,{wav},0\n", "line 2: has 3 cells for the 4 columns"),
        ("ID,wav,start,stop\na,{wav},0,9,x\n", "line 2: has 5 cells for the 4 columns"),
        ("ID,wav,start,stop\na,{wav},0.0,9\n", "line 2: start and stop must be whole .*'0.0'"),
        ("ID,wav,start,stop\na,{wav},9,9\n", "line 2: start and stop .* first below the second"),
        ("ID,wav,start,stop\na,{wav},-1,9\n", "line 2: start and stop must be whole"),
        ('ID,wav,start,stop\n"a,{wav},0,9\n', "line 2: unexpected end of data"),
        ("ID,ID,wav,start,stop\na,b,{wav},0,9\n", "line 1: a column comes twice"),
        ("ID,wav,start,stop\na,{wav},0,9\na,{wav},0,9\n", "'a' in line 2 and in line 3"),
    ],
)
def test_a_broken_csv_is_refused_with_file_and_line(clips_csv, text, message):
    with pytest.raises(ValueError, match=f"clips.csv.*{message}"):
        read_clips(clips_csv(text))


def test_text_of_another_encoding_is_refused_with_its_line(clips_csv, tmp_path):
    path = clips_csv("ID,wav,start,stop\na,{wav},0,9\n")
    path.write_bytes(path.read_bytes() + "é,x.wav,0,9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="clips.csv, line 3: is not UTF-8"):
        read_clips(path)
    with pytest.raises(ValueError, match="clips.csv, line 3: is not UTF-8"):
        list(ClipDataset(path, [], ["id"]))
    (tmp_path / "trials.txt").write_bytes(b"1 a b\n0 \xe9 b\n")
    for read in (read_trials, read_clip_list):
        with pytest.raises(ValueError, match="trials.txt, line 2: is not UTF-8"):
            read(tmp_path / "trials.txt")


def test_rows_of_training_are_refused_with_file_and_line(clips_csv):
    path = clips_csv("ID,duration,wav,start,stop\na,1.0,{wav},0,16000\nb,1.0,{wav}\n")
    with pytest.raises(ValueError, match="clips.csv, line 3: has 3 cells"):
        train_dataset(path, 0.5)[1]
    with pytest.raises(ValueError, match="clips.csv, line 3: has 3 cells"):
        valid_dataset(path, 0.5)
    with pytest.raises(ValueError, match="clips.csv, line 1: must have a column stop"):
        train_dataset(clips_csv("ID,wav,start\na,{wav},0\n"), 0.5)
    path = clips_csv("ID,duration,wav,start,stop\na,one,{wav},0,16000\n")
    for make in (train_dataset, valid_dataset):
        with pytest.raises(ValueError, match="clips.csv, line 2: duration must be seconds.*'one'"):
            list(make(path, 0.5))


def test_validation_clips_are_those_of_speechbrain(clips_csv):
    rows = "b/0/1.wav,0.5,{wav},100,8100,b\nc/0/1.wav,0.75,{wav},0,12000,c\n"
    path = clips_csv(GOOD + rows)
    expected = DynamicItemDataset.from_csv(path, {}, [], ["id", "duration"])
    expected = expected.filtered_sorted(sort_key="duration", reverse=True)
    found = valid_dataset(path, 9.0)
    assert found.data_ids == expected.data_ids
    assert [len(item["sig"]) for item in found] == [16000, 12000, 8000]


@pytest.mark.parametrize("text", [TRIALS, "\ufeff" + TRIALS, TRIALS + "\n \n", TRIALS[:-1]])
def test_a_byte_order_mark_and_empty_lines_at_the_end_are_no_trials(tmp_path, text):
    (tmp_path / "trials.txt").write_text(text, encoding="utf-8")
    trials = read_trials(tmp_path / "trials.txt")
    assert trials.clip_ids == ["a/1.wav", "a/2.wav", "b/1.wav"]
    assert trials.labels.tolist() == [True, False]


def test_lists_name_a_clip_with_or_without_its_folder_and_suffix(tmp_path):
    clips = [Clip("id1/call/1.m4a", "/x/1.m4a", 0, 9), Clip("id1/call/at.10.flac", "/x/2", 0, 9)]
    names = ["wav/id1/call/1.wav", "id1/call/1", "id1/call/at.10", "id2/call/1.wav"]
    assert [clip[:2] for clip in find_listed(names, clips)] == [
        ("wav/id1/call/1.wav", "/x/1.m4a"),
        ("id1/call/1", "/x/1.m4a"),
        ("id1/call/at.10", "/x/2"),
    ]
    assert {stem_of(name) for name in names[:2]} == {"id1/call/1"}


def _corpus(folder, speakers=range(10), suffix="wav"):
    for speaker in speakers:
        for number in range(3):
            path = folder / f"wav/id{speaker}/call/{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.random.default_rng(number).uniform(-1, 1, 16000), 16000)
    return folder


@pytest.mark.parametrize("prefix, suffix", [("", ".wav"), ("wav/", ".wav"), ("", ""), ("", ".m4a")])
@pytest.mark.parametrize("prepare", [prepare_voxceleb, prepare_folder])
def test_both_preparations_find_the_clips_of_any_trials(tmp_path, prepare, prefix, suffix):
    folder = _corpus(tmp_path / "data", suffix="flac")
    names = [f"{prefix}id{speaker}/call/{i}{suffix}" for speaker in (0, 1) for i in (0, 1)]
    text = f"1 {names[0]} {names[1]}\n0 {names[0]} {names[2]}\n0 {names[1]} {names[3]}\n\n"
    (tmp_path / "trials.txt").write_text("\ufeff" + text, encoding="utf-8")
    made = prepare(str(folder), str(tmp_path / "lists"), trials=str(tmp_path / "trials.txt"))
    assert [clip.id for clip in read_clips(made.test_csv)] == [names[i] for i in (0, 1, 2, 3)]
    trained = {clip.id.split("/")[0] for clip in read_clips(made.train_csv)}
    assert prepare is prepare_folder or not trained & {"id0", "id1"}
    with pytest.raises(ValueError, match="trials.txt, line 2: utterance 'nobody' is missing"):
        (tmp_path / "trials.txt").write_text(f"1 {names[0]} {names[1]}\n0 {names[0]} nobody\n")
        prepare(str(folder), str(tmp_path / "other"), trials=str(tmp_path / "trials.txt"))


def test_a_name_with_a_space_is_refused_before_anything_is_computed(tmp_path):
    folder = _corpus(tmp_path / "data")
    os.rename(folder / "wav/id3", folder / "wav/id 3")
    with pytest.raises(ValueError, match="id 3.*holds a space, at which trial lists end a name"):
        prepare_voxceleb(str(folder), str(tmp_path / "lists"))


def test_labelled_recordings_of_every_suffix_are_listed(tmp_path):
    folder = _corpus(tmp_path / "data")
    _corpus(folder, range(10, 12), "mp3")
    (folder / "wav/id0/call/._1.wav").write_bytes(b"\0\5\26\7")
    (folder / "wav/id0/call/dir.wav").mkdir()
    (folder / "wav/id0/call/gone.wav").symlink_to(folder / "nowhere.wav")
    made = prepare_voxceleb(str(folder), str(tmp_path / "lists"), test_speakers=4)
    lists = (made.train_csv, made.valid_csv, made.test_csv)
    found = {clip.id for path in lists for clip in read_clips(path)}
    assert found == {
        f"id{s}/call/{i}.{'wav' if s < 10 else 'mp3'}" for s in range(12) for i in range(3)
    }


def test_clip_that_begins_silent_is_heard_where_its_sound_is(clips_csv, tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(tmp_path / "late.wav", np.concatenate([np.zeros(40000), noise]), 16000)
    text = f"ID,duration,wav,start,stop\na,3.5,{tmp_path / 'late.wav'},0,56000\n"
    (item,) = valid_dataset(clips_csv(text), 1.0)
    torch.testing.assert_close(item["sig"].double(), torch.from_numpy(noise), atol=1e-4, rtol=0)
    chunks = train_dataset(clips_csv(text), 0.5, chunks_per_clip=20)
    assert all(chunk["sig"].any() for chunk in chunks)
