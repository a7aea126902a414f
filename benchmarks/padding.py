"""What padding does to embeddings of SpeechBrain's encoders, by themselves and in a MatryoshkaEncoder.

python benchmarks/padding.py

A batch holds utterances of 1, 2, 3 and 4 s; each utterance is embedded alone, too. Encoders have
the sizes that SpeechBrain publishes and random weights, unless ``--source`` names published ones.
"""

from functools import partial

import timing
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.ResNet import ResNet
from speechbrain.lobes.models.Xvector import Xvector
from speechbrain.processing.features import InputNormalization

from speechbrain_mrl import MatryoshkaEncoder

CHANNELS = [1024, 1024, 1024, 1024, 3072]
RANDOM = {  # name -> mel bands, encoder
    "ecapa": (80, lambda: ECAPA_TDNN(80, channels=CHANNELS)),
    "resnet": (80, ResNet),
    "xvect": (24, lambda: Xvector(in_channels=24)),
}


def make(name):
    """A published encoder, or one of random weights, with a head of 64 dimensions."""
    if name not in RANDOM:
        return MatryoshkaEncoder.from_hparams(name).eval()
    n_mels, encoder = RANDOM[name]
    norm = InputNormalization(norm_type="sentence", std_norm=False)
    return MatryoshkaEncoder(encoder(), 64, (64,), Fbank(n_mels=n_mels), norm).eval()


def own(model, wavs, wav_lens):
    """What SpeechBrain's own modules give, called as ``EncoderClassifier`` calls them."""
    feats = model.mean_var_norm(model.compute_features(wavs), wav_lens)
    return model.embedding_model(feats, wav_lens).reshape(len(wavs), -1)


def main():
    parser = timing.arguments(__doc__, "padding")
    parser.add_argument("--source", nargs="+", default=list(RANDOM), help="folders or Hub ids")
    args = timing.start(parser)
    counts = [16000 * seconds for seconds in (1, 2, 3, 4)]
    clips = [0.1 * torch.randn(1, count) for count in counts]
    padded = torch.cat([torch.nn.functional.pad(x, (0, counts[-1] - x.shape[1])) for x in clips])
    wav_lens, whole = torch.tensor(counts) / counts[-1], torch.ones(1)
    print(f"{'encoder':>30}{'SpeechBrain':>13}{'with a head':>13}{'times as long':>15}")
    rows = []
    for name in args.source:
        model = make(name)

        with torch.inference_mode():
            cosines, ways = [], {"own": partial(own, model), "model": model}
            for way in ways.values():
                alone = torch.cat([way(clip, whole) for clip in clips])
                cosines.append(torch.cosine_similarity(alone, way(padded, wav_lens)).min().item())
            calls = {name: partial(way, padded, wav_lens) for name, way in ways.items()}
            seconds = timing.interleaved(calls, args.repeats)
        row = {
            "encoder": name,
            "speechbrain": cosines[0],
            "with_a_head": cosines[1],
            "times_as_long": seconds["model"] / seconds["own"],
        }
        rows.append(row)
        print(f"{name[-30:]:>30}{row['speechbrain']:>13.6f}{row['with_a_head']:>13.6f}", end="")
        print(f"{row['times_as_long']:>15.2f}")
    timing.write(args.output, {"rows": rows})


if __name__ == "__main__":
    main()
