"""verify.py as a user runs it: from the YAML and the command line to the report."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import verify

from speechbrain_mrl import load_pretrained_redimnet
from speechbrain_mrl.dataio.clips import Clip
from speechbrain_mrl.evaluation.metrics import cllr, eer
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import export_model

SPEAKERS = [f"id{number:02d}" for number in range(20)]  # of small_corpus, 3 sessions of 2 clips
CLIPS = [f"s{session}/{clip}" for session in range(3) for clip in range(2)]


@pytest.fixture(scope="module")
def model(tiny_config, random_model):
    return MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (8, 32)).eval()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A folder as it is published."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    return export_model(model, folder, Provenance("Tiny", "cc-by-4.0", "Random numbers."))


def write_trials(path, speakers, suffix=".flac"):
    """Every pair of the speakers' first four clips; the suffix is not that of the files."""
    clips = [f"{speaker}/{clip}{suffix}" for speaker in speakers for clip in CLIPS[:4]]
    pairs = itertools.combinations(clips, 2)
    lines = [f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}" for a, b in pairs]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_clips(path, speakers):
    path.write_text("".join(f"{speaker}/{clip}.wav\n" for speaker in speakers for clip in CLIPS))
    return path


@pytest.fixture
def lists(tmp_path):
    """Trials of six speakers and of six others; a calibration and a cohort of the rest."""
    return {
        "first": write_trials(tmp_path / "first.txt", SPEAKERS[:6]),
        "second": write_trials(tmp_path / "second.txt", SPEAKERS[3:8]),
        "calibration": write_trials(tmp_path / "dev.txt", SPEAKERS[8:13]),
        "cohort": write_clips(tmp_path / "cohort.txt", SPEAKERS[13:]),
    }


@pytest.fixture
def run(small_corpus, exported, lists, tmp_path):
    """``run(key=value, ...)``: the report."""

    def call(yaml="hparams/verify.yaml", **changes):
        options = {
            "source": exported,
            "data_folder": small_corpus,
            "trials": lists["first"],
            "output_folder": tmp_path / "out",
            "n_bootstrap": 10,
            "num_workers": 0,
            "device": "cpu",
            **changes,
        }
        given = [f"--{key}={value}" for key, value in options.items() if value is not None]
        verify.main([str(yaml), *given])
        return json.loads(Path(options["output_folder"], "report.json").read_text())

    return call


def scores_by_hand(model, corpus, trials_path):
    """Cosines of each trial's clips, embedded one by one, and the labels."""
    fields = [line.split() for line in trials_path.read_text().splitlines()]
    embeddings = {}
    for clip_id in {clip_id for _, *pair in fields for clip_id in pair}:
        path = corpus / "wav" / Path(clip_id).with_suffix(".wav")
        clip = Clip(clip_id, str(path), 0, 19200)  # 1.2 s
        embeddings[clip_id] = embed_clips({"model": model}, [clip])["model"][0]
    labels = np.array([label == "1" for label, *_ in fields])
    return {
        size: np.array(
            [
                torch.cosine_similarity(embeddings[a][:size], embeddings[b][:size], 0).item()
                for _, a, b in fields
            ]
        )
        for size in (8, 32)
    }, labels


def test_an_exported_folder_is_verified_at_the_sizes_that_it_names(
    run, model, small_corpus, lists, tmp_path, capsys
):
    report = run()
    assert list(report["dims"]) == ["8", "32"]
    scores, labels = scores_by_hand(model, small_corpus, lists["first"])
    for size in (8, 32):
        expected, _ = eer(scores[size], labels)
        assert report["dims"][str(size)]["eer"] == pytest.approx(expected, abs=1e-6)
    assert report["trials"] == {"target": 36, "impostor": 240}  # 6 * C(4, 2), C(6, 2) * 4 * 4
    assert report["params"] > 0 and report["corpus"] == str(small_corpus)
    for name in ("eer_by_dim", "det", "scores", "eer_by_duration"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 0
    assert "36 target, 240 impostor trials" in capsys.readouterr().out


def test_a_checkpoint_file_has_its_one_size(run, release_file, tiny_config):
    path = release_file(tiny_config)
    report = run(source=path)
    assert list(report["dims"]) == [str(load_pretrained_redimnet(source=path).embed_dim)]
    assert report["source"] == str(path)


def test_several_lists_have_a_part_each_and_the_first_is_the_report(run, lists, tmp_path):
    report = run(trials=f"[{lists['first']}, {lists['second']}]")
    assert list(report["lists"]) == ["first", "second"] and report["list"] == "first"
    for key in ("dims", "trials", "by_duration"):
        assert report[key] == report["lists"]["first"][key]
    alone = run(trials=lists["second"])
    assert report["lists"]["second"]["dims"]["8"]["eer"] == alone["dims"]["8"]["eer"]
    assert (tmp_path / "out" / "second" / "det.png").exists()


def test_lists_are_named_in_a_yaml_of_ones_own(run, lists, tmp_path):
    text = Path("hparams/verify.yaml").read_text()
    named = f"trials: {{easy: {lists['first']}, hard: {lists['second']}}}"
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("trials: !PLACEHOLDER", named))
    assert list(run(yaml=own, trials=None)["lists"]) == ["easy", "hard"]


