"""Features by Kaldi's own C++ code."""

import numpy as np
import pytest
import torch

SIXTEEN_BIT = 2**15


def native(wav, high_freq=-400.0):
    """As sherpa-onnx feeds it: kaldi-native-fbank, frame by frame, then the mean removed."""
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.snip_edges = 0, False
    options.mel_opts.num_bins, options.mel_opts.high_freq = 80, high_freq
    online = knf.OnlineFbank(options)
    online.accept_waveform(16000, (wav * SIXTEEN_BIT).tolist())
    online.input_finished()
    frames = [online.get_frame(i) for i in range(online.num_frames_ready)]
    feats = torch.from_numpy(np.stack(frames))
    return feats - feats.mean(dim=0)
