import encoders
import numpy as np
import pytest
import torch
from speechbrain.inference.classifiers import EncoderClassifier

from speechbrain_mrl import MatryoshkaEncoder, PyannoteEmbedding, ReDimNetMRL, export_model
from speechbrain_mrl.models.redimnet import ASTP, TSTP
from speechbrain_mrl.publish.pyannote import weighted_pool


def pools():
    torch.manual_seed(0)
    return [ASTP(5, global_context_att=True), ASTP(5, False), TSTP(5, False)]


@pytest.mark.parametrize("pool", pools(), ids=["context", "attention", "statistics"])
def test_frames_of_weight_zero_are_as_if_they_were_not_there(pool):
    frames, weights = torch.randn(2, 5, 12), torch.zeros(2, 12)
    weights[0, :6], weights[1, 3:] = 1, 0.25
    with torch.no_grad():
        found = weighted_pool(pool, frames, weights)
        torch.testing.assert_close(found[:1], pool(frames[:1, :, :6]))
        torch.testing.assert_close(found[1:], pool(frames[1:, :, 3:]))  # equal ones, of any value
        assert weighted_pool(pool, frames, torch.zeros(2, 12)).isnan().all()
        one = torch.eye(12)[:2]  # a single frame has no deviation
        assert weighted_pool(pool, frames, one).isfinite().all()


def test_a_weight_multiplies_the_attention():
    """As if the frame were there that often."""
    pool, frames = pools()[1], torch.randn(1, 5, 4)
    often = torch.tensor([1, 3, 0, 2])
    with torch.no_grad():
        expected = pool(frames.repeat_interleave(often, dim=2))
        torch.testing.assert_close(weighted_pool(pool, frames, often[None].float()), expected)


def test_statistics_are_those_of_numpy_with_weights():
    frames, weights = torch.randn(1, 5, 9), torch.rand(1, 9)
    mean = np.average(frames[0], axis=1, weights=weights[0])
    deviation = np.diag(np.cov(frames[0], aweights=weights[0])) ** 0.5
    found = weighted_pool(pools()[2], frames, weights)[0]
    np.testing.assert_allclose(found, np.concatenate([mean, deviation]), rtol=1e-4)


def test_without_pyannote_the_error_says_what_to_install():
    try:
        import pyannote.audio  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="PyannoteEmbedding needs pyannote.audio, which is"):
            PyannoteEmbedding("model")


@pytest.fixture(scope="module", params=["redimnet", "redimnet2"])
def folder(request, tiny_config, tiny_config2, random_model, tmp_path_factory):
    pytest.importorskip("pyannote.audio")
    offset = {"before_pool_offset": 2}
    config = tiny_config if request.param == "redimnet" else {**tiny_config2, **offset}
    network = ReDimNetMRL.from_redimnet(random_model(config), embed_dim=32, mrl_dims=(8, 32))
    return export_model(network.eval(), tmp_path_factory.mktemp("pyannote") / "model")


def test_it_is_speechbrains_embedding_and_weights_of_one_change_nothing(folder, voices):
    from pyannote.audio import Model

    model, wavs = PyannoteEmbedding(folder), torch.stack([voices(i, 1.0) for i in range(2)])
    assert isinstance(model, Model) and model.dimension == 32
    expected = EncoderClassifier.from_hparams(folder).encode_batch(wavs).squeeze(1)
    with torch.no_grad():
        found = model(wavs[:, None])
        for frames in (1, 37, 1000):
            same = model(wavs[:, None], weights=torch.full((2, frames), 0.5))
            torch.testing.assert_close(same, found, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_speaker_has_an_embedding_and_one_who_is_silent_none(folder, voices):
    model, wavs = PyannoteEmbedding(folder, target_dim=8), voices(0, 1.0).repeat(2, 1, 1)
    weights = torch.rand(2, 3, 50)
    weights[1, 2] = 0
    with torch.no_grad():
        found = model(wavs, weights)
        assert found.shape == (2, 3, 8) and found[1, 2].isnan().all()
        torch.testing.assert_close(found[0, 1], model(wavs, weights[:, 1])[0])
        assert model(wavs, weights[:, 2] > 0)[1].isnan().all()  # pyannote's masks are bool


def test_pyannotes_own_classes_take_it(folder, voices):
    from pyannote.audio import Inference
    from pyannote.audio.pipelines.speaker_verification import PretrainedSpeakerEmbedding

    model, wav = PyannoteEmbedding(folder, target_dim=8), voices(0, 2.0)[None]
    with torch.no_grad():
        expected = model(wav[None])[0]
    sound = {"waveform": wav, "sample_rate": 16000}
    torch.testing.assert_close(torch.tensor(Inference(model, window="whole")(sound)), expected)
    windows = Inference(model, window="sliding", duration=1.0, step=0.5)(sound)
    assert windows.data.shape == (3, 8)
    embedding = PretrainedSpeakerEmbedding(model)
    assert (embedding.dimension, embedding.sample_rate) == (8, 16000)
    assert embedding.min_num_samples == model.network.min_samples
    found = embedding(wav[None].repeat(2, 1, 1), masks=torch.tensor([[1.0] * 9, [0.0] * 9]))
    torch.testing.assert_close(torch.tensor(found[0]), expected, rtol=1e-3, atol=1e-3)
    assert np.isnan(found[1]).all()


def test_what_it_cannot_do_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"target_dim must be one of mrl_dims \[8, 32\], got 9"):
        PyannoteEmbedding(folder, target_dim=9)
    model, wavs = PyannoteEmbedding(folder), torch.randn(2, 1, 8000)
    for weights in (torch.ones(3, 9), torch.ones(9), torch.ones(2, 1, 1, 9), -torch.ones(2, 9)):
        with pytest.raises(ValueError, match=r"weights must be at least 0 and \(B, frames\)"):
            model(wavs, weights)
    ecapa = MatryoshkaEncoder(embed_dim=8, mrl_dims=(8,), **encoders.parts("ecapa"))
    architecture = encoders.hyperparams("ecapa")
    other = export_model(ecapa.eval(), tmp_path / "ecapa", architecture=architecture)
    with pytest.raises(ValueError, match="must be a ReDimNet or ReDimNet2, .* ECAPA_TDNN"):
        PyannoteEmbedding(other)
