"""What a ppo.py run shows beside its numbers (alarms, samples, wandb) and what it survives: SIGTERM, a small disk."""
import hashlib, json, math, resource, shutil, signal
from dataclasses import asdict
from pathlib import Path

import torch

from common import RANK, decode_response, fail, say, total
from extras.pages import token_texts
from extras.checkpoints import save_checkpoint
from extras.runs import record_of


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the real tokens, [B, T] each; 1: V knows the returns, 0: it knows
    nothing (or there is nothing to know). Also over each fifth of the responses: V learns the ends first."""
    def explained(part):
        left, whole = ((x[part] - x[part].mean()).square().mean() for x in (returns - values, returns))
        return (1 - left / whole).item() if whole > 1e-12 else 0.0  # an empty part: NaN > 1e-12 is false
    fifth = torch.arange(mask.shape[1], device=mask.device) * 5 // mask.sum(1, keepdim=True).clamp(min=1)       # [B, T]
    return dict(explained_variance=explained(mask)) | {
        f"explained_variance_{k + 1}": explained(mask & (fifth == k)) for k in range(5)}


def peak_gb(device):
    """The peak of the fullest rank so far: of GPU memory, or of the process where there is none. All ranks."""
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return total(torch.tensor(peak / 1e9, device=device), "max").item()


# ---------------------------------------------------------------- alarms

def length_pressure(cfg, r, mask, ended):
    """Before the first update, from the first rollout: PPO sums r_t, so a mean that is not small against the spread
    pays for writing more, or less. r [B, T], ended [B] -> the words, or None"""
    mean, sd = r[mask].mean().item(), r[mask].std(correction=0).item()
    at_eos = r.gather(1, mask.sum(1, keepdim=True) - 1)[ended, 0]
    if cfg.level == "token" and cfg.reward_scale != "mean" and abs(mean) > sd / 2:
        return (f"each extra token pays {mean:+.3g} (mean r_t over all tokens"
                + (f"; {at_eos.mean().item():+.3g} at EOS" if len(at_eos) else "; no response has its EOS")
                + f"; their sd is {sd:.3g}): length pressure, see anchor and reward_scale")


def alarms(cfg, history, dtype):
    """What is wrong with a run, in words. history: the rows of metrics.jsonl up to this step's -> list of sentences"""
    row, words = history[-1], []
    if row["first_ratio_error"] > (1e-4 if dtype == torch.float32 else 1e-2):
        words.append(f"ratio != 1 at the first minibatch (off by {row['first_ratio_error']:.2g}): the update does not "
                     "compute the log-probs that the rollout was scored with; do not trust this run")
    if row["kl"] > 10 * (cfg.kl_target or 6.0) or row["approx_kl"] > 0.1:  # AlpacaFarm's target is 6 nats
        before = f" (three steps ago {history[-4]['kl']:.1f})" if len(history) > 3 else ""
        words.append(f"KL exploding: {row['kl']:.1f} nats per response from the reference{before}, "
                     f"{row['approx_kl']:.2g} per token within this step's update; lower --lr, raise --kl_coef, see in "
                     "samples.jsonl what is paid")
    if row["eos_share"] == 0:
        words.append(f"all {cfg.rollout_batch} responses truncated: none has its EOS within --response_len="
                     f"{cfg.response_len}; raise it, or see missing_eos_penalty")
    if len(history) % 10 == 0 and row["response_length"] > 1.5 * history[0]["response_length"]:
        words.append(f"responses grow: {row['response_length']:.3g} tokens, {history[0]['response_length']:.3g} at "
                     "first; see in samples.jsonl whether length is what is paid: anchor, kl_coef, reward_scale")
    if row["return_sd"] < 1e-8:
        words.append("reward flat: every response of this batch has the same return, there is nothing to learn from it")
    elif len(history) % 20 == 0:
        (first, error_1), (last, error_2) = (mean_and_error([row["reward"] for row in part])
                                             for part in (history[:10], history[-10:]))
        if last - first < 2 * math.hypot(error_1, error_2):
            words.append(f"reward flat: {last:.4g} +- {error_2:.2g} over the last ten steps, {first:.4g} +- "
                         f"{error_1:.2g} over the first; raise --lr, lower --kl_coef, look at samples.jsonl")
    return words


def mean_and_error(x):
    mean = sum(x) / len(x)
    return mean, math.sqrt(sum((y - mean) ** 2 for y in x) / (len(x) - 1) / len(x))


