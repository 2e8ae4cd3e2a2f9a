"""The two halves of soak.sh: `drive` starts, checks and compares runs; `run` is ppo.py with a point
at which it is killed.

The undisturbed run counts the calls (of Python and C functions) that each phase makes. A kill is
then drawn at random: a phase, how many of these phases run to their end first, and the call within
the phase at which the process dies. Lines of the log say when a phase begins, ends, or is killed.
"""
import json, os, random, shutil, signal, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PHASES = ("rollout", "update", "checkpoint", "rename", "model folder")
TIMINGS = {"seconds", "rollout_s", "score_s", "update_s", "tokens_per_s", "peak_gb"}
PPO = ["--steps=48", "--rollout_batch=16", "--rollout_micro_batch=4", "--score_micro_batch=8",
       "--batch=8", "--micro_batch=4", "--response_len=12", "--query_len=64", "--lr=1e-3",
       "--kl_target=0.1", "--resume_every=2", "--save_every=3"]


# ---------------------------------------------------------------- one process, killed at a point

class Killer:
    """Counts the calls inside the phases; kill -9 at call number `calls` of a phase.

    phase: the phase to die in, after `skip` of them; "none": only count, and log the counts;
    "other rank": do nothing."""

    def __init__(self, log, phase, skip, calls):
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.phase = phase
        self.skip = skip
        self.calls = calls
        self.made = 0

    def tell(self, *words):
        if self.phase != "other rank":
            line = " ".join(str(word) for word in words)
            os.write(self.log, f"{line}\n".encode())

    def begins(self, name):
        self.tell("begin", name)
        if self.phase == "none":
            self.made = 0
            sys.setprofile(self.on_call)
        if self.phase == name:
            # If this phase makes too few calls, the count continues in the next one.
            if self.skip <= 0:
                sys.setprofile(self.on_call)
            self.skip -= 1

    def ends(self, name):
        sys.setprofile(None)
        self.tell("end", name, self.made)

    def on_call(self, frame, event, arg):
        self.made += 1
        if self.made == self.calls:
            sys.setprofile(None)
            self.tell("kill", self.phase, self.calls)
            os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, name, function):
        """The same function, as a phase"""
        def wrapped(*args, **kwargs):
            self.begins(name)
            result = function(*args, **kwargs)
            self.ends(name)
            return result
        return wrapped


def run_ppo(log, phase, skip, calls):
    """ppo.py with its arguments, its five phases watched by a Killer"""
    import ppo
    from plumbing import record, watch
    from plumbing.command_line import load_config

    killer = Killer(log, phase, skip, calls)
    write = killer.inside("checkpoint", record.dcp.save)
    save_checkpoint = record.save_checkpoint

    # save_checkpoint() writes all files and then renames their folder. So the phase "rename" begins
    # where the write has ended, and it ends with the function.
    def write_then_rename(*args, **kwargs):
        write(*args, **kwargs)
        killer.begins("rename")

    def save_to_the_end(*args):
        save_checkpoint(*args)
        killer.ends("rename")

    record.dcp.save = write_then_rename
    ppo.save_checkpoint = save_to_the_end
    watch.save_checkpoint = save_to_the_end
    save_model = killer.inside("model folder", record.save_model)
    ppo.save_model = save_model
    record.save_model = save_model
    ppo.roll_out = killer.inside("rollout", ppo.roll_out)
    ppo.update = killer.inside("update", ppo.update)
    ppo.main(load_config(ppo.Config, "ppo"))


# ---------------------------------------------------------------- the driver

def start(out, ranks, log, phase="none", skip=0, calls=0, victim=0):
    """Run to the end, or to the kill -> exit status. victim: the rank that is killed"""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [__file__, "run", str(log), phase, str(skip), str(calls), str(victim)]

    world = out.parent / "world"
    command += [f"--policy={world}/sft", f"--reward_model={world}/rm",
                f"--data={world}/data/prompts.jsonl", f"--out={out}", *PPO]
    with open(out.parent / "output.txt", "a") as output:
        return subprocess.run(command, stdout=output, stderr=output).returncode


def saved_weights(folder):
    from safetensors.torch import load_file
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def rows_without_timings(path):
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows.append({name: value for name, value in row.items() if name not in TIMINGS})
    return rows


