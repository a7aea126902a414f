"""Encoders of SpeechBrain with a Matryoshka head, where Python trains, teaches and grows them."""

import encoders
import pytest
import torch

from speechbrain_mrl import (
    MatryoshkaDistillationLoss,
    MatryoshkaEncoder,
    MultiModelEnsemble,
    TeacherStore,
    expand_model,
    optimize_for_inference,
    train_distilled_mrl,
)
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.training.projection import (
    align_head,
    finish_head,
    pooled_features,
    start_from,
    start_new_dimensions,
)

KINDS = pytest.mark.parametrize("kind", list(encoders.ENCODERS))


def make(kind, sizes=(8, 16), seed=0):
    torch.manual_seed(seed)
    return MatryoshkaEncoder(embed_dim=sizes[-1], mrl_dims=sizes, **encoders.parts(kind, seed))


@pytest.fixture
def store(small_clips, random_model, tiny_config, tmp_path):
    store = TeacherStore(tmp_path / "store")
    store.fill({"one": random_model(tiny_config, seed=5)}, small_clips)
    return store


@KINDS
def test_an_encoder_of_ones_own_is_distilled_from_python(
    kind, small_corpus, random_model, tiny_config, tmp_path
):
    model = make(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    call = {
        "teachers": {"one": random_model(tiny_config, seed=5)},
        "student_config": {"backbone": model},
        "data": small_corpus,
        "output_folder": tmp_path,
        "batch_size": 16,
        "chunk_seconds": 0.5,
    }
    student = train_distilled_mrl(**call, epochs=1)
    assert isinstance(student, MatryoshkaEncoder) and student.mrl_dims == (8, 16)
    assert not student.training and student(torch.zeros(1, 8000)).shape == (1, 16)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    again = train_distilled_mrl(**call, epochs=1)  # which only loads what was trained
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[key])
    log = (tmp_path / "train_log.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch: 0", "epoch: 1"]


@torch.no_grad()
def test_a_start_is_rotated_before_it_is_truncated():
    model, seen = make("ecapa"), []
    student = start_from(model, 8, [4, 8], lambda whole: seen.append(whole.mrl_dims))
    assert seen == [(16,)] and student.mrl_dims == (4, 8)
    assert torch.equal(student.linear.weight, model.linear.weight[:8])
    larger = start_from(model, 20, [16, 20])
    assert torch.equal(larger.linear.weight[:16], model.linear.weight)


@torch.no_grad()
def test_the_head_is_fitted_in_closed_form_and_no_cosine_changes(store, small_clips):
    model = make("ecapa")
    objective = MatryoshkaDistillationLoss((8, 16), "all", terms={"cosine": 1.0})
    before = embed_clips({"it": model}, small_clips)["it"]
    targets = store.lookup([clip.id for clip in small_clips])
    align_head(model, 16, objective.fit(targets), store, small_clips)
    after = embed_clips({"it": model}, small_clips)["it"]
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-3, atol=1e-3)
    assert objective(after, targets)[0] < objective(before, targets)[0]
    finish_head(model, small_clips)
    found = embed_clips({"it": model}, small_clips)["it"]
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-3)
    variances = found.var(dim=0)
    assert (variances[:-1] >= variances[1:] - 1e-6).all()


@torch.no_grad()
def test_new_dimensions_are_fitted_to_what_the_old_ones_lack(store, small_clips):
    model = make("ecapa", sizes=(8,))
    pooled = pooled_features(model, small_clips)
    own = embed_clips({"it": model}, small_clips)["it"]
    torch.testing.assert_close(pooled @ model.linear.weight.T + model.linear.bias, own)
    grown = expand_model(model, 16)
    objective = MatryoshkaDistillationLoss((8, 16), "all", terms={"cosine": 1.0})
    targets = store.lookup([clip.id for clip in small_clips])
    objective.fit(targets)
    start_new_dimensions(grown, 8, objective, targets, small_clips)
    assert torch.equal(grown.linear.weight[:8], model.linear.weight)
    fitted = objective(embed_clips({"it": grown}, small_clips)["it"], targets)[0]
    unfitted = objective(embed_clips({"it": expand_model(model, 16)}, small_clips)["it"], targets)[
        0
    ]
    assert fitted < unfitted


def test_as_a_teacher_it_is_told_apart_by_its_weights_and_its_features():
    model = make("ecapa")
    found = {fingerprint(model), fingerprint(make("ecapa", seed=1))}
    assert fingerprint(make("ecapa")) in found and len(found) == 2
    model.compute_features.compute_fbanks.amin = 1e-5
    assert fingerprint(model) not in found


@torch.no_grad()
def test_an_ensemble_routes_a_size_to_its_prefix():
    model, wavs = make("ecapa").eval(), 0.1 * torch.randn(2, 8000)
    ensemble = MultiModelEnsemble(models={"ecapa": model}, routes={8: "ecapa"})
    torch.testing.assert_close(ensemble(wavs, target_dim=8).embeddings, model(wavs)[:, :8])


def test_there_is_no_faster_form_of_it():
    with pytest.raises(TypeError, match="must be a ReDimNet, got MatryoshkaEncoder; any other"):
        optimize_for_inference(make("ecapa"))
