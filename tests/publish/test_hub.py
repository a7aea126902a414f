import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import publish
import pytest
import soundfile
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.interfaces import foreign_class
from speechbrain.inference.speaker import SpeakerRecognition

from speechbrain_mrl.evaluation.calibration import Calibration, write_calibrations
from speechbrain_mrl.inference.optimize import optimize_for_inference
from speechbrain_mrl.models import redimnet
from speechbrain_mrl.models.pretrained import ReDimNetMRL
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.models.redimnet2 import ReDimNet2
from speechbrain_mrl.publish import hub
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.check import check_folder
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.publish.folder import FILES
from speechbrain_mrl.publish.hub import push_to_hub
from speechbrain_mrl.publish.load import load_published

SIZES = (8, 16, 32)
ENROLLED = 6  # speakers
PROVENANCE = Provenance(
    title="Tiny ReDimNet",
    license="cc-by-4.0",
    training_data="Nothing but random numbers.",
    teachers={"b0": "cc-by-4.0"},
    trials="the demo's trials",
)
REPORT = {
    "dims": {
        "8": {"eer": 0.125, "min_dcf": 0.75, "threshold": 0.5},
        "16": {"eer": 0.0625, "min_dcf": 0.5, "threshold": 0.4375},
        "32": {
            "eer": 0.03125,
            "min_dcf": 0.25,
            "threshold": 0.375,
            "thresholds": {"far_0.01": 0.6},
        },
    },
    "baselines": {"teachers": {"b0": {"dim": 48, "eer": 0.1, "min_dcf": 0.3, "threshold": 0.2}}},
    "trials": {"target": 30, "impostor": 150},
    "corpus": "demo",
}


@pytest.fixture(scope="module")
def student(tiny_config, random_model, voices):
    """Random, with its mean taken out so that different voices point to different sides."""
    model = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, SIZES).eval()
    with torch.no_grad():
        clips = torch.stack([voices(speaker, 1.0) for speaker in range(ENROLLED)])
        model.rotate_head(torch.eye(32), mean=model(clips).mean(dim=0))
    return model


@pytest.fixture(scope="module")
def speakers(student, voices):
    """Three recordings each, embedded."""
    with torch.no_grad():
        return {
            f"id{speaker}": student(torch.stack([voices(speaker, 1.0, c) for c in range(3)]))
            for speaker in range(ENROLLED)
        }


@pytest.fixture(scope="module")
def published(student, speakers, voices, tmp_path_factory):
    """A complete folder."""
    folder = tmp_path_factory.mktemp("published")
    soundfile.write(folder / "voice.wav", voices(2, 1.0).numpy(), 16000)
    (folder / "plot.png").write_bytes(b"\x89PNG, to be copied")
    return export_model(
        student,
        folder / "model",
        PROVENANCE,
        report=REPORT,
        plot=folder / "plot.png",
        speakers=speakers,
        examples={"Speaker 2": folder / "voice.wav"},
    )


@pytest.fixture
def copied(published, tmp_path):
    """The same folder, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "copied"))


@pytest.fixture(scope="module")
def loaded(published):
    return EncoderClassifier.from_hparams(source=published)


def in_isolation(script, *arguments, **env):
    """Run a script that cannot import this package; what its last line says, as JSON."""
    script = f"import json, sys\nsys.modules['speechbrain_mrl'] = None\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def embedding(model, wavs, **options):
    with torch.no_grad():
        return model(wavs, **options)


# Loading


ISOLATED = """
import torch
from speechbrain.inference.speaker import SpeakerRecognition

found = {}
for size in (8, 16, 32):
    model = SpeakerRecognition.from_hparams(source=sys.argv[1], overrides={"target_dim": size})
    wavs = torch.load(sys.argv[2])
    found[size] = model.encode_batch(wavs).flatten().tolist()
    found[f"same {size}"] = model.verify_batch(wavs, wavs)[0].item()
    found[f"total {size}"] = model.classify_batch(wavs)[0].exp().sum().item()