def test_each_clip_is_embedded_once_and_a_later_list_costs_its_new_clips(run, lists, monkeypatch):
    embedded = []

    def counting(encoders, clips, *arguments):
        embedded.extend(clip.id for clip in clips)
        return embed_clips(encoders, clips, *arguments)

    monkeypatch.setattr("speechbrain_mrl.inference.store.embed_clips", counting)
    first = run()
    assert len(embedded) == len(set(embedded)) == 24
    assert run() == {**first, "seconds": pytest.approx(first["seconds"], abs=60)}
    assert len(embedded) == 24
    run(trials=f"[{lists['first']}, {lists['second']}]")
    assert len(embedded) == len(set(embedded)) == 32  # two new speakers of four clips


def test_a_killed_run_goes_on_where_it_was(run, monkeypatch):
    embedded = []

    def dying(encoders, clips, *arguments):
        if len(embedded) == 8:
            raise KeyboardInterrupt
        embedded.extend(clip.id for clip in clips)
        return embed_clips(encoders, clips, *arguments)

    monkeypatch.setattr("speechbrain_mrl.inference.store.SHARD_SIZE", 4)
    monkeypatch.setattr("speechbrain_mrl.inference.store.embed_clips", dying)
    with pytest.raises(KeyboardInterrupt):
        run()
    embedded.append("the second run")
    run()
    assert len(embedded) - 1 == len(set(embedded)) - 1 == 24


def test_steps_build_on_each_other_and_are_reported_beside_the_cosine(run, lists, tmp_path):
    cohort = lists["cohort"]
    plain = run()["dims"]
    report = run(
        domain=cohort, cohort=cohort, cohort_top=20, plda=cohort, calibration=lists["calibration"]
    )
    for size in ("8", "32"):
        found = report["dims"][size]
        steps = {name: found.pop(name) for name in ("centred", "as_norm", "plda", "calibrated")}
        assert found == plain[size]
        assert all(0 <= result["eer"] <= 1 for result in steps.values())
        assert {"act_dcf", "act_dcf_0.05", "cllr", "cllr_ci"} <= steps["calibrated"].keys()
    written = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert written["scores"] == "as_norm" and list(written["dims"]) == ["8", "32"]


def test_a_calibration_of_an_earlier_run_is_applied(run, lists, model, small_corpus, tmp_path):
    fitted = run(calibration=lists["calibration"])
    file = tmp_path / "out" / "calibration.json"
    kept = file.rename(tmp_path / "kept.json")
    applied = run(calibration=kept)
    assert applied["dims"] == fitted["dims"]
    numbers = json.loads(kept.read_text())["dims"]["8"]
    scores, labels = scores_by_hand(model, small_corpus, lists["first"])
    durations = sum(numbers["quality"]) * np.log(1.2)  # of clips that all last 1.2 s
    llrs = numbers["offset"] + numbers["scale"] * scores[8] + durations
    found = applied["dims"]["8"]["calibrated"]["cllr"]
    assert found == pytest.approx(cllr(llrs, labels), abs=1e-3)
    with pytest.raises(ValueError, match="calibration is of cosine at .*scores are as_norm"):
        run(calibration=kept, cohort=lists["cohort"], cohort_top=20)


def test_two_models_are_compared_at_each_size(run, release_file, tiny_config, exported):
    same = run(compare_to=exported)["comparison"]
    assert same["size"] is None and same["dims"]["8"]["difference_ci"] == [0, 0]
    other = run(compare_to=release_file(tiny_config))["comparison"]
    assert other["size"] == 32  # the only one that it has
    assert list(other["dims"]) == ["8", "32"]


def test_whom_a_step_is_fitted_on_must_not_be_tested(run, lists, tmp_path):
    shared = write_clips(tmp_path / "shared.txt", SPEAKERS[5:9])
    for role in ("cohort", "plda", "domain"):
        with pytest.raises(ValueError, match="shared.txt has 1 speakers of the trials.*'id05'"):
            run(**{role: shared})
    with pytest.raises(ValueError, match="second.txt has 3 speakers of the trials"):
        run(calibration=lists["second"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 id00/s0/0.wav id00/s1/0.wav\n0 id00/s0/0.wav\n", "bad.txt, line 2: expected"),
        ("", "bad.txt, line 1: expected"),
        ("1 id00/s0/0.wav id00/s1/0.wav\n", "bad.txt, lines 1 to 1: 1 target trials"),
        (
            "1 id00/s0/0.wav id00/s1/0.wav\n0 id00/s0/0.wav id99/s1/0.wav\n",
            "bad.txt, line 2: utterance 'id99/s1/0.wav' is missing",
        ),
    ],
)
def test_a_bad_list_is_refused_by_line_before_any_clip_is_embedded(
    run, tmp_path, monkeypatch, text, message
):
    monkeypatch.setattr(verify, "load_teacher", lambda *_, **__: pytest.fail("loaded the model"))
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(trials=tmp_path / "bad.txt")


def test_a_missing_clip_of_a_cohort_is_named_with_its_line(run, tmp_path):
    (tmp_path / "cohort.txt").write_text("id15/s0/0.wav\nid99/s0/0.wav\n")
    with pytest.raises(
        ValueError, match="cohort.txt, line 2: utterance 'id99/s0/0.wav' is missing"
    ):
        run(cohort=tmp_path / "cohort.txt")


def test_lists_of_one_name_are_refused(run, lists, tmp_path):
    (tmp_path / "other").mkdir()
    twin = write_trials(tmp_path / "other" / "first.txt", SPEAKERS[:3])
    with pytest.raises(ValueError, match="trials must be files of different names"):
        run(trials=f"[{lists['first']}, {twin}]")
