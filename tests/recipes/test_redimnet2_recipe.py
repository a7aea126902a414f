"""A ReDimNet2 through the whole recipe, as teacher and as student."""

import json
import subprocess
import sys

import pytest
import read_hparams
import torch
import train
from check_hparams import check_training
from short_runs import OPTIONS

from speechbrain_mrl.models.redimnet import ReDimNet
from speechbrain_mrl.models.redimnet2 import ReDimNet2


@pytest.fixture
def run(small_corpus, release_file, tiny_config, tiny_config2, tmp_path, short_runs):
    """``run(backbone, key=value, ...)``: a ReDimNet and a ReDimNet2 teach on the small corpus."""
    teachers = {
        "one": release_file(tiny_config, name="one", seed=1),
        "two": release_file({**tiny_config2, "agg_gnorm": True}, name="two", seed=2),
    }

    def call(backbone, yaml="hparams/mrl_distill.yaml", **changes):
        options = {
            "data_folder": small_corpus,
            "output_folder": tmp_path / "run",
            "teachers": [str(path) for path in teachers.values()],
            "backbone": teachers[backbone],
            **OPTIONS,
            "embed_dim": 48,
            "mrl_dims": "[8, 16, 32, 48]",
            **changes,
        }
        return train.main([yaml, *(f"--{k}={v}" for k, v in options.items())]), tmp_path / "run"

    return call


RELEASES = "data_folder: hparams\nteachers: [redimnet2_b6, b6]\nbackbone: redimnet2_b2\n"


def test_a_yaml_names_teachers_and_backbone_of_either_family():
    document = read_hparams.read_yaml("hparams/mrl_distill.yaml", f"{RELEASES}pretrained: False\n")
    (document,) = read_hparams.split_stages(document)
    check_training(read_hparams.parse(document))
    assert isinstance(train.load_stage(document)["student"], ReDimNet2)


@pytest.mark.parametrize("key", ["teacher_dataset", "student_dataset"])
def test_what_was_not_released_of_redimnet2_is_refused(key):
    document = read_hparams.read_yaml("hparams/mrl_distill.yaml", f"{RELEASES}{key}: vb2\n")
    (document,) = read_hparams.split_stages(document)
    with pytest.raises(ValueError, match="of ReDimNet2 was never released; released are b0/b1"):
        check_training(read_hparams.parse(document))


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["speechbrain_mrl"] = None
import torch
from speechbrain.inference.classifiers import EncoderClassifier

wavs, found = torch.load(sys.argv[2]), {}
for size in (8, 16, 32, 48):
    model = EncoderClassifier.from_hparams(sys.argv[1], overrides={"target_dim": size})
    found[size] = model.encode_batch(wavs, torch.tensor([1.0, 0.531])).squeeze(1).tolist()
print(json.dumps(found))
"""


@pytest.mark.parametrize("backbone, network", [("two", ReDimNet2), ("one", ReDimNet)])
def test_both_families_teach_a_student_of_either_that_loads_without_this_package(
    run, tmp_path, backbone, network
):
    student, folder = run(backbone)
    assert isinstance(student, ReDimNet2) == (network is ReDimNet2)
    report = json.loads((folder / "report.json").read_text())
    assert set(report["dims"]) == set(report["baselines"]["start"]) == {"8", "16", "32", "48"}
    assert set(report["baselines"]["teachers"]) == {"one", "two"}
    wavs = torch.randn(2, 16000) * 0.1
    torch.save(wavs, tmp_path / "wavs.pt")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, folder / "model", tmp_path / "wavs.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        alone = torch.cat([student.eval()(wavs[:1]), student(wavs[1:, :8496])])
    for size in (8, 16, 32, 48):
        torch.testing.assert_close(
            torch.tensor(found[str(size)]), alone[:, :size], atol=1e-4, rtol=1e-4
        )


def test_a_redimnet2_grows_stage_by_stage(run):
    student, folder = run("two", yaml="hparams/mrl_progressive.yaml")
    assert isinstance(student, ReDimNet2)
    assert (folder / "model" / "hyperparams.yaml").is_file()
