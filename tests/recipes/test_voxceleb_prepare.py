import csv
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from folder_prepare import prepare_folder
from voxceleb_prepare import prepare_voxceleb

from speechbrain_mrl.dataio.audio import audio_info


def write_clip(path, seconds=1.5, sample_rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * sample_rate), 0.1), sample_rate)


def make_corpus(wav_folder, speakers, sessions=2, utterances=2, suffix=".flac"):
    for speaker, session, utterance in itertools.product(
        speakers, range(sessions), range(utterances)
    ):
        write_clip(wav_folder / speaker / f"s{session}" / f"{utterance}{suffix}")


def names(prefix, count):
    return [f"{prefix}{number:02d}" for number in range(count)]


def rows(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def speakers_of(path):
    return {row["spk_id"] for row in rows(path)}


def trials_of(path):
    return [tuple(line.split()) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def corpus(tmp_path):
    """Twelve speakers, two of them in the trials, which say .wav where the files are .flac."""
    make_corpus(tmp_path / "vox" / "wav", names("id", 12))
    (tmp_path / "trials.txt").write_text(
        "1 id00/s0/0.wav id00/s1/1.wav\n0 id00/s0/0.wav id01/s0/0.wav\n"
    )
    return tmp_path


def prepare(folder, save_folder="lists", **arguments):
    arguments = {"trials": str(folder / "trials.txt"), **arguments}
    return prepare_voxceleb(str(folder / "vox"), str(folder / save_folder), **arguments)


def test_no_speaker_is_in_two_lists(corpus):
    prepared = prepare(corpus)
    train, valid, test = map(speakers_of, prepared[:3])
    assert test == {"id00", "id01"}
    assert not (train & valid or train & test or valid & test)
    assert len(valid) == 4 and train | valid | test == set(names("id", 12))
    assert prepared.counts["left_out"] == {"bad": 0, "short": 0, "test_speakers": 2}


def test_row_gives_the_clip_in_seconds_and_16_khz_samples(corpus):
    write_clip(corpus / "vox/wav/id00/s0/0.flac", seconds=2.5, sample_rate=8000)
    row = rows(prepare(corpus).test_csv)[0]
    path = str(corpus / "vox/wav/id00/s0/0.flac")
    assert row == {
        "ID": "id00/s0/0.wav",  # as the trials spell it
        "duration": "2.5",
        "wav": path,
        "start": "0",
        "stop": "40000",
        "spk_id": "id00",
    }


def test_test_csv_holds_exactly_the_clips_of_the_trials(corpus):
    prepared = prepare(corpus)
    assert prepared.test_trials == str(corpus / "trials.txt")
    assert [row["ID"] for row in rows(prepared.test_csv)] == [
        "id00/s0/0.wav",
        "id00/s1/1.wav",
        "id01/s0/0.wav",
    ]


def test_train_speakers_limits_training_and_never_admits_a_test_speaker(corpus):
    (corpus / "train.txt").write_text("\n".join(names("id", 9)))
    prepared = prepare(corpus, train_speakers=str(corpus / "train.txt"))
    trained = speakers_of(prepared.train_csv) | speakers_of(prepared.valid_csv)
    assert trained == set(names("id", 9)) - {"id00", "id01"}


def test_trials_of_every_speaker_leave_none_to_train_on(corpus):
    others = names("id", 12)[1:]
    lines = [f"0 id00/s0/0.wav {speaker}/s0/0.wav" for speaker in others]
    lines.append("1 id00/s0/0.wav id00/s1/0.wav")
    (corpus / "trials.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="0 speakers remain for training after 12 of 12"):
        prepare(corpus)


def test_generated_trials_cross_sessions_and_label_speakers_rightly(corpus):
    prepared = prepare(corpus)
    trials = trials_of(prepared.valid_trials)
    for label, a, b in trials:
        assert (label == "1") == (a.split("/")[0] == b.split("/")[0])
        assert label == "0" or a.split("/")[1] != b.split("/")[1]
    # 4 speakers with 2 sessions of 2 clips: 4 targets each; 6 pairs of speakers, 16 impostors each
    assert prepared.counts["valid"] == {
        "speakers": 4,
        "clips": 16,
        "hours": round(16 * 1.5 / 3600, 3),
        "target": 16,
        "impostor": 96,
    }
    assert len(set(trials)) == 112
    assert {ID for _, *pair in trials for ID in pair} <= {
        row["ID"] for row in rows(prepared.valid_csv)
    }


def test_without_trials_speakers_are_held_out_and_tried(corpus):
    prepared = prepare(corpus, trials=None, test_speakers=3)
    train, valid, test = map(speakers_of, prepared[:3])
    assert (len(test), len(valid), len(train)) == (3, 3, 6)
    assert not (train & valid or train & test or valid & test)
    assert {label for label, _, _ in trials_of(prepared.test_trials)} == {"0", "1"}


def test_same_seed_same_lists_whatever_the_state_of_random(corpus):
    contents = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        random.seed(folder)
        prepared = prepare(corpus, folder, trials=None, test_speakers=3, seed=seed)
        contents.append([Path(path).read_text() for path in prepared[:5]])
    assert contents[0] == contents[1] != contents[2]


def test_second_call_reads_no_header_until_something_changes(corpus, monkeypatch):
    first = prepare(corpus)
    with monkeypatch.context() as patch:
        patch.setattr("headers.audio_info", lambda *_: pytest.fail("header read"))
        assert prepare(corpus) == first
        assert prepare_voxceleb("nowhere", str(corpus / "lists"), skip_prep=True) == first
    write_clip(corpus / "vox/wav/id12/s0/0.flac")
    assert prepare(corpus).counts["train"]["speakers"] == 7  # one more
    (corpus / "trials.txt").write_text(
        "1 id00/s0/0.wav id00/s1/0.wav\n0 id00/s0/0.wav id02/s0/0.wav\n"
    )
    assert speakers_of(prepare(corpus).test_csv) == {"id00", "id02"}


def test_interrupted_preparation_is_done_again(corpus):
    first = prepare(corpus)
    Path(first.train_csv).write_text("half")
    (corpus / "lists/prepare.json").unlink()
    assert len(rows(prepare(corpus).train_csv)) == first.counts["train"]["clips"]


@pytest.fixture
def read_paths(monkeypatch):
    """The files whose headers are read; after ``kill_at[0]`` of them reading breaks off."""
    read, kill_at = [], [None]

    def recording(path):
        if len(read) == kill_at[0]:
            raise LookupError
        read.append(path)
        return audio_info(path)

    monkeypatch.setattr("headers.audio_info", recording)
    monkeypatch.setattr("speechbrain_mrl.dataio.clips.THREADS", 1)
    return read, kill_at


def test_killed_preparation_goes_on_at_the_next_header(corpus, read_paths):
    read, kill_at = read_paths
    expected = prepare(corpus, "undisturbed")
    everything = set(read)
    read.clear()
    kill_at[0] = 20
    with pytest.raises(LookupError):
        prepare(corpus)
    journal = corpus / "lists/headers.tsv"
    kept = [line.split("\t")[3] for line in journal.read_text().splitlines()]
    assert kept == read[: len(kept)] and len(kept) >= 16
    journal.write_text(journal.read_text()[:-9])  # as if killed in the middle of a line
    write_clip(Path(kept[0]), seconds=1.75)  # changed in between
    read.clear()
    kill_at[0] = None
    prepared = prepare(corpus)
    assert set(read) == everything - set(kept[1:-1]) and len(read) == len(set(read))
    assert not journal.exists()
    write_clip(Path(kept[0]))
    for found, one in zip(prepared[:4], expected[:4]):
        assert rows_but(found, kept[0]) == rows_but(one, kept[0])
    changed = [row["stop"] for path in prepared[:3] for row in rows(path) if row["wav"] == kept[0]]
    assert changed in ([], ["28000"])


def rows_but(path, wav):
    return [line for line in Path(path).read_text().splitlines() if f",{wav}," not in line]


def test_mended_files_alone_are_read_again(corpus, read_paths):
    bad = [corpus / f"vox/wav/{speaker}/s0/0.flac" for speaker in ("id05", "id07")]
    for path in bad:
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="2 of 43 files are bad"):
        prepare(corpus)
    read_paths[0].clear()
    for path in bad:
        write_clip(path)
    prepare(corpus)
    assert sorted(read_paths[0]) == sorted(map(str, bad))


def test_folder_of_any_structure_is_read_once(corpus, read_paths):
    arguments = str(corpus / "vox"), str(corpus / "lists")
    first = prepare_folder(*arguments)
    assert len(read_paths[0]) == 48
    assert prepare_folder(*arguments) == first and len(read_paths[0]) == 48


def test_skip_prep_without_lists_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not prepared; run without skip_prep"):
        prepare_voxceleb("nowhere", str(tmp_path), skip_prep=True)


@pytest.mark.parametrize("root", ["wav", "aac", "dev/aac", "dev/wav", "test/wav", "."])
def test_usual_roots_are_found(tmp_path, root):
    make_corpus(tmp_path / "vox" / root, names("id", 8), utterances=1)
    assert prepare(tmp_path, trials=None, test_speakers=2).counts["train"]["clips"] == 8


def test_several_folders_and_formats_join_and_a_converted_copy_counts_once(tmp_path):
    make_corpus(tmp_path / "vox1/wav", names("id1", 6), suffix=".wav")
    make_corpus(tmp_path / "vox2/dev/aac", names("id2", 6), suffix=".ogg")
    make_corpus(tmp_path / "vox2/dev/wav", names("id2", 1), suffix=".wav")
    folders = [str(tmp_path / "vox1"), str(tmp_path / "vox2")]
    prepared = prepare_voxceleb(folders, str(tmp_path / "lists"), test_speakers=2)
    assert sum(prepared.counts[part]["clips"] for part in ("train", "valid", "test")) == 12 * 4
    everything = [row["wav"] for path in prepared[:3] for row in rows(path)]
    assert str(tmp_path / "vox2/dev/aac/id200/s0/0.ogg") not in everything
    assert str(tmp_path / "vox2/dev/wav/id200/s0/0.wav") in everything


def test_bad_files_stop_or_are_listed(corpus):
    for speaker in names("id", 12)[3:]:
        (corpus / f"vox/wav/{speaker}/s0/0.flac").write_bytes(b"broken")
    with pytest.raises(ValueError, match="(?s)9 of 43 files are bad; skip_bad_files=True") as error:
        prepare(corpus)
    assert str(error.value).count("cannot decode") == 5
    prepared = prepare(corpus, skip_bad_files=True)
    assert prepared.counts["left_out"]["bad"] == 9
    listed = (corpus / "lists/bad_files.txt").read_text()
    assert len(listed.splitlines()) == 9 and "id03/s0/0.flac" in listed
    assert "/id03/s0/0.flac" not in Path(prepared.train_csv).read_text()


def test_bad_clip_of_a_given_trial_is_never_left_out(corpus):
    (corpus / "vox/wav/id01/s0/0.flac").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1 utterances of the trials are bad: .*id01/s0/0.flac"):
        prepare(corpus, skip_bad_files=True)


def test_short_clips_are_left_out_but_not_of_trials(corpus):
    write_clip(corpus / "vox/wav/id00/s0/0.flac", seconds=0.5)
    write_clip(corpus / "vox/wav/id05/s0/0.flac", seconds=0.99)
    write_clip(corpus / "vox/wav/id06/s0/0.flac", seconds=1.0)
    prepared = prepare(corpus)
    assert prepared.counts["left_out"]["short"] == 1
    assert rows(prepared.test_csv)[0]["duration"] == "0.5"


def test_missing_clip_of_a_trial_is_named_with_its_line(corpus):
    (corpus / "trials.txt").write_text(
        "1 id00/s0/0.wav id00/s1/1.wav\n0 id00/s0/0.wav id77/a/b.wav"
    )
    with pytest.raises(
        ValueError, match=r"trials\.txt, line 2: utterance 'id77/a/b\.wav' is missing"
    ):
        prepare(corpus)


@pytest.mark.parametrize("line", ["id00/s0/0.wav id00/s1/1.wav", "2 a b", "1 a b c"])
def test_malformed_trial_is_named_with_its_line(corpus, line):
    (corpus / "trials.txt").write_text(line)
    with pytest.raises(ValueError, match=r"line 1: expected '1 enrol test'"):
        prepare(corpus)


def test_folder_of_another_layout_is_shown_the_expected_one(tmp_path):
    write_clip(tmp_path / "vox" / "clip.wav")
    with pytest.raises(ValueError, match="adds no utterance; expected .*wav/<speaker>/<session>/"):
        prepare(tmp_path, trials=None)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="vox is not a folder"):
        prepare(tmp_path, trials=None)


def test_unknown_train_speakers_are_named(corpus):
    (corpus / "train.txt").write_text("id05\nid99\n")
    with pytest.raises(ValueError, match="1 of 2 speakers in .*train.txt.*id99"):
        prepare(corpus, train_speakers=str(corpus / "train.txt"))


@pytest.mark.parametrize(
    "speakers, expected", [(6, (2, 2, 2)), (12, (5, 3, 4)), (20, (10, 4, 6)), (90, (54, 6, 30))]
)
def test_a_small_folder_holds_out_fewer_speakers_by_itself(speakers, expected, tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(speakers):
        for clip in range(2):
            path = tmp_path / f"wav/id{number:02d}/session/{clip}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.full(16000, 0.1), 16000)
    prepared = prepare_voxceleb(str(tmp_path), str(tmp_path / "lists"))
    counts = [prepared.counts[split] for split in ("train", "valid", "test")]
    assert tuple(count["speakers"] for count in counts) == expected
    assert all(count["target"] > 0 and count["impostor"] > 0 for count in counts[1:])
    assert f"test_speakers is {expected[2]} instead of 40, of {speakers} speakers" in caplog.text


def test_five_speakers_are_too_few_and_the_keys_are_named(tmp_path):
    for number in range(5):
        for clip in range(2):
            path = tmp_path / f"wav/id{number}/session/{clip}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.full(16000, 0.1), 16000)
    with pytest.raises(ValueError, match="3 speakers remain .* Give a data_folder of more"):
        prepare_voxceleb(str(tmp_path), str(tmp_path / "lists"))


@pytest.mark.parametrize("argument", ["valid_speakers", "test_speakers"])
def test_one_held_out_speaker_is_refused(corpus, argument):
    with pytest.raises(ValueError, match=f"{argument}.*2 or more"):
        prepare(corpus, **{argument: 1})