print(json.dumps(found))
"""


def test_who_has_only_speechbrain_gets_the_embeddings_of_the_package(
    published, student, voices, tmp_path
):
    wavs = voices(1, 2.0).unsqueeze(0)
    torch.save(wavs, tmp_path / "wavs.pt")
    found = in_isolation(ISOLATED, published, tmp_path / "wavs.pt", HF_HUB_OFFLINE="1")
    for size in SIZES:
        expected = embedding(student, wavs, target_dim=size)[0]
        torch.testing.assert_close(torch.tensor(found[str(size)]), expected, atol=1e-5, rtol=0.0)
        assert found[f"same {size}"] == pytest.approx(1.0, abs=1e-5)
        assert found[f"total {size}"] == pytest.approx(1.0, abs=1e-5)


def test_a_redimnet2_needs_speechbrain_alone_at_every_size(
    tiny_config2, random_model, voices, tmp_path
):
    redimnet2 = random_model({**tiny_config2, "agg_gnorm": True, "dual_agg": True})
    student = ReDimNetMRL.from_redimnet(redimnet2, 32, SIZES).eval()
    folder = export_model(student, tmp_path / "model", PROVENANCE)
    assert "author = {Yakovlev, Ivan and Okhotnikov, Anton}" in (folder / "README.md").read_text()
    wavs, wav_lens = torch.stack([voices(i, 1.0) for i in range(2)]), torch.tensor([1.0, 0.531])
    short = voices(0, 0.005)
    torch.save({"wavs": wavs, "wav_lens": wav_lens, "short": short}, tmp_path / "wavs.pt")
    found = in_isolation(
        "import torch\n"
        "from speechbrain.inference.classifiers import EncoderClassifier\n"
        "given = torch.load(sys.argv[2])\n"
        "sizes = {}\n"
        "for d in (8, 16, 32):\n"
        "    model = EncoderClassifier.from_hparams(sys.argv[1], overrides={'target_dim': d})\n"
        "    sizes[d] = model.encode_batch(given['wavs'], given['wav_lens']).squeeze(1).tolist()\n"
        "try:\n"
        "    refused = str(model.encode_batch(given['short'][None]))\n"
        "except RuntimeError as error:\n"
        "    refused = str(error)\n"
        "print(json.dumps([sizes, refused, type(model.mods.embedding_model).__module__]))",
        folder,
        tmp_path / "wavs.pt",
    )
    sizes, refused, module = found
    with torch.no_grad():
        for size in SIZES:
            alone = [student(wavs[0]), student(wavs[1, :8496])]
            expected = torch.cat(alone)[:, :size]
            torch.testing.assert_close(
                torch.tensor(sizes[str(size)]), expected, atol=1e-4, rtol=1e-4
            )
    assert "too short for an embedding" in refused and module.endswith("redimnet2")
    again = load_published(folder)
    assert isinstance(again, ReDimNet2) and torch.equal(again(wavs), student(wavs))
    fast = optimize_for_inference(
        EncoderClassifier.from_hparams(source=folder).mods.embedding_model
    )
    torch.testing.assert_close(fast(wavs).squeeze(1), student(wavs), atol=1e-4, rtol=1e-4)


def test_the_model_runs_from_the_code_in_its_own_folder(loaded):
    for part in loaded.mods.values():
        assert type(part).__module__.startswith("redimnet_")


def test_a_padded_clip_has_the_embedding_that_it_has_alone(loaded, voices):
    seconds = torch.tensor([0.5, 1.3, 2.0])
    clips = [voices(i, s) for i, s in enumerate(seconds.tolist())]
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    together = loaded.encode_batch(batch, seconds / 2.0).squeeze(1)
    alone = torch.cat([loaded.encode_batch(clip).squeeze(1) for clip in clips])
    assert torch.cosine_similarity(together, alone).min() > 0.9999


@pytest.mark.parametrize("target_dim", SIZES)
def test_target_dim_gives_that_size_of_everything(published, speakers, student, voices, target_dim):
    model = EncoderClassifier.from_hparams(source=published, overrides={"target_dim": target_dim})
    wavs = voices(3, 1.0, clip=7).unsqueeze(0)
    prefix = embedding(student, wavs)[0, :target_dim]
    torch.testing.assert_close(model.encode_batch(wavs)[0, 0], prefix, atol=1e-5, rtol=0.0)

    centroids = torch.stack(
        [(clips / clips.norm(dim=1, keepdim=True)).mean(dim=0) for clips in speakers.values()]
    )[:, :target_dim]
    cosines = torch.cosine_similarity(prefix, centroids, dim=1)
    log_posteriors, score, index, label = model.classify_batch(wavs)
    torch.testing.assert_close(log_posteriors[0], (30 * cosines).log_softmax(0), atol=1e-4, rtol=0)
    assert label == ["id3"] and index.item() == 3


@pytest.mark.parametrize("size", [100, 8.0])
def test_a_size_that_was_not_trained_is_refused_by_name(published, size):
    with pytest.raises(ValueError, match=rf"\[8, 16, 32\], got {size}"):
        EncoderClassifier.from_hparams(source=published, overrides={"target_dim": size})


def test_normalised_embeddings_have_unit_length(loaded, voices):
    wavs = torch.stack([voices(0, 1.0), voices(1, 1.0)])
    lengths = loaded.encode_batch(wavs, normalize=True).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(2, 1))


def test_custom_interface_loads_the_same_model(published, loaded, voices):
    model = foreign_class(source=published)
    wavs = voices(0, 1.0)
    torch.testing.assert_close(model.encode_batch(wavs), loaded.encode_batch(wavs))


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_other_rates_and_channels_are_read(
    published, voices, tmp_path, sample_rate, channels
):
    wav = voices(4, 1.0).numpy()
    soundfile.write(tmp_path / "plain.wav", wav, 16000)
    times = np.arange(sample_rate) / sample_rate
    resampled = np.interp(times, np.arange(16000) / 16000, wav)
    soundfile.write(tmp_path / "other.wav", np.stack([resampled] * channels, 1), sample_rate)
    model = SpeakerRecognition.from_hparams(source=published)
    score, _ = model.verify_files(str(tmp_path / "plain.wav"), str(tmp_path / "other.wav"))
    assert score > {8000: 0.4, 16000: 0.99, 44100: 0.8}[sample_rate]
    assert model.classify_file(str(tmp_path / "other.wav"))[3] == ["id4"]


def test_two_models_in_one_process_keep_their_code_and_weights(
    published, tiny_config, random_model, voices, tmp_path, monkeypatch
):
    source = Path(redimnet.__file__).read_text()
    twice = source.replace("(embeddings * is_sound)", "(embeddings * is_sound * 2)")
    assert twice != source
    (tmp_path / "redimnet.py").write_text(twice)
    monkeypatch.setattr(redimnet, "__file__", str(tmp_path / "redimnet.py"))
    other = random_model(tiny_config, seed=1)
    export_model(other, tmp_path / "other", PROVENANCE)

    wavs = voices(0, 1.0).unsqueeze(0)
    first = EncoderClassifier.from_hparams(source=published)
    before = first.encode_batch(wavs)
    second = EncoderClassifier.from_hparams(source=tmp_path / "other")
    torch.testing.assert_close(second.encode_batch(wavs)[0], 2 * embedding(other, wavs))
    torch.testing.assert_close(first.encode_batch(wavs), before)
    again = EncoderClassifier.from_hparams(source=published)
    torch.testing.assert_close(again.encode_batch(wavs), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("linear.bias"), r"1 missing: \['linear.bias'\]"),
        (lambda state: state.update(extra=torch.ones(1)), r"1 unexpected: \['extra'\]"),
        (lambda state: state.update({"linear.bias": torch.ones(31)}), r"linear.bias \(31,\)"),
        (lambda state: state["linear.bias"].fill_(torch.nan), r"not finite: \['linear.bias'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied, damage, message):
    state = torch.load(copied / "embedding_model.ckpt")
    damage(state)
    torch.save(state, copied / "embedding_model.ckpt")
    with pytest.raises(ValueError, match=message):
        EncoderClassifier.from_hparams(source=copied)


# What the Hub's page does with a model


def widget(model, wavs):
    """Top five labels and scores, as the Hub's inference image computes them."""
    posteriors = model.classify_batch(wavs, torch.tensor([1.0]))[0][0].softmax(dim=-1)
    labels = model.hparams.label_encoder.decode_ndim(range(len(posteriors)))
    scores, indices = posteriors.topk(5)
    return [(labels[i], score) for i, score in zip(indices.tolist(), scores.tolist())]


