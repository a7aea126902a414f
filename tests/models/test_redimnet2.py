import copy
import itertools

import fill
import pytest
import torch
import torch.nn.functional as F

from speechbrain_mrl.models.redimnet2 import (
    CONFIG_DEFAULTS,
    PRESETS,
    GroupNorm,
    PooledMapMix,
    ReDimNet2,
    complete_config,
)

FIXTURES = [
    "redimnet2_b2",
    "redimnet2_b3_gnorm",
    "redimnet2_syn_dual_gnorm",
    "redimnet2_syn_fwse_conv",
    "redimnet2_syn_pt_convnext",
    "redimnet2_syn_relu_fc_dual",
]


# Equal to the authors' code


def all_frames(spec, wavs):
    """Features before the last frames are left out; and the same in double precision."""
    every, exact = copy.deepcopy(spec), copy.deepcopy(spec)
    every.time_stride = exact.time_stride = 1
    for module in exact.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.double())
    return every._features(wavs, None)[0], exact._features(wavs.double(), None)[0]


@pytest.mark.parametrize("name", FIXTURES)
def test_embeddings_and_every_stage_equal_the_authors(parity, name):
    fixture = parity(name)
    model, found = fixture.model(), {}
    for probe in fixture["cases"][0]["probes"]:
        module = model.get_submodule(probe)
        module.register_forward_hook(lambda _m, _i, out, probe=probe: found.update({probe: out}))
    for case in fixture["cases"]:
        wavs = fill.waveform(case["seconds"])
        with torch.no_grad():
            embeddings = model(wavs)
            found["spec"], exact = all_frames(model.spec, wavs)
        assert fill.max_abs_diff(embeddings, case["output"]) < 1e-5
        for frame in (0, 10):
            expected = case["features"][f"frame{frame}"]
            assert fill.max_abs_diff(exact[0, : len(expected), frame], expected) < 1e-5
        for probe, expected in case["probes"].items():
            out = found[probe]
            if out.ndim == 4:  # (B, C, T, F), and F is 1 in a 1-D map
                out = out.squeeze(3) if len(expected["shape"]) == 3 else out.transpose(2, 3)
            if len(expected["shape"]) == 3 and probe != "spec":  # repeating is left to the mixture
                out = out.repeat_interleave(expected["shape"][2] // out.shape[2], dim=2)
            assert list(out.shape) == expected["shape"], probe
            ends = torch.cat([out.flatten()[:4], out.flatten()[-4:]])
            error = fill.max_abs_diff(ends, expected["first"] + expected["last"])
            assert error < 1e-4, probe  # the authors' own float32 is up to 8e-5 from double
            assert abs(fill.summary(out)["std"] / expected["std"] - 1) < 1e-5, probe


@pytest.mark.parametrize("name", FIXTURES)
def test_state_dict_keys_shapes_and_counts_are_the_release_s(parity, name):
    fixture = parity(name)
    model = ReDimNet2.from_config(fixture["model_config"])
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


def test_released_b2_and_its_preset_are_one_architecture(parity):
    expected = complete_config(parity("redimnet2_b2")["model_config"])
    preset = complete_config(PRESETS["redimnet2_b2"])
    for config in (expected, preset):
        for stage in config["stages_setup"]:
            stage[3] = None  # kernel sizes, which its blocks ignore
    assert preset == expected


PUBLISHED_MILLIONS = {"b0": 1.1, "b1": 2.1, "b2": 3.6, "b3": 4.1, "b4": 6.6, "b5": 8.9, "b6": 12.3}


@pytest.mark.parametrize("size", PUBLISHED_MILLIONS)
def test_presets_have_as_many_parameters_as_published(size):
    model = ReDimNet2.from_config(PRESETS[f"redimnet2_{size}"])
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert int(10 * millions) / 10 == PUBLISHED_MILLIONS[size]  # without rounding, as published


# Configurations


@pytest.mark.parametrize(
    "change, message",
    [
        ({"causal": False}, "causal=False; supported: 'none'"),
        ({"causal": "left"}, "causal='left'; supported: 'none'"),
        ({"fm_weigthing_type": "N"}, "fm_weigthing_type='N'; supported: 'NC'"),
        ({"spec_in_channels": 2}, "spec_in_channels=2; supported: 1"),
        ({"feat_type": "pt_stft"}, "feat_type='pt_stft'; supported: 'tf', 'tf_mel', 'pt'"),
        ({"att_dos": {"k": 1}}, r"att_dos=\{'k': 1\}; supported: None"),
        ({"agg_gnorm": 4}, "agg_gnorm=4; it must be true or false"),
        ({"agg_gnorm": 1}, "agg_gnorm=1; it must be true or false"),
        ({"dual_agg": None}, "dual_agg=None; it must be true or false"),
        ({"block_1d_type": "conv+att-rope"}, "block_1d_type='conv\\+att-rope'; supported"),
        ({"block_2d_type": "v2_basic_resnet"}, "block_2d_type='v2_basic_resnet'; supported"),
        ({"pooling_func": "MHASTP"}, "pooling_func='MHASTP'"),
        ({"return_all_outputs": True}, "return_all_outputs=True"),
        ({"is_subnet": True}, r"unknown keys \['is_subnet'\]"),
        ({"offset_fm_weights": 1}, r"unknown keys \['offset_fm_weights'\]"),
        ({"spec_params": {"spec_norm": "mn"}}, r"spec_params has unknown keys \['spec_norm'\]"),
        ({"feat_type": "pt", "spec_params": {"spec_norm": "bn"}}, "spec_norm='bn'; supported"),
        ({"feat_type": "pt", "spec_params": {"n_fft": 1024}}, "n_fft=1024; supported: 512"),
        ({"spec_params": {"n_fft": 512}}, r"unknown keys \['n_fft'\]"),
        ({"pad_right_samples": -1}, "pad_right_samples=-1"),
        ({"before_pool_offset": 1.5}, "before_pool_offset=1.5"),
        ({"stages_setup": []}, "stages_setup=\\[\\]; it must list the stages"),
        ({"stages_setup": [[1, 1, 1, None, 4]]}, r"\[\[frequency stride, time stride\], blocks"),
        ({"stages_setup": [[[1, 0], 1, 1, None, 4]]}, "time stride 0; it must be an integer"),
        ({"stages_setup": [[[1, 2.0], 1, 1, None, 4]]}, "time stride 2.0"),
        ({"stages_setup": [[[5, 1], 1, 1, None, 4]]}, r"stages_setup\[0\] has stride 5"),
        (
            {"block_2d_type": "convnext_like", "stages_setup": [[[1, 1], 1, 1, [[3, 4]], 4]]},
            r"kernel sizes \[\[3, 4\]\]; they must be pairs of odd integers",
        ),
    ],
)
def test_unsupported_configuration_is_refused_by_name_and_value(tiny_config2, change, message):
    with pytest.raises(ValueError, match=message):
        ReDimNet2.from_config({**tiny_config2, **change})


def test_configuration_that_is_silent_takes_the_authors_defaults(parity):
    config = complete_config({"causal": "none"})
    assert set(config) == set(CONFIG_DEFAULTS)
    assert config["stages_setup"] == PRESETS["redimnet2_b3"]["stages_setup"]
    assert config["feat_type"] == "pt" and config["spec_params"]["spec_norm"] == "mn"


def test_values_without_effect_are_accepted_and_never_evaluated(tiny_config2, random_model):
    change = {"num_classes": 5994, "feat_agg_dropout": 0.1, "head_activation": "exit(1)"}
    wavs = torch.randn(1, 8000)
    expected = random_model(tiny_config2)(wavs)
    assert torch.equal(random_model({**tiny_config2, **change})(wavs), expected)


def test_tf_mel_and_pt_mel_are_other_names(tiny_config2, random_model):
    wavs = torch.randn(1, 8000)
    for name in ("tf", "pt"):
        one, other = (
            random_model({**tiny_config2, "feat_type": feat_type})(wavs)
            for feat_type in (name, f"{name}_mel")
        )
        assert torch.equal(one, other)


# Padding


def assert_padding_changes_nothing(model, lengths):
    """Each clip alone, and all in one batch with loud noise where silence would be kinder."""
    generator = torch.Generator().manual_seed(0)
    wavs = torch.randn(len(lengths), max(lengths), generator=generator)
    for wav, n in zip(wavs, lengths):
        wav[:n] *= 0.1
    with torch.no_grad():
        padded = model(wavs, torch.tensor(lengths) / max(lengths))
        alone = torch.cat([model(wav[:n]) for wav, n in zip(wavs, lengths)])
    assert F.cosine_similarity(padded, alone).min() >= 0.99999
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FIXTURES)
def test_padded_clip_is_embedded_as_alone_whatever_is_left_of_the_time_stride(parity, name):
    model = parity(name).model()
    hop, stride = model.spec.hop_length, model.spec.time_stride
    assert stride > 1
    lengths = [model.min_samples, *(9000 + hop * i + 7 * i for i in range(stride)), 20011]
    assert_padding_changes_nothing(model, lengths)


