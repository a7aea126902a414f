import copy
import subprocess
import sys

import encoders
import numpy as np
import pytest
import torch
from kaldi_native import native
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

from speechbrain_mrl import KaldiFbank, MatryoshkaEncoder, export_model
from speechbrain_mrl.inference import graphs
from speechbrain_mrl.inference.onnx import ExportedEncoder, export_onnx
from speechbrain_mrl.inference.optimize import optimize_for_inference
from speechbrain_mrl.models import redimnet
from speechbrain_mrl.models.pretrained import ReDimNetMRL

pytest.importorskip("onnxscript")


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request):
    pytest.importorskip(request.param)
    return request.param


def test_embeddings_agree_at_every_length_and_batch(exported, engine, voices):
    model, path = exported
    encoder = ExportedEncoder(path, engine, threads=1)
    assert encoder.mrl_dims == (8, 32) and encoder.embed_dim == 32
    for batch, seconds in ((1, 0.02), (2, 0.7), (3, 1.3)):
        wavs = torch.stack([voices(i, seconds) for i in range(batch)])
        with torch.no_grad():
            expected = model(wavs).numpy()
        np.testing.assert_allclose(encoder(wavs.numpy()), expected, rtol=1e-4, atol=1e-4)
        assert (encoder(wavs.numpy(), target_dim=8) == encoder(wavs.numpy())[:, :8]).all()


