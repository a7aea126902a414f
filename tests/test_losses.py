import math

import pytest
import torch
import torch.nn.functional as F
from speechbrain.nnet.losses import LogSoftmaxWrapper
from torch import nn
from torch.multiprocessing import start_processes

from speechbrain_mrl.classification import MatryoshkaLoss, PrefixClassifier
from speechbrain_mrl.losses import MatryoshkaDistillationLoss

DIMS = (2, 4, 7)
WEIGHTS = (1.0, 2.0, 0.5)
TEACHER_WEIGHTS = {"large": 3.0}
MAPS = {
    "all": "all",
    "same teachers at every size": {dim: ["large", "small"] for dim in DIMS},
    "a teacher for each size": {"2": "small", "4": ["small", "large"], "7": "large"},
}
TEACHERS_OF = {
    "all": dict.fromkeys(DIMS, ["large", "small"]),
    "same teachers at every size": dict.fromkeys(DIMS, ["large", "small"]),
    "a teacher for each size": {2: ["small"], 4: ["large", "small"], 7: ["large"]},
}
NEEDS_FIT = ["cosine", "mse", "contrastive"]
CROSS_ENTROPY = LogSoftmaxWrapper(nn.Identity())


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_teachers(n_clips, seed=1):
    return {"small": random(n_clips, 5, seed=seed) + 1, "large": random(n_clips, 9, seed=seed + 1)}


def fitted(teacher_map="all", **arguments):
    objective = MatryoshkaDistillationLoss(DIMS, teacher_map, **arguments)
    return objective.double().fit(make_teachers(50))


# The slow, obvious reference: double precision, one vector or one size at a time.


def cosine(x, y):
    return (x @ y) / (x.norm() * y.norm())


def union_of(teachers, names):
    """Centred by the clips of `fitted`, unit length, weighted, side by side."""
    means = {name: clips.mean(dim=0) for name, clips in make_teachers(50).items()}
    shares = {name: TEACHER_WEIGHTS.get(name, 1.0) for name in names}
    return torch.cat(
        [
            torch.stack([row / row.norm() for row in teachers[name] - means[name]])
            * math.sqrt(shares[name] / sum(shares.values()))
            for name in names
        ],
        dim=1,
    )


def target_of(teachers, names):
    _, _, axes = torch.linalg.svd(union_of(make_teachers(50), names))
    signs = torch.stack([row[row.abs().argmax()].sign() for row in axes])
    return union_of(teachers, names) @ (axes * signs[:, None]).T


def reference(term, prefix, dim, teachers, names, scale):
    n_clips = len(prefix)
    target, union = target_of(teachers, names)[:, :dim], union_of(teachers, names)
    if term == "cosine":
        return sum(1 - cosine(prefix[i], target[i]) for i in range(n_clips)) / n_clips
    if term == "mse":
        return ((prefix - target) ** 2).sum() / (n_clips * dim)
    if term == "gram":
        pairs = [(i, j) for i in range(n_clips) for j in range(n_clips) if i != j]
        gaps = [cosine(prefix[i], prefix[j]) - cosine(union[i], union[j]) for i, j in pairs]
        return sum(gap**2 for gap in gaps) / len(pairs)
    total = 0
    for i in range(n_clips):
        wanted = torch.stack([scale * cosine(union[i], union[j]) for j in range(n_clips)])
        given = torch.stack([scale * cosine(prefix[i], target[j]) for j in range(n_clips)])
        total = total - (wanted.softmax(0) * given.log_softmax(0)).sum()
    return total / n_clips


