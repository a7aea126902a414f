"""The command line, in process; and once as a user types it."""

import functools
import json
import shutil
import subprocess
import sys
from concurrent import futures

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from test_utils import full_disk

from speechbrain_mrl import VoiceRegistry, cli
from speechbrain_mrl.cli import COMMANDS, main, parser
from speechbrain_mrl.evaluation.calibration import Calibration, read_calibrations
from speechbrain_mrl.inference import encoders, optimize
from speechbrain_mrl.inference.encoders import load_teacher
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.publish import hub
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import export_model
from speechbrain_mrl.utils import only_run, print_table

SIZES = (8, 16, 32)
EERS = {"8": 0.125, "16": 0.0625, "32": 0.03125}


@pytest.fixture(scope="module")
def student(tiny_config, random_model):
    return MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, SIZES).eval()


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    """An exported model with report, licence, a teacher and two speakers."""
    return export_model(
        student,
        tmp_path_factory.mktemp("published") / "model",
        Provenance(
            "Tiny ReDimNet",
            "cc-by-4.0",
            "Random numbers.",
            teachers={"b0": "cc-by-4.0"},
            trials="a list",
        ),
        report={
            "dims": {s: {"eer": e, "min_dcf": 0.5, "threshold": 0.25} for s, e in EERS.items()},
            "trials": {"target": 30, "impostor": 150},
            "corpus": "demo",
        },
        speakers={"ann": torch.ones(32), "bob": -torch.ones(32)},
    )


@pytest.fixture(scope="module")
def recordings(voices, tmp_path_factory):
    """Two recordings of one voice and one of another."""
    place = tmp_path_factory.mktemp("recordings")
    for name, speaker, clip in (("a1", 1, 0), ("a2", 1, 1), ("b1", 2, 0)):
        soundfile.write(place / f"{name}.wav", voices(speaker, 1.0, clip).numpy(), 16000)
    return place


def as_json(capsys, *arguments):
    assert main([str(argument) for argument in [*arguments, "--json"]]) == 0
    return json.loads(capsys.readouterr().out)


def expected(student, recordings, name, size=32):
    wav, _ = soundfile.read(recordings / f"{name}.wav", dtype="float32")
    with torch.no_grad():
        return F.normalize(student(torch.from_numpy(wav))[0, :size], dim=0)


def test_embed_writes_unit_prefixes_of_every_recording_of_a_folder(
    student, folder, recordings, tmp_path, capsys
):
    output = tmp_path / "voices.npz"
    arguments = ["embed", str(folder), str(recordings), "--target_dim=16", f"--output={output}"]
    assert main(arguments) == 0
    found = np.load(output)
    assert [name.rsplit("/", 1)[1] for name in found["ids"]] == ["a1.wav", "a2.wav", "b1.wav"]
    for name, row in zip(("a1", "a2", "b1"), found["embeddings"]):
        np.testing.assert_allclose(row, expected(student, recordings, name, 16), atol=1e-5)
    assert "3 embeddings of 16 dimensions" in capsys.readouterr().out


def test_embed_writes_the_file_that_it_names(folder, recordings, tmp_path, capsys):
    output = tmp_path / "new" / "plain"
    found = as_json(capsys, "embed", folder, recordings, f"--output={output}")
    assert found["output"] == str(output) and list(output.parent.iterdir()) == [output]
    assert np.load(output)["embeddings"].shape == (3, 32)


