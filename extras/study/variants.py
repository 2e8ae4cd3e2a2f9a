"""A stage with one equation changed: what the study tried besides the paper's.

    python extras/study/variants.py sum reward_model.py --data=out/diffs.jsonl --out=out/rm_sum
    python extras/study/variants.py state ppo.py --gamma=0 --out=out/ppo_state

sum       reward_model.py: Eq. 4 with the sum over a response's tokens instead of the mean
keep      reward_model.py: how likely does the editor keep a token? Binary cross-entropy on the
          tokens of the original, of which U_1 is not kept
keep      ppo.py: then r_t is the log of that probability
constant  ppo.py: r_t + 0.5, a b(s) that is the same in all states
state     ppo.py: r_t + b(s_t), which is 0.5 or -0.5 by a coin for each possible last token of s_t
"""
import importlib, sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
from plumbing.command_line import load_config
from plumbing.ranks import fail

B = 0.5  # 22 tokens of it add 11 to a return; at step 0 returns have a standard deviation of 9


def sum_rewards(r, response_mask):
    return r.masked_fill(~response_mask.bool(), 0).sum(1)


def keep_losses(r_w, response_w, changed_w, r_l, response_l, changed_l, *, loss, anchor=0.0):
    """Instead of reward_model.pair_losses(): [B], a mean over the tokens of the original"""
    kept = 1.0 - changed_l.float()
    losses = F.binary_cross_entropy_with_logits(r_l, kept.to(r_l), reduction="none")  # [B, T]
    return common.mean_rewards(losses, response_l)


def log_keep(model, ids, mask, response_mask, *, before=False):
    """Instead of token_heads(): r_t = log of the probability that a_t is kept"""
    heads = common.token_heads(model, ids, mask, response_mask, before=before)
    if before:  # V
        return heads
    return F.logsigmoid(heads) * response_mask


def plus_constant(model, ids, mask, response_mask, *, before=False):
    heads = common.token_heads(model, ids, mask, response_mask, before=before)
    return heads if before else (heads + B) * response_mask


def plus_state(model, ids, mask, response_mask, *, before=False):
    """r_t + b(s_t): b depends on the last token before a_t alone"""
    heads = common.token_heads(model, ids, mask, response_mask, before=before)
    if before:
        return heads
    coin = torch.Generator().manual_seed(0)
    b = B * (2 * torch.randint(2, (model.config.vocab_size,), generator=coin) - 1)  # [V]
    T = response_mask.shape[1]
    last_tokens = ids[:, -T - 1:-1][response_mask.flip(1)]                          # [tokens]
    return heads.masked_scatter(response_mask, heads[response_mask] + b.to(heads)[last_tokens])


# (name, stage): the function of the stage's module that is replaced, and what replaces it.
VARIANTS = {
    ("sum", "reward_model.py"): ("mean_rewards", sum_rewards),
    ("keep", "reward_model.py"): ("pair_losses", keep_losses),
    ("keep", "ppo.py"): ("token_heads", log_keep),
    ("constant", "ppo.py"): ("token_heads", plus_constant),
    ("state", "ppo.py"): ("token_heads", plus_state),
}


def main():
    name, script = (sys.argv[1:3] + ["", ""])[:2]
    if (name, script) not in VARIANTS:
        known = ", ".join(" ".join(words) for words in VARIANTS)
        fail(f"the first two words must be one of: {known}")
    function, other = VARIANTS[name, script]
    stage = script.removesuffix(".py")
    module = importlib.import_module(stage)
    setattr(module, function, other)
    module.main(load_config(module.Config, stage, sys.argv[3:]))


if __name__ == "__main__":
    main()
