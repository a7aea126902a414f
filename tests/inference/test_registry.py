import math

import numpy as np
import pytest
import soundfile
import torch
from scipy.stats import norm
from test_utils import full_disk
from torch import nn

from speechbrain_mrl import VoiceRegistry
from speechbrain_mrl.inference.registry import FILE
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.publish.load import load_published


class Angle(nn.Module):
    """A signal of level a has the embedding (cos πa, sin πa), times a length that depends on a."""

    mrl_dims = (2,)

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, wavs, wav_lens):
        level = wavs.abs().mean(dim=1, keepdim=True)
        return (
            (1 + 100 * level)
            * self.scale
            * torch.cat([(math.pi * level).cos(), (math.pi * level).sin()], dim=1)
        )


@pytest.fixture
def recording(tmp_path):
    """A file of a level and a length in seconds."""

    def write(level, seconds=2.0):
        path = tmp_path / f"{level}_{seconds}.wav"
        wav = level * np.resize([1.0, -1.0], int(16000 * seconds))
        soundfile.write(path, wav, 16000, subtype="FLOAT")
        return path

    return write


@pytest.fixture
def registry(recording):
    """Ann at level 0.1 and Bob at 0.5."""
    made = VoiceRegistry(Angle(), threshold=0.9)
    made.enroll("ann", recording(0.1))
    made.enroll("bob", [recording(0.5)])
    return made


def cosine(a, b):
    return math.cos(math.pi * (a - b))


def test_the_nearest_speaker_is_named_with_score_margin_and_seconds(registry, recording):
    found = registry.identify(recording(0.15))
    assert found.name == "ann" and found and found.reason is None
    assert found.score == pytest.approx(cosine(0.15, 0.1), abs=1e-6)
    assert found.margin == pytest.approx(cosine(0.15, 0.1) - cosine(0.15, 0.5), abs=1e-6)
    assert (found.threshold, found.seconds) == (0.9, 2.0)


def test_a_speaker_is_the_mean_of_normalised_embeddings(recording):
    made = VoiceRegistry(Angle(), threshold=0.9)
    made.enroll("ann", [recording(0.1), recording(0.3)])
    assert made.identify(recording(0.2)).score == pytest.approx(1.0, abs=1e-6)
    made.enroll("ann", recording(0.3))  # added to the others
    mean = sum(np.array([math.cos(math.pi * a), math.sin(math.pi * a)]) for a in (0.1, 0.3, 0.3))
    expected = mean[1] / np.linalg.norm(mean)  # with level 0.5, whose direction is (0, 1)
    assert made.identify(recording(0.5)).score == pytest.approx(expected, abs=1e-6)
    assert made.speakers == {"ann": (3, 6.0)}


def test_nobody_is_named_below_the_threshold_or_between_two(registry, recording):
    found = registry.identify(recording(0.9))
    assert not found and found.name is None
    assert found.reason == f"the score with bob, {cosine(0.9, 0.5):.3f}, is below 0.900"
    registry.enroll("eve", recording(0.11))
    found = registry.identify(recording(0.1))
    assert not found and found.reason.startswith("ann and eve are too near, 0.00")


@pytest.mark.parametrize(
    ("level", "seconds", "reason"),
    [
        (0.0, 3.0, "it holds only silence"),
        (1e-5, 3.0, "it holds only silence"),
        (0.1, 0.5, "it holds 0.5 s of sound, and 1 s is needed"),
    ],
)
def test_what_tells_nothing_of_a_voice_is_neither_named_nor_enrolled(
    registry, recording, level, seconds, reason
):
    path = recording(level, seconds)
    for found in (registry.identify(path), registry.verify("ann", path)):
        assert (found.name, found.score, found.reason) == (None, None, reason)
    with pytest.raises(ValueError, match=f"^{path} cannot be enrolled: {reason}$"):
        registry.enroll("ann", [recording(0.2), path])
    assert registry.speakers == {"ann": (1, 2.0), "bob": (1, 2.0)}
    assert registry.identify(recording(0.1)).score == pytest.approx(1.0, abs=1e-6)


def test_verify_compares_with_one_speaker_only(registry, recording):
    found = registry.verify("bob", recording(0.1))
    assert (found.name, found.margin) == (None, None)
    assert found.score == pytest.approx(cosine(0.1, 0.5), abs=1e-6)
    assert registry.verify("bob", recording(0.52)).name == "bob"


