"""Gradient checkpointing against the same step without it, bit for bit."""

import copy

import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

from speechbrain_mrl.training.gradient_checkpointing import checkpoint_gradients


def step(model, wavs, wav_lens):
    """Loss, gradients and buffers after a step, and the bytes of activations kept for backward."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held: no address is used twice
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(wavs, wav_lens).square().mean()
    n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **gradients, **dict(model.named_buffers())}, n_bytes


@pytest.mark.parametrize("config", ["tiny_config", "tiny_config2"])
@pytest.mark.parametrize("wav_lens", [None, torch.tensor([1.0, 0.6])])
def test_a_step_is_the_same_and_keeps_less(config, wav_lens, random_model, request):
    plain = random_model({**request.getfixturevalue(config), "feat_agg_dropout": 0.1}).train()
    ours = copy.deepcopy(plain)
    checkpoint_gradients(ours)
    torch.manual_seed(1)
    wavs = 0.1 * torch.randn(2, 8000)
    expected, all_bytes = step(plain, wavs, wav_lens)
    found, fewer_bytes = step(ours, wavs, wav_lens)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert fewer_bytes < 0.6 * all_bytes


def test_without_gradients_and_in_copies_it_is_the_network(tiny_config, random_model):
    plain = random_model(tiny_config).eval()
    ours = copy.deepcopy(plain)
    checkpoint_gradients(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(ours).double()
    assert copied.backbone.stage0.forward.args[0] is copied.backbone.stage0
    wavs = 0.1 * torch.randn(1, 8000)
    torch.testing.assert_close(ours(wavs), plain(wavs), rtol=0, atol=0)
    assert copied(wavs.double()).dtype == torch.float64


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing is for ReDimNets, got ECAPA_TDNN"):
        checkpoint_gradients(ECAPA_TDNN(8, lin_neurons=8, channels=[8] * 5))
