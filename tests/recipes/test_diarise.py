import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyannote.metrics")
sys.path.append(str(Path(__file__).parents[2] / "examples"))
import diarise  # noqa: E402
from pyannote.core import Annotation, Segment  # noqa: E402

from speechbrain_mrl.dataio.audio import read_audio  # noqa: E402
from speechbrain_mrl.inference.diarization import windows  # noqa: E402
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet  # noqa: E402
from speechbrain_mrl.publish.export import export_model  # noqa: E402


def test_a_mixture_is_the_recordings_one_after_the_other(small_corpus):
    clips = {
        name: sorted(map(str, (small_corpus / "wav" / name).rglob("*.wav")))
        for name in ("id00", "id01")
    }
    wav, reference = diarise.mix(clips, 5, np.random.default_rng(0))
    turns = [(s.start, s.end, who) for s, _, who in reference.itertracks(yield_label=True)]
    assert [who for *_, who in turns] == ["id00", "id01"] * 2 + ["id00"]
    assert turns[-1][1] == pytest.approx(len(wav) / 16000) and len(wav) == 5 * 19200
    first = wav[: int(turns[0][1] * 16000)]
    candidates = torch.stack([read_audio(path) for path in clips["id00"]])
    assert torch.cosine_similarity(first, candidates).max() > 0.9999


def test_two_voices_are_told_apart_by_the_dimensions_asked_for_only():
    spans = windows(16000 * 30)
    is_second = np.array([start >= 16000 * 15 for start, _ in spans])
    embeddings = torch.from_numpy(np.random.default_rng(0).standard_normal((len(spans), 8)))
    embeddings[:, :2] = torch.from_numpy(np.stack([~is_second, is_second], axis=1) + 0.01)
    reference = Annotation()
    reference[Segment(0, 15)], reference[Segment(15, 30)] = "a", "b"
    rate = diarise.DiarizationErrorRate()
    found, seconds = diarise.diarise(embeddings, spans, 2, n_speakers=2)
    assert rate(reference, found) < 0.05 and seconds > 0
    shuffled = torch.cat([embeddings[:, 2:], embeddings[:, :2]], dim=1)
    found, _ = diarise.diarise(shuffled, spans, 2, n_speakers=2)
    assert rate(reference, found) > 0.1


def test_the_example_prints_a_row_for_each_size(
    small_corpus, tiny_config, random_model, tmp_path, capsys
):
    student = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (8, 32))
    folder = export_model(student, tmp_path / "model")
    trials = tmp_path / "trials.txt"
    trials.write_text("1 id00/s0/0.wav id00/s1/0.wav\n0 id00/s0/0.wav id01/s0/0.wav\n")
    rates = diarise.main(
        [f"--model={folder}", f"--data_folder={small_corpus}", "--n_mixes=2", "--n_turns=12"]
        + ["--n_speakers=2", f"--trials={trials}"]
    )
    assert set(rates) == {(d, kind) for d in (8, 32) for kind in ("given", "estimated")}
    assert all(len(found) == 2 and min(found) >= 0 for found in rates.values())
    printed = capsys.readouterr().out
    assert "2 conversations of 2 speakers, 2 in all; 0.5 minutes" in printed
    assert f"| 32 | {50 * sum(rates[32, 'given']):.2f} (" in printed
    mean = 50 * (sum(rates[8, "estimated"]) - sum(rates[32, "estimated"]))
    assert f"| {mean:+.2f} (" in printed


def test_an_interval_holds_the_mean_of_as_many_conversations():
    rates = np.random.default_rng(1).normal(0.1, 0.02, 400)
    mean, low, high = diarise.mean_and_interval(rates)
    assert mean == pytest.approx(100 * rates.mean())
    # of a normal mean: 1.96 standard errors to either side
    half = 1.96 * 100 * rates.std() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
