"""Two gloo processes against one that has both batches."""

import os
from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
import torch.distributed as dist
from speechbrain.dataio.batch import PaddedBatch
from torch.multiprocessing import start_processes

from speechbrain_mrl import MatryoshkaDistillationLoss, ReDimNetMRL
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.training.distill import MRLBrain
from speechbrain_mrl.training.gradient_checkpointing import checkpoint_gradients
from speechbrain_mrl.training.projection import fit_objective
from speechbrain_mrl.utils import choose_device

N_CLIPS, N_STEPS = 8, 3


def make_brain(config, world_size, **run_opts):
    """A student, an objective with every term, and a store of random embeddings."""
    torch.manual_seed(0)
    teachers = {"a": torch.randn(N_CLIPS, 40), "b": torch.randn(N_CLIPS, 48)}
    store = TeacherStore("unused")
    store.rows = {str(i): i for i in range(N_CLIPS)}
    store.parts = {name: [found] for name, found in teachers.items()}
    terms = {"cosine": 1.0, "gram": 1.0, "contrastive": 0.1, "mse": 0.1, "aam": 0.1}
    objective = MatryoshkaDistillationLoss([16, 32], {16: "a", 32: "b"}, terms, n_classes=3)
    return MRLBrain(
        modules={
            "student": ReDimNetMRL(embed_dim=32, mrl_dims=(16, 32), backbone=config),
            "objective": objective.fit(
                {n: torch.randn(99, x.shape[1]) for n, x in teachers.items()}
            ),
        },
        opt_class=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        hparams={
            "wav_augment": None,
            "labels": True,
            "mrl_dims": [16, 32],
            "stage": "",
            "train_logger": SimpleNamespace(log_stats=lambda *_, **__: None),
        },
        run_opts={
            "device": "cpu",
            "distributed_launch": world_size > 1,
            "max_grad_norm": 1e9,
            **run_opts,
        },
        stores={sb.Stage.TRAIN: store, sb.Stage.VALID: store},
        valid_trials=None,
        lr_schedule=lambda optimizer, step: None,
    )


def train(rank, world_size, config, folder, checkpointing=False):
    """A few steps on this rank's clips, then validation, which rank 0 has a batch more of."""
    join(rank, world_size, folder)
    brain = make_brain(config, world_size)
    if checkpointing:
        checkpoint_gradients(brain.unwrapped["student"])
    brain.on_fit_start()
    brain.on_stage_start(sb.Stage.TRAIN, epoch=1)
    brain.modules.train()
    wavs = 0.1 * torch.randn(N_CLIPS, 4000, generator=torch.Generator().manual_seed(1))
    lengths = [1500, 2900, 2400, 3333] + 4 * [4000]  # rank 0 has padding, rank 1 none
    clips = [{"id": str(i), "sig": wavs[i, : lengths[i]], "label": i % 3} for i in range(N_CLIPS)]
    parameters = [p for p in brain.modules.parameters() if p.requires_grad]
    gradients = []
    brain.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in parameters])
    )
    losses = []
    for _ in range(N_STEPS):
        share = N_CLIPS // world_size
        losses.append(brain.fit_batch(PaddedBatch(clips[rank * share : (rank + 1) * share])))
    steps = list(zip(losses, gradients, strict=True))
    brain.checkpointer = SimpleNamespace(save_and_keep_only=lambda **_: None)
    brain.train_stats = {}
    shares = [clips] if world_size == 1 else [clips[:3], clips[3:6]] if rank == 0 else [clips[6:]]
    brain._fit_valid([PaddedBatch(share) for share in shares], epoch=1, enable=False)
    weights = [p.detach() for p in [*parameters, *brain.modules.buffers()]]
    torch.save((steps, weights, brain.embeddings), f"{folder}/{world_size}-{rank}.pt")
    leave(world_size)


def join(rank, world_size, folder):
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", None, world_size, rank)


def leave(world_size):
    if world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gradient checkpointing"])
def runs(request, tiny_config, tmp_path_factory):
    """What one process saved, and what each of two did, also with gradient checkpointing."""
    folder = tmp_path_factory.mktemp("ranks")
    train(0, 1, tiny_config, folder)
    arguments = 2, tiny_config, folder, request.param
    start_processes(train, args=arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]


def test_two_processes_train_as_one_with_both_batches_does(runs):
    """Step for step, loss and gradients of every parameter, and BatchNorm statistics at the end."""
    (expected, weights, _), *ranks = runs
    for number, (loss, gradients) in enumerate(expected):
        shares = [steps[number] for steps, _, _ in ranks]
        torch.testing.assert_close(sum(x[0] for x in shares) / 2, loss, rtol=1e-4, atol=1e-5)
        for _, found in shares:
            torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
    for _, found, _ in ranks:
        torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-6)
    assert expected[0][0] != expected[-1][0]


def test_each_process_validates_its_share_and_knows_all(runs):
    (_, _, expected), *ranks = runs
    assert len(expected) == N_CLIPS
    for _, _, found in ranks:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def fit_apart(rank, folder):
    """Rotations fitted by each rank on embeddings of its own, as ``LiveTeachers`` of its share."""
    join(rank, 2, folder)
    store = SimpleNamespace(sample=lambda n_clips: ([], own_embeddings(rank)))
    objective = MatryoshkaDistillationLoss([4, 8], "all")
    fit_objective(objective, store)
    torch.save(objective.state_dict(), f"{folder}/objective-{rank}.pt")
    leave(2)


def own_embeddings(rank):
    generator = torch.Generator().manual_seed(rank)
    return {name: torch.randn(40, 6, generator=generator) + rank for name in "ab"}


def test_two_processes_distil_to_the_target_that_the_first_has_fitted(tmp_path):
    start_processes(fit_apart, args=(tmp_path,), nprocs=2, start_method="forkserver")
    expected = MatryoshkaDistillationLoss([4, 8], "all").fit(own_embeddings(0)).state_dict()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"objective-{rank}.pt")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("given", ["command line", "run options", "YAML"])
def test_each_process_that_is_told_cuda_takes_its_own_gpu(given, monkeypatch):
    seen = {}
    monkeypatch.setattr(sb.Brain, "__init__", lambda brain, **options: seen.update(options))
    monkeypatch.setenv("LOCAL_RANK", "3")
    run_opts, hparams = {}, {"device": "cuda"}
    if given == "command line":
        _, run_opts, _ = sb.parse_arguments(["any.yaml", "--device=cuda", "--precision=bf16"])
        hparams = {}
    if given == "run options":
        run_opts, hparams = {"device": "cuda"}, {"device": "cpu"}
    with pytest.raises(AttributeError):  # there is no Brain behind it
        MRLBrain(stores={}, valid_trials=None, hparams=hparams, run_opts=run_opts, modules={})
    assert seen["run_opts"]["device"] == "cuda:3"
    assert seen["run_opts"].get("precision") == ("bf16" if given == "command line" else None)


def test_a_device_is_chosen_by_rank_unless_it_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(d) for d in (None, "cuda", "cuda:1", "cpu")] == [
        "cuda:5",
        "cuda:5",
        "cuda:1",
        "cpu",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == "cpu"
