"""One GPU against the CPU: a step in every precision, the recipe end to end, two ranks."""

import json

import pytest
import speechbrain as sb
import torch
import train
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.inference.classifiers import EncoderClassifier
from test_distributed import N_CLIPS, join, leave, make_brain

from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.redimnet import ReDimNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = "cuda:0"


@pytest.fixture(autouse=True)
def float32_is_float32():
    """TensorFloat-32 rounds to ten bits; comparisons with the CPU are without it."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def clips(first=0, last=N_CLIPS):
    """Utterances ``first`` to ``last`` of a fixed batch, as SpeechBrain's datasets give them."""
    wavs = 0.1 * torch.randn(N_CLIPS, 4000, generator=torch.Generator().manual_seed(1))
    return [{"id": str(i), "sig": wavs[i], "label": i % 3} for i in range(first, last)]


def one_step(config, batch, world_size=1, **run_opts):
    """Loss, gradients (one vector) and BatchNorm statistics of a step, on the CPU."""
    brain = make_brain(config, world_size, **run_opts)
    brain.on_fit_start()
    brain.on_stage_start(sb.Stage.TRAIN, epoch=1)
    brain.modules.train()
    gradients = []
    brain.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(
            p.grad.flatten().float().cpu() for p in brain.modules.parameters() if p.grad is not None
        )
    )
    for _ in range(20):  # float16's first losses are scaled too high, and their steps skipped
        loss = brain.fit_batch(PaddedBatch(batch)).cpu()
        if gradients:
            break
    return loss, torch.cat(gradients), [buffer.cpu() for buffer in brain.statistics]


@pytest.mark.parametrize(
    "precision, compiled, least_cosine, loss_rtol",
    [
        ("fp32", False, 0.99999, 1e-4),
        ("fp32", True, 0.99999, 1e-4),
        ("bf16", False, 0.98, 3e-2),
        ("fp16", False, 0.99, 1e-2),
    ],
)
def test_a_step_on_the_gpu_is_the_cpus(tiny_config, precision, compiled, least_cosine, loss_rtol):
    expected_loss, expected, expected_statistics = one_step(tiny_config, clips())
    loss, found, statistics = one_step(
        tiny_config, clips(), device=DEVICE, precision=precision, compile=compiled
    )
    torch.testing.assert_close(loss.float(), expected_loss, rtol=loss_rtol, atol=1e-4)
    assert torch.cosine_similarity(found, expected, dim=0) >= least_cosine
    torch.testing.assert_close(statistics, expected_statistics, rtol=loss_rtol, atol=1e-2)


def test_a_gpu_embeds_what_a_cpu_embeds(tiny_config, random_model, small_clips):
    model = random_model(tiny_config)
    expected = embed_clips({"model": model}, small_clips)["model"]
    found = embed_clips({"model": model.to(DEVICE)}, small_clips, device=DEVICE)["model"]
    assert torch.cosine_similarity(found, expected).min() > 0.99999


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_recipe_runs_on_a_gpu_and_its_model_loads_on_either(
    small_corpus, release_file, tiny_config, tmp_path, voices, precision
):
    teacher = release_file(tiny_config, name="first", seed=1)
    options = {
        "data_folder": small_corpus,
        "output_folder": tmp_path / "run",
        "teachers": [str(teacher)],
        "backbone": teacher,
        "valid_speakers": 4,
        "test_speakers": 6,
        "chunk_seconds": 0.5,
        "batch_size": 8,
        "num_workers": 2,
        "number_of_epochs": 1,
        "embed_dim": 48,
        "mrl_dims": "[8, 16, 32, 48]",
        "device": DEVICE,
        "precision": precision,
    }
    train.main(["hparams/mrl_distill.yaml", *(f"--{k}={v}" for k, v in options.items())])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(0 <= results["eer"] < 0.5 for results in report["dims"].values())
    wavs = voices(0, 1.0).unsqueeze(0)
    on_cpu = EncoderClassifier.from_hparams(
        source=str(tmp_path / "run" / "model"), run_opts={"device": "cpu"}
    )
    on_gpu = EncoderClassifier.from_hparams(
        source=str(tmp_path / "run" / "model"), run_opts={"device": DEVICE}
    )
    expected, found = on_cpu.encode_batch(wavs), on_gpu.encode_batch(wavs).cpu()
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.9999


def _rank(rank, config, folder):
    join(rank, 2, folder)
    share = clips(4 * rank, 4 * rank + 4)
    torch.save(one_step(config, share, 2, device=DEVICE), f"{folder}/{rank}.pt")
    leave(2)


def test_two_ranks_on_one_gpu_are_one_process_with_both_batches(tiny_config, tmp_path):
    """Over gloo, for NCCL refuses two ranks on a card; BatchNorm learns from both."""
    _, expected, expected_statistics = one_step(tiny_config, clips(), device=DEVICE)
    torch.multiprocessing.spawn(_rank, args=(tiny_config, tmp_path), nprocs=2)
    for rank in range(2):
        _, found, statistics = torch.load(tmp_path / f"{rank}.pt")
        assert torch.cosine_similarity(found, expected, dim=0) > 0.9999
        torch.testing.assert_close(statistics, expected_statistics, rtol=1e-3, atol=1e-4)


def test_a_plain_forward_in_half_precision_is_near_float32(tiny_config, random_model, voices):
    model: ReDimNet = random_model(tiny_config).to(DEVICE)
    wavs = torch.stack([voices(i, 2.0) for i in range(4)]).to(DEVICE)
    with torch.no_grad():
        expected = model(wavs)
        with torch.autocast("cuda", torch.bfloat16):
            found = model(wavs).float()
    assert torch.cosine_similarity(found, expected).min() > 0.99
