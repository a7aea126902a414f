"""Makes a small corpus of synthetic voices in VoxCeleb's layout, for trying the recipe out.

    python recipes/voxceleb/demo_voices.py FOLDER

The voices are espeak-ng's English accents and speaker variants, each with a pitch, pace and vocal
tract of its own. A session is recorded in loud noise, in a reverberant room or by telephone.
"""

import argparse
import ctypes
import functools
import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.fft import irfft, next_fast_len
from scipy.signal import butter, fftconvolve, resample_poly, sosfilt
from tqdm import tqdm

from speechbrain_mrl.utils import replacing, require, writing

SAMPLE_RATE = 16000  # Hz
CLIPS_PER_SESSION = 2

_ACCENTS = (
    "en en-us en-us-nyc en-029 en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd"
).split()
_VARIANTS = (
    "f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 m7 m8 Alex Alicia Andrea Andy Annie Denis Diogo Gene Hugo "
    "Lee Mario Michael Mike Nguyen Reed adam anika announcer aunty belinda boris david ed edward "
    "grandma grandpa gustave john linda marcelo max michel miguel norbert pablo paul quincy rob "
    "robert sandro shelby steph travis victor zac"
).split()
_WORDS = (
    "again air always animal answer apple autumn balance bank basket beauty because before bell "
    "bird blue boat bottle bread bridge bright brother butter candle careful carry castle chair "
    "change cheese children choose city clean clever cloud coffee cold colour copper corner "
    "cotton country cousin daily dance dark daughter deep dinner doctor door dream early earth "
    "east easy eight engine evening every family farmer father field finger fire fish flower "
    "follow forest forty fresh friend garden gentle glass golden grass green guitar happy harbour "
    "heavy history holiday honest house hundred island january journey juice jump kitchen knife "
    "ladder language laugh leather lemon letter light little machine market measure memory middle "
    "milk minute mirror money morning mother mountain music narrow nature never nothing number "
    "ocean orange other paper pencil people picture planet pleasure pocket power quarter question "
    "quick quiet rabbit rain reason remember river road round school season seven shadow sheep "
    "shoulder silver simple sister smooth soldier spring station stone story straight summer "
    "table teacher thank thirty thought thunder together tomorrow travel treasure under usual "
    "valley village violin voice water weather welcome whisper window winter wonder wooden yellow "
    "yesterday young zero"
).split()

_TEACHER_GROUPS = 3  # of accents and variants, that the demo's speakers do not have
_SPEAKERS_PER_PROCESS = 20
_BABBLE_VOICES = 6
_ESPEAK_RATE, _ESPEAK_PITCH, _ESPEAK_RANGE = 1, 3, 4  # espeak_PARAMETER in speak_lib.h
_ESPEAK_SYNCHRONOUS, _ESPEAK_DONT_EXIT, _ESPEAK_UTF8 = 2, 0x8000, 1


class _Voice(NamedTuple):
    name: str  # accent+variant
    pitch: float  # 0..100
    range: float  # 0..100, of intonation
    rate: float  # words per minute
    tract: int  # spectrum is scaled by 441/tract


