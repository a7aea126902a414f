import contextlib

import pytest
import soundfile
import torch
from torch import nn

from speechbrain_mrl import ReDimNetMRL, export_model
from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.dataio.clips import Clip, read_clips
from speechbrain_mrl.inference import encoders, extract, optimize
from speechbrain_mrl.inference.extract import embed_clips, embed_long
from speechbrain_mrl.publish.card import Provenance


class NanForShortClips(nn.Module):
    def forward(self, wavs, wav_lens):
        lengths = (wav_lens * wavs.shape[1]).round()
        return torch.where(lengths < 9000, torch.nan, lengths).unsqueeze(1)


class Counter(nn.Module):
    """Samples of each clip, its mean, and whether the module was in training mode."""

    def forward(self, wavs, wav_lens):
        lengths = (wav_lens * wavs.shape[1]).round()
        return torch.stack([lengths, wavs.sum(1) / lengths, 0 * lengths + self.training], dim=1)


def test_every_clip_has_the_embedding_that_it_has_alone(small_clips, random_model, tiny_config):
    model = random_model(tiny_config)
    found = embed_clips({"model": model}, small_clips[:20], batch_seconds=3.0)["model"]
    for clip, embedding in zip(small_clips, found, strict=False):
        alone = model(read_audio(clip.wav, clip.start, clip.num_frames))[0]
        assert torch.nn.functional.cosine_similarity(embedding, alone, dim=0) > 0.9999


def test_on_a_cpu_a_redimnet_runs_in_its_fast_form(
    small_clips, random_model, tiny_config, monkeypatch
):
    model = random_model(tiny_config).train()
    made = []
    monkeypatch.setattr(
        extract, "arrange", lambda *given: made.append(optimize.arrange(*given)) or made[-1]
    )
    embed_clips({"model": model}, small_clips[:2])
    assert type(made[0]["model"]) is not type(model)
    assert model.training and next(model.parameters()).requires_grad


def test_several_encoders_share_one_pass_in_the_order_of_the_clips(small_clips):
    found = embed_clips({"a": Counter(), "b": Counter()}, small_clips, batch_seconds=5.0)
    expected = torch.tensor([float(clip.num_frames) for clip in small_clips])
    torch.testing.assert_close(found["a"][:, 0], expected)
    torch.testing.assert_close(found["a"], found["b"])


def test_encoders_run_in_eval_mode_and_keep_their_own(small_clips):
    counter = Counter().train()
    assert embed_clips({"a": counter}, small_clips[:3])["a"][:, 2].sum() == 0
    assert counter.training


@pytest.mark.parametrize("encoder", [NanForShortClips, Counter])
def test_every_part_of_an_encoder_has_its_mode_back_also_after_an_error(small_clips, encoder):
    """As a student in training whose frozen part is in eval mode."""
    student = encoder().train()
    student.frozen = nn.BatchNorm1d(2).eval()
    fails = encoder is NanForShortClips
    with pytest.raises(ValueError) if fails else contextlib.nullcontext():
        embed_clips({"a": student}, small_clips)
    assert student.training and not student.frozen.training


def test_embeddings_are_tensors_that_autograd_takes(small_clips, random_model, tiny_config):
    model = random_model(tiny_config)
    wav = read_audio(small_clips[0].wav)
    for embeddings in (embed_clips({"a": model}, small_clips[:3])["a"], embed_long(model, wav)):
        layer = nn.Linear(embeddings.shape[1], 2)
        layer(embeddings).sum().backward()
        torch.testing.assert_close(layer.weight.grad[0], embeddings.sum(dim=0))


def test_a_batch_is_as_long_as_told_and_pads_little(small_clips):
    seen = []

    def encoder(wavs, wav_lens):
        seen.append((wavs.numel(), wav_lens.min().item(), len(wavs)))
        return wav_lens.unsqueeze(1)

    embed_clips({"a": encoder}, small_clips, batch_seconds=5.0)
    samples, shares, counts = zip(*seen)
    assert max(samples) <= 5 * 16000 and min(shares) >= 0.8 - 1e-6
    lengths = [clip.num_frames for clip in small_clips]
    assert max(lengths) > 2 * min(lengths) and sum(counts) == len(lengths) > 3 * len(counts)


def test_only_the_beginning_of_a_long_clip_is_read(small_clips):
    found = embed_clips({"a": Counter()}, small_clips[:5], max_seconds=0.25)["a"]
    assert found[:, 0].tolist() == [4000.0] * 5


def test_without_a_limit_whole_clips_are_heard(small_clips):
    found = embed_clips({"a": Counter()}, small_clips, max_seconds=None)["a"]
    assert found[:, 0].tolist() == [float(clip.num_frames) for clip in small_clips]


@pytest.mark.parametrize("published", [False, True])
def test_a_long_clip_goes_through_a_network_window_by_window(
    tiny_config, random_model, voices, published, tmp_path, monkeypatch
):
    """Long is a second here, and a window three quarters of it; without attention that is exact."""
    config = {**tiny_config, "block_1d_type": "conv", "block_2d_type": "basic_resnet"}
    model = random_model(config)
    encoder = model
    if published:
        student = ReDimNetMRL.from_redimnet(model, 32, [8, 32]).eval()
        export_model(student, tmp_path / "model", Provenance("a", "mit", "b"))
        encoder = encoders.load_teacher(str(tmp_path / "model"))
    clips = []
    for number, seconds in enumerate([0.8, 2.5, 2.4, 1.6]):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, voices(number, seconds).numpy(), 16000, subtype="FLOAT")
        clips.append(Clip(str(number), str(path), 0, round(seconds * 16000)))
    heard = []

    def windows(network, wav):
        heard.append(wav.shape[1])
        return embed_long(network, wav, window_seconds=0.75, margin_seconds=4.0)

    monkeypatch.setattr(extract, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(extract, "embed_long", windows)
    monkeypatch.setattr(encoders, "embed_long", windows)
    found = embed_clips({"it": encoder}, clips, max_seconds=None)["it"]
    with torch.no_grad():
        expected = torch.cat([model(voices(int(c.id), c.num_frames / 16000)) for c in clips])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sorted(heard) == [25600, 38400, 40000]


def test_workers_give_what_one_process_gives(small_clips):
    alone = embed_clips({"a": Counter()}, small_clips[:9], batch_seconds=2.0)["a"]
    shared = embed_clips({"a": Counter()}, small_clips[:9], batch_seconds=2.0, num_workers=2)["a"]
    torch.testing.assert_close(alone, shared)


def test_an_embedding_that_is_not_finite_is_an_error_with_the_path(small_clips):
    with pytest.raises(ValueError, match=r"bad .*not finite.*id00.*\.wav"):
        embed_clips({"bad": NanForShortClips()}, small_clips[:4])


def test_clips_come_out_of_a_csv(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("ID,duration,wav,start,stop,spk_id\na/0/1.wav,1.0,/x/1.wav,16,16016,a\n")
    assert read_clips(path) == [Clip("a/0/1.wav", "/x/1.wav", 16, 16016)]
