"""A Matryoshka head on encoders of SpeechBrain: what it gives, and what it refuses."""

import encoders
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from torch import nn

from speechbrain_mrl import MatryoshkaEncoder, expand_model
from speechbrain_mrl.models.redimnet import TooShort
from speechbrain_mrl.models.resize import resize_model

# SpeechBrain's x-vectors have a noise of up to 9e-5 in what they pool.
TOLERANCE = {"ecapa": {}, "resnet": {}, "xvect": {"atol": 1e-3, "rtol": 1e-3}}
KINDS = pytest.mark.parametrize("kind", list(encoders.ENCODERS))


def make(kind, **changes):
    return MatryoshkaEncoder(
        **{"embed_dim": 16, "mrl_dims": (4, 8, 16), **encoders.parts(kind), **changes}
    )


def noise(*shape):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def by_hand(parts, wavs, wav_lens):
    """As SpeechBrain's EncoderClassifier calls the parts, (B, E)."""
    feats = parts["mean_var_norm"](parts["compute_features"](wavs), wav_lens)
    return parts["embedding_model"](feats, wav_lens).reshape(len(wavs), -1)


@KINDS
@torch.no_grad()
def test_it_is_a_linear_layer_behind_speechbrains_own_modules(kind):
    parts, model = encoders.parts(kind), make(kind).eval()
    for part in parts.values():
        part.eval()
    wavs = noise(3, 12000)
    own = by_hand(parts, wavs, torch.ones(3))
    expected = own @ model.linear.weight.T + model.linear.bias
    whole = model(wavs)
    torch.testing.assert_close(whole, expected, **TOLERANCE[kind])
    for d, prefix in model(wavs, return_all_dims=True).items():
        assert torch.equal(prefix, whole[:, :d])
    assert torch.cosine_similarity(model(wavs, target_dim=4), expected[:, :4]).min() > 0.9999
    assert model(wavs[0]).shape == model(wavs[:1, None]).shape == (1, 16)


@KINDS
@torch.no_grad()
def test_a_clip_has_one_embedding_alone_and_in_any_padded_batch(kind):
    model = make(kind).eval()
    counts = [16000, 4800, 11111, 4800]
    clips = [noise(1, 16000).roll(n)[:, :count] for n, count in enumerate(counts)]
    padded = torch.cat([nn.functional.pad(clip, (0, 16000 - clip.shape[1])) for clip in clips])
    found = model(padded, torch.tensor(counts) / 16000)
    alone = torch.cat([model(clip) for clip in clips])
    assert torch.cosine_similarity(found, alone).min() > 0.9999
    # so that this says something: SpeechBrain alone gives others, but for the unpadded one
    parts = encoders.parts(kind)
    for part in parts.values():
        part.eval()
    theirs = by_hand(parts, padded, torch.tensor(counts) / 16000) @ model.linear.weight.T
    theirs_alone = torch.cat([by_hand(parts, clip, torch.ones(1)) for clip in clips])
    theirs_alone = theirs_alone @ model.linear.weight.T
    assert torch.cosine_similarity(theirs, theirs_alone).min() < 0.9999


@KINDS
def test_in_training_the_parts_are_told_the_lengths(kind):
    parts, model = encoders.parts(kind), make(kind)
    wavs, wav_lens = noise(3, 8000), torch.tensor([1.0, 0.75, 0.5])
    own = by_hand(parts, wavs, wav_lens)
    found = model.train()(wavs, wav_lens)
    expected = own @ model.linear.weight.T + model.linear.bias
    torch.testing.assert_close(found, expected, **TOLERANCE[kind])
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@KINDS
def test_to_make_one_changes_neither_the_encoder_nor_the_drawn_numbers(kind):
    parts = encoders.parts(kind)
    before = {key: x.clone() for key, x in parts["embedding_model"].state_dict().items()}
    torch.manual_seed(3)
    expected = nn.Linear(encoders.SIZES[kind][1], 16).weight
    torch.manual_seed(3)
    model = make(kind, **parts)
    torch.testing.assert_close(model.linear.weight, expected, atol=0, rtol=0)
    assert all(module.training for module in model.modules())
    for key, value in parts["embedding_model"].state_dict().items():
        assert torch.equal(value, before[key]), key


@KINDS
@torch.no_grad()
def test_the_fewest_samples_give_an_embedding_and_one_less_does_not(kind):
    model = make(kind).eval()
    wavs = noise(1, model.min_samples)
    assert model(wavs).isfinite().all()
    with pytest.raises(TooShort, match=f"at least {model.min_samples} samples"):
        model(wavs[:, 1:])
    with pytest.raises(TooShort, match=r"wavs\[1\]"):
        model(noise(2, 16000), torch.tensor([1.0, (model.min_samples - 1) / 16000]))
    if model.min_samples == 1:
        return
    try:
        own = model._own_embeddings(wavs[:, 1:], torch.ones(1))
    except RuntimeError:  # of a layer
        return
    assert not own.isfinite().all()


class Mean(nn.Module):
    """Mean over time of features (B, T, F), or of frames of waveforms, (B, F); takes no lengths."""

    def __init__(self, n_features):
        super().__init__()
        self.layer = nn.Linear(n_features, 6)

    def forward(self, x):
        return self.layer(x.unfold(1, 8, 8) if x.ndim == 2 else x).mean(dim=1)


