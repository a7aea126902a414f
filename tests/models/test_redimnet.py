import copy
import itertools

import fill
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from plain import PlainReDimNet

from speechbrain_mrl import ReDimNetMRL
from speechbrain_mrl.models.redimnet import (
    CONFIG_DEFAULTS,
    PRESETS,
    LogMel,
    MapMix,
    MatryoshkaReDimNet,
    ReDimNet,
    check_mrl_dims,
    complete_config,
)

FIXTURES = ["b0", "b1", "b2", "b3", "b5", "b6", "syn_att_convnext", "syn_conv_fwse"]


# Equal to the authors' code


def in_double(spec):
    """A copy of a front end that computes in double precision, alike on every processor."""
    spec = copy.deepcopy(spec)
    for module in spec.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.double())
    return spec


@pytest.mark.parametrize("name", FIXTURES)
def test_embeddings_and_every_stage_equal_the_authors(parity, name):
    fixture = parity(name)
    model, found = fixture.model(), {}
    for probe in fixture["cases"][0]["probes"]:
        module = model.get_submodule(probe)
        module.register_forward_hook(lambda _m, _i, out, probe=probe: found.update({probe: out}))
    for case in fixture["cases"]:
        with torch.no_grad():
            embeddings = model(fill.waveform(case["seconds"]))
        assert fill.max_abs_diff(embeddings, case["output"]) < 1e-5
        feats, mask = found["spec"]
        found["spec"] = feats
        exact, _ = in_double(model.spec)._features(fill.waveform(case["seconds"]).double(), None)
        assert mask is None and list(feats.shape) == case["features"]["shape"]
        for frame in (0, 10):
            expected = case["features"][f"frame{frame}"]
            assert fill.max_abs_diff(exact[0, : len(expected), frame], expected) < 1e-5
            # in float32 a quiet band has the rounding of the processor's Fourier transform
            assert fill.max_abs_diff(feats[0, : len(expected), frame], expected) < 2e-5
        for probe, expected in case["probes"].items():
            out = found[probe]
            out = out.squeeze(3) if out.ndim == 4 else out  # a 1-D map
            assert list(out.shape) == expected["shape"], probe
            ends = torch.cat([out.flatten()[:4], out.flatten()[-4:]])
            error = fill.max_abs_diff(ends, expected["first"] + expected["last"])
            assert error < 2e-5, probe  # values up to 10, stored in 7 digits
            assert abs(fill.summary(out)["std"] / expected["std"] - 1) < 1e-5, probe


@pytest.mark.parametrize("name", FIXTURES)
def test_state_dict_keys_shapes_and_counts_are_the_release_s(parity, name):
    fixture = parity(name)
    model = ReDimNet.from_config(fixture["model_config"])
    state = model.state_dict()
    assert {key: (list(x.shape), str(x.dtype)) for key, x in state.items()} == {
        entry["key"]: (entry["shape"], f"torch.{entry['dtype']}") for entry in fixture["manifest"]
    }
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == fixture["trainable"]
    for key, expected in fixture["unfilled_checksum"].items():
        found = fill.summary(state[key])
        assert found["mean"] == pytest.approx(expected["mean"], abs=1e-7), key
        assert found["std"] == pytest.approx(expected["std"], abs=1e-7), key


@pytest.mark.parametrize("size", sorted(PRESETS))
def test_preset_builds_and_runs_with_the_keys_of_its_fixture(parity, voices, size):
    model = ReDimNet.from_config(PRESETS[size]).eval()
    with torch.no_grad():
        embeddings = model(voices(0, 0.4))
    assert embeddings.shape == (1, 192) and embeddings.isfinite().all()
    if size in FIXTURES:
        expected = {entry["key"]: entry["shape"] for entry in parity(size)["manifest"]}
        assert {key: list(x.shape) for key, x in model.state_dict().items()} == expected


