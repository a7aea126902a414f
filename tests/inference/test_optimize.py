import importlib.util
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from speechbrain_mrl.inference.optimize import (
    batch_seconds_for,
    for_inference,
    optimize_for_inference,
)
from speechbrain_mrl.models import redimnet
from speechbrain_mrl.models.pretrained import ReDimNetMRL
from speechbrain_mrl.models.redimnet import PRESETS, MapMix, ReDimNet

RECORDS = pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch does not trace there")
OF_TWO = ["redimnet2_syn_dual_gnorm", "redimnet2_syn_fwse_conv", "redimnet2_syn_pt_convnext"]
CONFIGS = [*PRESETS, "tiny", "dense", "syn_att_convnext", "syn_conv_fwse", *OF_TWO]


@pytest.fixture
def config(request, parity, tiny_config):
    name = request.param
    if "syn" in name:
        return parity(name)["model_config"]
    if name == "dense":
        return {**tiny_config, "group_divisor": None}
    if name not in PRESETS:
        return tiny_config
    config = {**PRESETS[name], "emb_bn": name == "b1"}
    return config if name == "b0" else _shallow(config)


def _shallow(config):
    """Two blocks of each kind in a stage: one after another layer, and one after its like."""
    stages = [[stride, min(n, 2), *rest] for stride, n, *rest in config["stages_setup"]]
    return {**config, "stages_setup": stages}


def _mixed(model):
    """Stage weights of ``model`` unequal, and scales of its norms of both signs and zero."""
    for module in model.modules():
        if isinstance(module, MapMix) and module.w.requires_grad:
            module.w.data.normal_()
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data[::3] *= -1
            module.weight.data[0] = 0.0
    return model


@pytest.mark.parametrize("config", CONFIGS, indirect=True)
def test_the_copy_agrees_with_the_model_alone_and_padded(config, random_model, voices):
    model = _mixed(random_model(config))
    fast = optimize_for_inference(model)
    wavs, wav_lens = torch.stack([voices(0, 0.9), voices(1, 0.9)]), torch.tensor([1.0, 0.55])
    with torch.no_grad():
        expected = model(wavs), model(wavs, wav_lens)
    scale = expected[0].abs().max().clamp_min(1)
    for one, found in zip(expected, (fast(wavs), fast(wavs, wav_lens))):
        assert (found - one).abs().max() < 1e-4 * scale
        assert torch.cosine_similarity(found, one).min() > 1 - 1e-6


@RECORDS
@pytest.mark.parametrize("config", ["b0", "b2", "b5", "syn_att_convnext"], indirect=True)
def test_clips_without_padding_run_without_python_at_any_length(
    config, random_model, voices, monkeypatch
):
    model = random_model(config)
    fast = optimize_for_inference(model)
    batches = voices(0, 0.1), voices(0, 1.7), torch.stack([voices(i, 0.4) for i in range(3)])
    with torch.no_grad():
        expected = [model(wavs) for wavs in batches]
    monkeypatch.setattr(redimnet.Sequence, "forward", None)  # what Python would call
    for wavs, one in zip(batches, expected):
        torch.testing.assert_close(fast(wavs), one, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError):
        fast(wavs, torch.tensor([1.0, 0.6, 0.8]))  # padded clips do call it


@RECORDS
def test_where_torch_cannot_record_the_layers_are_called(
    tiny_config, random_model, voices, monkeypatch
):
    model, wav = random_model(tiny_config), voices(0, 0.5)
    recorded = optimize_for_inference(model)
    monkeypatch.setattr(
        "speechbrain_mrl.inference.optimize.sys", SimpleNamespace(version_info=(3, 14))
    )
    called = optimize_for_inference(model)
    assert called.backbone.recorded is None and recorded.backbone.recorded is not None
    torch.testing.assert_close(called(wav), recorded(wav))