def test_the_widget_names_a_known_speaker(loaded, voices):
    answers = widget(loaded, voices(5, 1.0).unsqueeze(0))
    assert answers[0][0] == "id5"
    assert len(answers) == 5 and sum(score for _, score in answers) <= 1 + 1e-5
    assert answers[0][1] > 0.5


@pytest.mark.parametrize(
    "wavs",
    [
        torch.zeros(1, 16000),
        torch.rand(1, 2, 16000),
        torch.rand(1, 16000, 2),
        torch.rand(2, 16000),
        torch.rand(1, 160),
    ],
    ids=["silence", "channels first", "channels last", "rows", "10 ms"],
)
def test_the_widget_survives_any_recording(loaded, wavs):
    assert all(np.isfinite(score) for _, score in widget(loaded, wavs))


@pytest.mark.parametrize(
    "wavs", [torch.full((1, 159), 0.1), torch.zeros(1, 0), torch.zeros(1, 0, 2)]
)
def test_a_scrap_gets_no_embedding(loaded, wavs):
    with pytest.raises(RuntimeError, match="too short for an embedding"):
        loaded.encode_batch(wavs)


def test_silence_scores_zero_with_silence_and_changes_no_other_clip(published, voices):
    model = SpeakerRecognition.from_hparams(source=published)
    silence, voice = torch.zeros(1, 16000), voices(5, 1.0).unsqueeze(0)
    for other in (silence, voice):
        score, same = model.verify_batch(silence, other)
        assert score.item() == 0.0 and not same.item()
    batch, lens = torch.cat([silence, voice]), torch.ones(2)
    for normalize in (False, True):
        both = model.encode_batch(batch, lens, normalize=normalize)
        alone = model.encode_batch(voice, normalize=normalize)
        assert not both[0].any()
        torch.testing.assert_close(both[1], alone[0])