@pytest.mark.parametrize("teacher_map", MAPS)
@pytest.mark.parametrize(
    "term, scale",
    [("cosine", 20), ("mse", 20), ("gram", 20), ("contrastive", 20), ("contrastive", 2)],
)
def test_each_term_is_the_slow_reference_in_value_and_gradient(term, scale, teacher_map):
    options = {} if scale == 20 else {"contrastive_scale": scale}
    objective = fitted(
        MAPS[teacher_map],
        terms={term: 0.5},
        mrl_weights=WEIGHTS,
        teacher_weights=TEACHER_WEIGHTS,
        **options,
    )
    for parameter in objective.parameters():
        nn.init.normal_(parameter)
    student = random(6, 8).requires_grad_()
    teachers = make_teachers(6, seed=5)
    loss, values = objective(student, teachers)
    inputs = [student, *objective.parameters()]
    gradients = torch.autograd.grad(loss, inputs)

    expected = {}
    for dim in DIMS:
        prefix = student[:, :dim]
        if objective.maps:
            prefix = prefix @ objective.maps[str(dim)].weight.T
        names = TEACHERS_OF[teacher_map][dim]
        expected[f"{term}/{dim}"] = reference(term, prefix, dim, teachers, names, scale)
    total = 0.5 * sum(w * x for w, x in zip(WEIGHTS, expected.values())) / sum(WEIGHTS)
    assert values == pytest.approx({k: x.item() for k, x in expected.items()}, abs=1e-6)
    torch.testing.assert_close(loss, total, atol=1e-6, rtol=0)
    expected_gradients = torch.autograd.grad(total, inputs)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=0)


def test_a_map_has_maps_of_its_own_only_where_teachers_differ():
    assert sum(p.numel() for p in fitted(MAPS["a teacher for each size"]).parameters()) == 69
    assert sum(p.numel() for p in fitted({2: "small", 4: "large", 7: "large"}).parameters()) == 69
    assert not list(fitted(MAPS["same teachers at every size"]).parameters())
    assert not list(fitted(MAPS["a teacher for each size"], terms={"gram": 1.0}).parameters())


def test_embeddings_narrower_than_the_largest_prefix_are_refused():
    with pytest.raises(ValueError, match=r"at least 7 dimensions.*got \(3, 6\)"):
        PrefixClassifier(8, 5, DIMS)(torch.ones(3, 6))
    with pytest.raises(ValueError, match="ends past embed_dim=6"):
        PrefixClassifier(6, 5, DIMS)
    with pytest.raises(ValueError, match=r"at least 7 dimensions.*got \(3, 6\)"):
        MatryoshkaDistillationLoss(DIMS, "all")(torch.ones(3, 6), make_teachers(3))


def test_one_size_alone_is_the_plain_loss():
    prediction, classes = random(5, 3), torch.tensor([0, 2, 1, 1, 0])
    loss = MatryoshkaLoss(CROSS_ENTROPY, [3], [7.0])({3: prediction}, classes)
    torch.testing.assert_close(loss, F.cross_entropy(prediction, classes))

    teachers = {"large": random(50, 9)}
    objective = MatryoshkaDistillationLoss([9], "all", terms={"cosine": 1.0}).double().fit(teachers)
    student, batch = random(6, 9, seed=3), {"large": random(6, 9, seed=4)}
    expected = 1 - F.cosine_similarity(student, objective.targets(batch)[9]).mean()
    torch.testing.assert_close(objective(student, batch)[0], expected)


def test_aam_is_the_formula_with_a_margin_for_each_size():
    torch.manual_seed(0)
    margins = {2: 0.1, 4: 0.2, 7: 0.3}
    objective = MatryoshkaDistillationLoss(
        DIMS, "all", {"aam": 2.0}, WEIGHTS, n_classes=3, margins=margins
    )
    student = random(5, 7).requires_grad_()
    classes = torch.tensor([0, 2, 1, 1, 0])
    loss, values = objective(student, {}, classes)

    weight = objective.classifier.weight.double()
    expected = {}
    for dim, margin in margins.items():
        total = 0
        for clip, speaker in zip(student, classes):
            logits = torch.stack([cosine(clip[:dim], row[:dim]) for row in weight])
            angles = logits.acos() + margin * F.one_hot(speaker, 3)
            assert angles[speaker] < math.pi  # past it SpeechBrain goes on in a straight line
            total = total - (30 * angles.cos()).log_softmax(0)[speaker]
        expected[f"aam/{dim}"] = total / len(student)
    assert values == pytest.approx({k: x.item() for k, x in expected.items()}, rel=1e-5)
    total = 2 * sum(w * x for w, x in zip(WEIGHTS, expected.values())) / sum(WEIGHTS)
    # SpeechBrain computes the margin in single precision
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0, check_dtype=False)
    gradient, plain = (torch.autograd.grad(x, student)[0] for x in (loss, total))
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)