@pytest.mark.parametrize("block_2d_type", ["convnext_like", "basic_resnet", "basic_resnet_fwse"])
@pytest.mark.parametrize("feat_type", ["tf", "pt"])
@pytest.mark.parametrize(
    "change",
    [
        {"agg_gnorm": True, "dual_agg": True},
        {"pooling_func": "TSTP", "pad_right_samples": 777, "block_1d_type": "att"},
        {"before_pool_offset": 3, "return_2d_output": False, "block_1d_type": "conv"},
        {"use_freq_pos_enc": True, "global_context_att": False, "block_1d_type": "fc"},
        {"spec_params": {"do_preemph": False}, "group_divisor": None, "emb_bn": True},
    ],
)
def test_every_option_embeds_a_padded_clip_as_alone(
    tiny_config2, random_model, block_2d_type, feat_type, change
):
    options = {"block_2d_type": block_2d_type, "feat_type": feat_type}
    model = random_model({**tiny_config2, **options, **change})
    shortest = model.min_samples
    lengths = [shortest, shortest + 1, 2399, 2400, 2560, 2720, 2880, 4801, 9600]
    assert_padding_changes_nothing(model, lengths)


def test_group_norm_of_padded_maps_is_torch_s_of_each_clip():
    norm = GroupNorm(3, 12)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    maps, lengths = torch.randn(4, 12, 20), [20, 13, 4, 1]
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).float().unsqueeze(1)
    found = norm(maps.unsqueeze(3), mask).squeeze(3)
    for clip, one, n in zip(maps, found, lengths):
        expected = F.group_norm(clip[None, :, :n], 3, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(one[None, :, :n], expected, atol=1e-5, rtol=1e-5)


def test_mixture_repeats_coarse_frames():
    mix = PooledMapMix(3, 2)
    torch.nn.init.normal_(mix.w)
    maps = [torch.randn(1, 2, frames, 1) for frames in (12, 6, 3)]
    weights = mix.w.detach().softmax(dim=1)[0].unsqueeze(2)
    expected = sum(
        one.repeat_interleave(times, dim=2) * weight
        for one, times, weight in zip(maps, (1, 2, 4), weights)
    )
    torch.testing.assert_close(mix(maps), expected)


# Signals


@pytest.mark.parametrize(
    "change, samples",
    [
        ({}, 720),  # four frames: (n + 160 - 400) // 160 + 1
        ({"hop_length": 161}, 723),  # (n + 160 - 400) // 161 + 1
        ({"pad_right_samples": 500}, 220),
        ({"before_pool_offset": 3}, 1360),  # eight frames, of which five are pooled
        ({"feat_type": "pt"}, 480),  # 1 + n // 160
        ({"feat_type": "pt", "hop_length": 40}, 257),  # reflect padding of 256
        ({"stages_setup": [[[1, 1], 1, 1, None, 12]]}, 400),  # two frames
    ],
)
def test_shortest_signal_has_the_frames_of_a_time_stride(
    tiny_config2, random_model, change, samples
):
    model = random_model({**tiny_config2, **change})
    assert model.min_samples == samples
    assert model(torch.randn(samples)).isfinite().all()
    with pytest.raises(
        ValueError, match=f"at least {samples} samples .* got {samples - 1}; the signal is too"
    ):
        model(torch.randn(samples - 1))
    wavs, wav_lens = torch.randn(2, 3200), torch.tensor([1.0, (samples - 1) / 3200])
    with pytest.raises(
        ValueError, match=rf"wavs\[1\] has {samples - 1} samples .* at least {samples}"
    ):
        model(wavs, wav_lens)


@pytest.mark.parametrize("feat_type", ["tf", "pt"])
def test_silence_has_a_finite_embedding(tiny_config2, random_model, feat_type):
    model = random_model({**tiny_config2, "feat_type": feat_type})
    assert model(torch.zeros(2, 8000), torch.tensor([1.0, 0.5])).isfinite().all()


# Training


@pytest.mark.parametrize("change", [{}, {"agg_gnorm": True, "dual_agg": True}])
def test_every_trainable_weight_gets_a_gradient(tiny_config2, random_model, change):
    model = random_model({**tiny_config2, **change}).train()
    model(torch.randn(4, 8000), torch.tensor([1.0, 0.9, 0.5, 0.3])).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 1 and frozen[0].startswith("backbone.stage0") and frozen[0][-1] == "w"


def test_bfloat16_autocast_stays_near_float32(tiny_config2, random_model, voices):
    model = random_model({**tiny_config2, "agg_gnorm": True})
    wavs = torch.stack([voices(speaker, 1.5) for speaker in range(3)])
    wav_lens = torch.tensor([1.0, 0.7, 0.4])
    with torch.no_grad():
        expected = model(wavs, wav_lens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = model(wavs, wav_lens)
    assert embeddings.dtype == torch.float32 and embeddings.isfinite().all()
    assert F.cosine_similarity(embeddings, expected).min() > 0.99


# Weights of another network


def test_weights_of_any_other_preset_are_refused():
    models = [ReDimNet2.from_config(PRESETS[f"redimnet2_b{n}"]) for n in (0, 2, 3, 5)]
    for given, own in itertools.permutations(models, 2):
        with pytest.raises(ValueError, match="state_dict is of another ReDimNet"):
            own.load_state_dict(given.state_dict())
