"""Recordings as they come from browsers, phones and pipes: read whole, or refused in a sentence."""

import io
import shutil
import struct

import numpy as np
import pytest
import soundfile
import torch
from sounds import encode

from speechbrain_mrl.dataio.audio import AudioInfo, audio_info, check_audio, read_audio

av = pytest.importorskip("av")


def voice(seconds, rate=16000):
    times = np.arange(round(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * 220 * times) + 0.1 * np.sin(2 * np.pi * 1310 * times)


def without_xing(path):
    """Drop the first frame of an MP3, which says how many there are."""
    data = path.read_bytes()
    first = data.index(b"\xff\xf3")
    path.write_bytes(data[data.index(b"\xff\xf3", first + 4) :])
    return path


def alike(found, expected):
    found, expected = found.double(), torch.from_numpy(expected)
    length = min(len(found), len(expected))
    return torch.cosine_similarity(found[:length], expected[:length], dim=0) > 0.99


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_joined_recordings_are_read_to_the_end_of_the_last(tmp_path, suffix):
    path = tmp_path / f"ab.{suffix}"
    for name, seconds in (("a", 4), ("b", 6)):
        soundfile.write(tmp_path / f"{name}.{suffix}", voice(seconds), 16000)
    path.write_bytes(b"".join((tmp_path / f"{n}.{suffix}").read_bytes() for n in "ab"))
    assert abs(audio_info(path).num_frames - 160000) < 3200
    assert check_audio(path).num_frames == audio_info(path).num_frames == len(read_audio(path))
    assert alike(read_audio(path, 8000, 48000), voice(4)[8000:56000])


def test_length_of_a_variable_bit_rate_is_not_the_estimate(tmp_path):
    samples = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 32000), 0.001 * voice(12)])
    with av.open(str(tmp_path / "a.mp3"), "w") as file:
        stream = file.add_stream("libmp3lame", rate=16000, layout="mono")
        stream.codec_context.flags |= 2  # AV_CODEC_FLAG_QSCALE
        stream.codec_context.global_quality = 4 * 118
        frame = av.AudioFrame.from_ndarray(samples[None].astype("f4"), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    path = without_xing(tmp_path / "a.mp3")
    assert abs(check_audio(path).num_frames - 14 * 16000) < 3200


@pytest.mark.parametrize(
    "codec, container, name",
    [
        ("aac", "mp4", "call.mp3"),
        ("libopus", "webm", "browser.wav"),
        ("libmp3lame", "mp3", "speech.flac"),
        ("flac", "flac", "speech.m4a"),
        ("pcm_s16le", "wav", "headerless.raw"),
        ("pcm_s16le", "wav", "dialogue.vox"),
    ],
)
def test_content_decides_what_a_file_is(tmp_path, codec, container, name):
    rate = 48000 if codec == "libopus" else 16000
    path = encode(tmp_path / name, voice(3, rate), codec, container, rate)
    assert abs(audio_info(path).num_frames - 48000) <= 2048
    assert abs(check_audio(path).num_frames - 48000) <= 2048
    wav = read_audio(path, 8000, 16000)
    shift = int(np.correlate(wav.numpy(), voice(1.9)[:14400], "valid").argmax())
    assert len(wav) == 16000 and shift < 16000  # the codec's delay aside, it is that voice
    spectrum = np.abs(np.fft.rfft(wav.numpy()))
    assert sorted(spectrum.argsort()[-2:].tolist()) == [220, 1310]


def test_browser_recording_without_duration_is_read(tmp_path):
    recording = io.BytesIO()
    recording.seekable = lambda: False  # as a browser writes, which cannot go back to its header
    with av.open(recording, "w", format="webm") as file:
        stream = file.add_stream("libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(voice(2, 48000)[None].astype("f4"), "fltp", "mono")
        frame.sample_rate, frame.pts = 48000, 0
        to_stream = av.AudioResampler(stream.format, "mono", 48000, stream.frame_size)
        for part in [*to_stream.resample(frame), *to_stream.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    path = tmp_path / "browser.webm"
    path.write_bytes(recording.getvalue())
    with av.open(str(path)) as file:
        assert not file.duration
    assert abs(check_audio(path).num_frames - 32000) <= 1024


@pytest.mark.parametrize("rate", [11127, 15999, 44101, 96001])
def test_rate_without_common_period_is_resampled_in_bounded_memory(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", voice(4, rate), rate, "FLOAT")
    wav = read_audio(tmp_path / "a.wav")
    assert abs(len(wav) - 64000) <= 1 and len(wav) == audio_info(tmp_path / "a.wav").num_frames
    np.testing.assert_allclose(wav[500:63000], voice(4)[500:63000], atol=5e-3)
    segment = read_audio(tmp_path / "a.wav", 20001, 16000)
    torch.testing.assert_close(segment, wav[20001:36001], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [1, 800, 2_000_000])
@pytest.mark.parametrize("read", [read_audio, audio_info, check_audio])
def test_impossible_rate_is_refused(tmp_path, rate, read):
    soundfile.write(tmp_path / "a.wav", np.ones(20000, "f4"), rate)
    with pytest.raises(ValueError, match=f"a.wav: its sample rate is {rate} Hz, it must be 4000 "):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize("read", [read_audio, audio_info, check_audio])
def test_recording_without_a_sample_is_named(tmp_path, read):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match="a.wav(: it)? holds no"):
        read(tmp_path / "a.wav")


def test_gsm_is_read_in_segments(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(3, 8000), 8000, "GSM610")
    assert abs(check_audio(tmp_path / "a.wav").num_frames - 48000) <= 640
    assert alike(read_audio(tmp_path / "a.wav", 16000, 16000), voice(2)[16000:])


@pytest.mark.parametrize("container", ["wav", "aiff", "au"])
def test_half_a_recording_is_found(tmp_path, container):
    whole, half = tmp_path / f"a.{container}", tmp_path / f"half.{container}"
    soundfile.write(whole, voice(4), 16000)
    half.write_bytes(whole.read_bytes()[:64000])
    assert check_audio(whole).num_frames == 64000
    with pytest.raises(ValueError, match=r"half.* ends after 2.0 of the 4.0 s that its header"):
        check_audio(half)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_wav_out_of_a_pipe_is_whole(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", voice(2), 16000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    assert check_audio(tmp_path / "a.wav") == AudioInfo(32000, 16000)
    assert alike(read_audio(tmp_path / "a.wav"), voice(2))


def test_flac_out_of_a_pipe_is_whole(tmp_path):
    soundfile.write(tmp_path / "a.flac", voice(2), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])  # of 36 bits that count the samples
    (tmp_path / "a.flac").write_bytes(data)
    assert check_audio(tmp_path / "a.flac") == AudioInfo(32000, 16000)


@pytest.mark.parametrize("residue", [0.0, 1 / 2000])
def test_channels_in_opposite_phase_do_not_cancel(tmp_path, residue):
    left = voice(2)
    stereo = np.stack([left, -left + residue * np.random.default_rng(0).normal(size=32000)], 1)
    soundfile.write(tmp_path / "a.wav", stereo, 16000, "FLOAT")
    assert alike(read_audio(tmp_path / "a.wav"), left)
    assert alike(read_audio(tmp_path / "a.wav", 16000, 8000), left[16000:24000])


def test_samples_beyond_any_scale_are_refused(tmp_path):
    samples = voice(1)
    samples[700] = 1e30
    soundfile.write(tmp_path / "a.wav", samples, 16000, "FLOAT")
    for read in (read_audio, check_audio):
        with pytest.raises(ValueError, match="a.wav.* beyond any format's full scale"):
            read(tmp_path / "a.wav")


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:10,\n{}\n", "ffconcat version 1.0\nfile {}\n"])
def test_playlist_opens_no_other_file(tmp_path, text):
    secret = encode(tmp_path / "secret.mp3", voice(2), "libmp3lame", "mp3")
    shutil.copy(secret, tmp_path / "secret.ts")
    (tmp_path / "a.wav").write_text(text.format("secret.mp3"))
    with pytest.raises(ValueError, match="cannot decode .*a.wav"):
        read_audio(tmp_path / "a.wav")


def test_url_is_no_file():
    with pytest.raises(FileNotFoundError, match="there is no file http://127.0.0.1:9/a.wav"):
        read_audio("http://127.0.0.1:9/a.wav")


def test_claimed_length_takes_no_memory(tmp_path):
    soundfile.write(tmp_path / "a.flac", voice(1), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] |= 0x0F  # some 64 billion samples
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(ValueError, match="cannot decode|ends after"):
        check_audio(tmp_path / "a.flac")
