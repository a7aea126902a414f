"""NaN in training, and numbers at the edge of their types."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
import torch.nn.functional as F
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_mrl import MatryoshkaDistillationLoss, ReDimNetMRL, train_distilled_mrl
from speechbrain_mrl.models import redimnet
from speechbrain_mrl.models.redimnet import LengthNorm, PrefixSpeakerClassifier, _mean
from speechbrain_mrl.training.distill import MRLBrain


class Mean(torch.nn.Module):
    def forward(self, embeddings, targets, labels):
        return embeddings.square().mean(), {"size": embeddings.square().mean().item()}


class FiniteLossOnly(torch.nn.Module):
    """A loss of 0 whose gradient is infinite."""

    def forward(self, embeddings, targets, labels):
        return (0 * embeddings).sum().sqrt(), {}


def _brain(tiny_config, objective, patience=3, **run_opts):
    torch.manual_seed(0)
    student = ReDimNetMRL(embed_dim=16, mrl_dims=(8, 16), backbone=tiny_config)
    brain = MRLBrain(
        stores={},
        valid_trials=None,
        lr_schedule=lambda optimizer, step: None,
        modules={"student": student, "objective": objective},
        opt_class=partial(torch.optim.AdamW, lr=1e-3),
        hparams={"wav_augment": None, "labels": False, "nonfinite_patience": patience},
        run_opts={"device": "cpu", **run_opts},
        checkpointer=SimpleNamespace(
            add_recoverable=lambda *_, **__: None, recover_if_possible=lambda: None
        ),
    )
    brain.on_fit_start()
    brain.on_stage_start(sb.Stage.TRAIN, 1)
    brain.modules.train()
    brain.nonfinite_count = 0
    return brain


def _batch(value=0.0, name="clip"):
    torch.manual_seed(1)
    clips = torch.randn(4, 4000) * 0.1
    clips[2, 100] += value
    return PaddedBatch([{"id": f"{name}{i}", "sig": clip} for i, clip in enumerate(clips)])


def _state(brain):
    state = brain.modules.state_dict() | {
        f"{name}/{key}": value
        for name, of_one in brain.optimizer.state_dict()["state"].items()
        for key, value in of_one.items()
    }
    return copy.deepcopy(state)


def test_no_value_is_read_between_a_batch_and_the_end_of_its_backward(tiny_config, monkeypatch):
    """On a GPU each read waits for all that is queued, and leaves it idle until more is."""
    terms = {"cosine": 1.0, "gram": 1.0, "contrastive": 0.1, "aam": 0.1}
    objective = MatryoshkaDistillationLoss((8, 16), "all", terms=terms, n_classes=4)
    teacher = {"one": torch.randn(8, 12)}
    brain = _brain(tiny_config, objective.fit(teacher))
    brain.stores = {
        sb.Stage.TRAIN: SimpleNamespace(targets=lambda batch: {"one": teacher["one"][:4]})
    }
    brain.hparams.labels = True
    batch = _batch()
    batch.label = torch.arange(4)
    # Lengths are checked on a CPU only, where they are the host's own.
    monkeypatch.setattr(redimnet, "sample_counts", lambda *arguments, **options: None)
    reads, after = [], []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        method = getattr(torch.Tensor, name)

        def read(tensor, *arguments, method=method, name=name, **options):
            reads.append(name)
            return method(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, read)
    brain.optimizer.register_step_pre_hook(lambda *_: after.append(len(reads)))
    brain.fit_batch(batch)
    assert after == [1]  # whether the gradients' norm is finite
    monkeypatch.undo()
    assert brain.n_batches == 1 and len(brain.sums) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_named(tiny_config, value, caplog):
    brain = _brain(tiny_config, Mean())
    brain.fit_batch(_batch())
    before, sums = _state(brain), dict(brain.sums)
    brain.fit_batch(_batch(value))
    after = _state(brain)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key  # BatchNorm statistics among them
    assert (brain.sums, brain.n_batches, brain.optimizer_step) == (sums, 1, 1)
    assert "not finite: clip0, clip1, clip2, clip3" in caplog.text
    brain.fit_batch(_batch())
    assert all(tensor.isfinite().all() for tensor in _state(brain).values())
    assert brain.optimizer_step == 2


def test_a_gradient_that_is_not_finite_takes_no_step(tiny_config):
    brain = _brain(tiny_config, FiniteLossOnly())
    before = _state(brain)
    brain.fit_batch(_batch())
    after = _state(brain)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    assert brain.nonfinite_count == 1


@pytest.mark.parametrize("patience", [0, 2])
def test_more_such_batches_than_allowed_stop_the_training(tiny_config, patience):
    brain = _brain(tiny_config, Mean(), patience)
    for _ in range(patience):
        brain.fit_batch(_batch(math.nan))
    with pytest.raises(ValueError, match=f"clip2.*nonfinite_patience allows {patience}"):
        brain.fit_batch(_batch(math.nan))


class FiniteLossIn(torch.nn.Module):
    """As ``FiniteLossOnly`` in one call, else as ``Mean``."""

    def __init__(self, call):
        super().__init__()
        self.objectives = [Mean()] * call + [FiniteLossOnly()] + [Mean()] * 9

    def forward(self, *arguments):
        return self.objectives.pop(0)(*arguments)


@pytest.mark.parametrize("guilty", [0, 1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_of_the_batches_of_a_step_the_one_that_is_not_finite_is_named(
    tiny_config, guilty, kind, caplog
):
    """It alone, and no weight changes; the next three batches make a step again."""
    objective = Mean() if kind == "loss" else FiniteLossIn(guilty)
    brain = _brain(tiny_config, objective, grad_accumulation_factor=3)
    before = _state(brain)
    for number in range(6):
        brain.step += 1
        bad = math.nan if (number, kind) == (guilty, "loss") else 0.0
        brain.fit_batch(_batch(bad, name="abcdef"[number]))
        if number == 2:
            after = _state(brain)
            weights = [key for key, _ in brain.modules.named_parameters()]
            assert all(torch.equal(after[key], before[key]) for key in weights)
            assert all(tensor.isfinite().all() for tensor in after.values())
            assert (brain.optimizer_step, brain.nonfinite_count) == (0, 1)
    named = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(named) == 1 and f"not finite: {'abc'[guilty]}0," in named[0]
    after = _state(brain)
    assert brain.optimizer_step == 1
    assert any(not torch.equal(after[key], before[key]) for key in weights)


def test_a_step_that_the_scaler_skips_leaves_batchnorm_statistics_too(tiny_config):
    brain = _brain(tiny_config, FiniteLossIn(0))
    brain.scaler = torch.GradScaler("cpu", init_scale=2.0)
    before = _state(brain)
    brain.fit_batch(_batch())
    after = _state(brain)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    assert brain.scaler.get_scale() == 1.0  # half of what it was
    brain.fit_batch(_batch())
    after = _state(brain)
    changed = [key for key in before if not torch.equal(after[key], before[key])]
    assert any("running_mean" in key for key in changed)
    assert any(key.endswith("linear.weight") for key in changed)


@pytest.mark.parametrize("limit", [5.0, 0.05, -1.0])
def test_gradients_of_all_groups_are_clipped_by_their_common_norm(tiny_config, limit):
    """As torch clips a copy of them all together; a negative limit switches clipping off."""
    brain = _brain(tiny_config, Mean(), max_grad_norm=limit)
    brain.part_lrs = {"backbone": 1e-4, "linear": 1e-5}
    brain.init_optimizers()
    assert len(brain.optimizer.param_groups) == 3
    torch.manual_seed(0)
    parameters = [p for p in brain.modules.parameters() if p.requires_grad]
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    for parameter, copied in zip(parameters, copies):
        parameter.grad = torch.randn_like(parameter)
        copied.grad = parameter.grad.clone()
    if limit > 0:
        torch.nn.utils.clip_grad_norm_(copies, limit)
    seen = []
    brain.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in parameters)
    )
    brain.finite = True
    brain.optimizers_step()
    torch.testing.assert_close(seen, [copied.grad for copied in copies])
    if limit > 0:
        norm = torch.stack([grad.norm() for grad in seen]).norm().item()
        assert norm == pytest.approx(limit, rel=1e-4)


def test_a_training_with_a_nan_batch_ends_in_finite_weights(
    small_corpus, random_model, tiny_config, tmp_path
):
    class Poison:
        calls = 0

        def __call__(self, wavs, wav_lens):
            self.calls += 1
            return (wavs * math.nan if self.calls == 2 else wavs), wav_lens

    student = train_distilled_mrl(
        {"one": random_model(tiny_config)},
        {"embed_dim": 16, "mrl_dims": [8, 16], "backbone": tiny_config},
        small_corpus,
        epochs=1,
        output_folder=tmp_path,
        batch_size=16,
        chunk_seconds=0.5,
        wav_augment=Poison(),
    )
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert "nan" not in (tmp_path / "train_log.txt").read_text()


# Numbers


@pytest.fixture(scope="module")
def speech(voices):
    return torch.stack([voices(speaker, 1.0) for speaker in range(3)])


def test_gain_and_offset_hardly_move_an_embedding(parity, speech):
    model = parity("b0").model()
    with torch.no_grad():
        expected = model(speech)
        for changed in (1000 * speech, 0.1 * speech, speech + 0.5):
            assert F.cosine_similarity(model(changed), expected).min() > 0.99


@pytest.mark.parametrize("samples", [257, 16000])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_embeddings_of_silence_are_finite(parity, samples, value):
    with torch.no_grad():
        assert parity("b0").model()(torch.full((2, samples), value)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_those_of_float32(parity, speech, dtype):
    model = parity("b0").model()
    with torch.no_grad():
        expected = model(speech)
        with torch.autocast("cpu", dtype):
            found = model(speech)
        assert F.cosine_similarity(found.float(), expected).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_gives_the_embeddings_of_its_float32(
    random_model, tiny_config, speech, dtype
):
    model, wav_lens = random_model(tiny_config), torch.tensor([1.0, 0.7, 0.5])
    speech = speech[
        :, :4000
    ]  # 67 frames take torch 2.14 minutes in float16 on some CPUs, 17 do not
    with torch.no_grad():
        expected = model(speech, wav_lens)
        model.to(dtype)
        for wavs in (speech, 1000 * speech, speech.to(dtype)):
            found = model(wavs, wav_lens)
            assert F.cosine_similarity(found.float(), expected).min() > 0.99


def test_a_mean_over_many_padded_frames_does_not_overflow():
    frames = torch.full((1, 1, 2000), 100.0, dtype=torch.float16)
    assert _mean(frames, torch.ones(1, 1, 2000)).item() == 100  # their sum is above 65504


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_large_half_precision_embeddings_do_not_overflow(dtype):
    """300 in each of 256 dimensions: the sum of squares is far above float16's 65504."""
    large = torch.full((4, 256), 300.0, dtype=dtype) * torch.tensor([1, 1, -1, -1.0])[:, None]
    large = large.to(dtype)
    assert torch.allclose(LengthNorm()(large).float().norm(dim=1), torch.ones(4), atol=0.02)
    classifier = PrefixSpeakerClassifier(256, 2, scale=1.0).to(dtype)
    classifier.weight.data = large[1:3].clone()
    expected = torch.tensor([1.0, -1.0]).log_softmax(0)  # the cosines
    assert torch.allclose(classifier(large)[0].float(), expected, atol=0.02)
