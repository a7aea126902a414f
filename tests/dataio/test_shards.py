"""Training clips in tar shards: what is written, who reads what, and a training from them."""

import io
import tarfile
from pathlib import Path

import pytest
import shards
import soundfile
import torch
from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.dataio.dataset import train_dataset
from speechbrain_mrl.dataio.shards import ShardedClips, shard_loader

CHUNK_SECONDS = 0.5


@pytest.fixture
def csv_path(small_corpus, tmp_path):
    """The 120 clips of ``small_corpus``, the last of them a segment of its recording."""
    paths = sorted(small_corpus.glob("wav/*/*/*.wav"))
    lines = ["ID,duration,wav,start,stop,spk_id"]
    for path in paths:
        name = path.relative_to(small_corpus / "wav")
        lines.append(f"{name},1.2,{path},0,19200,{name.parts[0]}")
    lines[-1] = lines[-1].replace(",0,19200,", ",3000,15000,")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "train.csv"


@pytest.fixture
def written(csv_path, tmp_path):
    """Six shards of 20 clips."""
    return shards.write_shards(csv_path, tmp_path / "shards", 6)


def dataset(csv_path, epoch=1, chunks_per_clip=1):
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(f"id{number:02d}" for number in range(20))
    clips = train_dataset(csv_path, CHUNK_SECONDS, chunks_per_clip, encoder)
    clips.epoch.fill_(epoch)
    return clips


def read(loader):
    """The batches, each a list of (id, label, samples)."""
    return [
        list(zip(batch.id, batch.label.tolist(), map(tuple, batch.sig.data.tolist())))
        for batch in loader
    ]


def ids(batches):
    return [clip[0] for batch in batches for clip in batch]