# Configurations


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feat_type": "tf"}, "feat_type='tf'; supported: 'pt'"),
        ({"pooling_func": "MQMHASTP"}, "pooling_func='MQMHASTP'; supported: 'ASTP', 'TSTP'"),
        ({"num_classes": 5994}, "num_classes=5994; supported: None"),
        ({"tf_optimized_arch": True}, "tf_optimized_arch=True"),
        ({"head_activation": "nn.ReLU()"}, r"head_activation='nn.ReLU\(\)'; supported: None"),
        ({"return_all_outputs": True}, "return_all_outputs=True"),
        ({"block_1d_type": "gru"}, "block_1d_type='gru'; supported: 'fc', 'conv', 'att'"),
        ({"block_2d_type": "convnext"}, "block_2d_type='convnext'"),
        ({"n_mels": 80}, r"model_config has unknown keys \['n_mels'\]"),
        ({"spec_params": {"eps": 1e-5}}, r"spec_params has unknown keys \['eps'\]"),
        ({"spec_params": {"n_fft": 1024}}, "n_fft=1024; supported: 512"),
        ({"spec_params": {"sample_rate": 8000}}, "sample_rate=8000; supported: 16000"),
        ({"spec_params": {"freq_start_bin": 3}}, "freq_start_bin=3; supported: 0"),
        ({"spec_params": {"win_length": 600}}, "win_length=600; it must be at most 512"),
        ({"spec_params": {"f_max": 9000}}, "f_min=20.0 and f_max=9000; they must be ascending"),
        ({"spec_params": {"num_apply_spec_aug": 0}}, "num_apply_spec_aug=0"),
        ({"spec_params": {"spec_norm": "bn"}}, "spec_norm='bn'; supported: 'mn', 'mvn'"),
        ({"spec_params": {"norm_signal": 1}}, "norm_signal=1; it must be true or false"),
        ({"spec_params": {"freq_mask_width": [6, 0]}}, r"freq_mask_width=\[6, 0\]"),
        ({"spec_params": None}, "spec_params must be a mapping, got NoneType"),
        ({"F": 60.0}, "F=60.0; it must be a positive integer"),
        ({"C": 0}, "C=0; it must be a positive integer"),
        ({"embed_dim": True}, "embed_dim=True; it must be a positive integer"),
        ({"hop_length": 320}, "hop_length=320; it must be below 257"),
        ({"out_channels": -1}, "out_channels=-1"),
        ({"emb_bn": "no"}, "emb_bn='no'; it must be true or false"),
        ({"feat_agg_dropout": 1.0}, r"feat_agg_dropout=1.0; it must be in \[0, 1\)"),
        ({"stages_setup": []}, r"stages_setup=\[\]; it must list the stages"),
        ({"stages_setup": [[1, 2, 1, 12]]}, r"stages_setup\[0\] is \[1, 2, 1, 12\]"),
        ({"stages_setup": [[4, 1, 1, None, 4]]}, r"stages_setup\[0\] has stride 4"),
        (
            {"stages_setup": [[2, 1, 1, None, 4]] * 4},
            r"stages_setup\[3\] has stride 2; .* divide the 3 frequencies",
        ),
        ({"stages_setup": [[1, -1, 1, None, 4]]}, r"stages_setup\[0\] has -1 blocks"),
        ({"stages_setup": [[1, 1, "2", None, 4]]}, r"stages_setup\[0\] has expansion '2'"),
        ({"stages_setup": [[1, 1, 0.1, None, 4]]}, r"stages_setup\[0\] has expansion 0.1"),
        ({"stages_setup": [[1, 1, 1, None, 0]]}, r"stages_setup\[0\] has reduction 0"),
        ({"stages_setup": [[1, 1, 1, None, 10]]}, "9 channels, which its 4 attention heads"),
        ({"group_divisor": 16}, "group_divisor 16 does not fit a layer of 8 to 8 channels"),
        ({"group_divisor": 3, "C": 5}, "group_divisor 3 does not fit a layer of 10 to 10 channels"),
        ({"group_divisor": 1, "stages_setup": [[1, 0, 1.5, 3, 4]]}, "a layer of 6 to 4 channels"),
    ],
)
def test_unsupported_configuration_is_refused_by_name_and_value(tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        ReDimNet.from_config({**tiny_config, **change})


def test_configuration_that_is_silent_takes_the_authors_defaults():
    config = complete_config({"C": 8})
    assert config["C"] == 8 and config["hop_length"] == 160 and config["block_1d_type"] == "att"
    assert config["spec_params"]["do_preemph"] is True
    assert set(config) == set(CONFIG_DEFAULTS)


# Padding


def assert_padding_changes_nothing(model, lengths, seed=0):
    """Each clip alone, and all in one batch with loud noise where silence would be kinder."""
    generator = torch.Generator().manual_seed(seed)
    wavs = torch.randn(len(lengths), max(lengths), generator=generator)
    wav_lens = torch.tensor(lengths) / max(lengths)
    for wav, n in zip(wavs, lengths):
        wav[:n] *= 0.1
    with torch.no_grad():
        padded = model(wavs, wav_lens)
        alone = torch.cat([model(wav[:n]) for wav, n in zip(wavs, lengths)])
    assert F.cosine_similarity(padded, alone).min() >= 0.9999  # the promise
    torch.testing.assert_close(padded, alone, atol=2e-4, rtol=1e-4)  # what float32 allows


@pytest.mark.parametrize(
    "name, seconds",
    [
        ("b0", (0.6, 1.13, 2.0, 3.371, 8.0)),
        ("b2", (0.6, 1.13, 2.0, 3.371, 8.0)),
        ("b5", (3.0, 0.6, 1.13)),
        pytest.param("b5", (0.6, 1.13, 2.0, 3.371, 8.0), marks=pytest.mark.slow),
    ],
)
def test_released_architecture_embeds_a_padded_clip_as_alone(parity, name, seconds):
    assert_padding_changes_nothing(parity(name).model(), [round(16000 * s) for s in seconds])


@pytest.mark.parametrize("name", ["syn_att_convnext", "syn_conv_fwse"])
def test_other_released_options_embed_a_padded_clip_as_alone(parity, name):
    assert_padding_changes_nothing(parity(name).model(), [48000, 9600, 20011])


@pytest.mark.parametrize("block_1d_type", ["fc", "conv", "att", "conv+att"])
@pytest.mark.parametrize("block_2d_type", ["convnext_like_relu", "basic_resnet_fwse"])
@pytest.mark.parametrize("group_divisor", [None, 2])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pooling_func": "TSTP", "spec_params": {"norm_signal": True, "spec_norm": "mvn"}},
        {"hop_length": 160, "out_channels": 40, "global_context_att": False, "emb_bn": True},
        {"spec_params": {"do_preemph": False, "norm_signal": True}},
    ],
)
def test_every_option_embeds_a_padded_clip_as_alone(
    tiny_config, random_model, block_1d_type, block_2d_type, group_divisor, change
):
    config = {**tiny_config, "block_1d_type": block_1d_type, "block_2d_type": block_2d_type}
    model = random_model({**config, "group_divisor": group_divisor, **change})
    # The shortest signal, whole numbers of frames, and one sample to either side of them.
    assert_padding_changes_nothing(model, [257, 2399, 2400, 2401, 4801, 9600, 11000])


