import copy

import pytest
import torch

from speechbrain_mrl.fast import batch_seconds_for, optimize_for_inference
from speechbrain_mrl.pretrained import ReDimNetMRL
from speechbrain_mrl.redimnet import PRESETS, EmbeddingModel, MapMix, ReDimNet

CONFIGS = [*PRESETS, "tiny", "syn_att_convnext", "syn_conv_fwse"]


@pytest.fixture
def config(request, parity, tiny_config):
    name = request.param
    if name.startswith("syn"):
        return parity(name)["model_config"]
    return {**PRESETS[name], "emb_bn": name == "b1"} if name in PRESETS else tiny_config


def _mixed(model):
    """Stage weights of ``model`` unequal, as after training."""
    for module in model.modules():
        if isinstance(module, MapMix) and module.w.requires_grad:
            module.w.data.normal_()
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
