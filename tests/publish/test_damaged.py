"""Published folders that were damaged, tampered with or interrupted."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_mrl.evaluation.calibration import (
    Calibration,
    check_calibration,
    write_calibrations,
)
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.publish.export import export_model, foreign_files
from speechbrain_mrl.publish.folder import model_info
from speechbrain_mrl.publish.hub import push_to_hub
from speechbrain_mrl.publish.load import load_published, read_speakers

PROVENANCE = Provenance("Tiny", "cc-by-4.0", "Nothing.", trials="Toy")
REPORT = {
    "dims": {str(d): {"eer": 0.1, "min_dcf": 0.5, "threshold": 0.4} for d in (8, 32)},
    "trials": {"target": 30, "impostor": 150},
    "corpus": "/home/ann/secret/VoxCeleb1",
}


@pytest.fixture(scope="module")
def exported(tiny_config, random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (8, 32)).eval()
    soundfile.write(folder / "voice.wav", np.ones(16000) / 2, 16000)
    speakers = {"ann": torch.ones(32), "bob": torch.arange(32.0)}
    examples = {"Ann": folder / "voice.wav"}
    options = {"report": REPORT, "speakers": speakers, "examples": examples}
    return export_model(model, folder / "model", PROVENANCE, **options)


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copied")


@pytest.mark.parametrize("name", ["embedding_model.ckpt", "classifier.ckpt"])
def test_a_flipped_bit_of_a_checkpoint_is_found_by_every_reader(copied, name):
    path = copied / name
    read = load_published if name == "embedding_model.ckpt" else read_speakers
    data = path.read_bytes()
    for place in np.linspace(200, len(data) - 200, 12).astype(int):
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=name):
            model_info(copied)
        try:
            found = read(copied)
        except ValueError as error:
            assert name in str(error)
        else:  # the bit is padding of the archive: nothing of it was read
            path.write_bytes(data)
            same = read(copied)
            if read is load_published:
                found, same = found.state_dict(), same.state_dict()
            assert all(torch.equal(found[key], same[key]) for key in same)


def test_yaml_aliases_do_not_keep_info_busy(copied):
    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n"
    for one, other in zip("abcdefgh", "bcdefghi"):
        bomb += f"{other}: &{other} [{','.join([f'*{one}'] * 9)}]\n"
    text = (copied / "hyperparams.yaml").read_text()
    (copied / "hyperparams.yaml").write_text(bomb + text.replace("F: 24", "F: *i"))
    started = time.monotonic()
    with pytest.raises(ValueError, match="hyperparams.yaml .* it has aliases"):
        model_info(copied)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", ["config.json", "report.json", "hyperparams.yaml"])
@pytest.mark.parametrize("text", ["", "[", "[]", '{"dims": {"8": {}}, "provenance": 3}', "{{{{"])
def test_a_damaged_text_is_one_sentence_that_names_it(copied, name, text):
    (copied / name).write_text(text)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        model_info(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["'ann'x => 0\n", "'ann' => 0\n" + 1000 * "(" + " => 1\n", "\0"])
def test_damaged_labels_are_one_sentence_that_names_them(copied, text):
    (copied / "label_encoder.ckpt").write_text(text)
    with pytest.raises(ValueError, match=r"label_encoder\.ckpt is not as export_model wrote it"):
        read_speakers(copied)
    with pytest.raises(ValueError, match=r"label_encoder\.ckpt .* its SHA-256 differs"):
        model_info(copied)


def _lines(tmp_path, **changes):
    path = tmp_path / "calibration.json"
    write_calibrations({8: Calibration(-1.0, 3.0, (0.5,), ((0.0, 1.0),))}, path)
    found = json.loads(path.read_text())
    found["dims"]["8"] |= changes
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"offset": float("nan")}, "has nan, which is not finite"),
        ({"scale": float("inf")}, "has inf, which is not finite"),
        ({"scale": "3.0"}, "has '3.0', which is no number"),
        ({"scale": -3.0}, "has the scale -3.0, it must be positive"),
        ({"quality": [None]}, "has None, which is no number"),
        ({"bounds": [[1.0, 0.0]]}, "bounds that are no ranges"),
        ({"quality": 3}, "is no calibration"),
    ],
)
def test_values_that_no_fit_gives_do_not_travel(tmp_path, changes, message):
    check_calibration(_lines(tmp_path), [8])
    with pytest.raises(ValueError, match=f"calibration.json .*{message}"):
        check_calibration(_lines(tmp_path, **changes), [8])


def test_only_the_cards_own_recordings_may_be_published(copied, tmp_path):
    assert foreign_files(copied) == []
    (tmp_path / "passwd").write_text("root")
    (copied / "examples" / "2.wav").symlink_to(tmp_path / "passwd")
    (copied / "examples" / ".env").write_text("SECRET=1")
    (copied / "check.json").unlink()
    (copied / "check.json").symlink_to(tmp_path / "passwd")
    assert foreign_files(copied) == ["check.json", "examples/.env", "examples/2.wav"]
    with pytest.raises(ValueError, match=r"examples/\.env.*no export wrote"):
        push_to_hub(copied, "org/name", dry_run=True)


def test_the_published_report_names_no_local_folder(exported):
    assert json.loads((exported / "report.json").read_text())["corpus"] == "VoxCeleb1"
    assert all(
        b"/home/ann" not in path.read_bytes() for path in exported.rglob("*") if path.is_file()
    )


def test_a_model_is_there_at_every_moment_of_its_replacement(
    exported, copied, tiny_config, random_model, monkeypatch
):
    replace, seen = os.replace, []

    def watched(*paths):
        replace(*paths)
        seen.append((copied / "hyperparams.yaml").is_file())

    monkeypatch.setattr(os, "replace", watched)
    if not hasattr(__import__("ctypes").CDLL(None), "renameat2"):
        pytest.skip("this system renames in two steps")
    model = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, (16, 32)).eval()
    export_model(model, copied, PROVENANCE)
    assert all(seen) and model_info(copied)["mrl_dims"] == [16, 32]
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


@pytest.mark.parametrize("repo_id", ["name", "org/", "a/b/c", "org/na me"])
def test_a_repo_without_an_organisation_is_refused_at_once(exported, repo_id):
    with pytest.raises(ValueError, match="repo_id must be organisation/name"):
        push_to_hub(exported, repo_id, dry_run=True)
    with pytest.raises(ValueError, match="tag must be of letters"):
        push_to_hub(exported, "org/name", dry_run=True, tag="v 1")