def test_mask_ends_where_the_clip_alone_would_end(tiny_config):
    spec = ReDimNet.from_config(tiny_config).eval().spec
    counts = torch.tensor([16000, 479, 480, 481])
    feats, mask = spec(torch.randn(4, 16000), counts)
    assert mask.sum(dim=-1).flatten().tolist() == [67, 2, 3, 3]  # 1 + n // 240
    assert (feats * (1 - mask) == 0).all()


def test_wav_lens_of_one_change_nothing(tiny_config, random_model):
    model, wavs = random_model(tiny_config), torch.randn(2, 8000)
    torch.testing.assert_close(model(wavs, torch.ones(2)), model(wavs), atol=0, rtol=0)


# Training on padded clips


def assert_trained_as_without_padding(model, lengths):
    """Embeddings, gradients and running statistics in training, against clips of their own lengths."""
    torch.manual_seed(0)  # rarely an activation is so near zero that float32 gives it another sign
    wavs, wav_lens = torch.randn(len(lengths), max(lengths)), torch.tensor(lengths) / max(lengths)
    with torch.no_grad():
        alone = [model.spec(wav[None, :n])[0].double() for wav, n in zip(wavs, lengths)]
    model.train()
    plain = PlainReDimNet(model, training=True, dtype=torch.float64)
    expected, parameters = plain(alone), {k: p for k, p in model.named_parameters()}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    direction = torch.randn(expected.shape)
    gradients = torch.autograd.grad((expected * direction).sum(), list(trained.values()))
    embeddings = model(wavs, wav_lens)
    assert F.cosine_similarity(embeddings, expected).min() > 1 - 1e-6
    torch.testing.assert_close(embeddings.double(), expected, rtol=1e-3, atol=1e-3)
    (embeddings * direction).sum().backward()
    largest = max(g.abs().max().item() for g in gradients)
    for (name, parameter), gradient in zip(trained.items(), gradients):
        # that of a bias before BatchNorm is zero but for rounding
        scale = gradient.norm() + 1e-3 * largest * gradient.numel() ** 0.5
        assert (parameter.grad - gradient).norm() < 3e-2 * scale, name
    state = model.state_dict()
    for name, (mean, variance) in plain.running.items():
        spread = variance.sqrt().float()
        assert ((state[f"{name}.running_mean"] - mean.float()).abs() < 1e-3 * spread).all(), name
        torch.testing.assert_close(
            state[f"{name}.running_var"].double(), variance, rtol=1e-3, atol=0.0
        )
        assert state[f"{name}.num_batches_tracked"] == 1
    assert set(plain.running) == {
        name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__
    }