def test_a_removed_speaker_is_gone(registry, recording):
    registry.remove("ann")
    assert registry.identify(recording(0.1)).score == pytest.approx(cosine(0.1, 0.5), abs=1e-6)
    registry.remove("bob")
    assert registry.identify(recording(0.1)).reason == "nobody is enrolled"
    with pytest.raises(ValueError, match="name must be that of an enrolled speaker, 'bob' is not"):
        registry.remove("bob")
    with pytest.raises(ValueError, match="enrolled speaker, 'bob' is not"):
        registry.verify("bob", recording(0.1))


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_a_name_is_a_text(registry, recording, name):
    with pytest.raises(ValueError, match="^name must be a text that is not empty"):
        registry.enroll(name, recording(0.1))


def test_an_empty_list_a_missing_file_and_a_broken_model_are_refused(registry, tmp_path, recording):
    with pytest.raises(ValueError, match="recordings of 'ann' are none; give at least one"):
        registry.enroll("ann", [])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        registry.identify(tmp_path / "nothing.wav")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(ValueError, match="cannot decode"):
        registry.identify(tmp_path / "text.wav")
    path = recording(0.1)
    with pytest.raises(ValueError, match=f"an embedding that is not finite for {path}"):
        VoiceRegistry(Angle(math.nan), threshold=0.9).enroll("ann", path)


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match=r"target_dim must be one of \[2\], .*, got 3"):
        VoiceRegistry(Angle(), target_dim=3, threshold=0.9)
    with pytest.raises(ValueError, match="no threshold for 2 dimensions; give threshold"):
        VoiceRegistry(Angle())
    with pytest.raises(ValueError, match=r"threshold must be a cosine, in -1..1, got 1.5"):
        VoiceRegistry(Angle(), threshold=1.5)


def with_report(**thresholds):
    model = Angle()
    model.thresholds = {"2": thresholds}
    return VoiceRegistry(model)


def test_the_threshold_keeps_impostors_out_of_any_number_of_speakers(recording):
    cosines = {"eer": 0.2, "far_0.01": 0.3, "far_0.0001": 0.4}
    made, z = with_report(**cosines), norm.isf
    made.enroll("0", recording(0.0 + 0.01))
    for n_speakers, cosine, rate in ((1, 0.3, 1e-2), (7, 0.3, 1e-2), (500, 0.4, 1e-4)):
        for number in range(len(made.speakers), n_speakers):
            made.speakers[str(number)] = (1, 2.0)
        made.sums = made.sums[:1].repeat(n_speakers, 1)
        found = made.identify(recording(0.9)).threshold
        expected = max(cosine * z(0.07 / n_speakers) / z(rate), 0.2)
        assert found == pytest.approx(expected, abs=1e-6)


def test_without_a_rate_in_the_report_the_equal_error_rate_decides(recording):
    made = with_report(eer=0.2)
    made.enroll("ann", recording(0.1))
    assert made.identify(recording(0.1)).threshold == pytest.approx(0.2)


@pytest.mark.parametrize("n_speakers", [1, 20])
def test_seven_percent_of_impostors_are_named(n_speakers, recording, monkeypatch):
    """Cosines of random directions in many dimensions are normal, of variance 1 / D."""
    size, draws = 400, 4000
    model = Angle()
    model.thresholds = {"2": {"eer": 0.0, "far_0.01": norm.isf(0.01) / math.sqrt(size)}}
    made, random = VoiceRegistry(model), torch.Generator().manual_seed(0)
    made.speakers = {str(number): (1, 2.0) for number in range(n_speakers)}
    monkeypatch.setattr("speechbrain_mrl.inference.registry.MIN_MARGIN", 0.0)
    named = 0
    for _ in range(draws):
        made.sums = nn.functional.normalize(torch.randn(n_speakers, size, generator=random), dim=1)
        query = nn.functional.normalize(torch.randn(size, generator=random), dim=0)
        monkeypatch.setattr(made, "_embed", lambda path, query=query: (2.0, query))
        named += bool(made.identify("any"))
    assert named / draws == pytest.approx(0.07, abs=0.012)  # three standard errors


