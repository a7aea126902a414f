"""Time and memory of the objective at all sizes, against the largest alone and one size at a time.

python benchmarks/objective.py --speakers=6000 --batch_size=128

Forward and backward of each term of MatryoshkaDistillationLoss. For aam also SpeechBrain's own
AdditiveAngularMargin on one product per size, which is today's way.
"""

import torch
import torch.nn.functional as F
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
from timing import arguments, interleaved, peak_memory, start, write

from speechbrain_mrl import MatryoshkaDistillationLoss

SIZES = (64, 128, 192, 256)
TERMS = ("aam", "cosine", "gram", "contrastive")


def step(term, sizes, speakers, batch_size):
    """A function that runs one forward and backward of a term."""
    torch.manual_seed(0)
    teachers = {name: torch.randn(500, width) for name, width in (("b0", 192), ("b2", 192))}
    objective = MatryoshkaDistillationLoss(sizes, "all", {term: 1.0}, n_classes=speakers)
    objective.fit(teachers)
    student = torch.randn(batch_size, SIZES[-1], requires_grad=True)
    batch = {name: found[:batch_size] for name, found in teachers.items()}
    labels = torch.randint(speakers, (batch_size,))

    def run():
        student.grad = None
        objective.zero_grad()
        objective(student, batch, labels)[0].backward()

    return run


def size_by_size(term, sizes, speakers, batch_size):
    """The same for SpeechBrain's margin loss, with one product for each size."""
    torch.manual_seed(0)
    loss = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30.0))
    weight = torch.randn(speakers, SIZES[-1], requires_grad=True)
    student = torch.randn(batch_size, SIZES[-1], requires_grad=True)
    labels = torch.randint(speakers, (batch_size, 1))

    def run():
        student.grad = weight.grad = None
        total = 0
        for dim in sizes:
            prefix, vectors = F.normalize(student[:, :dim]), F.normalize(weight[:, :dim])
            total = total + loss((prefix @ vectors.T).unsqueeze(1), labels)
        total.backward()

    return run


def main():
    parser = arguments(__doc__, "objective")
    parser.add_argument("--speakers", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=128)
    args = start(parser)
    rows = [(term, "here", step) for term in TERMS] + [("aam", "size by size", size_by_size)]
    cases = {
        (term, way, count): (function, term, sizes, args.speakers, args.batch_size)
        for term, way, function in rows
        for count, sizes in (("all", SIZES), ("largest", SIZES[-1:]))
    }
    seconds = interleaved(
        {key: make(*given) for key, (make, *given) in cases.items()}, args.repeats
    )
    found = []
    print(f"{args.speakers} speakers, {args.batch_size} utterances, {args.threads} threads")
    print(f"{'':28}{'largest':>11}{'all sizes':>12}{'ratio':>8}{'largest':>12}{'all sizes':>12}")
    for term, way, _ in rows:
        row = {"term": term, "way": way}
        for count in ("largest", "all"):
            row[f"{count}_ms"] = 1e3 * seconds[term, way, count]
            row[f"{count}_mb"] = peak_memory(*cases[term, way, count])
        row["ratio"] = row["all_ms"] / row["largest_ms"]
        found.append(row)
        print(
            f"{term + ', ' + way:28}{row['largest_ms']:8.1f} ms{row['all_ms']:9.1f} ms"
            f"{row['ratio']:8.2f}{row['largest_mb']:9.0f} MB{row['all_mb']:9.0f} MB"
        )
    here, plain = found[0], found[-1]
    ratio = here["all_ms"] / plain["largest_ms"]
    print(f"aam, all sizes here, against SpeechBrain's at the largest alone: {ratio:.2f}")
    settings = {"speakers": args.speakers, "batch_size": args.batch_size, "threads": args.threads}
    write(args.output, settings | {"rows": found, "aam_all_to_plain_largest": ratio})


if __name__ == "__main__":
    main()