# Exporting


def test_the_folder_is_complete(published):
    names = {path.name for path in published.iterdir()}
    assert names == set(FILES) - {"calibration.json"}
    config = json.loads((published / "config.json").read_text())
    assert config["speechbrain_interface"] == "EncoderClassifier"
    assert Provenance(**config["provenance"]) == PROVENANCE
    assert json.loads((published / "report.json").read_text()) == REPORT


def test_checkpoints_hold_tensors_only(published):
    for name in ("embedding_model", "classifier"):
        state = torch.load(published / f"{name}.ckpt", weights_only=True)
        assert {type(value) for value in state.values()} == {torch.Tensor}


def test_a_plain_model_becomes_a_speechbrain_model(tiny_config, random_model, voices, tmp_path):
    model = random_model({**tiny_config, "emb_bn": True}).train()
    folder = export_model(model, tmp_path / "plain", PROVENANCE)
    assert model.training
    loaded = EncoderClassifier.from_hparams(source=folder)
    wavs = voices(0, 1.0).unsqueeze(0)
    expected = embedding(model.eval(), wavs)
    torch.testing.assert_close(loaded.encode_batch(wavs)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_smaller_export_drops_the_dimensions_past_its_size(
    published, student, speakers, voices, tmp_path
):
    folder = export_model(student, tmp_path / "small", PROVENANCE, speakers=speakers, target_dim=16)
    state = torch.load(folder / "embedding_model.ckpt")
    assert len(state["linear.weight"]) == 16
    assert torch.load(folder / "classifier.ckpt")["weight"].shape == (ENROLLED, 16)
    loaded = EncoderClassifier.from_hparams(source=folder)
    wavs = voices(0, 1.0).unsqueeze(0)
    expected = embedding(student, wavs, target_dim=16)
    torch.testing.assert_close(loaded.encode_batch(wavs)[0], expected)
    with pytest.raises(ValueError, match=r"\[8, 16\], got 32"):
        EncoderClassifier.from_hparams(source=folder, overrides={"target_dim": 32})


def test_float16_storage_is_smaller_and_loads_as_float32(published, student, voices, tmp_path):
    folder = export_model(student, tmp_path / "half", PROVENANCE, dtype=torch.float16)
    name = "embedding_model.ckpt"
    assert (folder / name).stat().st_size < 0.75 * (published / name).stat().st_size
    loaded = EncoderClassifier.from_hparams(source=folder)
    wavs = voices(0, 1.0).unsqueeze(0)
    found, expected = loaded.encode_batch(wavs)[0], embedding(student, wavs)
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, expected) > 0.9999


def test_a_model_without_speakers_has_no_classification_tag(student, voices, tmp_path):
    folder = export_model(student, tmp_path / "mute", PROVENANCE, report=REPORT)
    assert ModelCard.load(folder / "README.md").data.get("pipeline_tag") is None
    check_folder(folder)
    loaded = EncoderClassifier.from_hparams(source=folder)
    with pytest.raises(ValueError, match="published without speakers"):
        loaded.classify_batch(voices(0, 1.0).unsqueeze(0))


