"""The checks and the speed of ppo.py on the GPUs of this machine; gpu.sh starts it.

A line each, "ok" or "NOT ok", with its figures; the exit code is 1 if one is not ok:
  - in the first update of each step pi is still pi_old: the ratio is 1
  - before the first update the policy is the reference: KL is 0
  - log-probs of the computing dtype are those of plain transformers in float32, row by row
  - a run that is killed inside an update and started again ends with the same bits as one that is
    not killed (with torch's deterministic kernels)
  - the peak memory that `ppo.py --plan` counts is within 10% of the measured one (on a GPU only)

Then a table, for Llamas with random weights in the shapes of SmolLM2-135M and Llama-3.2-1B, prompts
of 192 and responses of 300 tokens: response tokens a second, seconds by phase, and the update's
MFU. That is the floating-point operations of its real tokens (flops.py) over those that the GPUs
can do in that time, by their data sheet. A model that does not fit, by the plan, is left out.

Every run is ppo.main with its own metrics.jsonl, in processes of its own; its output is in the .log
file beside its folder.
"""
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)  # torchrun reads the same variable
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(HERE))
import flops, world

# Dense bfloat16 TFLOP/s of the data sheets; the first name found in the card's name counts.
SHEETS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362,
          "L4": 121, "A10": 125, "RTX 4090": 165, "RTX 3090": 71}
AIM = 0.5  # of the MFU
FAILED = []  # the names of the checks that are not ok


def check(name, ok, figures):
    print(f"{'ok' if ok else 'NOT ok':7}{name}: {figures}", flush=True)
    if not ok:
        FAILED.append(name)


# ---------------------------------------------------------------- a rank of a run

def rank(job):
    """ppo.main as one process. job: config; dies: kill it inside an update; saves: False for the
    runs that are only timed; compare: log-probs are compared with float32, and written there"""
    import ppo
    sys.argv = ["ppo.py"]
    if job["saves"]:  # the runs whose bits are compared
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        from extras import alarms
        ppo.save_checkpoint = ppo.save_model = alarms.check_disk = lambda *args: None
    if job["dies"]:
        die_inside_the_update(ppo)
    setup = ppo.setup
    placed = []

    def remembered(dtype):
        placed.append(setup(dtype))
        return placed[0]

    ppo.setup = remembered
    ppo.main(ppo.Config(**job["config"]))
    if job["compare"]:
        compare(ppo, job, *placed[0])


def die_inside_the_update(ppo):
    """Every rank kills itself in step 2, between two optimizer steps"""
    update = ppo.update
    optimizer_step = ppo.optimizer_step

    def step_and_die(*args):
        optimizer_step(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def update_or_die(models, optimizer, rollout, cfg, step, *others):
        if step == 2:
            ppo.optimizer_step = step_and_die
        return update(models, optimizer, rollout, cfg, step, *others)

    ppo.update = update_or_die


def compare(ppo, job, device, mesh, dtype):
    """Write how far log-probs of the computing dtype are from float32, and how much they vary. Rows
    of several lengths. All ranks."""
    from transformers import AutoModelForCausalLM
    cfg = ppo.Config(**job["config"])
    V = len(ppo.load_tokenizer(cfg.policy))
    prompts = [world.random_ids(f"prompt {k}", 20 + 7 * k, V) for k in range(8)]
    responses = [world.random_ids(f"response {k}", 64 - 5 * k, V) for k in range(8)]
    packed = ppo.pack(prompts, responses, device)
    policy = ppo.load_model(cfg.policy, device, mesh, dtype)
    with torch.no_grad():
        found = ppo.token_logprobs(policy, *packed)[packed[2]]                  # [tokens]
        plain = AutoModelForCausalLM.from_pretrained(cfg.policy, dtype=torch.float32,
                                                     attn_implementation="eager").to(device)
        want = []
        for prompt, response in zip(prompts, responses):
            logits = plain(torch.tensor([prompt + response], device=device)).logits[0]
            rows = torch.log_softmax(logits[len(prompt) - 1:-1], -1)            # [T, V]
            want.append(rows[range(len(response)), response])
    want = torch.cat(want)
    figures = dict(error=(found - want).square().mean().sqrt().item(), sd=want.std().item())
    if ppo.RANK == 0:
        Path(job["compare"]).write_text(json.dumps(figures))


# ---------------------------------------------------------------- the checks

def run(args, name, config, *, dies=False, saves=True, compare=None):
    """Start the ranks of a run and wait -> is it finished (or dead, as it was told to)?"""
    config = config | dict(out=f"{args.out}/{config.get('out', name)}", overwrite=name != "resumed")
    job = dict(config=config, dies=dies, saves=saves, compare=compare)
    words = [PYTHON]
    if args.ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    words += [__file__, f"--job={json.dumps(job)}"]
    log = Path(args.out, f"{name}.log")
    started = time.time()
    with open(log, "w") as output:
        code = subprocess.run(words, stdout=output, stderr=output,
                              env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}).returncode
    if (code == 0) == dies:
        last = (log.read_text().strip() or "no word").splitlines()[-1]
        took = time.time() - started
        check(name, False, f"exit code {code} after {took:.0f} s, see {log}: {last}")
        return False
    return True