@pytest.mark.parametrize("block_1d_type", ["fc", "conv", "att", "conv+att"])
@pytest.mark.parametrize("block_2d_type", ["convnext_like", "basic_resnet_fwse"])
@pytest.mark.parametrize(
    "change", [{}, {"out_channels": 40, "emb_bn": True, "group_divisor": None}]
)
def test_padding_is_not_trained_on(tiny_config, random_model, block_1d_type, block_2d_type, change):
    config = {**tiny_config, "block_1d_type": block_1d_type, "block_2d_type": block_2d_type}
    assert_trained_as_without_padding(
        random_model({**config, **change}), [11000, 2400, 4801, 9600, 8000]
    )


@pytest.mark.parametrize("name", ["b0", "b2", pytest.param("b5", marks=pytest.mark.slow)])
def test_released_architectures_do_not_train_on_padding(parity, name):
    assert_trained_as_without_padding(parity(name).model(), [16000, 5000, 9000, 12001])


def test_synchronized_statistics_of_one_process_are_its_own(tiny_config, random_model):
    model, wavs, wav_lens = (
        random_model(tiny_config),
        torch.randn(3, 8000),
        torch.tensor([1, 0.5, 1]),
    )
    same = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert list(same.state_dict()) == list(model.state_dict())
    for lens in (wav_lens, None):
        found, expected = same.train()(wavs, lens), model.train()(wavs, lens)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(same.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-4)


# Signals


def test_three_shapes_of_one_signal_give_one_embedding(tiny_config, random_model, voices):
    model, wav = random_model(tiny_config), voices(0, 0.7)
    expected = model(wav)
    assert expected.shape == (1, 32)
    for wavs in (wav[None], wav[None, None]):
        torch.testing.assert_close(model(wavs), expected, atol=0, rtol=0)
    assert model(torch.stack([wav, wav])).shape == (2, 32)


@pytest.mark.parametrize("shape", [(2, 2, 16000), (1, 1, 1, 16000), (), (0, 16000)])
def test_other_shapes_are_refused(tiny_config, shape):
    with pytest.raises(ValueError, match=r"wavs must be \(T,\), \(B, T\) or \(B, 1, T\), got"):
        ReDimNet.from_config(tiny_config)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.bool])
def test_integer_signals_are_refused(tiny_config, dtype):
    with pytest.raises(ValueError, match=f"wavs must be float .* got {dtype}"):
        ReDimNet.from_config(tiny_config)(torch.zeros(1, 16000, dtype=dtype))


def test_shortest_signal_has_257_samples(tiny_config, random_model):
    model = random_model(tiny_config)
    assert model(torch.randn(257)).isfinite().all()
    with pytest.raises(
        ValueError, match="at least 257 samples .* got 256; the signal is too short"
    ):
        model(torch.randn(1, 256))
    with pytest.raises(ValueError, match="at least 257 samples .* got 0"):
        model(torch.zeros(1, 0))


@pytest.mark.parametrize("spec_norm", ["mn", "mvn"])
def test_silence_has_a_finite_embedding(tiny_config, random_model, spec_norm):
    spec_params = {"norm_signal": True, "spec_norm": spec_norm}
    model = random_model({**tiny_config, "spec_params": spec_params})
    assert model(torch.zeros(2, 8000), torch.tensor([1.0, 0.5])).isfinite().all()


