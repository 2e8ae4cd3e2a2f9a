"""What ppo.py watches if this folder is there: the disk, how well V predicts, alarms in words."""
if __name__ == "__main__":
    raise SystemExit("alarms.py is a part of: python ppo.py")

import math, shutil, statistics
from pathlib import Path

import torch

from plumbing.ranks import fail, say


def check_disk(cfg, models, dtype):
    """fail() unless the disk has room for what the run will write: a checkpoint (float32 weights,
    Adam's two moments) next to the one before, a model every save_every steps and at the end"""
    numel = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    checkpoint = 12 * sum(numel.values())
    checkpoints = 1 if any(Path(cfg.out).glob("checkpoint_*")) else 2
    folder = numel["policy"] * dtype.itemsize
    steps = range(cfg.save_every, cfg.steps, cfg.save_every)
    folders = 1 + sum(not Path(cfg.out, f"step_{step}").exists() for step in steps)
    need = checkpoints * checkpoint + folders * folder
    free = shutil.disk_usage(cfg.out).free
    if need > free:
        fail(f"--out={cfg.out} has {free / 1e9:.3g} GB free, this run needs {need / 1e9:.3g} GB: "
             f"{checkpoints} checkpoint(s) of {checkpoint / 1e9:.3g} GB and {folders} model "
             f"folder(s) of {folder / 1e9:.3g} GB; raise --save_every, or choose another --out")


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns), [B, T] each: 1 if V predicts the returns, 0 if not.
    -> dict: of all real tokens, and of each fifth of the responses (V learns the ends first)"""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)                                # [B, 1]
    fifth = torch.arange(mask.shape[1], device=mask.device) * 5 // lengths          # [B, T]
    parts = {"explained_variance": mask}
    for k in range(5):
        parts[f"explained_variance_{k + 1}"] = mask & (fifth == k)
    figures = {}
    for name, part in parts.items():
        target, error = returns[part], (returns - values)[part]
        variance = (target - target.mean()).square().mean()
        unexplained = (error - error.mean()).square().mean()
        known = variance > 1e-12  # False for NaN, where the part has no token
        figures[name] = (1 - unexplained / variance).item() if known else 0.0
    return figures


def length_pressure(cfg, r, mask, ended):
    """A sentence if the first rollout's mean r_t is not small against its spread, or None. PPO sums
    r_t, so such a mean rewards longer (or shorter) answers. r, mask [B, T]; ended [B]: has EOS."""
    mean = r[mask].mean().item()
    sd = r[mask].std(correction=0).item()
    if cfg.level != "token" or cfg.reward_scale == "mean" or abs(mean) <= sd / 2:
        return None
    at_eos = r.gather(1, mask.sum(1, keepdim=True) - 1)[ended, 0]
    eos = f"{at_eos.mean().item():+.3g} at EOS" if len(at_eos) else "no response has its EOS"
    return (f"each extra token pays {mean:+.3g} (mean r_t over all tokens; {eos}; their sd is "
            f"{sd:.3g}): length pressure, see anchor, or reward_scale=mean")


def check_length_pressure(cfg, step, r, mask, ended):
    """Print the sentence of length_pressure(), if there is one, after the first rollout"""
    words = length_pressure(cfg, r, mask, ended) if step == 0 else None
    if words:
        say("ALARM:", words)


def alarms(cfg, history, dtype):
    """What is wrong with a run -> list of sentences. history: the rows of metrics.jsonl so far"""
    row = history[-1]
    words = []
    error = row["first_ratio_error"]
    if error > (1e-4 if dtype == torch.float32 else 1e-2):
        words.append(f"ratio != 1 at the first minibatch (off by {error:.2g}): update and scoring "
                     "compute different log-probs; do not trust this run")

    if row["kl"] > 10 * (cfg.kl_target or 6.0):  # AlpacaFarm aims at 6
        before = f" (three steps ago {history[-4]['kl']:.1f})" if len(history) > 3 else ""
        words.append(f"KL exploding: {row['kl']:.1f} nats per response from the reference{before}; "
                     "lower --lr, raise --kl_coef, see in samples.jsonl what is rewarded")
    if row["approx_kl"] > 0.1:
        words.append(f"KL exploding within this step's update: {row['approx_kl']:.2g} nats per "
                     "token from the policy of the rollouts; lower --lr, or take fewer ppo_epochs")

    if row["eos_share"] == 0:
        words.append(f"all {cfg.rollout_batch} responses truncated: none has its EOS within "
                     f"--response_len={cfg.response_len}; raise it, or see missing_eos_penalty")

    length = row["response_length"]
    first_length = history[0]["response_length"]
    if len(history) % 10 == 0 and length > 1.5 * first_length:
        words.append(f"responses grow: {length:.3g} tokens, {first_length:.3g} at first; see in "
                     "samples.jsonl whether length is rewarded: anchor, kl_coef, reward_scale")

    if row["return_sd"] < 1e-8:
        words.append("reward flat: all responses have the same return, so nothing can be learned")
    elif len(history) % 20 == 0:
        words += flat_reward(history)
    return words


def flat_reward(history):
    """An alarm if the last ten steps' reward is not above the first ten's by two standard errors"""
    first = [row["reward"] for row in history[:10]]
    last = [row["reward"] for row in history[-10:]]
    mean_1, error_1 = statistics.fmean(first), statistics.stdev(first) / math.sqrt(10)
    mean_2, error_2 = statistics.fmean(last), statistics.stdev(last) / math.sqrt(10)
    if mean_2 - mean_1 >= 2 * math.hypot(error_1, error_2):
        return []
    return [f"reward flat: {mean_2:.4g} +- {error_2:.2g} over the last ten steps, {mean_1:.4g} +- "
            f"{error_1:.2g} over the first; raise --lr, lower --kl_coef, look at samples.jsonl"]
