"""Augmentation: the shipped YAML's draws, and each augmentation against another implementation."""

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from scipy.signal import fftconvolve
from scipy.stats import binom

from speechbrain_mrl.training.augment import (
    DropBands,
    DropChunks,
    LowPass,
    Noise,
    Reverb,
    Speed,
    Telephone,
    UtteranceAugmenter,
    babble,
)

N_BATCHES, BATCH_SIZE = 100, 16


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """What hparams/mrl_distill.yaml says, loaded by HyperPyYAML alone."""
    with open("hparams/mrl_distill.yaml") as file:
        return load_hyperpyyaml(file, {"output_folder": str(tmp_path_factory.mktemp("out"))})


@pytest.fixture
def drawn(shipped, monkeypatch):
    """Which augmentation which utterance gets in 100 batches, (100, 16, K): each adds its bit."""
    augment = shipped["wav_augment"]
    for number, part in enumerate(augment.augmentations.values()):
        monkeypatch.setattr(part, "forward", lambda wavs, bit=2**number, **_: wavs + bit)
    torch.manual_seed(0)
    silence = torch.zeros(BATCH_SIZE, 10), torch.ones(BATCH_SIZE)
    codes = torch.stack([augment(*silence)[0][:, 0] for _ in range(N_BATCHES)]).int()
    return codes[..., None] // 2 ** torch.arange(len(augment.augmentations)) % 2 == 1


def within_chance(count, n, probability):
    low, high = binom.interval(0.9999, n, probability)
    return low <= count <= high


def test_every_augmentation_of_the_shipped_yaml_has_its_share(drawn):
    """Two of K on average, in 80 % of the utterances; a fifth stays clean."""
    n, n_augmentations = N_BATCHES * BATCH_SIZE, drawn.shape[-1]
    assert n_augmentations == 7
    for count in drawn.sum(dim=(0, 1)).tolist():
        assert within_chance(count, n, 0.8 * 2 / n_augmentations)
    assert within_chance((~drawn.any(dim=-1)).sum().item(), n, 0.2)
    numbers = drawn.sum(dim=-1)[drawn.any(dim=-1)]
    for number in (1, 2, 3):
        assert within_chance((numbers == number).sum().item(), len(numbers), 1 / 3)