@pytest.mark.parametrize(
    "wav_lens, message",
    [
        ([1.0], r"wav_lens must have shape \(2,\) for wavs \(2, 16000\), got \(1,\)"),
        ([[1.0], [1.0]], r"wav_lens must have shape \(2,\)"),
        ([1.0, 1.5], r"wav_lens must be relative lengths in \(0, 1\], got \[1.0, 1.5\]"),
        ([16000.0, 8000.0], r"relative lengths"),
        ([1.0, float("nan")], r"relative lengths"),
        ([1.0, 0.016], r"wavs\[1\] has 256 samples by its wav_lens and needs at least 257"),
        ([1.0, 0.0], r"wavs\[1\] has 0 samples"),
        ([-1.0, 1.0], r"wavs\[0\] has -16000 samples"),
        ([1.0, float("-inf")], r"relative lengths"),
    ],
)
def test_impossible_wav_lens_are_refused(tiny_config, wav_lens, message):
    with pytest.raises(ValueError, match=message):
        ReDimNet.from_config(tiny_config)(torch.zeros(2, 16000), torch.tensor(wav_lens))


def test_mel_parameters_of_a_checkpoint_are_those_of_torchaudio(tiny_config):
    given = {"f_min": 60, "f_max": 7000, "win_length": 320, "num_apply_spec_aug": 2}
    whole = {"sample_rate": 16000, "n_fft": 512, "freq_start_bin": 0, "do_preemph": False, **given}
    spec = ReDimNet.from_config({**tiny_config, "spec_params": whole}).eval().spec
    wavs = torch.randn(1, 16000)
    mel = torchaudio.transforms.MelSpectrogram(
        16000, 512, 320, 240, 60, 7000, n_mels=24, window_fn=torch.hamming_window
    )
    expected = (mel(wavs) + 1e-6).log()
    expected = expected - expected.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(spec(wavs)[0], expected, atol=1e-4, rtol=1e-4)


# Training


def test_spectral_drops_are_zeros_and_only_in_training():
    spec = LogMel(24, 240, True, False, True, "mn", (1, 6), (1, 8))
    plain = LogMel(24, 240, False, False, True, "mn", (1, 6), (1, 8))
    wavs = torch.randn(3, 16000)
    expected, _ = plain(wavs)
    torch.testing.assert_close(spec.eval()(wavs)[0], expected, atol=0, rtol=0)
    for seed in range(20):
        torch.manual_seed(seed)
        feats, _ = spec.train()(wavs)
        changed = feats != expected
        assert (feats[changed] == 0).all()
        for clip in changed:
            # Whole bands and whole frames, at most 5 and 7 of them: the widths exclude the upper.
            bands, frames = clip.all(dim=1), clip.all(dim=0)
            assert 1 <= bands.sum() <= 5 and 1 <= frames.sum() <= 7
            assert torch.equal(clip, bands[:, None] | frames[None])


def test_every_trainable_weight_gets_a_gradient(tiny_config, random_model):
    model = random_model(tiny_config).train()
    model(torch.randn(4, 8000), torch.tensor([1.0, 0.9, 0.5, 0.3])).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["backbone.stage0.0.w"]  # the mix of one map
    used = [p.grad.any().item() for p in model.parameters() if p.requires_grad]
    assert sum(used) > 0.9 * len(used)