@pytest.mark.slow
def test_redimnet2_is_exported_too(tiny_config2, random_model, engine, voices, tmp_path):
    redimnet = random_model({**tiny_config2, "agg_gnorm": True, "dual_agg": True})
    model = ReDimNetMRL.from_redimnet(redimnet, embed_dim=32, mrl_dims=(8, 32)).eval()
    export_onnx(model, tmp_path / "model.onnx")
    encoder = ExportedEncoder(tmp_path / "model.onnx", engine, threads=1)
    assert encoder.min_samples == 720 and encoder.mrl_dims == (8, 32)
    for batch, samples in ((1, 720), (2, 11111), (3, 16000)):
        wavs = torch.stack([voices(i, samples / 16000) for i in range(batch)])
        with torch.no_grad():
            torch.testing.assert_close(encoder(wavs), model(wavs), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at least 720 samples .* got 719"):
        encoder(wavs[:, :719])


def encoder_model(kind):
    """A Matryoshka head on a toy encoder; "kaldi" is an ECAPA-TDNN on Kaldi's features."""
    parts = encoders.parts("ecapa" if kind == "kaldi" else kind)
    if kind == "kaldi":
        parts |= {"compute_features": KaldiFbank(n_mels=24), "mean_var_norm": None}
    return MatryoshkaEncoder(embed_dim=16, mrl_dims=(4, 16), **parts).eval()


@pytest.mark.parametrize(
    "kind",
    ["resnet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("kaldi", "xvect"))],
)
def test_any_encoder_is_exported_from_waveforms(kind, voices, tmp_path):
    """Speechbrain's own features too; "resnet" is the model of a published folder."""
    pytest.importorskip("onnxruntime")
    model, path = encoder_model(kind), tmp_path / "model.onnx"
    if kind == "resnet":
        architecture = encoders.hyperparams(kind)
        folder = export_model(model, tmp_path / "model", architecture=architecture)
        export_onnx(EncoderClassifier.from_hparams(folder).mods.embedding_model, path)
    else:
        export_onnx(model, path)
    encoder = ExportedEncoder(path, threads=1)
    assert encoder.mrl_dims == (4, 16) and encoder.min_samples == model.min_samples
    for batch, samples in ((1, max(model.min_samples, 400)), (3, 21111)):
        wavs = torch.stack([voices(i, samples / 16000) for i in range(batch)])
        with torch.no_grad():
            torch.testing.assert_close(encoder(wavs), model(wavs), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        expected = model(wavs, torch.tensor([1.0, 0.7, 0.4]))
    found = encoder(wavs, [1.0, 0.7, 0.4], target_dim=4)
    torch.testing.assert_close(found, expected[:, :4], rtol=1e-3, atol=1e-3)
    if kind == "resnet":
        pytest.importorskip("openvino")
        with pytest.raises(ValueError, match="OpenVINO cannot read .* use engine 'onnxruntime'"):
            ExportedEncoder(path, "openvino")


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    """A model on ``KaldiFbank()``, and its file of 4 dimensions for runtimes that feed features."""
    torch.manual_seed(0)
    net = ECAPA_TDNN(80, "cpu", 8, channels=[16] * 4 + [48], attention_channels=8, res2net_scale=4)
    model = MatryoshkaEncoder(net, 16, (4, 16), compute_features=KaldiFbank()).eval()
    path = tmp_path_factory.mktemp("fbank") / "model.onnx"
    export_onnx(model, path, input="fbank", target_dim=4)
    return model, path


def test_a_graph_from_features_embeds_what_kaldis_own_code_computes(fed, voices):
    """Names and shapes as 3D-Speaker's C++ asks for; WeSpeaker's takes one input and one output."""
    session = pytest.importorskip("onnxruntime").InferenceSession(fed[1])
    assert [one.name for one in session.get_inputs()] == ["feature"]
    assert [one.name for one in session.get_outputs()] == ["embedding"]
    for samples in (4000, 23456):
        wavs = torch.stack([voices(i, samples / 16000) for i in range(2)])
        feats = torch.stack([native(wav) for wav in wavs]).numpy()
        (found,) = session.run(["embedding"], {"feature": feats})
        with torch.no_grad():
            expected = fed[0](wavs, target_dim=4)
        assert found.shape == (2, 4)
        assert torch.cosine_similarity(torch.from_numpy(found), expected).min() > 0.9999


def test_sherpa_onnx_gives_the_embedding_of_the_waveform(fed, voices):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    config = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(fed[1]))
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(config)
    assert extractor.dim == 4
    wav, stream = voices(0, 1.5), extractor.create_stream()
    stream.accept_waveform(16000, wav.numpy())
    stream.input_finished()
    with torch.no_grad():
        expected = fed[0](wav, target_dim=4)[0]
    found = torch.tensor(extractor.compute(stream))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9999


@pytest.mark.slow  # the graph from features is of one size, too
def test_a_graph_of_one_size_gives_that_prefix(exported, voices, tmp_path):
    model, path = exported[0], tmp_path / "model.onnx"
    export_onnx(model, path, target_dim=8)
    encoder, wav = ExportedEncoder(path, threads=1), voices(0, 0.5)
    assert encoder.mrl_dims == (8,) and encoder.embed_dim == 8
    with torch.no_grad():
        torch.testing.assert_close(encoder(wav), model(wav)[:, :8], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_refused_before_a_file_is_written(exported, fed, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="input must be one of .* got 'mel'"):
        export_onnx(exported[0], path, input="mel")
    for size in (9, 8.0):
        with pytest.raises(ValueError, match=r"target_dim must be one of mrl_dims \[8, 32\], got"):
            export_onnx(exported[0], path, target_dim=size)
    with pytest.raises(ValueError, match="got a MatryoshkaReDimNet with features of its own"):
        export_onnx(exported[0], path, input="fbank")
    with pytest.raises(ValueError, match="80 bands from 20 to 7600 Hz, .* has 24 other ones"):
        export_onnx(encoder_model("kaldi"), path, input="fbank")
    other = MatryoshkaEncoder(fed[0].embedding_model, 16, (16,), KaldiFbank(f_max=8000.0))
    with pytest.raises(ValueError, match="80 bands from 20 to 7600 Hz"):
        export_onnx(other, path, input="fbank")
    assert not path.exists()


def test_a_graph_from_features_is_not_taken_for_one_from_waveforms(fed, engine):
    with pytest.raises(ValueError, match="was not written by export_onnx with input='wavs'"):
        ExportedEncoder(fed[1], engine)


@pytest.mark.parametrize("config", ["b2", "b5", "syn_att_convnext", "syn_conv_fwse", "mfa"])
def test_the_graph_is_the_model_in_another_arrangement(
    config, tiny_config, parity, random_model, voices
):
    if config == "mfa":
        config = {**tiny_config, "out_channels": 20}
    else:
        config = parity(config)["model_config"]
    model = random_model(config)
    for module in model.modules():
        if isinstance(module, redimnet.MapMix) and module.w.requires_grad:
            module.w.data.normal_()  # weights that differ between channels
    wavs = torch.stack([voices(i, 0.5) for i in range(2)])
    with torch.no_grad():
        expected, (found, _) = model(wavs), graphs.ReDimNetGraph(copy.deepcopy(model)).eval()(wavs)
    scale = expected.abs().max().clamp_min(1)
    assert (found - expected).abs().max() < 1e-4 * scale


def test_padded_clips_are_embedded_as_alone(exported, engine, voices):
    model, path = exported
    wavs, wav_lens = torch.stack([voices(0, 1.0), voices(1, 1.0)]), [1.0, 0.6]
    with torch.no_grad():
        expected = model(wavs, torch.tensor(wav_lens)).numpy()
    found = ExportedEncoder(path, engine, threads=1)(wavs.numpy(), wav_lens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_clips_side_by_side_are_embedded_as_alone(exported, engine, voices):
    model, path = exported
    encoder = ExportedEncoder(path, engine, threads=2, streams=2)
    wavs = torch.stack([voices(i, 0.8) for i in range(7)])
    wav_lens = torch.linspace(0.3, 1.0, 7)
    with torch.no_grad():
        whole, padded = model(wavs), model(wavs, wav_lens)
    torch.testing.assert_close(encoder(wavs), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(wavs, wav_lens), padded, rtol=1e-4, atol=1e-4)
    assert encoder(wavs[:1].numpy(), target_dim=8).shape == (1, 8)


def test_a_fixed_shape_has_a_graph_of_its_own_and_others_still_run(exported, engine, voices):
    model, path = exported
    encoder = ExportedEncoder(path, engine, threads=1, shape=(2, 12000))
    wavs = torch.stack([voices(i, 0.75) for i in range(2)])
    for given in (wavs, wavs[:1], wavs[:, :9000]):
        with torch.no_grad():
            torch.testing.assert_close(encoder(given), model(given), rtol=1e-4, atol=1e-4)
    encoder._any_shape = None
    assert encoder(wavs).shape == (2, 32)


@pytest.mark.parametrize("shape", [(1,), (0, 16000), (1, 256)])
def test_a_fixed_shape_that_no_waveforms_have_is_refused(exported, engine, shape):
    with pytest.raises(
        ValueError, match=r"shape must be \(B, T\), B at least 1 and T at least 257"
    ):
        ExportedEncoder(exported[1], engine, shape=shape)


@pytest.mark.parametrize(
    "groups, inputs, outputs, left",
    [(8, 4, 4, 2), (6, 4, 2, 2), (3, 8, 8, 3), (5, 1, 1, 5), (1, 6, 4, 1), (2, 24, 24, 2)],
)
def test_joined_groups_give_the_same_convolution(groups, inputs, outputs, left):
    conv = redimnet.Conv2d(groups * inputs, groups * outputs, 3, groups=groups)
    x = torch.randn(2, groups * inputs, 5, 6)
    expected = conv(x)
    graphs.join_groups(conv)
    assert conv.groups == left and conv.weight.shape[1] <= max(inputs, 16)
    torch.testing.assert_close(conv(x), expected)


def test_openvino_leaves_signals_alone_and_reports_nothing_over_the_network(exported):
    """Signals after two encoders, one after the other."""
    pytest.importorskip("openvino")
    code = (
        "import multiprocessing, os, signal, sys\n"
        "def refuse(*_, **__): print('told')\n"
        "multiprocessing.Process.start = refuse\n"  # how the reporter reaches the network
        "from speechbrain_mrl.inference.onnx import ExportedEncoder\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "first, second = (ExportedEncoder(sys.argv[1], 'openvino', threads=1) for _ in '12')\n"
        "del first\n"
        "del second\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    command = [sys.executable, "-c", code, str(exported[1])]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"handled\n"


def test_bfloat16_comes_close(exported, voices):
    pytest.importorskip("openvino")
    model, path = exported
    wav = voices(0, 1.0)
    with torch.no_grad():
        expected = model(wav)
    found = ExportedEncoder(path, "openvino", "bfloat16", threads=1)(wav.numpy())
    assert torch.cosine_similarity(torch.from_numpy(found), expected).item() > 0.999


def test_what_an_exported_model_cannot_do_is_refused(exported, engine):
    encoder, wavs = ExportedEncoder(exported[1], engine, threads=1), np.zeros((1, 16000), "f4")
    with pytest.raises(ValueError, match="target_dim must be one of"):
        encoder(wavs, target_dim=9)
    with pytest.raises(ValueError, match="at least 257"):
        encoder(wavs[:, :100])
    with pytest.raises(ValueError, match="engine must be one of"):
        ExportedEncoder(exported[1], "tensorrt")
    with pytest.raises(ValueError, match="precision must be one of"):
        ExportedEncoder(exported[1], engine, "int4")
    with pytest.raises(ValueError, match="streams must be at least 1, got 0"):
        ExportedEncoder(exported[1], engine, streams=0)
    with pytest.raises(TypeError, match="must be a ReDimNet"):
        export_onnx(torch.nn.Linear(1, 1), "x.onnx")
    with pytest.raises(TypeError, match="pass the model it was made of"):
        export_onnx(optimize_for_inference(exported[0]), "x.onnx")