# ---------------------------------------------------------------- samples and wandb

def samples(cfg, tokenizer, step, rows, responses, r, R):
    """A few responses of the step with their token rewards -> samples.jsonl, the first of them printed with each token
    coloured by r_t (rank 0). rows of the data file; responses: lists of ids; r [.., T], R [..]"""
    if RANK > 0:
        return
    from extras.show_rewards import paint
    entries = [dict(step=step, instruction=row["instruction"], input=row.get("input") or "",
                    output=decode_response(tokenizer, ids), tokens=token_texts(tokenizer, ids),
                    token_rewards=r[i, :len(ids)].tolist(), reward=R[i].item())
               for i, (row, ids) in enumerate(zip(rows, responses))]
    with open(Path(cfg.out, "samples.jsonl"), "a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    first = entries[0]
    say(f"R = {first['reward']:+.3f} for {json.dumps(first['instruction'])[:80]}:",
        paint(first["tokens"], first["token_rewards"], max(map(abs, first["token_rewards"])) or 1.0))


def mirror(cfg):
    """A function that sends a row of metrics.jsonl to wandb; without --wandb_project or wandb it does nothing"""
    if RANK == 0 and cfg.wandb_project:
        try:
            import wandb
            started = record_of(cfg.out).get("started", "")  # with --overwrite another run, not more of the old one
            run = wandb.init(project=cfg.wandb_project, name=cfg.out, config=asdict(cfg), resume="allow",
                             id=hashlib.sha256(f"{Path(cfg.out).resolve()} {started}".encode()).hexdigest()[:16])
            return lambda row: run.log(row, step=row["step"])
        except ImportError:
            say(f"--wandb_project={cfg.wandb_project}: wandb is not installed (pip install wandb); metrics go to "
                f"{cfg.out}/metrics.jsonl alone")
    return lambda row: None


# ---------------------------------------------------------------- the night

TOLD_TO_STOP = []


def listen_for_sigterm():
    signal.signal(signal.SIGTERM, lambda *_: TOLD_TO_STOP.append(True))


def stop_if_told(cfg, step, saved, models, optimizer, device):
    """SIGTERM to any rank: write the checkpoint of `step` steps (unless it is `saved`) and go. All ranks."""
    if total(torch.tensor(len(TOLD_TO_STOP), device=device), "max") > 0:
        if step != saved:
            save_checkpoint(cfg.out, step, models, optimizer)
        say(f"SIGTERM: stopped after {step} steps; the same command goes on from there"
            + " (without --overwrite)" * cfg.overwrite)
        raise SystemExit(128 + signal.SIGTERM)


def check_start(cfg, done, last_lr):
    """What can be wrong with going on after the steps that are done, or with the learning rate of the last"""
    if done > cfg.steps:
        fail(f"{cfg.out} has {done} steps already, --steps={cfg.steps} is less; choose another --out")
    if done and not Path(cfg.out, "metrics.jsonl").exists():
        fail(f"{cfg.out} has a checkpoint, but no metrics.jsonl to go on from; start anew with --overwrite=true")
    if cfg.lr and last_lr == 0:
        say(f"ALARM: the learning rate is 0 before step {cfg.steps}: prompts, rollout_batch and "
            f"--lr_epochs={cfg.lr_epochs} give fewer steps than --steps; raise --lr_epochs")


def check_disk(cfg, models, dtype):
    """fail() unless there is room for what the run will write: a checkpoint (float32 weights and Adam's two moments of
    policy and value) beside the one before, and a Hugging Face folder every save_every steps and at the end"""
    numel = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    checkpoint, folder = 12 * sum(numel.values()), numel["policy"] * dtype.itemsize
    here = any(Path(cfg.out).glob("checkpoint_*"))
    folders = 1 + sum(not Path(cfg.out, f"step_{k}").exists() for k in range(cfg.save_every, cfg.steps, cfg.save_every))
    need, free = (2 - here) * checkpoint + folders * folder, shutil.disk_usage(cfg.out).free
    if need > free:
        fail(f"--out={cfg.out} has {free / 1e9:.3g} GB free, this run needs {need / 1e9:.3g} GB: {2 - here} "
             f"checkpoint(s) of {checkpoint / 1e9:.3g} GB (a new one is written beside the old) and {folders} model "
             f"folder(s) of {folder / 1e9:.3g} GB; raise --save_every, or choose an --out on a larger disk")