def test_recordings_are_copied_and_segments_cut(written, csv_path):
    stored = {}
    for path in sorted(csv_path.with_name("shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            stored |= {member.name: tar.extractfile(member).read() for member in tar}
    rows = [line.split(",") for line in csv_path.read_text().splitlines()[1:]]
    assert len(stored) == 2 * len(rows)
    for number, row in enumerate(rows[:-1]):
        assert stored[f"{number:09d}.wav"] == Path(row[2]).read_bytes()
    wav, _ = soundfile.read(io.BytesIO(stored["000000119.flac"]), dtype="float32")
    assert torch.equal(torch.from_numpy(wav), read_audio(rows[-1][2], 3000, 12000))


def test_neighbours_are_of_different_speakers(written, csv_path):
    batches = read(shard_loader(dataset(csv_path), written, 8))
    assert sum(len({clip[1] for clip in batch}) for batch in batches) / len(batches) > 5


@pytest.mark.parametrize("chunks_per_clip", [1, 2])
def test_a_clip_comes_once_as_the_list_gives_it(written, csv_path, chunks_per_clip):
    clips = dataset(csv_path, 3, chunks_per_clip)
    loader = shard_loader(clips, written, 8)
    batches = read(loader)
    assert len(batches) == len(loader) == 15 * chunks_per_clip
    expected = [clips[position] for position in range(120 * chunks_per_clip)]
    expected = [(item["id"], item["label"], tuple(item["sig"].tolist())) for item in expected]
    assert sorted(clip for batch in batches for clip in batch) == sorted(expected)


def test_each_epoch_has_an_order_of_its_own(written, csv_path):
    first, again, second = (
        ids(read(shard_loader(dataset(csv_path, epoch), written, 8))) for epoch in (1, 1, 2)
    )
    assert first == again != second and set(first) == set(second)


def test_ranks_share_the_shards_and_make_equally_many_steps(written, csv_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        loader = shard_loader(dataset(csv_path), written, 4, num_workers=1)
        batches = read(loader)
        assert len(batches) == len(loader) == 15
        found.append(ids(batches))
    assert not set(found[0]) & set(found[1]) and len({*found[0], *found[1]}) == 120


def test_shards_that_ranks_cannot_share_are_left_out_of_an_epoch(written, csv_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert len(shard_loader(dataset(csv_path), written, 4)) == 20 // 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_goes_on_behind_the_batches_that_are_done(written, csv_path, num_workers):
    loader = shard_loader(dataset(csv_path), written, 8, num_workers)
    batches = read(loader)
    assert len(set(ids(batches))) == 8 * len(batches) == 8 * len(loader)
    for done in (5, 6):
        loader.dataset.done.fill_(done)
        assert read(loader) == batches[done:]


def test_killed_writing_goes_on_at_the_shard_where_it_was(csv_path, tmp_path, monkeypatch):
    expected = shards.write_shards(csv_path, tmp_path / "undisturbed", 6)
    calls = []

    def read_50(*arguments):
        calls.append(arguments)
        if len(calls) > 50:
            raise ValueError("gone")
        return sample(*arguments)

    sample = shards._sample
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="gone"):
        patch.setattr("shards._sample", read_50)
        shards.write_shards(csv_path, tmp_path / "shards", 6)
    folder = tmp_path / "shards"
    (folder / ".123.2.tar").write_bytes(b"half")  # as a killed process leaves it
    assert {path.name for path in folder.iterdir()} - {".lock", ".123.2.tar"} == {
        "shards.json",
        "0.tar",
        "1.tar",
    }
    times = [(folder / name).stat().st_mtime_ns for name in ("0.tar", "1.tar")]
    found = shards.write_shards(csv_path, folder, 6)
    assert times == [(folder / name).stat().st_mtime_ns for name in ("0.tar", "1.tar")]
    assert found == str(folder / "{0..5}.tar") and not list(folder.glob(".*.tar"))
    for number in range(6):
        name = f"{number}.tar"
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert expected.endswith("undisturbed/{0..5}.tar")


def test_a_folder_holds_one_list(written, csv_path):
    with pytest.raises(ValueError, match="filled with other (shards|list); delete that folder"):
        shards.write_shards(csv_path, csv_path.with_name("shards"), 5)


def test_a_recording_that_is_gone_is_named(csv_path):
    csv_path.write_text("ID,wav,start,stop\na,/no/such.wav,0,1000\n")
    with pytest.raises(ValueError, match="cannot read /no/such.wav"):
        shards.write_shards(csv_path, csv_path.with_name("shards"), 1)


def _cut(path, csv_path):
    path.write_bytes(path.read_bytes()[:100_000])


def _cut_between_clips(path, csv_path):
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-2].offset
    path.write_bytes(path.read_bytes()[:end])


def _write_noise(path, csv_path):
    path.write_bytes(bytes(range(256)) * 100)


def _change_list(path, csv_path):
    header, *lines = csv_path.read_text().splitlines()
    csv_path.write_text("\n".join([header, *lines[::-1]]) + "\n")


@pytest.mark.parametrize(
    "harm, reason",
    [
        (_cut, "unexpected end of data"),
        (_cut_between_clips, "it holds 19 utterances, and should hold 20"),
        (_write_noise, "could not be opened successfully|invalid header"),
        (_change_list, "its utterance 0000.* is not that of .*train.csv"),
    ],
)
def test_a_harmed_shard_is_one_sentence(written, csv_path, harm, reason):
    harm(csv_path.with_name("shards") / "3.tar", csv_path)
    with pytest.raises(
        ValueError, match=f"cannot read shard .*tar: .*({reason}).*; see that it is"
    ):
        read(shard_loader(dataset(csv_path), written, 8))


def test_a_missing_shard_is_named_at_the_start(written, csv_path):
    csv_path.with_name("shards").joinpath("4.tar").unlink()
    with pytest.raises(ValueError, match="shards/4.tar, which is not there"):
        shard_loader(dataset(csv_path), written, 8)


def test_a_url_is_read_as_a_path_is(written, csv_path):
    from_paths, from_urls = (
        read(shard_loader(dataset(csv_path), shards, 8))
        for shards in (written, f"file://{written}")
    )
    assert from_paths == from_urls


def test_too_few_shards_or_clips_for_a_batch_are_refused(written, csv_path, monkeypatch):
    with pytest.raises(ValueError, match="6 shards of 20 utterances give not one batch of 121"):
        shard_loader(dataset(csv_path), written, 121)
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(ValueError, match="to each of 7 processes"):
        shard_loader(dataset(csv_path), written, 2)


@pytest.mark.parametrize(
    "shards",
    [
        "pipe:touch x",
        "pipe://touch x",
        "s3://a/0.tar",
        "http://a/'; touch x; '.tar",
        "ftp://a/0.tar",
    ],
)
def test_what_would_reach_a_shell_is_refused(shards):
    with pytest.raises(ValueError, match="must be a path or an http.s. address, without quotes"):
        ShardedClips(None, shards, batch_size=1)