@pytest.mark.parametrize("place", ["file/out.npz", "a_folder", "/proc/out.npz"])
def test_what_cannot_be_written_is_refused_before_anything_is_embedded(
    place, folder, recordings, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    (tmp_path / "a_folder").mkdir()
    monkeypatch.setattr(encoders, "load_teacher", lambda *_, **__: pytest.fail("loaded the model"))
    assert main(["embed", str(folder), str(recordings), f"--output={tmp_path / place}"]) == 1
    assert f"cannot write {tmp_path / place}: " in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_embeddings(folder, recordings, tmp_path, capsys):
    output = tmp_path / "calls.npz"
    output.write_bytes(b"old")
    load_teacher(str(folder))  # the first of a process writes the model's code to a temporary file
    with full_disk(tmp_path, size=100):
        code = main(["embed", str(folder), str(recordings), f"--output={output}"])
    assert code == 1 and f"cannot write {output}" in capsys.readouterr().err
    assert output.read_bytes() == b"old" and list(tmp_path.iterdir()) == [output]


def test_embed_without_a_file_prints_the_embeddings_as_json(student, folder, recordings, capsys):
    found = as_json(capsys, "embed", folder, recordings / "a1.wav")
    (one,) = found["recordings"]
    assert one["seconds"] == 1.0 and found["target_dim"] == 32
    own = expected(student, recordings, "a1")
    np.testing.assert_allclose(one["embedding"], own, atol=1e-5)


def test_verify_scores_every_size_and_decides_by_the_models_threshold(
    student, folder, recordings, capsys
):
    pair = recordings / "a1.wav", recordings / "b1.wav"
    found = as_json(capsys, "verify", folder, *pair)["scores"]
    assert [one["size"] for one in found] == list(SIZES)
    for one in found:
        first, second = (expected(student, recordings, n, one["size"]) for n in ("a1", "b1"))
        assert one["score"] == pytest.approx((first @ second).item(), abs=1e-5)
        assert one["threshold"] == 0.25 and one["same"] == (one["score"] >= 0.25)
    found = as_json(capsys, "verify", folder, *pair, "--threshold=1.01")["scores"]
    assert not any(one["same"] for one in found)


def test_verify_of_a_list_reports_error_rates_at_every_size(folder, recordings, tmp_path, capsys):
    trials = tmp_path / "trials.txt"
    trials.write_text("1 a1.wav a2.wav\n0 a1.wav b1.wav\n")
    arguments = ["verify", str(folder), f"--trials={trials}", f"--data_folder={recordings}"]
    assert main([*arguments, f"--output={tmp_path / 'report'}"]) == 0
    assert "EER %" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(report["dims"]) == ["8", "16", "32"]
    assert report["trials"] == {"target": 1, "impostor": 1}


def test_enroll_and_identify_name_speakers_or_nobody(student, folder, recordings, tmp_path, capsys):
    staff = tmp_path / "staff"
    found = as_json(capsys, "enroll", staff, "ann", recordings / "a1.wav", f"--model={folder}")
    assert found == {"name": "ann", "recordings": 1, "seconds": 1.0}
    found = as_json(capsys, "enroll", staff, "bob", recordings / "b1.wav")
    (one,) = as_json(capsys, "identify", staff, recordings / "a2.wav")["recordings"]
    query = expected(student, recordings, "a2")
    scores = [(query @ expected(student, recordings, name)).item() for name in ("a1", "b1")]
    assert one["score"] == pytest.approx(max(scores), abs=1e-4)
    assert one["margin"] == pytest.approx(abs(scores[0] - scores[1]), abs=1e-4)
    (own,) = as_json(capsys, "identify", staff, recordings / "a1.wav")["recordings"]
    assert own["score"] == pytest.approx(1.0, abs=1e-5)
    assert (own["name"] == "ann") == (own["margin"] >= 0.05) == (own["reason"] is None)
    soundfile.write(tmp_path / "silence.wav", np.zeros(32000), 16000)
    assert main(["identify", str(staff), str(tmp_path / "silence.wav")]) == 0
    assert "nobody" in (table := capsys.readouterr().out) and "holds only silence" in table


def test_a_registry_keeps_its_model(folder, recordings, tmp_path, capsys):
    staff, wav = str(tmp_path / "staff"), str(recordings / "a1.wav")
    assert main(["enroll", staff, "ann", wav]) == 1
    assert "is no registry yet; give --model to make it" in capsys.readouterr().err
    assert not (tmp_path / "staff").exists()
    assert main(["enroll", staff, "ann", wav, f"--model={folder}"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["ann", "1", "1.000"]
    assert main(["enroll", staff, "bob", wav, "--threshold=0.3"]) == 1
    assert "--threshold is for a new registry" in capsys.readouterr().err


def test_who_enrols_waits_for_who_enrols(folder, recordings, tmp_path):
    staff, wav = str(tmp_path / "staff"), str(recordings / "a1.wav")
    first = VoiceRegistry(folder)
    first.enroll("bob", recordings / "b1.wav")
    with futures.ThreadPoolExecutor() as pool:
        with only_run(staff):
            second = pool.submit(main, ["enroll", staff, "ann", wav, f"--model={folder}"])
            with pytest.raises(futures.TimeoutError):
                second.result(timeout=1)
            first.save(staff)
        assert second.result() == 0
    assert [*VoiceRegistry.load(staff).speakers] == ["bob", "ann"]


def test_diarize_prints_turns_and_writes_rttm(folder, recordings, tmp_path, capsys):
    wavs = [soundfile.read(recordings / f"{name}.wav")[0] for name in ("a1", "b1")]
    call = tmp_path / "a call.wav"
    soundfile.write(call, np.concatenate([np.tile(wav, 8) for wav in wavs]), 16000)
    output = tmp_path / "call.rttm"
    arguments = ["diarize", folder, call, "--n_speakers=2", f"--output={output}"]
    turns = as_json(capsys, *arguments)["turns"]
    assert turns[0]["start"] == 0 and turns[-1]["end"] == 16
    rows = [line.split() for line in output.read_text().splitlines()]
    assert [[float(row[3]), row[7]] for row in rows] == [
        [turn["start"], f"speaker{turn['speaker']}"] for turn in turns
    ]
    assert {(row[0], row[1], len(row)) for row in rows} == {("SPEAKER", "a_call", 10)}
    assert main(["diarize", str(folder), str(call), "--n_speakers=1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["0.000", "16.000", "1"]


def test_calibrate_writes_what_a_fit_of_its_cosines_gives(
    student, folder, recordings, tmp_path, capsys
):
    trials, output = tmp_path / "trials.txt", tmp_path / "fitted.json"
    pairs = [(1, "a1", "a2"), (0, "a1", "b1"), (0, "a2", "b1")]
    trials.write_text("".join(f"{label} {x}.wav {y}.wav\n" for label, x, y in pairs))
    arguments = ["calibrate", folder, f"--trials={trials}", f"--data_folder={recordings}"]
    found = as_json(capsys, *arguments, f"--output={output}", "--p_target=0.5")
    calibrations, scores = read_calibrations(output)
    assert scores == "cosine" and [*calibrations] == [*SIZES] == [int(d) for d in found]
    cosines = [
        (expected(student, recordings, x) @ expected(student, recordings, y)).item()
        for _, x, y in pairs
    ]
    durations = np.zeros((3, 2))  # log of one second
    fitted = Calibration.fit(cosines, [1, 0, 0], durations, p_target=0.5)
    ratios = calibrations[32](cosines, durations)
    np.testing.assert_allclose(ratios, fitted(cosines, durations), rtol=1e-3)


def test_a_list_may_name_clips_as_voxceleb_does_and_no_other_file_is_read(
    folder, recordings, tmp_path, capsys
):
    data, trials = tmp_path / "data", tmp_path / "trials.txt"
    shutil.copytree(recordings, data / "wav" / "id1")
    (data / "wav" / "id1" / "broken.wav").write_bytes(b"not listed")
    trials.write_text("1 id1/a1.wav id1/a2.m4a\n0 wav/id1/a1 id1/b1.wav\n")
    found = as_json(capsys, "verify", folder, f"--trials={trials}", f"--data_folder={data}")
    assert found["trials"] == {"target": 1, "impostor": 1}


@pytest.fixture
def sources(release_file, tiny_config, folder, tmp_path, monkeypatch):
    """Every way to name an encoder, by its kind."""
    (cache := tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache.parent))
    path = release_file(tiny_config)
    shutil.copy(path, cache)
    return {
        "model's name": "b2",
        "release's name": "b2-vox2-ft_lm",
        "file": str(path),
        "folder": str(folder),
    }


@pytest.mark.parametrize("kind", ["model's name", "release's name", "file", "folder"])
def test_verify_embed_and_convert_take_the_same_models(
    kind, sources, student, random_model, tiny_config, recordings, tmp_path, capsys
):
    model, out = sources[kind], tmp_path / "converted"
    network = student if kind == "folder" else random_model(tiny_config)
    first, second = (expected(network, recordings, name) for name in ("a1", "b1"))
    pair = recordings / "a1.wav", recordings / "b1.wav"
    info = as_json(capsys, "convert", model, out)
    for source in (model, out):
        scores = as_json(capsys, "verify", source, *pair)["scores"]
        assert scores[-1]["score"] == pytest.approx((first @ second).item(), abs=1e-5)
    assert str(tmp_path) not in info["title"] + info["training_data"]


def test_a_folder_that_convert_may_not_replace_is_refused_first(tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert main(["convert", "b2-vox2-ft_lm", str(tmp_path), "--recordings=/gone"]) == 1
    assert "holds ['thesis.txt'], which no export wrote" in capsys.readouterr().err


def test_convert_keeps_a_releases_embedding(
    release_file, tiny_config, random_model, recordings, tmp_path, capsys
):
    path, out = release_file(tiny_config, name="b2-vox2-ft_lm"), tmp_path / "b2"
    found = as_json(capsys, "convert", "b2-vox2-ft_lm", out, f"--source={path}")
    assert found["license"] == "cc-by-4.0" and found["mrl_dims"] == [32]
    (one,) = as_json(capsys, "embed", out, recordings / "a1.wav")["recordings"]
    own = expected(random_model(tiny_config), recordings, "a1")
    np.testing.assert_allclose(one["embedding"], own, atol=1e-5)


def test_convert_puts_the_recordings_principal_axes_first(
    release_file, tiny_config, random_model, small_corpus, tmp_path, capsys
):
    path, out = release_file(tiny_config, name="b2-vox2-ft_lm"), tmp_path / "b2"
    arguments = [
        "convert",
        "b2-vox2-ft_lm",
        out,
        f"--source={path}",
        f"--recordings={small_corpus}",
    ]
    found = as_json(capsys, *arguments, "--mrl_dims", 8, 16, 32)
    assert found["mrl_dims"] == [8, 16, 32] and "120 recordings" in found["training_data"]
    wavs = [soundfile.read(p, dtype="float32")[0] for p in sorted(small_corpus.rglob("*.wav"))]
    with torch.no_grad():
        own = random_model(tiny_config)(torch.from_numpy(np.stack(wavs))).double()
    centred = own - own.mean(dim=0)
    pca = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:8].T
    (one,) = as_json(capsys, "embed", out, next(small_corpus.rglob("*.wav")), "--target_dim=8")[
        "recordings"
    ]
    index = sorted(small_corpus.rglob("*.wav")).index(next(small_corpus.rglob("*.wav")))
    signless = F.normalize(pca[index], dim=0).abs()
    np.testing.assert_allclose(np.abs(one["embedding"]), signless, atol=1e-3)


def test_export_cuts_and_halves_a_model_and_keeps_what_is_known_of_it(
    student, folder, recordings, tmp_path, capsys
):
    arguments = ["export", folder, tmp_path / "small", "--target_dim=16", "--dtype=float16"]
    small, whole = as_json(capsys, *arguments), as_json(capsys, "info", folder)
    assert small["mrl_dims"] == [8, 16] and small["megabytes"] < 0.6 * whole["megabytes"]
    for key in ("title", "license", "training_data", "teachers", "speakers", "list"):
        assert small[key] == whole[key]
    (one,) = as_json(capsys, "embed", tmp_path / "small", recordings / "a1.wav")["recordings"]
    own = expected(student, recordings, "a1", 16)
    np.testing.assert_allclose(one["embedding"], own, atol=0.01)


def test_info_tells_what_report_and_card_tell(student, folder, capsys):
    found = as_json(capsys, "info", folder)
    assert found["params"] == sum(p.numel() for p in student.parameters())
    assert {size: one["eer"] for size, one in found["dims"].items()} == EERS
    card = ModelCard.load(folder / "README.md").data
    assert found["license"] == card.license and found["title"] == card.model_name
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for part in ("8, 16, 32", "b0 (cc-by-4.0)", "Random numbers.", "12.50", "3.12", "2 known"):
        assert part in text


def test_info_says_what_to_do_with_a_model_of_an_earlier_version(folder, tmp_path, capsys):
    old = shutil.copytree(folder, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    for key in ("params", "speakers", "sha256"):
        del config[key]
    (old / "config.json").write_text(json.dumps(config))
    assert main(["info", str(old)]) == 1
    assert f"write it again: speechbrain-mrl export {old} NEW_FOLDER" in capsys.readouterr().err
    assert main(["export", str(old), str(tmp_path / "new")]) == 0
    assert main(["info", str(tmp_path / "new")]) == 0


def test_info_and_help_do_not_wait_for_torch(folder):
    code = f"""
import contextlib, sys
from speechbrain_mrl.cli import main
main(["info", {str(folder)!r}])
with contextlib.suppress(SystemExit):
    main(["embed", "--help"])
print({{"torch", "speechbrain", "numpy", "sklearn"}} & {{*sys.modules}})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Tiny ReDimNet" in done.stdout and "usage:" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", [*COMMANDS, "--help"])
def test_the_process_is_prepared_where_recordings_are_embedded(command, monkeypatch):
    prepared = []
    monkeypatch.setattr(optimize, "prepare_cpu", lambda: prepared.append(True))
    monkeypatch.setattr(cli, "main", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["speechbrain-mrl", command])
    with pytest.raises(SystemExit):
        cli.run()
    assert bool(prepared) == (command not in ("export", "publish", "info", "--help"))


def test_publish_lists_what_would_be_uploaded(folder, capsys):
    assert main(["publish", str(folder), "org/tiny", "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "embedding_model.ckpt" in text and "would be uploaded to" in text


def test_publish_pushes_the_model_then_the_space_that_shows_it(folder, capsys, monkeypatch):
    pushed = []

    def push(name, *given, **options):
        pushed.append((name, *given, options["private"], options["revision"]))
        print("for people")
        return f"hub/{given[0]}"

    monkeypatch.setattr(hub, "push_to_hub", functools.partial(push, "model"))
    monkeypatch.setattr(hub, "push_space", functools.partial(push, "space"))
    found = as_json(capsys, "publish", folder, "org/tiny", "--space=org/show", "--revision=next")
    assert pushed == [
        ("model", str(folder), "org/tiny", False, "next"),
        ("space", "org/show", "org/tiny", False, "next"),
    ]
    assert found["uploaded"] and found["space"] == "hub/org/show"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["info", "{empty}"], "no model that export_model wrote"),
        (["info", "org/does-not-exist"], "org/does-not-exist"),
        (["embed", "b9", "{wav}"], "neither a file or folder, nor a released name"),
        (["embed", "{model}", "missing.wav"], "there is no file missing.wav"),
        (["embed", "{model}", "{empty}"], "holds no recording"),
        (["embed", "{model}", "{wav}", "--target_dim=9"], r"one of [8, 16, 32]"),
        (["identify", "{empty}", "{wav}"], "so it is no saved registry"),
        (["diarize", "{model}", "{wav}"], "lasts 1.00 s; diarization needs 1.5 s at least"),
        (["diarize", "{model}", "{wav}", "--output={empty}"], "cannot write {empty}"),
        (["calibrate", "{model}", "--trials=/gone", "--data_folder=/gone"], "cannot open /gone"),
        (["convert", "b9", "out"], "named like b2, b2-vox2-ft_lm"),
        (["embed", "b2-vox2", "{wav}"], "named like b2, b2-vox2-ft_lm"),
        (["embed", "{model}", "{wav}", "--device=gpu"], "device 'gpu' cannot be used here"),
        (["verify", "{model}", "{wav}", "{wav}", "--device=mps"], "device 'mps' cannot be used"),
        (["verify", "{model}", "{empty}", "{empty}"], "there is no file"),
        (["export", "{model}", "{empty}/out", "--target_dim=9"], "target_dim must be one of"),
        (["publish", "{empty}", "org/name"], "write it with export_model"),
    ],
)
def test_a_users_error_is_one_sentence_and_exit_code_1(
    arguments, sentence, folder, recordings, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"empty": tmp_path, "model": folder, "wav": recordings / "a1.wav"}
    assert main([argument.format(**places) for argument in arguments]) == 1
    shown = capsys.readouterr()
    sentence = sentence.replace("{empty}", str(tmp_path))
    assert shown.err.count("\n") == 1 and sentence in shown.err and not shown.out


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["verify", "model", "one.wav"], ["verify", "model", "--trials=list"]]
    + [["calibrate", "model", "--trials=list"], ["identify", "registry"]]
    + [["publish", "model", "org/name", "--space=org/show", "--dry_run"]],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines() if line.startswith("  speechbrain-mrl")]
    assert stopped.value.code == 0 and lines
    for line in lines:
        assert parser().parse_args(line[1:]).command == name


def test_publishing_without_a_network_is_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr(hub, "check_folder", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["publish", str(folder), "org/tiny"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the Hub did not do it" in line and "org/tiny is as it was" in line
    monkeypatch.setattr(hub, "push_to_hub", lambda *_, **__: "https://hub/org/tiny")
    assert main(["publish", str(folder), "org/tiny", "--space=org/show"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the Hub did not do it" in line and "org/show does not show org/tiny" in line


def test_an_interrupted_command_says_so_without_a_trace(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "push_to_hub", interrupt)
    assert main(["publish", str(folder), "org/tiny"]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_table_in_a_pipe_folds_nothing_and_takes_names_as_they_are(folder, capsys):
    assert main(["info", str(folder)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 200
    name = "[bold]" + 150 * "x" + ".wav"
    print_table(["recording", "seconds"], [[name, "1.00"]])
    assert capsys.readouterr().out.splitlines()[1].split() == [name, "1.00"]


@pytest.mark.parametrize("console_script", [False, True])
def test_it_runs_as_a_user_types_it(folder, console_script):
    command = [sys.executable, "-m", "speechbrain_mrl", "info", str(folder), "--json"]
    if console_script:
        command[:3] = [sys.executable, "-c", "from speechbrain_mrl.cli import run; run()"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["title"] == "Tiny ReDimNet"
    assert not done.stderr
    failed = subprocess.run([*command[:-2], "/nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1 and "error:" in failed.stderr and "Traceback" not in failed.stderr