def metrics(args, name):
    lines = Path(args.out, name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def differences(args, name, other):
    """What differs between two finished runs, but for times and memory -> list of names"""
    found = []
    a, b = (Path(args.out, folder, "model.safetensors").read_bytes() for folder in (name, other))
    if a != b:
        found.append("the model's weights")
    clocks = ("_s", "seconds", "peak_gb")
    for row, other_row in zip(metrics(args, name), metrics(args, other), strict=True):
        for key in row:
            if not key.endswith(clocks) and row[key] != other_row[key]:
                found.append(f"step {row['step']}: {key}")
    return found


def prepare(args, size_name):
    """Write policy, reward model and prompts of 192 tokens -> fields of the config"""
    from common import encode_prompt, load_tokenizer
    home = Path(args.out, f"world_{size_name}")
    world.make(home, world.SIZES[size_name], "full")
    tokenizer = load_tokenizer(home / "policy")
    bare = len(encode_prompt(tokenizer, dict(instruction="", input="")))
    rows = []
    for k in range(1024):
        letters = "".join(chr(97 + i % 26) for i in world.random_ids(k, 192 - bare, 1000))
        rows.append(json.dumps(dict(instruction=letters, input="")) + "\n")
    (home / "letters.jsonl").write_text("".join(rows))
    return dict(policy=f"{home}/policy", reward_model=f"{home}/rm", data=f"{home}/letters.jsonl",
                dtype="bfloat16", query_len=192)


def check_results(args):
    """Everything but speed and memory, on a small model"""
    size_name = "tiny" if args.small else "A"
    rows = 8 * args.ranks
    config = prepare(args, size_name)
    config |= dict(steps=4, resume_every=1, rollout_batch=2 * rows, rollout_micro_batch=16,
                   score_micro_batch=8, batch=rows, micro_batch=4, lr=1e-3,
                   response_len=16 if args.small else 128)
    written = f"{args.out}/logprobs.json"
    if not run(args, "whole", config, compare=written):
        return
    steps = metrics(args, "whole")
    error = max(row["first_ratio_error"] for row in steps)
    check("first ratio", error <= 1e-2, f"at most {error:.2g} from 1 in {len(steps)} steps")
    kl, later = steps[0]["kl"], steps[-1]["kl"]
    check("KL at step 0", abs(kl) <= 1e-3, f"{kl:.2g}, and {later:.2g} at the last step")
    found = json.loads(Path(written).read_text())
    check("log-probs", found["error"] <= 0.05 * found["sd"],
          f"bfloat16 is {found['error']:.2g} from float32 (rms), their sd is {found['sd']:.2g}")

    # The same run, killed and started again.
    again = config | dict(out="again")
    if run(args, "killed", again, dies=True) and run(args, "resumed", again):
        unequal = differences(args, "whole", "again")
        moved = later != 0  # a run that learns nothing shows nothing
        figures = ", ".join(unequal[:4]) or "model.safetensors and metrics.jsonl are bit-identical"
        check("resume after a kill", not unequal and moved, figures)


# ---------------------------------------------------------------- speed

def planned_gb(args, config):
    import ppo
    from extras.memory import plan
    cfg = ppo.Config(**config)
    policy, value = plan.models_of(cfg)
    return plan.peak(policy, value, args.ranks, cfg, 2) / 1e9


def speed(args, size_name, peak_rate):
    """Time two steps, check the plan -> the row of the table, or None"""
    size = world.SIZES[size_name]
    response = 16 if args.small else 300
    n = size.rows * args.ranks
    config = prepare(args, size_name)
    config |= dict(steps=3, rollout_batch=n, rollout_micro_batch=size.rows, batch=n // 2,
                   score_micro_batch=size.micro_batch, micro_batch=size.micro_batch,
                   response_len=response)
    plan = planned_gb(args, config)
    if args.cuda and plan > 0.88 * torch.cuda.get_device_properties(0).total_memory / 1e9:
        print(f"{'':7}{size_name} is left out: the plan is {plan:.1f} GB, more than fits here")
        return None
    if not run(args, size_name, config, saves=False):
        return None

    # The first step also loads kernels.
    steps = metrics(args, size_name)
    peak = max(row["peak_gb"] for row in steps)
    if args.cuda:
        check(f"plan of {size_name}", abs(plan / peak - 1) <= 0.1,
              f"counted {plan:.2f} GB, measured {peak:.2f} GB a GPU, {plan / peak - 1:+.1%}")
    best = min(steps[1:], key=lambda row: row["seconds"])
    lengths = [round(best["response_length"])] * n
    operations = flops.ppo_flops(size, 192, lengths)["update"]
    mfu = operations / (args.ranks * peak_rate * best["update_s"])
    phases = " + ".join(f"{best[name + '_s']:.2f}" for name in ("rollout", "score", "update"))
    aim = "" if not args.cuda else " (the aim)" if mfu >= AIM else f" (aim {AIM:.0%})"
    return (f"| {size_name}, {n} rows a step | {best['tokens_per_s']:.0f} | {mfu:.0%}{aim} | "
            f"{phases} | {peak:.1f} ({plan:.1f}) |")


def main(args):
    began = time.time()
    args.cuda = torch.cuda.is_available()
    args.ranks = args.ranks or max(1, torch.cuda.device_count())
    if not args.cuda and not args.small:
        print("gpu.sh: torch sees no GPU here; --small runs on a CPU", file=sys.stderr)
        return 2
    Path(args.out).mkdir(parents=True, exist_ok=True)

    # What the machine can do: one large product, measured, and the data sheet.
    card = torch.cuda.get_device_name() if args.cuda else "CPU"
    measured = flops.matmul_rate("bfloat16", *(("cuda", 8192) if args.cuda else ("cpu", 256)))
    torch.cuda.empty_cache()
    sheet = next((rate * 1e12 for name, rate in SHEETS.items() if name in card), None)
    print(f"{args.ranks} x {card}, torch {torch.__version__}; one product in bfloat16 "
          f"{measured / 1e12:.3g} TFLOP/s, data sheet {sheet / 1e12 if sheet else 'not known'}\n")

    check_results(args)
    rows = []
    for size_name in ("tiny",) if args.small else ("135M", "1B"):
        rows.append(speed(args, size_name, sheet or measured))
    print(f"\n| {card} x {args.ranks}, bf16 | response tokens/s | MFU of the update | rollout + "
          "score + update, s | GB a GPU (plan) |\n|---|---|---|---|---|")
    print("\n".join(row for row in rows if row))
    if not sheet:
        print("MFU is against the measured product: the card's data sheet is not known here.")
    print(f"\n{time.time() - began:.0f} s; "
          + (f"NOT ok: {', '.join(FAILED)}" if FAILED else "all checks ok"))
    return 1 if FAILED else 0


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--small", action="store_true", help="tiny models, also on a CPU")
    flags.add_argument("--ranks", type=int, help="all GPUs; without a GPU 1")
    flags.add_argument("--out", default="out/gpu")
    flags.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.job:
        rank(args.job)
    else:
        raise SystemExit(main(args))
