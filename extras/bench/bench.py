"""How long a PPO step takes, next to a floor measured in the same run, and next to TRL.

    python extras/bench/bench.py                                    # minutes; no network
    python extras/bench/bench.py --trl_python=VENV/bin/python       # next to TRL's PPOTrainer
    python extras/bench/bench.py --before=FOLDER    # next to another checkout of this project, or
                                                    # to several: FOLDER,FOLDER
    python extras/bench/bench.py --stages=sft,reward_model,decode

For TRL: python -m venv VENV && VENV/bin/pip install torch==2.13.0 trl==1.10.0

Every trainer is a process of its own that runs ppo.main (or TRL's trainer) and stops before each
step. They take their steps in turn, one at a time, so whatever else the machine does hits all of
them. The first step of each is not counted. All get the same weights, prompts and batches, and the
same list of response lengths: "full" (every response has 64 tokens) and "natural" (most end
earlier).

The floor is what the matrix products of the real tokens need (counted; flops.py) at the rate of one
large matrix product, measured between the steps. "Computed / real" divides the tokens that the
models were given by the real tokens, by phase.
"""
import argparse, json, os, statistics, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)  # torchrun reads the same variable
sys.path.insert(0, str(HERE))
import flops, world

PHASES = ("rollout", "score", "update")
NOTES = """\
s: wall seconds of a step, least (median); CPU s: of all cores, least. floor: times the least time
that the real tokens need, at the rate of the trainer's dtype. GB: peak of the process."""
TRL_NOTES = """\
TRL with num_mini_batches=2 takes one optimizer step per epoch (2) where two are due (4, as ours
takes). bf16=True does nothing there when it is started with plain `python`, so its bf16 rows set
ACCELERATE_MIXED_PRECISION=bf16."""


