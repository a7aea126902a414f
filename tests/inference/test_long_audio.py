import pytest
import torch

from speechbrain_mrl.inference.extract import embed_long
from speechbrain_mrl.inference.optimize import optimize_for_inference


@pytest.fixture(scope="session")
def long_voice(voices):
    return torch.cat([voices(i, 2.0) * (0.2 + i % 3) for i in range(8)])  # 16 s


@pytest.mark.parametrize("global_context_att", [True, False])
def test_without_attention_windows_give_the_whole_recording_s_embedding(
    tiny_config, random_model, long_voice, global_context_att
):
    config = {**tiny_config, "block_1d_type": "conv", "block_2d_type": "basic_resnet"}
    config["global_context_att"] = global_context_att
    model = random_model(config)
    with torch.no_grad():
        whole = model(long_voice)
    for one in (model, optimize_for_inference(model)):
        found = embed_long(one, long_voice, window_seconds=1.7, margin_seconds=4.0)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_windows_of_redimnet2_begin_at_whole_strides(tiny_config2, random_model, long_voice):
    model = random_model({**tiny_config2, "block_1d_type": "conv"})
    with torch.no_grad():
        whole = model(long_voice)
    found = embed_long(model, long_voice, window_seconds=1.777, margin_seconds=4.0)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    offset = random_model({**tiny_config2, "before_pool_offset": 3})
    with pytest.raises(ValueError, match="leaves out 3 frames"):
        embed_long(offset, long_voice)


@pytest.mark.parametrize("pooling", ["ASTP", "TSTP"])
def test_with_attention_windows_come_close(tiny_config, random_model, long_voice, pooling):
    model = random_model({**tiny_config, "pooling_func": pooling})
    with torch.no_grad():
        whole = model(long_voice)
    exact = embed_long(model, long_voice)  # one window
    torch.testing.assert_close(exact, whole, rtol=1e-4, atol=1e-4)
    found = embed_long(model, long_voice, window_seconds=4.0, margin_seconds=2.0)
    assert torch.cosine_similarity(found, whole).item() > 0.999
    assert (found - whole).abs().max() > 1e-6


def test_what_is_no_single_recording_is_refused(tiny_config, random_model):
    model = random_model(tiny_config)
    with pytest.raises(ValueError, match="one recording, got 2"):
        embed_long(model, torch.zeros(2, 16000))
    with pytest.raises(ValueError, match="window_seconds must be positive"):
        embed_long(model, torch.zeros(16000), window_seconds=0)