def test_a_saved_registry_is_the_same(registry, recording, tmp_path):
    registry.save(tmp_path / "staff")
    again = VoiceRegistry.load(tmp_path / "staff", Angle())
    assert again.identify(recording(0.15)) == registry.identify(recording(0.15))
    assert (again.speakers, again.threshold) == (registry.speakers, 0.9)
    registry.remove("ann")
    registry.save(tmp_path / "staff")
    assert list((tmp_path / "staff").iterdir()) == [tmp_path / "staff" / FILE]
    assert b"ann" not in (tmp_path / "staff" / FILE).read_bytes()


def test_a_registry_of_another_model_is_refused(registry, tmp_path):
    registry.save(tmp_path)
    with pytest.raises(ValueError, match="was enrolled with another model than Angle"):
        VoiceRegistry.load(tmp_path, Angle(2.0))
    with pytest.raises(ValueError, match="saved with a module as its model; give it as source"):
        VoiceRegistry.load(tmp_path)


def test_every_changed_byte_is_found(registry, tmp_path):
    registry.save(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"^{path} is damaged"):
            VoiceRegistry.load(tmp_path, Angle())
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{path} is damaged"):
            VoiceRegistry.load(tmp_path, Angle())
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {FILE}, so it is no saved registry"):
        VoiceRegistry.load(tmp_path, Angle())


def test_a_published_model_enrols_at_each_size(tmp_path, random_model, tiny_config, voices):
    student = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (8, 32)).eval()
    report = {
        "dims": {d: {"eer": 0.1, "min_dcf": 0.5, "threshold": 0.25} for d in ("8", "32")},
        "trials": {"target": 30, "impostor": 150},
        "corpus": "demo",
    }
    folder = export_model(student, tmp_path / "model", Provenance(trials="a list"), report=report)
    for name, clip in (("a", 0), ("b", 1)):
        soundfile.write(tmp_path / f"{name}.wav", voices(1, 2.0, clip).numpy(), 16000)
    made = VoiceRegistry(folder, target_dim=8)
    made.enroll("ann", tmp_path / "a.wav")
    made.save(tmp_path / "staff")
    found = VoiceRegistry.load(tmp_path / "staff").verify("ann", tmp_path / "b.wav")
    wavs = [
        torch.from_numpy(soundfile.read(tmp_path / f"{n}.wav", dtype="float32")[0]) for n in "ab"
    ]
    with torch.no_grad():
        one, two = (load_published(folder)(wav, target_dim=8)[0] for wav in wavs)
    assert found.score == pytest.approx(torch.cosine_similarity(one, two, dim=0).item(), abs=1e-4)
    assert found.threshold == 0.25


def test_a_mean_of_several_recordings_is_decided_more_strictly(recording):
    made = with_report(**{"eer": 0.2, "far_0.01": 0.5})
    made.enroll("ann", [recording(0.1), recording(0.3)])
    length = math.cos(0.1 * math.pi)  # of the mean of two unit vectors 0.2 pi apart
    expected = 0.5 * norm.isf(0.07) / norm.isf(0.01) / length**0.5
    assert made.identify(recording(0.2)).threshold == pytest.approx(expected, abs=1e-6)


def test_a_full_disk_leaves_the_old_registry(registry, recording, tmp_path):
    folder = tmp_path / "staff"
    registry.save(folder)
    before = (folder / FILE).read_bytes()
    registry.enroll("eve", recording(0.2))
    with full_disk(tmp_path, size=100), pytest.raises(OSError, match="cannot write"):
        registry.save(folder)
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(FILE, before)]


def test_the_benchmark_counts_every_recording_once(
    tmp_path, small_corpus, random_model, tiny_config, capsys
):
    from benchmarks import identification

    student = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (8, 32)).eval()
    folder = export_model(student, tmp_path / "model")
    trials = tmp_path / "trials.txt"
    names = sorted(path.name for path in (small_corpus / "wav").iterdir())[:8]
    other = "".join(f"0 {names[0]}/s0/0.wav {name}/s0/0.wav\n" for name in names[1:])
    trials.write_text(f"1 {names[0]}/s0/0.wav {names[0]}/s1/0.wav\n{other}")
    arguments = [f"--model={folder}", f"--data_folder={small_corpus}", f"--trials={trials}"]
    found = identification.main([*arguments, "--draws=2", "--sizes=8", "--enrolled=1"])[8]
    *known, named = found.values()
    assert sum(known) == pytest.approx(100, abs=0.02) and 0 <= named <= 100
    assert f"| 8 | {found['right']:.1f} (" in capsys.readouterr().out