class Child:
    """A trainer in a process of its own that takes a step when it is told to"""

    def __init__(self, name, kind, python, **cfg):
        self.name, self.kind, self.cfg, self.steps = name, kind, cfg, []
        out = Path(cfg["out"])
        out.parent.mkdir(parents=True, exist_ok=True)
        threads = str(os.cpu_count())
        env = os.environ | dict(OMP_NUM_THREADS=threads, HF_HUB_OFFLINE="1",
                                TOKENIZERS_PARALLELISM="false")
        self.log = out.with_suffix(".log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [python, HERE / "child.py", kind, json.dumps(cfg)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        self.hear()

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            last = (self.log.read_text().strip() or "no word").splitlines()[-1]
            print(f"bench.py: {self.name} ended early, see {self.log}: {last}", file=sys.stderr)
            raise SystemExit(2)
        return json.loads(line)

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        figures = self.hear()
        assert self.hear() == {"ready": True}
        return figures

    def end(self):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------- one run

def trainers(args, stage):
    """-> (name, kind, python, code, dtype) of the trainers that take turns"""
    here = HERE.parents[1]
    found = []
    for dtype in args.dtypes:
        short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        for code in args.before:
            name = "before" if len(args.before) == 1 else Path(code).name
            found.append((f"{name}, {short}", stage, PYTHON, code, dtype))
        found.append((f"ours, {short}", stage, PYTHON, here, dtype))
        if args.trl_python and stage == "ppo" and dtype in args.trl_dtypes:
            found.append((f"TRL, {short}", "trl", args.trl_python, here, dtype))
    return found


def run(args, stage, size, lengths):
    """Alternate -> the floor's child and the trainers, with the figures of their steps"""
    folder = Path(args.out, f"{stage}_{size}_{lengths}")
    common = dict(size=size, lengths=lengths, world=str(Path(args.out, f"world_{size}_{lengths}")))
    here = str(HERE.parents[1])
    floor = Child("floor", "floor", PYTHON, code=here, out=f"{folder}/floor",
                  dtype="float32", **common)
    children = [floor]
    try:
        for name, kind, python, code, dtype in trainers(args, stage):
            out = folder / name.replace(", ", "_")
            children.append(Child(name, kind, python, code=str(Path(code).resolve()), dtype=dtype,
                                  out=str(out), **common))
            children[-1].step()  # not counted
        for _ in range(args.repeats):
            for child in children:
                child.steps.append(child.step())
                seconds = sum(child.steps[-1]["wall"].values())
                print(f"{size} {lengths} {child.name}: {seconds:.2f} s", file=sys.stderr)
    finally:
        for child in children:
            child.end()
    steps = {child.name: child.steps for child in children}
    (folder / "steps.json").write_text(json.dumps(steps, indent=1))
    return floor, children[1:]


# ---------------------------------------------------------------- the table

def real_work(stage, size, lengths):
    """-> {phase: real tokens}, {phase: operations}, of a step"""
    rows = [world.PROMPT + length for length in lengths]
    tokens = sum(rows)
    read = tokens - len(rows)  # a response's last token is drawn, but not read
    if stage == "ppo":
        counts = dict(rollout=read, score=4 * tokens, update=2 * 2 * tokens)
        return counts, flops.ppo_flops(size, world.PROMPT, lengths)
    answers = sum(lengths)
    with_logits = flops.forward_flops(size, rows, logits=answers)
    if stage == "sft":
        return dict(step=tokens), dict(step=3 * with_logits)
    if stage == "decode":
        operations = flops.forward_flops(size, [length - 1 for length in rows], logits=answers)
        return dict(step=read), dict(step=operations)
    # Two answers to each prompt, which is computed once.
    prompts = world.PROMPT * len(rows) // 2
    return dict(step=prompts + answers), dict(step=3 * flops.forward_flops(size, rows))


def least(steps, kind, name=None):
    """The least seconds of a phase, or of the complete step"""
    return min(step[kind][name] if name else sum(step[kind].values()) for step in steps)


def lines(stage, size_name, kind, floor, children):
    """The rows of the table, one per trainer"""
    size = world.SIZES[size_name]
    lengths = world.response_lengths(kind, size.rows)
    real, operations = real_work(stage, size, lengths)
    rates = {dtype: max(step["rates"][dtype] for step in floor.steps)
             for dtype in ("float32", "bfloat16")}
    mean = statistics.fmean(lengths)
    for child in children:
        rate = rates[child.cfg["dtype"]]
        wall = least(child.steps, "wall")
        median = statistics.median(sum(step["wall"].values()) for step in child.steps)
        parts = " + ".join(f"{least(child.steps, 'wall', name):.1f}" for name in real)
        shares = []
        for name in real:
            due = real[name]
            if child.kind == "trl" and name == "score":
                due = due * 3 // 4  # its decoding has the policy's log-probs already
            computed = child.steps[-1]["computed"][name]
            shares.append(f"{computed / due:.2f}")
        last = list(real)[-1]
        above = wall / (sum(operations.values()) / rate)
        update_above = least(child.steps, "wall", last) / (operations[last] / rate)
        yield (f"| {stage} {size_name}, {kind} ({mean:.0f} of {world.RESPONSE}) | {child.name} | "
               f"{wall:.2f} ({median:.2f}) | {parts} | {least(child.steps, 'cpu'):.1f} | "
               f"{max(step['peak_gb'] for step in child.steps):.1f} | {', '.join(shares)} | "
               f"{above:.1f} ({update_above:.1f}) |")
    yield (f"| | floor | {sum(operations.values()) / rates['float32']:.2f} (fp32), "
           f"{sum(operations.values()) / rates['bfloat16']:.2f} (bf16) | "
           f"{rates['float32'] / 1e9:.0f} and {rates['bfloat16'] / 1e9:.0f} GFLOP/s | | | | 1 |")


COLUMNS = ("what, lengths (mean)", "trainer", "s a step", "rollout + score + update", "CPU s", "GB",
           "computed / real", "times its floor (update)")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main(words):
    flags = argparse.ArgumentParser(description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text):
        return text.split(",")

    flags.add_argument("--sizes", type=names, default=["A", "B"], help="of world.py: A, B, tiny")
    flags.add_argument("--lengths", type=names, default=["full", "natural"])
    flags.add_argument("--stages", type=names, default=["ppo"],
                       help="ppo, sft, reward_model, decode")
    flags.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    flags.add_argument("--repeats", type=int, default=3, help="counted steps of each trainer")
    flags.add_argument("--trl_python", help="the python of an environment with trl==1.10.0")
    flags.add_argument("--trl_dtypes", type=names, default=["float32", "bfloat16"])
    flags.add_argument("--before", type=names, default=[], help="checkouts to compare with")
    flags.add_argument("--out", default="out/bench")
    args = flags.parse_args(words)

    rows = []
    for stage in args.stages:
        for size in args.sizes:
            for kind in args.lengths:
                rows += lines(stage, size, kind, *run(args, stage, size, kind))
    print(f"python extras/bench/bench.py {' '.join(words)}\n\n{HEAD}")
    print("\n".join(rows))
    print(f"\n{NOTES}" + (f"\n{TRL_NOTES}" if args.trl_python else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