def test_utterances_of_a_batch_draw_independently_of_one_another(drawn):
    """A draw for the whole batch would make 7 in 10 neighbours equal or more."""
    clean = ~drawn.any(dim=-1)  # (batches, 16)
    both = (clean[:, ::2] & clean[:, 1::2]).sum().item()
    assert within_chance(both, N_BATCHES * BATCH_SIZE // 2, 0.2**2)


def test_draws_follow_from_the_seed_of_the_step_alone(shipped, voices):
    """Whatever was drawn before, as in a run that goes on."""
    augment, lengths = shipped["wav_augment"], torch.tensor([1.0, 0.9, 0.5, 1.0])
    wavs = torch.stack([voices(speaker, 0.5) for speaker in range(4)])
    found = []
    for drawn_before in (0, 3):
        for _ in range(drawn_before):
            augment(wavs, lengths)
        torch.manual_seed(7)
        found.append(augment(wavs, lengths)[0])
    assert torch.equal(*found)
    assert found[0].shape == wavs.shape and found[0].isfinite().all()
    assert not found[0][1, 7200:].any() and not found[0][2, 4000:].any()  # padding stays silent


def test_an_augmentation_that_changes_the_length_is_refused():
    class Half(torch.nn.Module):
        def forward(self, wavs):
            return wavs[:, ::2]

    with pytest.raises(ValueError, match="Half0 must keep the length 8"):
        UtteranceAugmenter([Half()], 1.0, 1, 1)(torch.ones(2, 8), torch.ones(2))


@pytest.mark.parametrize("arguments", [{"max_augmentations": 2}, {"min_augmentations": 0}])
def test_more_augmentations_than_there_are_and_none_are_refused(arguments):
    with pytest.raises(ValueError, match="must be from 1 to the 1 augmentations"):
        UtteranceAugmenter([Telephone()], **{"max_augmentations": 1, **arguments})


# Each augmentation


def tone(hertz, n=16000):
    return torch.sin(2 * np.pi * hertz * torch.arange(n) / 16000)[None]


def level_db(after, before):
    """Of the middle, where no filter has an edge."""
    after, before = after[..., 2000:-2000], before[..., 2000:-2000]
    return 10 * torch.log10(after.square().mean() / before.square().mean()).item()


@pytest.fixture
def recordings(tmp_path):
    """A folder of three recordings, each one of its own value."""
    for number in range(3):
        rng = np.random.default_rng(number)
        soundfile.write(tmp_path / f"{number}.wav", 0.1 * rng.standard_normal(2000), 16000)
    return tmp_path


def test_reverberation_is_the_convolution_from_the_direct_path_on(recordings, voices):
    """Each utterance with a room of its own, at its own level."""
    wavs = torch.stack([voices(speaker, 0.5) for speaker in range(8)])
    torch.manual_seed(0)
    found = Reverb(recordings)(wavs)
    rooms = [soundfile.read(path)[0] for path in sorted(recordings.glob("*.wav"))]
    rooms = [room[np.abs(room).argmax() :] for room in rooms]
    used = set()
    for wav, reverberant in zip(wavs.numpy(), found.numpy()):
        expected = np.stack([fftconvolve(wav, room)[: len(wav)] for room in rooms])
        rms = np.sqrt((expected**2).mean(axis=1, keepdims=True))
        errors = np.abs(expected * np.sqrt((wav**2).mean()) / rms - reverberant).max(axis=1)
        assert errors.min() < 1e-5
        used.add(errors.argmin())
    assert used == {0, 1, 2}


def test_synthetic_rooms_decay_and_differ():
    impulses = torch.zeros(32, 16000)
    impulses[:, 0] = 1.0
    torch.manual_seed(0)
    rooms = Reverb()(impulses)
    rooms = rooms / rooms[:, :1]  # the direct path
    assert not rooms[:, 1:32].abs().gt(1e-5).any()  # 2 ms until the first reflection
    energy = rooms[:, 32:].square().sum(dim=1)
    assert (energy < 1.01).all() and (energy > 0.06).all()  # 0 to 12 dB below it
    halves = rooms[:, 1600:3200].square().sum(dim=1), rooms[:, 4800:6400].square().sum(dim=1)
    assert (halves[1] < halves[0]).all() and halves[1].unique().numel() == 32


def test_recorded_noise_is_a_piece_of_a_recording(recordings):
    torch.manual_seed(0)
    for noise in Noise(recordings)(torch.zeros(8, 500)):
        found = [
            np.abs(
                np.lib.stride_tricks.sliding_window_view(soundfile.read(path)[0], 500)
                - noise.numpy()
            )
            .max(axis=1)
            .min()
            for path in recordings.glob("*.wav")
        ]
        assert min(found) < 1e-4


def test_recorded_noise_follows_the_seed_whichever_thread_reads_it(recordings):
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(Noise(recordings)(torch.zeros(40, 500)))
    assert torch.equal(*drawn) and len(drawn[0].unique(dim=0)) > 20


def test_noise_is_read_from_speechbrains_csv_and_repeated_where_it_is_short(recordings):
    csv_file = recordings / "noise.csv"
    csv_file.write_text(
        f"ID, duration, wav, wav_format, wav_opts\n1, 0.1, {recordings / '1.wav'}, wav,\n"
    )
    noise = Noise(csv_file)(torch.zeros(1, 5000))[0]
    whole = torch.from_numpy(soundfile.read(recordings / "1.wav")[0]).float()
    torch.testing.assert_close(noise, whole.repeat(3)[:5000], atol=1e-4, rtol=0)


def test_a_folder_without_recordings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no recording"):
        Noise(tmp_path)


def test_babble_is_a_sum_of_the_others_at_the_wanted_level(shipped):
    """Orthogonal utterances: what another one is in the babble is its product with it."""
    wavs = torch.stack([tone(hertz, 16000)[0] for hertz in (400, 500, 600, 700, 800)])
    torch.manual_seed(0)
    found = babble(wavs)
    spectra = torch.fft.rfft(found).abs()[:, [400, 500, 600, 700, 800]]
    assert (spectra.diagonal() < 1e-2).all()
    assert ((spectra > 100).sum(dim=1) >= 2).all()
    noisy = shipped["add_babble"](wavs, torch.ones(5))
    spectra = torch.fft.rfft(noisy).abs()[:, [400, 500, 600, 700, 800]]
    speech = spectra.diagonal().square()
    snr_db = 10 * torch.log10(speech / (spectra.square().sum(dim=1) - speech))
    assert (snr_db > 9.9).all() and (snr_db < 20.1).all()


def test_coloured_noise_has_most_of_its_power_in_low_frequencies():
    torch.manual_seed(0)
    power = torch.fft.rfft(Noise()(torch.zeros(64, 16000))).abs().square()
    slopes = torch.log2(power[:, 2000:4000].mean(dim=1) / power[:, 200:400].mean(dim=1))
    assert (slopes < 0.3).all() and (slopes > -7).all()  # white: 0, brown: -6.6
    assert slopes.min() < -5 and slopes.max() > -1


def test_a_low_pass_keeps_what_is_below_its_cutoff_and_takes_what_is_above():
    for hertz, db in ((1000, 0.0), (3000, -3.01), (6000, -48.16)):  # 10 log10(1 + 2 ** 16)
        assert level_db(LowPass(3000, 3000)(tone(hertz)), tone(hertz)) == pytest.approx(db, abs=0.1)
    torch.manual_seed(0)
    found = LowPass(2000, 7000)(tone(4500).repeat(20, 1))
    levels = [level_db(one, tone(4500)) for one in found]
    assert min(levels) < -20 and max(levels) > -1


def test_a_telephone_passes_its_band_in_eight_bits():
    telephone = Telephone()
    for hertz, low, high in (
        (100, -80, -40),
        (500, -0.2, 0.2),
        (1000, -0.2, 0.2),
        (3000, -1.5, 0.2),
        (4500, -99, -30),
        (6000, -99, -30),
    ):
        assert low < level_db(telephone(tone(hertz)), tone(hertz)) < high, hertz
    error = telephone(0.1 * tone(1013)) - 0.1 * tone(1013)
    snr_db = -level_db(error, 0.1 * tone(1013))
    assert 33 < snr_db < 42  # G.711 has about 38 dB, whatever the level
    assert telephone(torch.zeros(1, 5001)).shape == (1, 5001)


def test_dropped_bands_are_empty_and_the_rest_stays():
    torch.manual_seed(0)
    noise = torch.randn(20, 16000)
    ratio = (torch.fft.rfft(DropBands(3, 400)(noise)) / torch.fft.rfft(noise)).abs()
    gone = ratio < 1e-3
    assert (gone | ((ratio - 1).abs() < 1e-3)).all()
    assert (gone.sum(dim=1) >= 199).all() and (gone.sum(dim=1) <= 3 * 401).all()
    assert gone[:, ::400].any(dim=0).sum() > 10  # everywhere
    assert len(gone.sum(dim=1).unique()) > 3


def test_dropped_chunks_are_silent_and_lie_inside_the_utterance():
    torch.manual_seed(0)
    found = DropChunks(3, 800, 3200)(torch.ones(50, 16000), torch.full((50,), 0.5))
    silent = found == 0
    assert ((found == 1) | silent).all() and not silent[:, 8000:].any()
    runs = [int(n) for one in silent for n in _runs(one.numpy())]
    per_utterance = [len(_runs(one.numpy())) for one in silent]
    assert min(per_utterance) == 1 and max(per_utterance) == 3
    assert min(runs) >= 799 and min(runs) < 1200 and max(runs) > 2800


def _runs(silent):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent.astype(int), [0]])))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize("speed, hertz", [(80, 800), (125, 1250)])
def test_speed_moves_the_pitch_and_keeps_the_length(speed, hertz):
    sine = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000).repeat(2, 1)
    changed = Speed([speed])(sine)
    assert changed.shape == sine.shape
    # within one period of what is repeated at the seam, a second has a bin for each hertz
    assert (torch.fft.rfft(changed).abs().argmax(dim=1) - hertz).abs().max() <= 1
