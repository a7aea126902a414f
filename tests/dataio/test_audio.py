import os
import sys

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mrl.dataio.audio import AudioInfo, audio_info, read_audio


def sine(seconds, sample_rate, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * sample_rate)) / sample_rate)


def write_m4a(path, samples, sample_rate):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=sample_rate, layout="mono", bit_rate=128_000)
        frame = av.AudioFrame.from_ndarray(
            samples[None].astype(np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = sample_rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_16_khz_mono_is_read_as_written(tmp_path, suffix):
    written = sine(1.5, 16000)
    soundfile.write(tmp_path / f"a.{suffix}", written, 16000)
    wav = read_audio(tmp_path / f"a.{suffix}")
    assert wav.dtype == torch.float32 and wav.shape == (24000,)
    tolerance = 0.05 if suffix == "ogg" else 1 / 32768
    np.testing.assert_allclose(wav[1000:-1000], written[1000:-1000], atol=tolerance)
    assert audio_info(tmp_path / f"a.{suffix}") == AudioInfo(24000, 16000)


@pytest.mark.parametrize("native_rate", [8000, 11025, 44100, 48000])
def test_other_rates_come_out_at_16_khz(tmp_path, native_rate):
    soundfile.write(tmp_path / "a.wav", sine(2.5, native_rate), native_rate, subtype="FLOAT")
    wav = read_audio(tmp_path / "a.wav")
    expected = sine(2.5, 16000)
    # 2.5 s at 11,025 Hz end half a sample late
    assert len(wav) == audio_info(tmp_path / "a.wav").num_frames
    assert abs(len(wav) - 40000) <= 1
    np.testing.assert_allclose(wav[500:39500], expected[500:39500], atol=5e-3)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([sine(1, 16000), np.full(16000, 0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), stereo.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("native_rate", [8000, 11025, 16000, 44100])
@pytest.mark.parametrize("start", [0, 777, 16000, 35001, 55000])
def test_segment_equals_the_same_samples_of_the_whole(tmp_path, native_rate, start):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * native_rate)
    soundfile.write(tmp_path / "a.wav", noise, native_rate, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav")
    segment = read_audio(tmp_path / "a.wav", start, 8000)
    torch.testing.assert_close(segment, whole[start : start + 8000], atol=1e-6, rtol=0)
    torch.testing.assert_close(read_audio(tmp_path / "a.wav", start), whole[start:])


@pytest.mark.parametrize("native_rate", [16000, 44100])
def test_m4a_is_decoded_in_place_and_in_segments(tmp_path, native_rate):
    write_m4a(tmp_path / "a.m4a", sine(3, native_rate), native_rate)
    wav = read_audio(tmp_path / "a.m4a")
    np.testing.assert_allclose(wav[2000:46000], sine(3, 16000)[2000:46000], atol=0.02)
    info = audio_info(tmp_path / "a.m4a")
    assert info.sample_rate == native_rate
    assert abs(info.num_frames - 48000) <= 1024 and abs(len(wav) - 48000) <= 1024
    segment = read_audio(tmp_path / "a.m4a", 20123, 16000)
    torch.testing.assert_close(segment, wav[20123:36123], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
@pytest.mark.parametrize("read", [read_audio, audio_info])
def test_undecodable_file_is_named_with_the_reason(tmp_path, name, read):
    (tmp_path / name).write_bytes(b"not audio at all" * 100)
    with pytest.raises(ValueError, match=rf"cannot decode .*{name}: (Format|Invalid data)"):
        read(tmp_path / name)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted there")
def test_no_file_stays_open(tmp_path):
    soundfile.write(tmp_path / "good.wav", sine(0.1, 16000), 16000)
    (tmp_path / "bad.wav").write_bytes(b"not audio at all" * 100)
    pytest.importorskip("av")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_audio(tmp_path / "good.wav")
        with pytest.raises(ValueError):
            read_audio(tmp_path / "bad.wav")
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
        read_audio(tmp_path / name)


def test_without_pyav_one_sentence_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "README.md").write_text("# Not a recording")
    with pytest.raises(ImportError, match="no WAV, FLAC or Ogg .* needs av, .*: pip install av$"):
        read_audio(tmp_path / "README.md")


def test_segment_past_the_end_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(1, 16000), 16000)
    assert len(read_audio(tmp_path / "a.wav", 15000, 8000)) == 1000
    with pytest.raises(ValueError, match="no audio from sample 16000"):
        read_audio(tmp_path / "a.wav", 16000, 8000)


@pytest.mark.parametrize("start, num_frames", [(-1, 10), (0, 0), (0, -2)])
def test_impossible_segment_is_refused(start, num_frames):
    with pytest.raises(ValueError, match=f"start={start}, num_frames={num_frames}"):
        read_audio("a.wav", start, num_frames)