def count_calls(log):
    """-> {phase: the fewest calls that it made in the undisturbed run}"""
    fewest = {}
    for line in log.read_text().splitlines():
        if line.startswith("end "):
            phase, calls = line.removeprefix("end ").rsplit(maxsplit=1)
            fewest[phase] = min(int(calls), fewest.get(phase, int(calls)))
    return {phase: fewest[phase] for phase in PHASES}


def steps_logged(out):
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def compare(undisturbed, killed):
    """Both runs must have the same weights, rows and files -> how many weights, how many steps"""
    one = saved_weights(undisturbed)
    two = saved_weights(killed)
    assert one.keys() == two.keys(), "the weights have different names"
    assert all(one[name].equal(two[name]) for name in one), "the weights differ"

    rows = rows_without_timings(undisturbed / "metrics.jsonl")
    killed_rows = rows_without_timings(killed / "metrics.jsonl")
    steps = [row["step"] for row in killed_rows]
    assert steps == list(range(len(rows))), "a step is missing or there twice"
    assert rows == killed_rows, "the metrics differ"
    samples = rows_without_timings(undisturbed / "samples.jsonl")
    assert samples == rows_without_timings(killed / "samples.jsonl"), "the samples differ"

    files = {path.name for path in undisturbed.iterdir()}
    assert {path.name for path in killed.iterdir()} == files, "files are left over"
    return len(one), len(rows)


def drive(home, ranks, seed, kills):
    """One run without a kill, one that is killed `kills` times and resumed, and the comparison"""
    undisturbed = home / f"whole_{ranks}"
    undisturbed_log = home / f"whole_{ranks}.log"
    killed = home / f"killed_{ranks}"
    log = home / f"kills_{ranks}.log"
    shutil.rmtree(killed, ignore_errors=True)
    log.unlink(missing_ok=True)

    # The undisturbed run, kept for the next call.
    if not (undisturbed / "config.json").exists():
        shutil.rmtree(undisturbed, ignore_errors=True)
        undisturbed_log.unlink(missing_ok=True)
        status = start(undisturbed, ranks, undisturbed_log)
        assert status == 0, f"the undisturbed run failed: see {home}/output.txt"
    made = count_calls(undisturbed_log)
    print("undisturbed; calls in a phase:", made, flush=True)

    # Each phase gets its share of the kills, in a random order.
    draw = random.Random(seed)
    phases = [PHASES[k % len(PHASES)] for k in range(kills)]
    draw.shuffle(phases)
    for k, phase in enumerate(phases):
        skip = draw.randrange(3 if phase in ("rollout", "update") else 2)
        calls = draw.randrange(1, made[phase] + 1)
        only_rank_0 = phase in ("rename", "model folder")
        victim = 0 if only_rank_0 else k % ranks
        status = start(killed, ranks, log, phase, skip, calls, victim)

        # The process must have died in this phase, at this call; torchrun then exits with 1.
        last = log.read_text().splitlines()[-2:]
        assert last == [f"begin {phase}", f"kill {phase} {calls}"], (phase, last)
        assert status == (-signal.SIGKILL if ranks == 1 else 1), status
        print(f"kill {k + 1:2}: inside {phase}, call {calls} of {made[phase]}; "
              f"{steps_logged(killed)} steps logged", flush=True)
    assert start(killed, ranks, log, "end") == 0, f"the last run failed: see {home}/output.txt"

    weights, steps = compare(undisturbed, killed)
    print(f"{kills} kills on {ranks} rank(s): {weights} weights the same to the last bit, "
          f"{steps} steps once")


if __name__ == "__main__":
    if len(sys.argv) < 6:
        raise SystemExit("soak.py is a part of: bash extras/study/soak.sh")
    if sys.argv[1] == "drive":
        home, *numbers = sys.argv[2:6]
        drive(Path(home).resolve(), *[int(number) for number in numbers])
    else:
        log, phase, skip, calls, victim = sys.argv[2:7]
        sys.argv = ["ppo.py", *sys.argv[7:]]
        if os.environ.get("RANK", victim) != victim:
            phase = "other rank"
        run_ppo(log, phase, int(skip), int(calls))
