"""Recordings of a constant 0.5 + v, whose first two dimensions are at the angle pi v."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from test_utils import full_disk

from speechbrain_mrl import VoiceRegistry
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import export_model

# Normal quantiles of tables: of 1 - 0.05, 1 - 0.05 / 20, 1 - 0.01 and 1 - 0.001.
Z05, Z0025, Z01, Z001 = 1.6449, 2.8070, 2.3263, 3.0902


class Angle(torch.nn.Module):
    """(cos a, sin a, 3, 0) times two, a = pi (mean - 0.5) of the recording."""

    mrl_dims = (2, 4)

    def __init__(self, thresholds=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(math.pi))
        self.thresholds = thresholds or {"2": {"eer": 0.3, "far_0.01": 0.5}}

    def forward(self, wavs, wav_lens):
        a = self.weight * (wavs.sum(1) / (wav_lens * wavs.shape[1]) - 0.5)
        return 2 * torch.stack([a.cos(), a.sin(), 3 + 0 * a, 0 * a], dim=1)


@pytest.fixture
def record(tmp_path):
    """``record(0.1, seconds=2)``: the path of a recording."""

    def write(value, seconds=2.0):
        path = tmp_path / f"{value}_{seconds}.wav"
        soundfile.write(path, np.full(round(16000 * seconds), 0.5 + value), 16000, "FLOAT")
        return path

    return write


def registry(thresholds=None, **options):
    return VoiceRegistry(Angle(thresholds), target_dim=2, **options)


def named(found):
    return found.name, found.reason


def test_a_speaker_is_the_mean_of_unit_embeddings_and_the_best_is_named(record):
    voices = registry()
    voices.enroll("ann", [record(0.1), record(0.2), record(0.3, seconds=3)])
    voices.enroll("bob", record(0.5))
    found = voices.identify(record(0.25))
    score, other = math.cos(0.05 * math.pi), math.cos(0.25 * math.pi)
    assert named(found) == ("ann", None) and found.seconds == 2
    assert (found.score, found.margin) == pytest.approx((score, score - other), abs=1e-5)
    assert voices.speakers == {"ann": (3, 7.0), "bob": (1, 2.0)} and len(voices) == 2


def test_recordings_that_are_added_later_count_as_those_before(record):
    at_once, later = registry(), registry()
    at_once.enroll("ann", [record(0.0), record(0.1), record(0.2)])
    later.enroll("ann", [record(0.0), record(0.1)])
    later.enroll("ann", record(0.2))
    assert at_once.speakers == later.speakers == {"ann": (3, 6.0)}
    scores = [voices.verify("ann", record(0.4)).score for voices in (at_once, later)]
    assert scores == pytest.approx([math.cos(0.3 * math.pi)] * 2, abs=1e-5)


@pytest.mark.parametrize(
    "thresholds, n, expected",
    [
        ({"eer": 0.3, "far_0.01": 0.5}, 1, 0.5 * Z05 / Z01),
        ({"eer": 0.3, "far_0.01": 0.5}, 20, 0.5 * Z0025 / Z01),
        ({"eer": 0.3, "far_0.01": 0.5, "far_0.001": 0.6}, 20, 0.6 * Z0025 / Z001),
        ({"eer": 0.45, "far_0.01": 0.5}, 1, 0.45),
        ({"eer": 0.3}, 1, 0.3),
        ({"eer": 0.3}, 20, 0.3 * Z0025 / Z05),
        ({"eer": 0.7, "far_0.01": 0.9}, 20, 1.0),
    ],
    ids=[
        "one",
        "twenty",
        "nearest rate",
        "not below the EER's",
        "no rate",
        "no rate, 20",
        "cosine",
    ],
)
def test_the_threshold_is_the_models_for_one_false_alarm_in_twenty_recordings(
    thresholds, n, expected, record
):
    voices = registry({"2": thresholds})
    for i in range(n):
        voices.enroll(f"speaker {i}", record(round(0.02 * i, 2)))
    found = voices.identify(record(-0.4))
    assert found.threshold == pytest.approx(expected, abs=1e-3)


def test_a_mean_of_several_recordings_is_decided_more_strictly(record):
    voices = registry()
    voices.enroll("ann", [record(0.1), record(0.3)])
    length = math.cos(0.1 * math.pi)  # of the mean of two unit vectors 0.2 pi apart
    expected = 0.5 * Z05 / Z01 / length**0.5
    assert voices.identify(record(0.2)).threshold == pytest.approx(expected, abs=1e-3)
    assert voices.verify("ann", record(0.2)).threshold == pytest.approx(expected, abs=1e-3)


def test_nobody_is_named_below_the_threshold_or_between_two_speakers(record):
    voices = registry(threshold=0.8)
    assert voices.identify(record(0.1)).reason == "nobody is enrolled"
    voices.enroll("ann", record(0.0))
    found = voices.identify(record(0.2))
    assert found.name == "ann" and found.margin is None and found.threshold == 0.8
    found = voices.identify(record(0.3))
    assert named(found) == (None, "the score with ann, 0.588, is below 0.800")
    voices.enroll("bob", record(0.3))
    found = voices.identify(record(0.155))
    assert found.name is None and found.score == pytest.approx(math.cos(0.145 * math.pi), abs=1e-5)
    assert found.reason == "bob and ann are too near, 0.014 apart"
    assert voices.identify(record(0.2)).name == "bob"


@pytest.mark.parametrize(
    "value, seconds, heard, reason",
    [
        (-0.5, 2.0, 0.0, "it holds only silence"),
        (1e-5 - 0.5, 2.0, 0.0, "it holds only silence"),
        (0.1, 0.5, 0.5, "too short, it holds 0.5 s of sound and 1 s is needed"),
        (0.1, 0.001, 0.025, "too short, it holds 0.0 s of sound and 1 s is needed"),
    ],
)
def test_silence_and_a_short_recording_name_nobody_and_enroll_nobody(
    value, seconds, heard, reason, record
):
    voices = registry()
    voices.enroll("ann", record(0.1))
    found, claim = (
        voices.identify(record(value, seconds)),
        voices.verify("ann", record(value, seconds)),
    )
    assert found == (None, None, None, None, heard, reason)
    assert not claim.accepted and (claim.score, claim.reason) == (None, reason)
    with pytest.raises(ValueError, match=f"{value}_{seconds}.wav cannot be enrolled: {reason}"):
        voices.enroll("ann", [record(0.2), record(value, seconds)])
    assert voices.speakers == {"ann": (1, 2.0)}
    assert voices.verify("ann", record(0.1)).score == pytest.approx(1.0)  # nothing was added


def test_seconds_are_those_of_sound(tmp_path):
    speech, path = np.random.default_rng(0).normal(0, 0.1, 24000), tmp_path / "pauses.wav"
    quiet = np.random.default_rng(1).normal(0, 0.0002, 80000)
    soundfile.write(path, np.concatenate([quiet, speech, 0 * quiet]), 16000)
    voices = registry(threshold=0)
    voices.enroll("ann", path)
    assert voices.speakers["ann"] == (1, 1.5)


def test_verify_decides_on_one_speaker_whoever_else_is_there(record):
    voices = registry(threshold=0.5)
    voices.enroll("ann", record(0.0))
    voices.enroll("bob", record(0.25))
    found = voices.verify("ann", record(0.2))
    assert found.accepted and found.reason is None
    assert found.score == pytest.approx(math.cos(0.2 * math.pi), abs=1e-5)
    refused = voices.verify("ann", record(0.48))
    assert not refused.accepted and refused.reason == "the score, 0.063, is below 0.500"
    for call in (lambda: voices.verify("cleo", record(0.1)), lambda: voices.remove("cleo")):
        with pytest.raises(ValueError, match="name must be of an enrolled speaker, 'cleo' is not"):
            call()


def test_what_is_saved_decides_as_before(record, tmp_path):
    voices = registry()
    voices.enroll("ann", [record(0.1), record(0.2)])
    voices.enroll("Zoë\n", record(0.6))
    voices.enroll("bob", record(-0.4))
    voices.remove("bob")
    voices.save(tmp_path / "new" / "registry")
    again = VoiceRegistry.load(tmp_path / "new" / "registry", source=Angle())
    assert again.speakers == voices.speakers == {"ann": (2, 4.0), "Zoë\n": (1, 2.0)}
    for value in (0.1, 0.3, 0.55, -0.4):
        assert again.identify(record(value)) == voices.identify(record(value))
    again.enroll("ann", record(0.2))
    again.save(tmp_path / "new" / "registry")
    assert [path.name for path in (tmp_path / "new" / "registry").iterdir()] == [
        "registry.safetensors"
    ]
    assert VoiceRegistry.load(tmp_path / "new" / "registry", Angle()).speakers["ann"] == (3, 6.0)


@pytest.mark.parametrize("fault", ["embedding", "name", "half", "empty", "other file"])
def test_a_damaged_file_is_refused_by_name(fault, record, tmp_path):
    voices = registry()
    voices.enroll("ann", record(0.1))
    voices.save(tmp_path)
    path = tmp_path / "registry.safetensors"
    data = bytearray(path.read_bytes())
    if fault == "embedding":
        data[-1] ^= 1
    elif fault == "name":
        data = data.replace(b"ann", b"bob")
    else:
        data = {"half": data[: len(data) // 2], "empty": b"", "other file": b"{}" * 20}[fault]
    path.write_bytes(data)
    with pytest.raises(ValueError, match="registry.safetensors is damaged"):
        VoiceRegistry.load(tmp_path, source=Angle())


def test_a_registry_of_another_model_or_none_is_refused(record, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no registry.safetensors"):
        VoiceRegistry.load(tmp_path, source=Angle())
    voices = registry()
    voices.enroll("ann", record(0.1))
    voices.save(tmp_path)
    with pytest.raises(ValueError, match="was saved with a module; give it as source"):
        VoiceRegistry.load(tmp_path)
    other = Angle()
    other.weight.data += 0.001
    with pytest.raises(ValueError, match="was enrolled with another model than"):
        VoiceRegistry.load(tmp_path, source=other)


def test_a_full_disk_leaves_the_old_registry(record, tmp_path):
    voices, folder = registry(), tmp_path / "registry"
    voices.enroll("ann", record(0.1))
    voices.save(folder)
    before = (folder / "registry.safetensors").read_bytes()
    voices.enroll("bob", record(0.2))
    with full_disk(tmp_path, size=100), pytest.raises(OSError, match="cannot write"):
        voices.save(folder)
    assert [(p.name, p.read_bytes()) for p in folder.iterdir()] == [
        ("registry.safetensors", before)
    ]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"target_dim": 3}, r"target_dim must be one of \[2, 4\], the model's sizes, got 3"),
        ({}, "the model brings no threshold for 4 dimensions; give threshold"),
        ({"threshold": 60}, r"threshold is a cosine, it must lie in -1\.\.1, got 60"),
        ({"threshold": math.nan}, "threshold is a cosine"),
    ],
)
def test_a_model_that_cannot_decide_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        VoiceRegistry(Angle(), **options)


def test_what_cannot_be_enrolled_is_refused(record, tmp_path):
    voices = registry()
    for name in ("", " ", None):
        with pytest.raises(ValueError, match="name must be a text that is not empty"):
            voices.enroll(name, record(0.1))
    with pytest.raises(ValueError, match="recordings of 'ann' are none"):
        voices.enroll("ann", [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no recording"):
        voices.enroll("ann", tmp_path / "empty")
    for call in (lambda path: voices.enroll("ann", path), voices.identify):
        with pytest.raises(ValueError, match=r"nan_2.0.wav holds samples that are NaN"):
            call(record(math.nan))
        with pytest.raises(FileNotFoundError, match="there is no file"):
            call(tmp_path / "gone.wav")
    assert not voices.speakers


def test_a_published_model_names_a_voice_in_another_process(
    tiny_config, random_model, voices, tmp_path
):
    student = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (8, 32)).eval()
    model = export_model(
        student,
        tmp_path / "model",
        Provenance("Tiny", "cc-by-4.0", "Random numbers.", trials="a list"),
        report={
            "dims": {s: {"eer": 0.1, "min_dcf": 0.5, "threshold": 0.25} for s in ("8", "32")},
            "trials": {"target": 30, "impostor": 150},
            "corpus": "demo",
        },
    )
    wavs = [voices(1, 1.5, clip) for clip in range(3)]
    for clip, wav in enumerate(wavs):
        soundfile.write(tmp_path / f"{clip}.wav", wav.numpy(), 16000, "FLOAT")
    speakers = VoiceRegistry(model, target_dim=8)
    speakers.enroll("ann", [tmp_path / "0.wav", tmp_path / "1.wav"])
    speakers.save(tmp_path / "registry")
    code = f"""
import json
from speechbrain_mrl import VoiceRegistry
registry = VoiceRegistry.load({str(tmp_path / "registry")!r})
print(json.dumps(registry.identify({str(tmp_path / "2.wav")!r})._asdict()))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        units = [F.normalize(student(wav)[0, :8], dim=0) for wav in wavs]
    mean = (units[0] + units[1]) / 2
    score = F.cosine_similarity(mean, units[2], dim=0).item()
    assert found["score"] == pytest.approx(score, abs=1e-4)
    assert found["threshold"] == pytest.approx(0.25 / mean.norm().item() ** 0.5, abs=1e-4)
    assert found["name"] == ("ann" if score >= found["threshold"] else None)