def test_every_size_has_the_margin_that_is_given_or_a_fifth():
    for arguments, expected in (({}, 0.2), ({"margins": 0.3}, 0.3)):
        objective = MatryoshkaDistillationLoss(DIMS, "all", {"aam": 1.0}, n_classes=3, **arguments)
        assert objective.scaled_margins == dict.fromkeys(DIMS, expected)


def test_gram_of_two_clips_worked_out_by_hand():
    objective = MatryoshkaDistillationLoss([1, 2], "all", terms={"gram": 1.0})
    student = torch.tensor([[3.0, 4.0], [4.0, 3.0]])  # cosine 1 at size 1, 24/25 at size 2
    loss, values = objective(student, {"b0": torch.eye(2)})  # cosine 0
    assert values == pytest.approx({"gram/1": 1.0, "gram/2": 0.9216})
    assert loss.item() == pytest.approx(0.9608)


def test_cosine_and_mse_of_one_clip_worked_out_by_hand():
    objective = MatryoshkaDistillationLoss([1, 2], "all", terms={"cosine": 1.0, "mse": 1.0})
    # Mean zero, and the first axis has twice the clips of the second
    clips = torch.tensor([[2.0, 0], [-2, 0], [5, 0], [-5, 0], [0, 1], [0, -1]])
    objective.fit({"b0": clips})
    # Target (1, 1) / sqrt(2); cosine 7 / (5 sqrt(2)) with the student (3, 4)
    _, values = objective(torch.tensor([[3.0, 4.0]]), {"b0": torch.tensor([[1.0, 1.0]])})
    first, second = (3 - 0.5**0.5) ** 2, (4 - 0.5**0.5) ** 2
    expected = {"cosine/1": 0.0, "cosine/2": 1 - 7 / 50**0.5, "mse/1": first}
    assert values == pytest.approx({**expected, "mse/2": (first + second) / 2}, abs=1e-6)


def test_a_batch_of_one_clip_has_no_pairs_and_costs_no_gram():
    student = torch.ones(1, 2, requires_grad=True)
    objective = MatryoshkaDistillationLoss([1, 2], "all", terms={"gram": 1.0})
    loss, _ = objective(student, {"b0": torch.ones(1, 3)})
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


def test_gram_needs_no_fit_with_the_default_map():
    objective = MatryoshkaDistillationLoss((64, 128, 192, 256), terms={"gram": 1.0})
    student = torch.randn(8, 256, requires_grad=True)
    names = ("b0", "b1", "b2", "b6")
    loss, values = objective(student, {name: torch.randn(8, 192) for name in names})
    loss.backward()
    assert not objective.fitted and student.grad.abs().sum() > 0
    assert list(values) == ["gram/64", "gram/128", "gram/192", "gram/256"]
    assert all(isinstance(value, float) for value in values.values())


def test_dimensions_past_the_largest_prefix_and_teachers_get_no_gradient():
    terms = {"cosine": 1.0, "gram": 1.0, "contrastive": 0.1, "mse": 1.0, "aam": 1.0}
    objective = fitted(MAPS["a teacher for each size"], terms=terms, n_classes=3)
    student = random(5, 9).requires_grad_()
    teachers = {name: x.requires_grad_() for name, x in make_teachers(5).items()}
    loss, _ = objective(student, teachers, torch.tensor([0, 2, 1, 1, 0]))
    loss.backward()
    assert (student.grad[:, 7:] == 0).all() and (student.grad[:, :7] != 0).all()
    assert all(embeddings.grad is None for embeddings in teachers.values())


def test_a_student_that_is_the_target_has_no_cosine_loss_at_any_size():
    objective = fitted("all", terms={"cosine": 1.0, "mse": 1.0})
    teachers = make_teachers(6, seed=5)
    student = objective.targets(teachers)[7]
    loss, _ = objective(student, teachers)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_aligned_targets_go_on_from_a_students_prefix():
    objective, teachers = fitted(), make_teachers(50)
    turn, _ = torch.linalg.qr(random(7, 7, seed=9))
    student = objective.targets(teachers)[7] @ turn
    objective.align(teachers, student[:, :4])
    torch.testing.assert_close(objective.targets(teachers)[4], student[:, :4], atol=0.01, rtol=0)