@torch.no_grad()
def test_an_encoder_may_take_no_lengths_or_waveforms():
    wavs = noise(2, 8000)
    fbank = Fbank(n_mels=10)
    for encoder, features in ((Mean(10), fbank), (Mean(8), None)):
        model = MatryoshkaEncoder(encoder, 4, (2, 4), features).eval()
        own = encoder(wavs if features is None else fbank(wavs))
        expected = own @ model.linear.weight.T + model.linear.bias
        torch.testing.assert_close(model(wavs), expected)
        padded = model(wavs, torch.tensor([1.0, 0.5]))
        torch.testing.assert_close(padded[1:], model(wavs[1:, :4000]))


class Frozen(Mean):
    """Gives embeddings without gradients, as encoders do that run under no_grad."""

    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"compute_features": Fbank(n_mels=40)}, r"embedding_model cannot embed .* one number of"),
        ({"mrl_dims": (8, 32)}, r"mrl_dims must end in embed_dim 16, got \[8, 32\]"),
        ({"mrl_dims": (8, 4, 16)}, "strictly ascending"),
        ({"mean_var_norm": InputNormalization(norm_type="batch")}, "norm_type='batch'"),
        ({"mean_var_norm": InputNormalization(norm_type="global")}, "no statistics yet"),
        ({"embedding_model": Mean(24).requires_grad_(False)}, "requires_grad_"),
        ({"embedding_model": Frozen(24)}, "without gradients; it cannot be trained"),
        ({"embedding_model": nn.Linear(24, 8)}, r"must give \(B, 1, E\) or \(B, E\), got \(1, 101"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        make("ecapa", **changes)


@pytest.mark.parametrize("part", ["embedding_model", "compute_features", "mean_var_norm"])
def test_a_part_that_is_no_module_is_refused(part):
    with pytest.raises(TypeError, match=f"{part} must be a torch.nn.Module, got str"):
        make("ecapa", **{part: "ecapa"})


@pytest.mark.parametrize("target_dim", [0, 5, 32, 8.0])
def test_a_size_that_it_does_not_have_is_refused(target_dim):
    with pytest.raises(ValueError, match=r"target_dim must be one of mrl_dims \[4, 8, 16\], got"):
        make("ecapa")(noise(2, 8000), target_dim=target_dim)


def test_a_global_normaliser_keeps_its_statistics():
    norm = InputNormalization(norm_type="global")
    norm(3 + 2 * torch.randn(4, 500, 24), torch.ones(4))
    mean, std = norm.glob_mean.clone(), norm.glob_std.clone()
    model = make("ecapa", mean_var_norm=norm)
    model.train()(noise(2, 8000))
    assert torch.equal(norm.glob_mean, mean) and torch.equal(norm.glob_std, std)
    parts = encoders.parts("ecapa")
    feats = (parts["compute_features"](noise(2, 8000)) - mean) / std
    own = parts["embedding_model"].eval()(feats, torch.ones(2)).squeeze(1)
    model.eval()
    expected = own @ model.linear.weight.T + model.linear.bias
    fresh = make("ecapa", mean_var_norm=norm).eval()
    fresh.linear.load_state_dict(model.linear.state_dict())
    torch.testing.assert_close(fresh(noise(2, 8000)), expected)
    assert model.double().mean_var_norm.glob_mean.dtype == torch.float64  # moves with the model


@KINDS
@torch.no_grad()
def test_a_published_encoder_starts_as_itself(kind, tmp_path):
    folder = encoders.write_published(tmp_path / kind, kind)
    own_dim = encoders.SIZES[kind][1]
    wavs = noise(2, 12000)
    published = EncoderClassifier.from_hparams(
        str(folder), overrides={"pretrained_path": str(folder)}
    )
    expected = published.encode_batch(wavs).reshape(2, own_dim)
    model = MatryoshkaEncoder.from_hparams(folder, own_dim + 8, (8, own_dim, own_dim + 8))
    found = model(wavs)
    torch.testing.assert_close(found[:, :own_dim], expected, atol=1e-3, rtol=1e-3)
    assert found[:, own_dim:].abs().mean() < 0.05 * expected.abs().mean()
    assert MatryoshkaEncoder.from_hparams(folder).mrl_dims == (own_dim,)
    assert all(p.requires_grad for p in model.embedding_model.parameters())
    made = load_hyperpyyaml(model.architecture)
    assert list(made) == ["compute_features", "mean_var_norm", "embedding_model"]
    made["embedding_model"].load_state_dict(model.embedding_model.state_dict())
    for part in made.values():
        part.eval()
    torch.testing.assert_close(by_hand(made, wavs, torch.ones(2)), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=f"smaller than the {own_dim} dimensions"):
        MatryoshkaEncoder.from_hparams(folder, 8)


def test_what_is_no_published_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks hyperparams.yaml"):
        MatryoshkaEncoder.from_hparams(tmp_path)


@KINDS
@torch.no_grad()
def test_it_grows_and_shrinks_as_any_student(kind):
    model = make(kind).eval()
    grown, shrunk = expand_model(model, 20).eval(), resize_model(model, (4, 8)).eval()
    assert grown.mrl_dims == (4, 8, 16, 20) and shrunk.mrl_dims == (4, 8)
    assert torch.equal(grown.linear.weight[:16], model.linear.weight)
    assert torch.equal(shrunk.linear.weight, model.linear.weight[:8])
    wavs = noise(2, 8000)
    expected = model(wavs)
    torch.testing.assert_close(grown(wavs)[:, :16], expected)
    torch.testing.assert_close(shrunk(wavs), expected[:, :8])
    assert model.mrl_dims == (4, 8, 16) and model.linear.out_features == 16
