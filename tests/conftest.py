import json
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

import fill
import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mrl.dataio.clips import Clip
from speechbrain_mrl.inference.onnx import export_onnx
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet, ReDimNet
from speechbrain_mrl.models.redimnet2 import ReDimNet2

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of programs that tests run: one test a core runs as it is
# New processes of tests start from one that has imported what takes longest.
PRELOADED = ["speechbrain_mrl.training.distill", "speechbrain_mrl.publish.export", "torch._dynamo"]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
sys.modules.setdefault("openvino_telemetry", None)  # OpenVINO would report its use over the network

PARITY = Path(__file__).parent / "parity"


def _network(model_config):
    family = ReDimNet2 if "causal" in model_config else ReDimNet
    return family.from_config(model_config)


class Fixture(dict):
    """A parity fixture: its JSON, and the weights that it says how to draw."""

    def weights(self):
        """The release's keys -> tensors; what the fixture leaves as constructed included."""
        state = _network(self["model_config"]).state_dict()
        return state | fill.fill_state_dict(self["manifest"])

    def model(self):
        model = _network(self["model_config"])
        model.load_state_dict(self.weights())
        return model.eval()


@pytest.fixture(scope="session")
def parity():
    """``parity("b0")``: that fixture."""
    return lambda name: Fixture(json.loads((PARITY / f"{name}.json").read_text()))


@pytest.fixture(scope="session")
def tiny_config():
    """The smallest model that has every kind of layer of b0 … b6; runs in milliseconds."""
    return {
        "F": 24,
        "C": 4,
        "block_1d_type": "conv+att",
        "block_2d_type": "basic_resnet_fwse",
        "stages_setup": [[1, 1, 2, [[3, 3]], 12], [2, 1, 1, [[3, 3]], None]],
        "group_divisor": 2,
        "embed_dim": 32,
        "hop_length": 240,
        "global_context_att": True,
    }


@pytest.fixture(scope="session")
def tiny_config2():
    """The same of ReDimNet2, redimnet2_b0 … redimnet2_b6."""
    return {
        "F": 24,
        "C": 4,
        "causal": "none",
        "block_1d_type": "conv+att",
        "block_2d_type": "basic_resnet",
        "stages_setup": [
            [[1, 1], 1, 2, [[3, 3]], 12],
            [[2, 2], 1, 1, [[3, 3]], None],
            [[1, 2], 1, 0.5, [[3, 3]], 12],
        ],
        "return_2d_output": True,
        "out_channels": 6,
        "embed_dim": 32,
        "feat_type": "tf",
        "spec_params": {"norm_signal": True},
    }


def _random_model(model_config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _network(model_config)
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def random_model():
    """``random_model(config)``: in eval mode, its BatchNorm statistics not the identity."""
    return _random_model


@pytest.fixture(scope="session")
def exported(tiny_config, tmp_path_factory):
    """A tiny Matryoshka model and its ONNX file; one export takes longer than all that use it."""
    pytest.importorskip("onnxscript")
    redimnet = _random_model(tiny_config)
    model = MatryoshkaReDimNet.from_redimnet(redimnet, embed_dim=32, mrl_dims=(8, 32)).eval()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, path)
    return model, path


def _write_release(folder, model_config, state_dict=None, name="b2-vox2-ft_lm", seed=0):
    if state_dict is None:
        state_dict = _random_model(model_config, seed).state_dict()
    path = folder / f"{name}.pt"
    torch.save({"model_config": model_config, "state_dict": state_dict}, path)
    return path


@pytest.fixture
def release_file(tmp_path):
    """``release_file(config)`` writes a checkpoint as released, and returns its path."""
    return partial(_write_release, tmp_path)


@pytest.fixture(scope="session")
def two_teachers(tiny_config, tmp_path_factory):
    """Checkpoints of a tiny ReDimNet of 32 dimensions and of one of 24: first.pt and second.pt."""
    folder, smaller = tmp_path_factory.mktemp("teachers"), {**tiny_config, "embed_dim": 24}
    return [
        _write_release(folder, tiny_config, name="first", seed=1),
        _write_release(folder, smaller, name="second", seed=2),
    ]


@pytest.fixture
def short_runs(monkeypatch):
    """Trainings of the recipes without what takes long beside them."""
    from short_runs import shorten

    shorten(monkeypatch.setattr)


def _synthetic_voice(speaker, seconds, clip=0):
    """A buzzing source through three resonances, all drawn from the speaker; (T,), float32.

    The pitch glides and the resonances move a little with ``clip``, as they would with the words.
    """
    rng = np.random.default_rng([speaker])
    pitch, formants = rng.uniform(90, 250), rng.uniform([300, 900, 2200], [800, 2000, 3200])
    rng = np.random.default_rng([speaker, clip])
    formants = formants * rng.uniform(0.92, 1.08, 3)
    n = round(seconds * 16000)
    times = np.arange(n) / 16000
    glide = 1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 3) * times + rng.uniform(0, 6))
    phase = np.cumsum(pitch * glide) / 16000
    pulses = np.diff(np.floor(phase), prepend=0.0) + 0.01 * rng.standard_normal(n)
    hertz = np.fft.rfftfreq(n, 1 / 16000)
    gain = sum(1 / (1 + ((hertz - formant) / 80) ** 2) for formant in formants)
    wav = np.fft.irfft(np.fft.rfft(pulses) * gain, n)
    return torch.from_numpy(0.5 * wav / np.abs(wav).max()).float()


@pytest.fixture(scope="session")
def voices():
    """``voices(speaker, seconds, clip=0)``: a short synthetic voice, (T,)."""
    return _synthetic_voice


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """A folder in VoxCeleb's layout: 20 synthetic voices, 3 sessions each of 2 clips of 1.2 s."""
    folder = tmp_path_factory.mktemp("corpus")
    for speaker in range(20):
        for clip in range(6):
            path = folder / "wav" / f"id{speaker:02d}" / f"s{clip // 2}" / f"{clip % 2}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, _synthetic_voice(speaker, 1.2, clip).numpy(), 16000)
    return folder


@pytest.fixture(scope="session")
def small_clips(small_corpus):
    """The clips of ``small_corpus``, of unequal lengths."""
    paths = sorted(small_corpus.glob("wav/*/*/*.wav"))
    root = small_corpus / "wav"
    return [
        Clip(str(path.relative_to(root)), str(path), 0, 8000 + 640 * (i % 17))
        for i, path in enumerate(paths)
    ]