@pytest.mark.parametrize("teacher_map", MAPS)
def test_a_fitted_state_restores_a_fresh_objective(teacher_map, tmp_path):
    objective = fitted(MAPS[teacher_map]).float()
    torch.save(objective.state_dict(), tmp_path / "objective.ckpt")
    fresh = MatryoshkaDistillationLoss(DIMS, MAPS[teacher_map])
    assert not fresh.fitted
    fresh.load_state_dict(torch.load(tmp_path / "objective.ckpt", weights_only=True))
    student, teachers = torch.randn(6, 7), make_teachers(6, seed=5)
    assert fresh.fitted and fresh(student, teachers) == objective(student, teachers)


def test_a_state_of_other_teachers_is_refused():
    state = fitted({dim: "large" for dim in DIMS}).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*mean_large"):
        MatryoshkaDistillationLoss(DIMS, {dim: "small" for dim in DIMS}).load_state_dict(state)


def test_half_precision_is_computed_in_single_precision():
    objective = fitted(terms={"cosine": 1.0, "gram": 1.0, "contrastive": 1.0, "mse": 1.0}).float()
    student = torch.randn(6, 7).bfloat16().requires_grad_()
    teachers = {name: x.bfloat16() for name, x in make_teachers(6, seed=5).items()}
    expected = objective(student.float(), {name: x.float() for name, x in teachers.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, values = objective(student, teachers)
    loss.backward()
    assert (loss, values) == expected and student.grad.isfinite().all()


def test_without_the_term_aam_labels_are_ignored():
    objective, student, teachers = fitted().float(), torch.randn(6, 7), make_teachers(6)
    loss, values = objective(student, teachers, torch.arange(6))
    assert (loss, values) == objective(student, teachers) and loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_embeddings_in_half_precision_do_not_overflow(dtype):
    """1024 times as large, sums of squares are above float16's 65504; cosines are as they were."""
    terms = dict.fromkeys(["cosine", "gram", "contrastive", "aam", "mse"], 1.0)
    labels, found = torch.tensor([0, 2, 1, 1, 0, 2]), []
    for factor in (1, 1024):
        torch.manual_seed(0)
        objective = MatryoshkaDistillationLoss(DIMS, "all", terms, n_classes=3)
        student = (factor * random(6, 7)).to(dtype).requires_grad_()
        clips, batch = (
            {name: (factor * x).to(dtype) for name, x in make_teachers(n, seed).items()}
            for n, seed in ((50, 1), (6, 5))
        )
        with torch.autocast("cpu", dtype=dtype):
            loss, values = objective.fit(clips)(student, batch, labels)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()
        found.append({key: x for key, x in values.items() if not key.startswith("mse")})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": {"cosine": 1.0, "triplet": 1.0}}, "terms must be some of.*triplet"),
        ({"terms": {"cosine": None}}, "terms must be some of"),
        ({"teacher_map": {2: "small", 4: "small"}}, r"teacher_map.*\(2, 4, 7\), got \[2, 4\]"),
        ({"teacher_map": None}, r"^the default teacher_map.*\(2, 4, 7\), got \[64, 128"),
        ({"teacher_map": dict.fromkeys(DIMS, [])}, "must name a teacher for each size"),
        ({"teacher_map": "small"}, "teacher_map must map sizes to entries, got a str"),
        ({"mrl_weights": [1.0]}, r"has 1 entries for 3 mrl_dims .*; give one weight per size"),
        ({"mrl_weights": [1.0, -1.0, 1.0]}, "must be finite, none negative"),
        ({"mrl_weights": [1.0, float("nan"), 1.0]}, "must be finite"),
        ({"mrl_weights": [0, 0, 0]}, "one above 0"),
        ({"mrl_weights": 3}, "must be a list of numbers, got 3"),
        ({"terms": {"cosine": float("inf")}}, "finite weights of at least 0, got"),
        ({"terms": {"cosine": 1.0, "gram": -1.0}}, "finite weights of at least 0, got"),
        ({"terms": {"aam": 1.0}}, "^the aam term needs n_classes"),
        ({"terms": {"aam": 1.0}, "n_classes": 3, "margins": {2: 0.1}}, "margins must have"),
        (
            {"teacher_map": dict.fromkeys(DIMS, "small"), "teacher_weights": {"b9": 2.0}},
            r"teacher_weights {'b9': 2.0} must be for teachers \['small'\]",
        ),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaDistillationLoss(DIMS, **{"teacher_map": "all", **arguments})


@pytest.mark.parametrize("term", NEEDS_FIT)
def test_a_term_with_a_target_asks_for_fit(term):
    objective = MatryoshkaDistillationLoss(DIMS, "all", terms={term: 1.0})
    with pytest.raises(RuntimeError, match="call fit"):
        objective(torch.randn(3, 7), make_teachers(3))


def test_a_call_without_teacher_labels_or_clips_is_refused():
    objective = fitted(MAPS["a teacher for each size"])
    student, teachers = random(3, 7), make_teachers(3)
    with pytest.raises(ValueError, match=r"\['large'\] are missing; given: \['small'\]"):
        objective(student, {"small": teachers["small"]})
    with pytest.raises(ValueError, match="same utterances, got.*'student': 2"):
        objective(student[:2], teachers)
    with pytest.raises(ValueError, match="same utterances, got.*'labels': 2"):
        objective(student, teachers, torch.tensor([0, 1]))
    objective = MatryoshkaDistillationLoss(DIMS, "all", terms={"aam": 1.0}, n_classes=3)
    with pytest.raises(ValueError, match=r"^the aam term needs labels, \(B,\)"):
        objective(student, {})
    loss, values = objective.eval()(student, {})  # held-out speakers are no classes
    assert loss == 0 and values == {}
    with pytest.raises(ValueError, match="predictions at size 2 hold 3 utterances for 2 targets"):
        MatryoshkaLoss(CROSS_ENTROPY, [2])({2: torch.ones(3, 4)}, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="predictions must map sizes to entries, got a Tensor"):
        MatryoshkaLoss(CROSS_ENTROPY, [2])(torch.ones(3, 4), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"^base_loss_per_dim must have .*\(2,\), got \[4\]"):
        MatryoshkaLoss({4: CROSS_ENTROPY}, [2])
    with pytest.raises(ValueError, match="^a schedule of margins needs the term aam$"):
        fitted().scale_margins(0.5)


def distributed_step(rank, world_size, folder, clips_each=4):
    """One step on this rank's clips; returns the loss and the gradients that DDP averaged."""
    objective = fitted(
        MAPS["a teacher for each size"],
        terms={"cosine": 1.0, "gram": 1.0, "contrastive": 0.1, "mse": 1.0, "aam": 0.5},
        n_classes=3,
    )
    student = nn.Linear(6, 7).double()
    for seed, parameter in enumerate([*student.parameters(), *objective.parameters()]):
        parameter.data = random(*parameter.shape, seed=seed)
    mine = slice(rank * clips_each, (rank + 1) * clips_each)
    features, labels = random(8, 6, seed=7)[mine], torch.tensor([0, 1, 2, 0, 2, 2, 1, 0])[mine]
    teachers = {name: x[mine] for name, x in make_teachers(8, seed=8).items()}
    modules = [student, objective]
    if world_size > 1:
        rendezvous = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", rendezvous, None, world_size, rank)
        modules = [nn.parallel.DistributedDataParallel(module) for module in modules]
    loss, _ = modules[1](modules[0](features), teachers, labels)
    loss.backward()
    gradients = [p.grad for p in (*student.parameters(), *objective.parameters())]
    torch.save((loss.detach(), gradients), f"{folder}/{world_size}-{rank}.pt")
    if world_size > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_learns_from_both_batches(tmp_path):
    distributed_step(0, 1, tmp_path, clips_each=8)
    start_processes(distributed_step, args=(2, tmp_path), nprocs=2, start_method="forkserver")
    loss, gradients = torch.load(tmp_path / "1-0.pt")
    ranks = [torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(sum(x[0] for x in ranks) / 2, loss, atol=1e-6, rtol=0)
    for rank in ranks:
        torch.testing.assert_close(rank[1], gradients, atol=1e-6, rtol=0)
