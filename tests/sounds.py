"""Writes recordings in formats that soundfile does not know."""

import pytest


def encode(path, samples, codec, container, rate=16000):
    """Write samples with PyAV, whatever suffix the path has."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype("f4"), "fltp", "mono")
        frame.sample_rate, frame.pts = rate, 0
        to_stream = av.AudioResampler(stream.format, "mono", rate, stream.frame_size or 1024)
        for part in [*to_stream.resample(frame), *to_stream.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return path
