"""The two halves of soak.sh: `drive` starts, checks and compares; `run` is ppo.py with a point
where it is killed.

The calls (of Python and C functions) that a phase makes are counted in the undisturbed run; a
kill is then drawn as a phase, how many of them to let pass, and which of its calls is the last.
A log line tells where a phase begins, ends, or is killed.
"""

import json, os, random, shutil, signal, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PHASES = ("rollout", "update", "checkpoint", "rename", "model folder")
TIMINGS = {"seconds", "rollout_s", "score_s", "update_s", "tokens_per_s", "peak_gb"}
PPO = (
    "--steps=48 --rollout_batch=16 --rollout_micro_batch=4 --score_micro_batch=8 --batch=8 "
    "--micro_batch=4 --response_len=12 --query_len=64 --lr=1e-3 --kl_target=0.1 "
    "--resume_every=2 --save_every=3"
).split()


# ---------------------------------------------------------------- one process: ppo.py, killed at a
# point


def run(log, phase, skip, calls):
    """ppo.py with its arguments; kill -9 at the calls-th call in a phase, after `skip` of them.
    "none": only count"""
    import ppo
    from plumbing import record, watch
    from plumbing.command_line import load_config

    def tell(*words):
        if phase != "other rank":
            os.write(log_file, (" ".join(map(str, words)) + "\n").encode())

    log_file, state = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), dict(skip=skip, made=0)

    def begins(name):
        tell("begin", name)
        if phase == "none":
            state["made"] = 0
        if phase == "none" or (
            phase == name and state["skip"] <= 0
        ):  # too few calls: the next one is armed too
            sys.setprofile(on_call)
        state["skip"] -= phase == name

    def ends(name):
        sys.setprofile(None)
        tell("end", name, state["made"])

    def on_call(frame, event, arg):
        state["made"] += 1
        if state["made"] == calls:
            sys.setprofile(None)
            tell("kill", phase, calls)
            os.kill(os.getpid(), signal.SIGKILL)

    def inside(name, function):
        def wrapped(*args, **kwargs):
            begins(name)
            result = function(*args, **kwargs)
            ends(name)
            return result

        return wrapped

    def save_checkpoint(
        *args, save=record.save_checkpoint
    ):  # the rename begins where the write has ended
        save(*args)
        ends("rename")

    def write(*args, save=record.dcp.save, **kwargs):
        inside("checkpoint", save)(*args, **kwargs)
        begins("rename")

    record.dcp.save = write
    ppo.save_checkpoint = watch.save_checkpoint = save_checkpoint
    ppo.roll_out, ppo.update = inside("rollout", ppo.roll_out), inside("update", ppo.update)
    ppo.save_model = record.save_model = inside("model folder", record.save_model)
    ppo.main(load_config(ppo.Config, "ppo"))


# ---------------------------------------------------------------- the driver


def start(out, ranks, log, phase="none", skip=0, calls=0, victim=0):
    """Run to the end, or to the kill -> exit status"""
    world = out.parent / "world"
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    words = [
        "run",
        log,
        phase,
        skip,
        calls,
        victim,
        f"--policy={world}/sft",
        f"--reward_model={world}/rm",
        f"--data={world}/data/prompts.jsonl",
        f"--out={out}",
        *PPO,
    ]
    with open(out.parent / "output.txt", "a") as output:
        command = [sys.executable, *launch, __file__, *map(str, words)]
        return subprocess.run(command, stdout=output, stderr=output).returncode


def weights(folder):
    from safetensors.torch import load_file

    return {
        name: w
        for file in sorted(folder.glob("*.safetensors"))
        for name, w in load_file(file).items()
    }


def drive(home, ranks, seed, kills):
    whole, killed, log = (
        home / f"whole_{ranks}",
        home / f"killed_{ranks}",
        home / f"kills_{ranks}.log",
    )
    for path in (killed, log):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    counted = home / f"whole_{ranks}.log"
    if not (whole / "config.json").exists():
        shutil.rmtree(whole, ignore_errors=True)
        counted.unlink(missing_ok=True)
        assert start(whole, ranks, counted) == 0, (
            f"the undisturbed run failed: see {home}/output.txt"
        )
    lines = counted.read_text().splitlines()
    made = {
        phase: min(int(line.split()[-1]) for line in lines if line.startswith(f"end {phase} "))
        for phase in PHASES
    }
    print("undisturbed; calls in a phase:", made, flush=True)

    draw = random.Random(seed)
    phases = [PHASES[k % len(PHASES)] for k in range(kills)]
    draw.shuffle(phases)
    for k, phase in enumerate(phases):
        skip = draw.randrange(3 if phase in ("rollout", "update") else 2)
        calls = draw.randrange(1, made[phase] + 1)
        victim = 0 if phase in ("rename", "model folder") else k % ranks  # those are rank 0's work
        status = start(killed, ranks, log, phase, skip, calls, victim)
        last = log.read_text().splitlines()[-2:]
        assert last[1] == f"kill {phase} {calls}" and last[0] == f"begin {phase}", (phase, last)
        assert status == (-signal.SIGKILL if ranks == 1 else 1), status
        steps = (
            (killed / "metrics.jsonl").read_text().count("\n")
            if (killed / "metrics.jsonl").exists()
            else 0
        )
        print(
            f"kill {k + 1:2}: inside {phase}, call {calls} of {made[phase]}; {steps} steps logged",
            flush=True,
        )
    assert start(killed, ranks, log, "end") == 0, f"the last run failed: see {home}/output.txt"

    one, two = weights(whole), weights(killed)
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one), (
        "the weights differ"
    )
    rows, samples = (
        [
            [
                {k: x for k, x in json.loads(line).items() if k not in TIMINGS}
                for line in open(out / file)
            ]
            for out in (whole, killed)
        ]
        for file in ("metrics.jsonl", "samples.jsonl")
    )
    assert [row["step"] for row in rows[1]] == list(range(len(rows[0]))), (
        "a step is missing or there twice"
    )
    assert rows[0] == rows[1], "the metrics differ"
    assert samples[0] == samples[1], "the samples differ"
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}, (
        "files are left over"
    )
    print(f"{kills} kills on {ranks} rank(s): {len(one)} weights the same to the last bit, "
          f"{len(rows[1])} steps once")


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(Path(sys.argv[2]).resolve(), *map(int, sys.argv[3:6]))
    else:
        log, phase, skip, calls, victim = sys.argv[2:7]
        sys.argv = ["ppo.py", *sys.argv[7:]]
        run(
            log,
            phase if os.environ.get("RANK", victim) == victim else "other rank",
            int(skip),
            int(calls),
        )