def test_the_copy_is_called_as_its_model_and_leaves_it_alone(tiny_config, voices):
    model = ReDimNetMRL(embed_dim=128, mrl_dims=(64, 128), backbone=tiny_config).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast, wav = optimize_for_inference(model), voices(0, 0.5)
    sizes = fast(wav, return_all_dims=True)
    assert {d: tuple(z.shape) for d, z in sizes.items()} == {64: (1, 64), 128: (1, 128)}
    assert fast(wav, target_dim=64).equal(sizes[64]) and isinstance(fast, ReDimNetMRL)
    assert not sizes[64].is_inference()
    with pytest.raises(ValueError, match="target_dim must be one of"):
        fast(wav, target_dim=65)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert next(model.parameters()).requires_grad


def test_the_copy_is_neither_trained_nor_saved(tiny_config, random_model):
    fast = optimize_for_inference(random_model(tiny_config))
    with pytest.raises(RuntimeError, match="train its model"):
        fast.train()
    with pytest.raises(RuntimeError, match="save the model instead"):
        fast.state_dict()
    assert fast.eval() is fast


@pytest.mark.parametrize("config", ["b0", "b1", "b5", "syn_conv_fwse"], indirect=True)
def test_bfloat16_points_where_float32_does_alone_and_padded(config, random_model, voices):
    model = _mixed(random_model(config))
    rough = optimize_for_inference(model, "bfloat16")
    wavs, wav_lens = torch.stack([voices(0, 0.9), voices(1, 0.9)]), torch.tensor([1.0, 0.55])
    with torch.no_grad():
        expected = model(wavs), model(wavs, wav_lens)
    for one, found in zip(expected, (rough(wavs), rough(wavs, wav_lens))):
        assert found.dtype == torch.float32 and not found.equal(one)
        assert torch.cosine_similarity(found, one).min() > 0.999


@pytest.mark.parametrize("has", [False, True])
def test_bfloat16_without_its_instructions_is_warned_of(
    has, tiny_config, random_model, monkeypatch
):
    instructions = {"avx512_f": True, "avx512_bf16": has, "cpu_name": "x"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    model = random_model(tiny_config)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimize_for_inference(model, "float32")
        optimize_for_inference(model, "bfloat16")
    said = [str(one.message) for one in found if "no bfloat16 instructions" in str(one.message)]
    assert len(said) == (0 if has else 1) and all(text.count(". ") == 0 for text in said)


def test_another_precision_is_refused(tiny_config, random_model):
    with pytest.raises(ValueError, match="precision must be one of .*, got 'int4'"):
        optimize_for_inference(random_model(tiny_config), "int4")


def test_what_is_no_redimnet_is_refused():
    with pytest.raises(TypeError, match="mods.embedding_model"):
        optimize_for_inference(torch.nn.Linear(1, 1))


def test_a_copy_is_not_copied_again(tiny_config, random_model):
    fast = optimize_for_inference(random_model(tiny_config))
    with pytest.raises(TypeError, match="pass the model it was made of"):
        optimize_for_inference(fast)
    assert for_inference(fast) is fast


def test_the_model_of_a_published_folder_s_own_code_is_taken(tiny_config, random_model, voices):
    spec = importlib.util.spec_from_file_location("custom", redimnet.__file__)
    custom = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(custom)
    published = custom.EmbeddingModel(tiny_config, mrl_dims=(8, 32), target_dim=8)
    published.load_state_dict(random_model(tiny_config).state_dict())
    wav = voices(0, 0.7)
    with torch.no_grad():
        expected = published.eval()(wav)
    found = optimize_for_inference(published)(wav)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_subnormal_weights_are_flushed(tiny_config, random_model):
    model = random_model(tiny_config)
    model.linear.weight.data[0] = 1e-40
    fast = optimize_for_inference(model)
    assert (fast.linear.weight[0] == 0).all()


def test_the_largest_map_of_a_batch_stays_within_16_megabytes(tiny_config):
    # 24 · 4 numbers per frame, expanded by 2, 4 bytes each, 240 samples per frame
    expected = 16 * 2**20 / (24 * 4 * 2 * 4) * 240 / 16000
    model = ReDimNet.from_config(tiny_config)
    assert batch_seconds_for(model) == pytest.approx(expected)
    assert batch_seconds_for(optimize_for_inference(model)) == pytest.approx(expected)
    assert batch_seconds_for(optimize_for_inference(model, "bfloat16")) == pytest.approx(
        2 * expected
    )
