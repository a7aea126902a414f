"""Error rates of one model in each arrangement for inference, on real trials.

python benchmarks/precision.py --source=results/mrl_distill/1986/model --data_folder=/data/voxceleb1 --trials=veri_test2.txt
"""

from pathlib import Path

import torch
from timing import arguments, start, write

from speechbrain_mrl.dataio.clips import find_clips, read_clips
from speechbrain_mrl.evaluation.verification import evaluate, read_trials
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.inference.onnx import ExportedEncoder, export_onnx
from speechbrain_mrl.inference.optimize import batch_seconds_for, for_inference
from speechbrain_mrl.publish.load import load_published


def main():
    parser = arguments(__doc__, "precision")
    parser.add_argument("--source", required=True, help="folder of a published model")
    parser.add_argument(
        "--data_folder", required=True, help="recordings of the trials, or their CSV"
    )
    parser.add_argument("--trials", required=True)
    parser.add_argument("--exported", type=Path, default=Path("results/precision.onnx"))
    args = start(parser)
    model = load_published(args.source)
    args.exported.parent.mkdir(parents=True, exist_ok=True)
    export_onnx(model, args.exported)
    encoders = {
        "plain": lambda wavs, wav_lens: model(wavs, wav_lens),  # itself would be arranged
        "fast": for_inference(model),
        "fast bfloat16": for_inference(model, "bfloat16"),
        "openvino bfloat16": ExportedEncoder(args.exported, "openvino", "bfloat16", args.threads),
    }
    trials = read_trials(args.trials)
    wanted = set(trials.clip_ids)
    read = read_clips if Path(args.data_folder).is_file() else find_clips
    clips = [clip for clip in read(args.data_folder) if clip.id in wanted]
    trials.check_clips({clip.id for clip in clips})
    found = embed_clips(encoders, clips, batch_seconds=batch_seconds_for(model))
    results = {"trials": len(trials.labels), "rows": {}}
    sizes = model.mrl_dims
    print(f"{'EER %':20}{''.join(f'{size:>8}' for size in sizes)}  lowest cosine")
    for name, embeddings in found.items():
        stacked = trials.stack(dict(zip((clip.id for clip in clips), embeddings, strict=True)))
        errors = evaluate(stacked, trials, sizes)
        cosine = torch.cosine_similarity(embeddings, found["plain"]).min().item()
        eers = {size: errors[str(size)]["eer"] for size in sizes}
        results["rows"][name] = {"eer": eers, "lowest_cosine": cosine}
        print(f"{name:20}{''.join(f'{100 * eer:8.3f}' for eer in eers.values())}  {cosine:.6f}")
    write(args.output, results)


if __name__ == "__main__":
    main()
