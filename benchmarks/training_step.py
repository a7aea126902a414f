"""A training step with the teacher store, with teachers that embed each batch, without teachers.

python benchmarks/training_step.py --students b0 b2 --teachers b0 b1 b2 b6

Random weights, random audio; the store holds 100,000 utterances. One step is the student's forward
and backward, the objective (cosine and contrastive) and AdamW. The step without teachers has the
mean square of the embeddings as its loss, the cheapest there is.
"""

from functools import partial

import torch
from timing import arguments, interleaved, start, write

from speechbrain_mrl import MatryoshkaDistillationLoss, ReDimNet, ReDimNetMRL
from speechbrain_mrl.inference.store import SHARD_SIZE, TeacherStore
from speechbrain_mrl.models.redimnet import PRESETS

N_STORED = 100_000


def make_store(teachers):
    """A full store of random embeddings."""
    store = TeacherStore("unused")
    store.rows = {f"id/{number}": number for number in range(N_STORED)}
    store.parts = {
        n: torch.randn(N_STORED, t.embed_dim).split(SHARD_SIZE) for n, t in teachers.items()
    }
    return store


def main():
    parser = arguments(__doc__, "training_step")
    parser.add_argument("--students", nargs="+", default=["b0", "b2"], choices=list(PRESETS))
    parser.add_argument("--teachers", nargs="+", default=["b0", "b1", "b2", "b6"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = start(parser)
    teachers = {name: ReDimNet.from_config(PRESETS[name]).eval() for name in args.teachers}
    store = make_store(teachers)
    wavs = torch.randn(args.batch_size, round(16000 * args.seconds)) / 10
    ids = [f"id/{number}" for number in torch.randint(N_STORED, (args.batch_size,)).tolist()]

    @torch.no_grad()
    def live():
        return {name: teacher(wavs) for name, teacher in teachers.items()}

    def step(student, optimizer, objective, targets):
        optimizer.zero_grad()
        embeddings = student(wavs)
        if targets is None:
            loss = embeddings.square().mean()
        else:
            loss, _ = objective(embeddings, targets())
        loss.backward()
        optimizer.step()

    rows = {}
    print(f"{args.batch_size} x {args.seconds} s, teachers {args.teachers}, {args.threads} threads")
    print(f"{'student':8}{'live':>10}{'store':>10}{'none':>10}{'live/store':>12}{'store/none':>12}")
    for name in args.students:
        student = ReDimNetMRL(backbone=name).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
        terms = {"cosine": 1.0, "contrastive": 0.1}
        objective = MatryoshkaDistillationLoss(student.mrl_dims, "all", terms)
        objective.fit(store.sample(2000)[1])
        ways = {"live": live, "store": partial(store.lookup, ids), "none": None}
        row = interleaved(
            {
                way: partial(step, student, optimizer, objective, targets)
                for way, targets in ways.items()
            },
            args.repeats,
        )
        rows[name] = row | {
            "live_to_store": row["live"] / row["store"],
            "store_to_none": row["store"] / row["none"],
        }
        print(
            f"{name:8}{row['live']:8.2f} s{row['store']:8.2f} s{row['none']:8.2f} s"
            f"{rows[name]['live_to_store']:12.2f}{rows[name]['store_to_none']:12.3f}",
            flush=True,
        )
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    write(args.output, settings | {"rows": rows})


if __name__ == "__main__":
    main()