def test_an_export_replaces_an_export_and_nothing_else(student, tmp_path):
    folder = export_model(student, tmp_path / "model", PROVENANCE, report=REPORT)
    export_model(student, folder, PROVENANCE)
    assert not (folder / "report.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        export_model(student, folder, PROVENANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_dim": 12}, r"\[8, 16, 32\], got 12"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"speakers": {"a": torch.ones(31)}}, r"\(32,\) or \(n, 32\), got \(31,\)"),
        ({"speakers": {"a => b": torch.ones(32)}}, "a => b"),
        ({"speakers": {"a": torch.full((32,), torch.nan)}}, r"not finite: \['weight'\]"),
        ({"examples": {"a": "a.wav"}}, "speakers"),
        ({"report": {**REPORT, "dims": {"8": REPORT["dims"]["8"]}}}, r"sizes \[16, 32\]"),
    ],
)
def test_what_does_not_belong_together_is_not_exported(student, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_model(student, tmp_path / "model", PROVENANCE, **options)
    assert not list(tmp_path.iterdir())


# The card


def test_the_hubs_parser_reads_every_result_back(published):
    results = ModelCard.load(published / "README.md").data.eval_results
    told = {(r.metric_type, r.metric_name): r.metric_value for r in results}
    assert told[("eer", "EER (fraction), 8 dimensions")] == 0.125
    assert told[("min_dcf", "minDCF (p = 0.01), 32 dimensions")] == 0.25
    assert len(told) == 6
    assert {r.dataset_name for r in results} == {"demo, the demo's trials"}


def test_the_card_tells_what_the_report_tells(published):
    text = (published / "README.md").read_text()
    for line in (
        "| 8 | 12.50 | 0.750 | 0.500 |",
        "| 16 | 6.25 | 0.500 | 0.438 |",
        "| 48: teacher b0 | 10.00 | 0.300 | 0.200 |",
        "**Demo numbers**",
        "30 target and 150 impostor trials",
        "![EER against embedding size](eer_by_dim.png)",
        "* b0: cc-by-4.0",
    ):
        assert line in text
    assert "not for commercial use" not in text


def test_the_cards_code_runs(published, voices, tmp_path, monkeypatch):
    text = (published / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    for name in ("one.wav", "two.wav"):
        soundfile.write(tmp_path / name, voices(1, 1.0).numpy(), 16000)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("ORG/NAME", str(published)), names)
    assert names["same_speaker"]


def test_the_cards_examples_carry_the_models_answers(published):
    (example,) = ModelCard.load(published / "README.md").data.widget
    assert (published / example["src"]).is_file()
    assert example["example_title"] == "Speaker 2"
    assert example["output"][0]["label"] == "id2" and len(example["output"]) == 5


def test_thresholds_of_the_report_travel_with_the_model(student, tmp_path):
    folder = export_model(student, tmp_path / "model", PROVENANCE, report=REPORT)
    loaded = EncoderClassifier.from_hparams(source=str(folder))
    assert loaded.hparams.thresholds["8"] == {"eer": 0.5}
    assert loaded.hparams.thresholds["32"] == {"eer": 0.375, "far_0.01": 0.6}


def test_an_export_without_licence_or_report_loads_and_is_not_uploaded(student, tmp_path):
    folder = export_model(student, tmp_path / "model")
    loaded = EncoderClassifier.from_hparams(source=str(folder))
    assert loaded.encode_batch(torch.zeros(1, 16000)).shape[-1] == student.embed_dim
    with pytest.raises(ValueError) as error:
        push_to_hub(folder, "org/name", dry_run=True)
    assert "names no license" in str(error.value) and "no report.json" in str(error.value)


def test_a_licence_of_its_own_is_other_to_the_hub(student, tmp_path):
    provenance = Provenance("Tiny", "non-commercial", "VoxBlink2.", {"M": "non-commercial"})
    card = ModelCard.load(export_model(student, tmp_path / "model", provenance) / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "non-commercial")
    assert "**not for commercial use**" in card.text


def test_a_student_of_a_noncommercial_teacher_says_so(student, tmp_path):
    teachers = {"M": "cc-by-nc-sa-4.0"}
    with pytest.raises(ValueError, match=r"teachers \['M'\]"):
        Provenance("Tiny", "cc-by-4.0", "VoxBlink2.", teachers)
    provenance = Provenance("Tiny", "cc-by-nc-sa-4.0", "VoxBlink2.", teachers)
    folder = export_model(student, tmp_path / "model", provenance)
    assert "**not for commercial use**" in (folder / "README.md").read_text()


# The check and the upload


def test_a_card_that_disagrees_is_not_published(copied):
    card = (copied / "README.md").read_text()
    card = card.replace("value: 0.125", "value: 0.0125").replace("license: cc-by-4.0\n", "")
    (copied / "README.md").write_text(card)
    check = json.loads((copied / "check.json").read_text())
    check["embedding"][:8] = [0.0] * 8
    (copied / "check.json").write_text(json.dumps(check))
    with pytest.raises(ValueError) as error:
        check_folder(copied)
    for problem in ("no license", "other numbers", "at target_dim 8 the embedding"):
        assert problem in str(error.value)


def test_labels_that_are_not_the_classifiers_are_not_published(copied):
    labels = CategoricalEncoder()
    labels.update_from_iterable(["id0", "id1"])
    labels.save(copied / "label_encoder.ckpt")
    with pytest.raises(ValueError, match="does not load with SpeechBrain alone"):
        check_folder(copied)


def test_files_that_no_export_wrote_are_not_published(copied):
    (copied / ".env").write_text("SECRET=1")
    with pytest.raises(ValueError, match=".env"):
        check_folder(copied)


def test_another_embedding_in_sentence_transformers_is_not_published(copied):
    code = (copied / "custom_st.py").read_text()
    (copied / "custom_st.py").write_text(code.replace("squeeze(1)", "squeeze(1) + 1"))
    with pytest.raises(ValueError, match="sentence-transformers gets another embedding"):
        check_folder(copied)


def test_a_folder_that_needs_this_package_is_not_published(copied):
    yaml = (copied / "hyperparams.yaml").read_text()
    (copied / "hyperparams.yaml").write_text(yaml + "extra: !new:speechbrain_mrl.ReDimNet\n")
    with pytest.raises(ValueError, match="does not load with SpeechBrain alone"):
        check_folder(copied)


PUSHES = """
import json, sys
from speechbrain_mrl.publish import hub

def push(*arguments, **options):
    try:
        print(hub.push_to_hub(folder, *arguments, **options))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")

for line in sys.stdin:
    folder, lines = json.loads(line)
    exec(lines)
    print("DONE", flush=True)
"""


@contextmanager
def pushing(server, home):
    """``run(lines, folder)``: what they print in a process of its own.

    huggingface_hub reads its settings at import.
    """
    env = {"HF_ENDPOINT": server.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    path = os.pathsep.join([str(Path(hub.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", PUSHES],
        env={**os.environ, **env, "HF_TOKEN": "secret", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(lines, folder):
            print(json.dumps([str(folder), lines]), file=process.stdin, flush=True)
            printed = []
            for line in process.stdout:
                if line == "DONE\n":
                    return "".join(printed)
                printed.append(line)
            raise AssertionError("the process ended: " + "".join(printed))

        yield run


LOAD = """
import torch
from speechbrain.inference.classifiers import EncoderClassifier

try:
    from speechbrain.utils.fetching import FetchConfig
except ImportError:  # before SpeechBrain 1.1
    pinned = {"revision": "v1", "use_auth_token": True}
else:
    pinned = {"fetch_config": FetchConfig(revision="v1", token=True)}
model = EncoderClassifier.from_hparams(source="org/tiny", **pinned)
print(json.dumps(model.encode_batch(torch.ones(1, 16000)).flatten().tolist()))
"""


def test_a_pushed_model_loads_from_the_hub_and_then_offline(published, loaded, tmp_path):
    home = {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    with HubServer(token="secret") as server:
        with pushing(server, tmp_path) as run:
            printed = run("push('org/tiny', private=True)", published)
        repo = server.repos["org/tiny"]
        files = repo.files("main")
        online = in_isolation(LOAD, HF_ENDPOINT=server.address, HF_TOKEN="secret", **home)
        offline = in_isolation(LOAD, HF_HUB_OFFLINE="1", HF_TOKEN="secret", **home)
    expected = loaded.encode_batch(torch.ones(1, 16000)).flatten()
    torch.testing.assert_close(torch.tensor(online), expected)
    torch.testing.assert_close(torch.tensor(offline), expected)

    assert repo.private and len(repo.commits) == 2  # the Hub's own first one, and ours
    assert repo.tags == {"v1": repo.branches["main"]}
    content, in_lfs = files["embedding_model.ckpt"]
    assert in_lfs and content == (published / "embedding_model.ckpt").read_bytes()
    card = ModelCard(files["README.md"][0].decode())
    assert 'source="org/tiny"' in card.text and "ORG/NAME" not in card.text
    source = f"{server.address}/org/tiny/resolve/main/examples/1.wav"
    assert card.data.widget[0]["src"] == source and "examples/1.wav" in files
    assert f"{server.address}/org/tiny" in printed and "from_hparams" in printed


def test_uploads_that_fail_or_are_refused_leave_the_repo_as_it_was(published, tmp_path):
    with HubServer(token="secret") as server, pushing(server, tmp_path) as run:
        run(
            "hub.check_folder = lambda folder: None\npush('org/tiny', tag='first')",
            published,
        )
        repo = server.repos["org/tiny"]
        before = dict(repo.branches), dict(repo.tags), list(repo.commits)
        server.lfs.clear()
        server.refuses_uploads = True
        printed = run(
            "hub.check_folder = lambda folder: None\n"
            "push('org/tiny')\n"
            "push('org/tiny', tag='first')\n"
            "push('org/tiny', private=True)\n"
            "push('org/tiny', token='wrong')\n"
            "push('org/new', dry_run=True)\n",
            published,
        )
        assert (dict(repo.branches), dict(repo.tags), list(repo.commits)) == before
        assert list(server.repos) == ["org/tiny"]
        for reason in (
            "to the Hub",
            "has the tag 'first'",
            "is public",
            "401",
            "would be uploaded",
        ):
            assert reason in printed

        server.refuses_uploads = False
        (repo.commits[repo.branches["main"]])["eer_by_dim.png"] = (b"old", False)
        (published_without_plot := tmp_path / "bare").mkdir()
        shutil.copytree(published, published_without_plot, dirs_exist_ok=True)
        (published_without_plot / "eer_by_dim.png").unlink()
        run(
            "hub.check_folder = lambda folder: None\npush('org/tiny', revision='next')",
            published_without_plot,
        )
        assert repo.branches["main"] == before[0]["main"]
        assert repo.tags["v1"] == repo.branches["next"] != repo.branches["main"]
        assert "eer_by_dim.png" not in repo.files("next")
        assert ".gitattributes" in repo.files("next")


def test_what_came_in_between_is_kept_and_a_missing_tag_is_said(published, tmp_path):
    pushes = "hub.check_folder = lambda folder: None\npush('org/tiny')\n"
    with ExitStack() as stack:
        with HubServer(token="secret") as server:
            run = stack.enter_context(pushing(server, tmp_path))
            server.overtaken = True
            printed = run(pushes, published)
            repo = server.repos["org/tiny"]
            assert "ConnectionError: the Hub did not do it" in printed and "is as it was" in printed
            assert "Uploading" in printed and set(repo.files("main")) == {
                ".gitattributes",
                "theirs.txt",
            }
            server.overtaken, server.refuses_tags = False, True
            printed = run(pushes, published)
            assert f"has the model as commit {repo.branches['main']}, and no tag v1" in printed
            assert "README.md" in repo.files("main") and "theirs.txt" in repo.files("main")
        printed = run(pushes, published)  # of a server that is gone
        assert "ConnectionError: the Hub did not do it" in printed


# The Space


SHOW = """
sys.path.insert(0, sys.argv[1])
import app

pinned = app.read_json(app.Path(sys.argv[1], "model.json"))
model = app.Model(pinned["model"], pinned["revision"])
page = app.compare(model, *sys.argv[2:])
print(json.dumps([model.name, len(app.build(model).blocks) > 10, page["cosine"].tolist()]))
"""


def test_a_pushed_space_runs_with_speechbrain_alone_and_the_commit_that_it_names(
    published, voices, tmp_path
):
    pytest.importorskip("gradio")
    pytest.importorskip("av")
    pushes = "hub.check_folder = lambda folder: None\npush('org/tiny', tag='first')\n"
    pushes += "hub.push_space('org/show', 'org/tiny', private=True)\n"
    with HubServer(token="secret") as server:
        with pushing(server, tmp_path) as run:
            printed = run(pushes, published)
        space, model = server.repos["spaces/org/show"], server.repos["org/tiny"]
        shown = model.branches["main"]
        model.commit("main", {})  # a later version, which the Space must not follow
        for name, (content, _) in space.files("main").items():
            (tmp_path / name).write_bytes(content)
        paths = [str(tmp_path / f"{i}.wav") for i in (1, 2)]
        for path in paths:
            soundfile.write(path, voices(1, 1.5).numpy(), 16000)
        home = {"HF_HOME": str(tmp_path / "other"), "HF_HUB_DISABLE_XET": "1"}
        name, is_page, page = in_isolation(
            SHOW, tmp_path, *paths, HF_ENDPOINT=server.address, HF_TOKEN="secret", **home
        )
    assert space.private and f"/spaces/org/show shows org/tiny at {shown}" in printed
    assert json.loads((tmp_path / "model.json").read_text())["revision"] == shown
    front = ModelCard((tmp_path / "README.md").read_text()).data
    assert (front.get("sdk"), front.get("app_file")) == ("gradio", "app.py")
    assert front.get("models") == ["org/tiny"]
    requirements = (tmp_path / "requirements.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.split('+')[0]}" in requirements
    assert name == "org/tiny" and is_page and page == ["1.00"] * len(SIZES)


# The recipe


def test_the_recipe_turns_a_release_into_a_speechbrain_model(
    tiny_config, release_file, random_model, voices, tmp_path, capsys
):
    path = release_file(tiny_config, name="M-vb2-ptn")
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    publish.main(
        [str(tmp_path / "model"), "--release=M-vb2-ptn", f"--source={path}", "--trials=Vox1-O"]
        + [f"--report={tmp_path / 'report.json'}"]
    )
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license_name: non-commercial" in card and "**not for commercial use**" in card
    wavs = voices(0, 1.0).unsqueeze(0)
    loaded = EncoderClassifier.from_hparams(source=tmp_path / "model")
    expected = embedding(random_model(tiny_config), wavs)
    torch.testing.assert_close(loaded.encode_batch(wavs)[0], expected)

    publish.main([str(tmp_path / "model"), "org/name", "--dry_run"])
    assert "would be uploaded to" in capsys.readouterr().out


def test_a_calibration_of_cosines_travels_with_the_model(copied, student, tmp_path, capsys):
    fitted = tmp_path / "calibration.json"
    write_calibrations({size: Calibration(-2.0, 10.0) for size in SIZES}, fitted)
    arguments = [str(copied), "org/name", "--dry_run", f"--calibration={fitted}"]
    publish.main(arguments)
    assert (copied / "calibration.json").read_text() == fitted.read_text()
    assert " calibration.json" in capsys.readouterr().out
    folder = export_model(student, tmp_path / "new", PROVENANCE, calibration=fitted)
    assert (folder / "calibration.json").read_text() == fitted.read_text()

    write_calibrations({8: Calibration(-2.0, 10.0)}, fitted)
    with pytest.raises(ValueError, match=r"no calibration of the sizes \[16, 32\]"):
        publish.main(arguments)
    with pytest.raises(ValueError, match=r"no calibration of the sizes \[16, 32\]"):
        export_model(student, tmp_path / "new", PROVENANCE, calibration=fitted)
    shutil.copyfile(fitted, copied / "calibration.json")
    with pytest.raises(ValueError, match=r"no calibration of the sizes \[16, 32\]"):
        check_folder(copied)


@pytest.mark.parametrize(
    "arguments",
    [
        ["folder"],
        ["--release=b2-vox2-ft_lm"],
        ["folder", "--release=b2-vox2-ft_lm", "--space=org/show"],
        ["folder", "org/name", "--space=org/show", "--dry_run"],
    ],
)
def test_the_recipe_says_what_it_lacks(arguments, capsys):
    with pytest.raises(SystemExit):
        publish.main(arguments)
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("line_break", ["\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_a_title_cannot_add_a_line_to_the_yaml(tmp_path, student, line_break):
    title = f"Tiny{line_break}target_dim: !apply:builtins.print [ran]"
    folder = export_model(student, tmp_path / "model", Provenance(title, "cc0-1.0", "Nothing."))
    first, second, *_ = (folder / "hyperparams.yaml").read_text(encoding="utf-8").splitlines()
    assert first == "# Tiny target_dim: !apply:builtins.print [ran]"
    assert second.startswith("# Loads with SpeechBrain alone")