def test_bfloat16_autocast_stays_near_float32(parity, voices):
    model = parity("b0").model()
    wavs = torch.stack([voices(speaker, 1.5) for speaker in range(3)])
    wav_lens = torch.tensor([1.0, 0.7, 0.4])
    with torch.no_grad():
        expected = model(wavs, wav_lens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = model(wavs, wav_lens)
    assert embeddings.dtype == torch.float32 and embeddings.isfinite().all()
    assert F.cosine_similarity(embeddings, expected).min() > 0.99


@pytest.mark.parametrize("block_1d_type", ["fc", "conv", "att", "conv+att"])
def test_maps_that_are_summed_lie_in_memory_alike(tiny_config, random_model, block_1d_type):
    model = random_model({**tiny_config, "block_1d_type": block_1d_type})
    seen = []
    for module in model.modules():
        if isinstance(module, MapMix):
            module.register_forward_pre_hook(lambda _, given: seen.extend(given[0]))
    model(torch.randn(2, 8000))
    assert len(seen) > 2 and all(one.permute(0, 2, 3, 1).is_contiguous() for one in seen)


# Weights of another network


@pytest.fixture(scope="module")
def presets():
    return {size: ReDimNet.from_config(config) for size, config in PRESETS.items()}


def test_weights_of_any_other_preset_are_refused(presets):
    for given, own in itertools.permutations(presets, 2):
        with pytest.raises(ValueError, match="state_dict is of another ReDimNet"):
            presets[own].load_state_dict(presets[given].state_dict())


def test_why_b6_cannot_be_loaded_into_b2_is_one_sentence_that_names_the_ways(presets):
    with pytest.raises(ValueError) as error:
        MatryoshkaReDimNet(backbone="b2").load_state_dict(presets["b6"].state_dict())
    message = str(error.value)
    assert "backbone.stem.0.weight is (32, 1, 3, 3), here (16, 1, 3, 3)" in message
    assert ". " not in message and "\n" not in message and len(message) < 500
    for way in ("train_distilled_mrl", "expand_model", "MultiModelEnsemble"):
        assert way in message


def test_other_misfits_keep_torch_s_strict_errors(tiny_config, random_model):
    model = random_model(tiny_config)
    state_dict = model.state_dict()
    del state_dict["bn.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*bn.weight"):
        model.load_state_dict(state_dict)
    assert model.load_state_dict(state_dict, strict=False).missing_keys == ["bn.weight"]
    wider = random_model({**tiny_config, "embed_dim": 48})
    with pytest.raises(RuntimeError, match="size mismatch for linear.weight"):
        wider.load_state_dict(model.state_dict())


# The Matryoshka head


def test_prefixes_are_cuts_of_one_embedding(tiny_config, voices):
    model = MatryoshkaReDimNet(48, [8, 16, 48], tiny_config).eval()
    wavs, wav_lens = torch.stack([voices(0, 1.0), voices(1, 1.0)]), torch.tensor([1.0, 0.6])
    whole = model(wavs, wav_lens)
    assert whole.shape == (2, 48)
    prefixes = model(wavs, wav_lens, return_all_dims=True)
    assert list(prefixes) == [8, 16, 48]
    for dim, prefix in prefixes.items():
        assert torch.equal(prefix, whole[:, :dim])
        assert torch.equal(model(wavs, wav_lens, target_dim=dim), whole[:, :dim])


@pytest.mark.parametrize(
    "mrl_dims, message",
    [
        ([], r"strictly ascending positive integers, got \[\]"),
        ([0, 48], r"strictly ascending positive integers, got \[0, 48\]"),
        ([16, 8, 48], "strictly ascending"),
        ([16, 16, 48], "strictly ascending"),
        ([16.0, 48], "strictly ascending positive integers"),
        ([True, 48], "strictly ascending positive integers"),
        ([16, 32], r"must end in embed_dim 48, got \[16, 32\]; add 48 or set embed_dim to 32"),
        ([16, 64], "must end in embed_dim 48"),
    ],
)
def test_impossible_mrl_dims_are_refused(tiny_config, mrl_dims, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaReDimNet(48, mrl_dims, tiny_config)


def test_any_ascending_list_that_ends_in_embed_dim_is_accepted():
    dims = [8, 16, 32, 64, 128, 192, 256]
    assert check_mrl_dims(dims, 256) == tuple(dims)
    assert check_mrl_dims((48,), 48) == (48,)


@pytest.mark.parametrize("target_dim", [0, 12, 49, -8])
def test_size_that_was_not_trained_is_refused(tiny_config, target_dim):
    model = MatryoshkaReDimNet(48, [8, 48], tiny_config).eval()
    with pytest.raises(ValueError, match=rf"one of mrl_dims \[8, 48\], got {target_dim}"):
        model(torch.zeros(16000), target_dim=target_dim)


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match=r"backbone must be one of \['b0'.*'b6'\], got 'b9'"):
        MatryoshkaReDimNet(backbone="b9")


@pytest.mark.parametrize("name", ["b0", "syn_att_convnext"])
def test_student_starts_with_every_tensor_of_the_pretrained_model(parity, name):
    source = parity(name).model()
    source_state = source.state_dict()
    student = MatryoshkaReDimNet.from_redimnet(source, 256).eval()
    state, copied, folded = student.state_dict(), [], []
    for key, value in source_state.items():
        head = key.startswith(("linear.", "bn2."))
        if head and source.bn2 is not None:
            folded.append(key)
            continue
        assert torch.equal(state[key][:192] if head else state[key], value), key
        copied.append(key)
    n_norm = 5 if name == "syn_att_convnext" else 0  # emb_bn: weight, bias, mean, var, counter
    assert len(state) == len(source_state) - n_norm
    assert len(folded) == (2 + n_norm if n_norm else 0)
    assert len(copied) + len(folded) == len(source_state)
    with torch.no_grad():
        wavs = fill.waveform(1.0)
        torch.testing.assert_close(student(wavs)[:, :192], source(wavs), atol=1e-5, rtol=1e-5)


def test_extra_dimensions_start_small_but_not_zero(parity, voices):
    source = parity("b0").model()
    student = MatryoshkaReDimNet.from_redimnet(source, 256).eval()
    with torch.no_grad():
        embeddings = student(torch.stack([voices(speaker, 1.0) for speaker in range(6)]))
    pretrained, extra = embeddings.split([192, 64], dim=1)
    assert 0 < extra.norm(dim=1).max() < 0.05 * pretrained.norm(dim=1).min()
    assert student.linear.weight[192:].std() > 0


def test_student_smaller_than_the_pretrained_model_is_refused(tiny_config, random_model):
    with pytest.raises(ValueError, match="embed_dim 16 is smaller than the 32 dimensions"):
        MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 16, [8, 16])


