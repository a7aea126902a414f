import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from speechbrain_mrl import export_model
from speechbrain_mrl.dataio.clips import read_clips, write_clips
from speechbrain_mrl.inference import store as teachers
from speechbrain_mrl.inference.encoders import load_teacher, load_teachers
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.inference.store import TeacherStore


class Counting(nn.Module):
    """Gives (B, 2) and counts the clips that it was asked for."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight, 2.0]))
        self.clips = 0

    def forward(self, wavs, wav_lens):
        self.clips += len(wavs)
        return (wav_lens * wavs.shape[1]).unsqueeze(1) * self.weight


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(teachers, "SHARD_SIZE", 8)


def test_a_checkpoint_file_a_module_and_a_mapping_are_teachers(
    release_file, tiny_config, random_model
):
    path = release_file(tiny_config, name="any")
    wavs = torch.randn(2, 8000)
    expected = random_model(tiny_config)(wavs)
    torch.testing.assert_close(load_teacher(path)(wavs), expected)
    torch.testing.assert_close(load_teachers([str(path)])["any"](wavs), expected)
    assert load_teachers({"mine": Counting()})["mine"](wavs, torch.ones(2)).shape == (2, 2)


def test_any_speechbrain_encoder_is_a_teacher(tmp_path, random_model, tiny_config):
    model = random_model(tiny_config)
    folder = export_model(model, tmp_path / "published")
    teacher = load_teachers({"published": str(folder)})["published"]
    wavs, wav_lens = torch.randn(2, 8000), torch.tensor([1.0, 0.7])
    torch.testing.assert_close(teacher(wavs, wav_lens), model(wavs, wav_lens))
    weights = fingerprint(teacher)
    assert len(weights) == 64
    assert not any(p.requires_grad for p in teacher.parameters())
    arranged = teacher.for_inference()
    network = arranged.encoder.mods.embedding_model
    assert type(network.backbone).__module__ == "speechbrain_mrl.inference.optimize"
    expected = model(wavs, wav_lens)
    torch.testing.assert_close(arranged(wavs, wav_lens), expected, rtol=1e-4, atol=1e-4)
    assert fingerprint(teacher) == weights  # is itself as it was


def test_a_teacher_is_frozen_and_in_eval_mode():
    teacher = load_teacher(Counting().train())
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_two_teachers_of_one_name_are_refused(release_file, tiny_config):
    path = str(release_file(tiny_config))
    with pytest.raises(ValueError, match="share a name"):
        load_teachers([path, path])
    with pytest.raises(ValueError, match="teachers is empty"):
        load_teachers([])


def test_the_store_holds_what_the_teacher_says(tmp_path, small_clips, small_shards):
    store = TeacherStore(tmp_path)
    store.fill({"a": Counting(1.0), "b": Counting(3.0)}, small_clips)
    ids = [clip.id for clip in small_clips[5:9]]
    lengths = torch.tensor([[float(clip.num_frames)] for clip in small_clips[5:9]])
    torch.testing.assert_close(store.lookup(ids)["a"], lengths * torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(store.lookup(ids)["b"], lengths * torch.tensor([[3.0, 2.0]]))


def test_a_full_store_runs_no_teacher(tmp_path, small_clips, small_shards):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)
    again = Counting()
    TeacherStore(tmp_path).fill({"a": again}, small_clips)
    assert again.clips == 0


def test_a_new_teacher_is_added_without_running_the_old_one(tmp_path, small_clips, small_shards):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)
    old, new = Counting(), Counting(5.0)
    TeacherStore(tmp_path).fill({"a": old, "b": new}, small_clips)
    assert (old.clips, new.clips) == (0, len(small_clips))


def test_half_a_store_is_completed(tmp_path, small_clips, small_shards):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)
    (tmp_path / "a" / "00003.safetensors").unlink()
    (tmp_path / "a" / "00003.part").write_bytes(b"half a shard")
    again, store = Counting(), TeacherStore(tmp_path)
    store.fill({"a": again}, small_clips)
    assert again.clips == 8
    assert len(store.embeddings["a"]) == len(small_clips)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda clips: ({"a": Counting(1.0001)}, clips, 30.0), "teacher"),
        (lambda clips: ({"a": Counting()}, clips[1:], 30.0), "clips"),
        (lambda clips: ({"a": Counting()}, clips, 2.0), "max_seconds"),
    ],
)
def test_a_store_of_other_weights_clips_or_lengths_is_refused(
    tmp_path, small_clips, small_shards, change, named
):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)
    before = load_file(tmp_path / "a" / "00000.safetensors")["embeddings"]
    changed, clips, max_seconds = change(small_clips)
    with pytest.raises(ValueError, match=f"other {named}.*delete"):
        TeacherStore(tmp_path).fill(changed, clips, max_seconds=max_seconds)
    after = load_file(tmp_path / "a" / "00000.safetensors")["embeddings"]
    torch.testing.assert_close(before, after)


HARM = {
    "NaN": (lambda rows: rows.index_fill(0, torch.tensor([2]), torch.nan), "NaN or infinity"),
    "a surplus row": (lambda rows: torch.cat([rows, rows[:1]]), r"holds \(9, 2\) for 8 utterances"),
    "a missing row": (lambda rows: rows[1:], r"holds \(7, 2\) for 8 utterances"),
    "one number a clip": (lambda rows: rows[:, 0].contiguous(), r"holds \(8,\) for 8 utterances"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_shard_is_refused_by_name(tmp_path, small_clips, small_shards, harm):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)
    path = tmp_path / "a" / "00001.safetensors"
    damage, reason = HARM[harm]
    with safe_open(path, "pt") as file:
        rows, made_of = file.get_tensor("embeddings"), file.metadata()
    save_file({"embeddings": damage(rows)}, path, made_of)
    with pytest.raises(ValueError, match=f"{path} cannot be used .*{reason}.*delete it"):
        TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)


@pytest.mark.parametrize("content", [b"", b"no tensors", bytes(64)])
def test_a_shard_that_is_none_is_refused_by_name(tmp_path, small_clips, small_shards, content):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)
    path = tmp_path / "a" / "00001.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} cannot be used"):
        TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)


def test_shards_that_changed_places_are_refused(tmp_path, small_clips, small_shards):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)
    paths = [tmp_path / "a" / f"0000{number}.safetensors" for number in range(2)]
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(ValueError, match=f"{paths[0]} cannot be used .it is of other utterances"):
        TeacherStore(tmp_path).fill({"a": Counting()}, small_clips)


@pytest.mark.parametrize("text", ["", "[]", "null", '"', "{}"])
def test_a_damaged_manifest_of_a_store_is_refused_by_name(tmp_path, small_clips, text):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips[:2])
    (tmp_path / "a" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/a"):
        TeacherStore(tmp_path).fill({"a": Counting()}, small_clips[:2])


def test_a_file_of_another_size_makes_the_store_stale(tmp_path, small_clips):
    copy = tmp_path / "clip.wav"
    copy.write_bytes(open(small_clips[0].wav, "rb").read())
    clips = [small_clips[0]._replace(wav=str(copy))]
    TeacherStore(tmp_path / "store").fill({"a": Counting()}, clips)
    copy.write_bytes(open(small_clips[0].wav, "rb").read() + b"more")
    with pytest.raises(ValueError, match="other clips"):
        TeacherStore(tmp_path / "store").fill({"a": Counting()}, clips)


def test_each_rank_fills_its_part(tmp_path, small_clips, small_shards, monkeypatch):
    # Rank 1 first: its shards alone must be there; rank 0 then finds the others missing.
    ranks = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        ranks.append(Counting())
        store = TeacherStore(tmp_path)
        if rank == 1:
            with pytest.raises(FileNotFoundError):  # rank 0 has not come yet
                store.fill({"a": ranks[0]}, small_clips)
        else:
            store.fill({"a": ranks[1]}, small_clips)
    assert ranks[0].clips + ranks[1].clips == len(small_clips)
    expected = embed_clips({"a": Counting()}, small_clips)["a"]
    torch.testing.assert_close(store.lookup([c.id for c in small_clips])["a"], expected)


def test_the_fingerprint_changes_with_one_weight_and_with_the_class():
    class Other(Counting):
        pass

    assert fingerprint(Counting()) == fingerprint(Counting())
    assert fingerprint(Counting()) != fingerprint(Counting(1.0001))
    assert fingerprint(Counting()) != fingerprint(Other())


@pytest.mark.parametrize("change", [{"hop_length": 160}, {"spec_params": {"norm_signal": True}}])
def test_the_same_weights_in_another_configuration_are_another_teacher(
    change, tiny_config, random_model, tmp_path, small_clips
):
    first, second = random_model(tiny_config), random_model({**tiny_config, **change})
    second.load_state_dict(first.state_dict())
    TeacherStore(tmp_path).fill({"a": first}, small_clips[:2])
    TeacherStore(tmp_path).fill({"a": random_model(tiny_config)}, small_clips[:2])  # the same
    with pytest.raises(ValueError, match="other teacher"):
        TeacherStore(tmp_path).fill({"a": second}, small_clips[:2])


class Configured(nn.Module):
    """Any encoder: no weights, plain attributes."""

    def __init__(self, **values):
        super().__init__()
        self.inner = nn.Conv1d(1, 1, 3)
        nn.init.ones_(self.inner.weight)
        nn.init.ones_(self.inner.bias)
        self._calls = self.device = self.logger = None
        vars(self).update({"hop": 160, "bands": (20, 40), "scale": torch.ones(2), **values})


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"hop": 240}, False),
        ({"bands": (20, 80)}, False),
        ({"bands": {"low": 20}}, False),
        ({"scale": torch.zeros(2)}, False),
        ({"act": torch.relu}, False),
        ({"_calls": 3}, True),
        ({"device": "cuda:1"}, True),
        ({"logger": object()}, True),
    ],
)
def test_configuration_is_what_plain_attributes_hold(values, same):
    expected = fingerprint(Configured(logger=object()))
    assert (fingerprint(Configured(**{"logger": object(), **values})) == expected) == same
    strided = Configured(logger=object())
    strided.inner.stride = (2,)
    assert fingerprint(strided) != expected


def test_a_published_encoder_is_told_by_its_hparams_not_its_place(
    tmp_path, random_model, tiny_config
):
    model = random_model(tiny_config)
    prints = []
    for name in ("one", "two"):
        teacher = load_teacher(str(export_model(model, tmp_path / name)))
        prints.append(fingerprint(teacher))
    assert prints[0] == prints[1]
    teacher.encoder.hparams.sample_rate = 8000
    assert fingerprint(teacher) != prints[0]


def test_running_an_encoder_leaves_its_fingerprint(random_model, tiny_config):
    model = random_model(tiny_config)
    before = fingerprint(model)
    model(torch.randn(2, 8000), torch.tensor([1.0, 0.5]))
    embed_clips({"a": model}, [])
    assert fingerprint(model) == before


def test_two_clips_of_one_id_are_refused(tmp_path, small_clips):
    clips = [*small_clips[:3], small_clips[1]._replace(start=100)]
    with pytest.raises(ValueError, match=f"two utterances have the id '{small_clips[1].id}'"):
        TeacherStore(tmp_path).fill({"a": Counting()}, clips)
    assert not any(tmp_path.iterdir())
    write_clips(clips, tmp_path / "clips.csv")
    message = f"ID '{small_clips[1].id}' in line 3 and in line 5"
    with pytest.raises(ValueError, match=message):
        read_clips(tmp_path / "clips.csv")


def test_the_manifest_says_what_the_store_is_of(tmp_path, small_clips):
    TeacherStore(tmp_path).fill({"a": Counting()}, small_clips, max_seconds=7.0)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["teacher"] == fingerprint(Counting())
    assert manifest["max_seconds"] == 7.0