def make_demo_corpus(
    folder: str,
    n_speakers: int = 210,
    clips_per_speaker: int = 8,
    seconds: float = 3.0,
    seed: int = 0,
    group: int = 0,
) -> Path:
    """Writes ``wav/demo0000/s00/00000.wav`` and so on, 16 kHz mono.

    Does nothing when the folder holds a complete corpus of the same arguments; another
    or a half-made one is replaced.

    Arguments
    ---------
    folder : str
        Where the corpus goes. A folder that holds other speakers is refused.
    n_speakers : int
        Speakers, 2 or more. Once all accents and variants of the group are taken, they come again
        with another pitch, pace and vocal tract.
    clips_per_speaker : int
        Clips of each, two to a session.
    seconds : float
        Mean length of an utterance; lengths vary by up to half a second.
    seed : int
        The same seed gives the same utterances, on one platform and espeak-ng to the bit.
    group : int
        0 for the demo's speakers, 1 to 3 for those that its teachers are trained on. No accent and
        variant is in two groups.

    Returns
    -------
    Path
        ``folder``, to be given as ``data_folder``.

    Raises
    ------
    ImportError
        If espeakng-loader is not installed.
    ValueError
        If an argument is out of its range, or the folder holds other speakers.

    Example
    -------
    >>> import pytest
    >>> espeakng_loader = pytest.importorskip("espeakng_loader")
    >>> folder = make_demo_corpus(getfixture("tmp_path"), n_speakers=2, clips_per_speaker=1)
    >>> sorted(path.relative_to(folder).as_posix() for path in folder.glob("wav/*/*/*"))
    ['wav/demo0000/s00/00000.wav', 'wav/demo0001/s00/00000.wav']
    """
    if n_speakers < 2 or clips_per_speaker < 1 or seconds < 1:
        raise ValueError(
            "n_speakers must be 2 or more, clips_per_speaker and seconds 1 or more; "
            f"got {n_speakers}, {clips_per_speaker} and {seconds}"
        )
    if not 0 <= group <= _TEACHER_GROUPS:
        raise ValueError(f"group must be 0 to {_TEACHER_GROUPS}, got {group}")
    folder = Path(folder)
    marker = folder / "demo.json"
    contents = {
        "n_speakers": n_speakers,
        "clips_per_speaker": clips_per_speaker,
        "seconds": seconds,
        "seed": seed,
        "group": group,
        "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    if marker.is_file() and json.loads(marker.read_text()) == contents:
        if len(list(folder.glob("wav/*/*/*.wav"))) == n_speakers * clips_per_speaker:
            return folder
    _espeakng_loader()
    wav_folder = folder / "wav"
    wav_folder.mkdir(parents=True, exist_ok=True)
    present = list(wav_folder.iterdir())
    if others := sorted(path.name for path in present if not path.name.startswith("demo")):
        raise ValueError(
            f"{wav_folder} holds other speakers, such as {others[0]}; name a new folder"
        )
    marker.unlink(missing_ok=True)
    for path in present:
        shutil.rmtree(path)

    # espeak-ng is not thread-safe, and what it says depends on what it said before:
    # a fixed share of the speakers to a fresh process makes the corpus reproducible.
    speakers = range(n_speakers)
    blocks = [speakers[i : i + _SPEAKERS_PER_PROCESS] for i in speakers[::_SPEAKERS_PER_PROCESS]]
    make_block = functools.partial(
        _make_speakers,
        wav_folder,
        _draw_voices(n_speakers, seed, group),
        clips_per_speaker,
        seconds,
        seed + 1000 * group,
    )
    with (
        multiprocessing.Pool(maxtasksperchild=1) as pool,
        tqdm(desc="make demo voices", total=n_speakers, unit="speaker") as progress,
    ):
        for made in pool.imap_unordered(make_block, blocks):
            progress.update(made)
    with replacing(marker) as part:
        part.write_text(json.dumps(contents, indent=2))
    return folder


def _espeakng_loader():
    return require("espeakng_loader", "making demo voices")


def _draw_voices(n_speakers: int, seed: int, group: int) -> list[_Voice]:
    """The speakers' voices, then those of the babble."""
    names = [f"{accent}+{variant}" for accent in _ACCENTS for variant in _VARIANTS]
    dealt = np.random.default_rng(0).permutation(len(names))
    half, share = len(names) // 2, len(names) // 2 // _TEACHER_GROUPS
    groups = np.split(dealt, [half + share * teacher for teacher in range(_TEACHER_GROUPS)])
    rng = np.random.default_rng([seed, group])
    return [
        _Voice(
            name=names[number],
            pitch=rng.uniform(20, 80),
            range=rng.uniform(25, 85),
            rate=rng.uniform(140, 195),
            tract=int(rng.integers(410, 475)),
        )
        for number in np.resize(rng.permutation(groups[group]), n_speakers + _BABBLE_VOICES)
    ]


def _make_speakers(wav_folder, voices, clips_per_speaker, seconds, seed, speakers) -> int:
    """All utterances of some speakers, in a process of its own."""
    synthesizer = _Synthesizer(seed)
    babble = _make_babble(synthesizer, voices[-_BABBLE_VOICES:], seed)
    for speaker in speakers:
        for clip in range(clips_per_speaker):
            session = clip // CLIPS_PER_SESSION
            folder = wav_folder / f"demo{speaker:04d}" / f"s{session:02d}"
            rng = np.random.default_rng([seed, speaker, clip])
            session_rng = np.random.default_rng([seed, speaker, session, 1])
            length = round((seconds + rng.uniform(-0.5, 0.5)) * SAMPLE_RATE)
            speech = synthesizer.speak(voices[speaker], length, rng)
            wav = _record(speech, babble, session_rng, rng)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                soundfile.write(folder / f"{clip:05d}.wav", wav, SAMPLE_RATE)
    return len(speakers)


class _Synthesizer:
    """espeak-ng, once per process."""

    def __init__(self, seed: int):
        loader = _espeakng_loader()
        self.library = ctypes.CDLL(loader.get_library_path())
        self.library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        text, pointers = [ctypes.c_char_p, ctypes.c_size_t], 2 * [ctypes.c_void_p]
        self.library.espeak_Synth.argtypes = [*text, *4 * [ctypes.c_uint], *pointers]
        data_folder = loader.get_data_path()
        sample_rate = self.library.espeak_Initialize(
            _ESPEAK_SYNCHRONOUS, 0, data_folder.encode(), _ESPEAK_DONT_EXIT
        )
        if sample_rate != 22050:
            raise RuntimeError(f"espeak-ng cannot start with its data in {data_folder}")
        self.library.espeak_ng_SetRandSeed(seed)
        self.blocks = []
        callback_type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.callback = callback_type(self._receive)  # kept, or ctypes frees it
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count, _events) -> int:
        if samples and count:
            self.blocks.append(np.frombuffer(ctypes.string_at(samples, 2 * count), np.int16))
        return 0

    def speak(self, voice: _Voice, length: int, rng) -> np.ndarray:
        """Random words, ``length`` samples at 16 kHz, at unit power.

        Pitch and pace vary a little from utterance to utterance, as people's do.
        """
        if self.library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice.name}")
        pitch = np.clip(voice.pitch + rng.normal(0, 4), 0, 100)
        rate = voice.rate * rng.uniform(0.92, 1.08)
        for parameter, value in (
            (_ESPEAK_RATE, rate),
            (_ESPEAK_PITCH, pitch),
            (_ESPEAK_RANGE, voice.range),
        ):
            self.library.espeak_SetParameter(parameter, round(value), 0)
        self.blocks.clear()
        while sum(map(len, self.blocks)) * 320 < (length + SAMPLE_RATE / 2) * voice.tract:
            text = " ".join(rng.choice(_WORDS, 5)).encode()
            self.library.espeak_Synth(text, len(text) + 1, 0, 0, 0, _ESPEAK_UTF8, None, None)
        speech = np.concatenate(self.blocks) / 32768
        # 320/441 is from 22,050 Hz to 16 kHz; another divisor also moves pitch and formants.
        speech = resample_poly(speech, 320, voice.tract)
        first = rng.integers(SAMPLE_RATE // 10, SAMPLE_RATE // 2)
        return _unit_power(speech[first : first + length])


def _make_babble(synthesizer, voices, seed) -> np.ndarray:
    """Eight seconds of all ``voices`` at once."""
    rng = np.random.default_rng([seed, 2])
    return sum(synthesizer.speak(voice, 8 * SAMPLE_RATE, rng) for voice in voices)


def _record(speech, babble, session_rng, rng) -> np.ndarray:
    """Speech in the session's condition, room, noise and microphone, at a random level."""
    condition = session_rng.choice(["noise", "room", "phone"])
    reverberation, decay = session_rng.uniform(0.1, 0.5), session_rng.uniform(0.1, 0.3)
    low, high = session_rng.uniform(60, 200), session_rng.uniform(5000, 7600)
    kind = session_rng.choice(["white", "pink", "babble"])
    snr_db = (0.0, 10.0) if condition == "noise" else (15.0, 22.0)
    if condition == "room":
        reverberation, decay = session_rng.uniform(1.0, 2.5), session_rng.uniform(0.4, 0.9)
    elif condition == "phone":
        low, high = session_rng.uniform(250, 400), session_rng.uniform(2600, 3600)

    room = _room(reverberation, decay, session_rng)
    wav = _unit_power(fftconvolve(speech, room)[: len(speech)])
    noise = _unit_power(_noise(kind, len(wav), babble, rng))
    wav = wav + 10 ** (-rng.uniform(*snr_db) / 20) * noise
    order = 4 if condition == "phone" else 1
    microphone = butter(order, (low, high), "bandpass", fs=SAMPLE_RATE, output="sos")
    wav = _unit_power(sosfilt(microphone, wav))
    if condition == "phone":
        wav = _unit_power(_coarse_mu_law(wav))
    wav = wav * 10 ** (rng.uniform(-30, -22) / 20)
    return wav / max(1.0, np.abs(wav).max() / 0.95)


def _room(reverberation: float, decay: float, rng) -> np.ndarray:
    """Impulse response: the direct sound, then noise that falls by 60 dB in ``decay`` seconds."""
    times = np.arange(round(decay * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(times)) * 10 ** (-3 * times / decay)
    room = reverberation * tail / np.linalg.norm(tail)
    room[0] = 1.0
    return room


def _coarse_mu_law(wav: np.ndarray) -> np.ndarray:
    """A telephone's companding, with 33 steps instead of 256."""
    wav = np.clip(wav / 4, -1, 1)
    law = np.round(16 * np.sign(wav) * np.log1p(255 * np.abs(wav)) / np.log(256)) / 16
    return np.sign(law) * np.expm1(np.abs(law) * np.log(256)) / 255


def _noise(kind: str, length: int, babble: np.ndarray, rng) -> np.ndarray:
    if kind == "babble":
        return np.take(babble, rng.integers(len(babble)) + np.arange(length), mode="wrap")
    if kind == "white":
        return rng.standard_normal(length)
    fast_length = next_fast_len(length, real=True)
    bins = np.arange(fast_length // 2 + 1)
    spectrum = rng.standard_normal(len(bins)) + 1j * rng.standard_normal(len(bins))
    return irfft(spectrum / np.sqrt(bins + 1), fast_length)[:length]  # pink


def _unit_power(wav: np.ndarray) -> np.ndarray:
    return wav / np.sqrt(np.mean(wav**2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the corpus goes")
    print(make_demo_corpus(parser.parse_args().folder))