def pca_of(embeddings):
    """Principal axes as rows, largest variance first, by the covariance's eigenvectors."""
    values, vectors = torch.linalg.eigh(torch.cov(embeddings.double().T))
    return vectors.flip(1).T, values.flip(0)


def test_orthogonal_rotation_of_the_head_keeps_every_score(tiny_config, random_model, voices):
    wavs = torch.stack([voices(i % 6, 0.5, clip=i // 6) for i in range(24)])
    source = random_model(tiny_config)
    student = MatryoshkaReDimNet.from_redimnet(source, 48, [8, 32, 48]).eval()
    with torch.no_grad():
        teacher = source(wavs)
        student.rotate_head(pca_of(teacher)[0])
        rotated = student(wavs, target_dim=32)
    assert (rotated - teacher).abs().max() > 0.1  # it did rotate
    scores, expected = (
        F.cosine_similarity(z[:, None], z[None], dim=-1) for z in (rotated, teacher)
    )
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_principal_axes_come_first_after_rotation(tiny_config, random_model, voices):
    wavs = torch.stack([voices(i, 0.5) for i in range(48)])
    student = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 48, [8, 32, 48]).eval()
    with torch.no_grad():
        embeddings = student(wavs, target_dim=32)
        axes, variances = pca_of(embeddings)
        untouched = student(wavs)[:, 32:]
        student.rotate_head(axes, embeddings.mean(dim=0))
        rotated = student(wavs)
    found = rotated[:, :32].double()
    torch.testing.assert_close(found.var(dim=0), variances, atol=1e-5, rtol=1e-3)
    assert found.mean(dim=0).abs().max() < 1e-5  # the mean was subtracted first
    assert torch.equal(rotated[:, 32:], untouched)


@pytest.mark.parametrize("shape", [(32, 16), (64, 64), (32,)])
def test_rotation_of_another_shape_is_refused(tiny_config, shape):
    student = MatryoshkaReDimNet(48, [48], tiny_config)
    with pytest.raises(ValueError, match="matrix must be square with at most 48 rows"):
        student.rotate_head(torch.ones(shape))


@pytest.mark.parametrize("family", ["tiny_config", "tiny_config2"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_takes_the_whole_network_into_one_graph(family, training, request):
    model = ReDimNetMRL(16, (8, 16), request.getfixturevalue(family)).train(training)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.randn(2, 8000))
    assert found.graph_count == 1, [reason.user_stack for reason in found.break_reasons]
