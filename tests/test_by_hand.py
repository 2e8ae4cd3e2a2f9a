"""The smallest example of each equation, to check in the head. pytest tests/test_by_hand.py

Each test has its arithmetic in a comment. Change a number, predict what fails, and run it. A row of
a tensor is a response; a column is a token."""
import math

import pytest
import torch

from common import mean_rewards, sequence_rewards
from diff import align
from evaluate import win_rate
from ppo import (gae, masked_mean, next_kl_coef, policy_loss, shape_rewards, value_loss, whiten)
from reward_model import hits, pair_losses, pair_terms

THREE = torch.ones(1, 3)                        # the mask of one response with three real tokens
TWO_OF_THREE = torch.tensor([[1.0, 1.0, 0.0]])  # the third column is padding
NO_KL = torch.zeros(1, 3)                       # log-probs of a policy that is the reference


def numbers(x):
    """The numbers of a tensor with one row, as pytest compares them"""
    return pytest.approx(x.flatten().tolist(), abs=1e-6)


# ---------------------------------------------------------------- which tokens changed

def test_align_a_replaced_token():
    original = [1, 2, 3]
    edited = [1, 9, 3]  # 2 became 9
    assert align(original, edited) == ([0, 1, 0], [0, 1, 0])


def test_align_an_inserted_token():
    original = [1, 3]
    edited = [1, 2, 3]  # nothing of the original is changed
    assert align(original, edited) == ([0, 0], [0, 1, 0])


def test_align_with_gaps():
    original = [1, 3]
    edited = [1, 2, 3]  # where the edited answer said 2, the original said 3
    assert align(original, edited, gaps=True) == ([0, 1], [0, 1, 0])
    # A replaced token has U_1 on both sides already: nothing more is marked.
    assert align([1, 2, 3], [1, 9, 3], gaps=True) == ([0, 1, 0], [0, 1, 0])


def test_figure_5_of_the_paper():
    """Claude-2's edit, with a word as a token"""
    original = ("It is better to have had a flame and lost it, than never to have been burned at "
                "all.").split()
    edited = ("It is better to have had a flame and been singed, than never to have felt its "
              "warmth at all.").split()
    original_changed, edited_changed = align(original, edited)
    removed = [word for word, changed in zip(original, original_changed) if changed]
    added = [word for word, changed in zip(edited, edited_changed) if changed]
    assert removed == ["lost", "it,", "been", "burned"]
    assert added == ["been", "singed,", "felt", "its", "warmth"]


# ---------------------------------------------------------------- the reward model's loss

# w has three tokens and l has two. The first token of each is unchanged.
R_W = torch.tensor([[1.0, 2.0, 3.0]])
CHANGED_W = torch.tensor([[0, 1, 1]])
R_L = torch.tensor([[1.0, -2.0]])
CHANGED_L = torch.tensor([[0, 1]])
PAIR = (R_W, torch.ones(1, 3), CHANGED_W, R_L, torch.ones(1, 2), CHANGED_L)


def test_equation_1_is_a_mean():
    assert mean_rewards(R_W, torch.ones(1, 3)).item() == 2     # (1 + 2 + 3) / 3
    assert mean_rewards(R_L, torch.ones(1, 2)).item() == -0.5  # (1 - 2) / 2
    assert mean_rewards(R_W, TWO_OF_THREE).item() == 1.5       # (1 + 2) / 2


def test_the_terms_of_equation_3():
    u0, u1_w, u1_l = pair_terms(*PAIR)
    assert u0.item() == pytest.approx(-1 / 6)   # 1 / 3 - 1 / 2
    assert u1_w.item() == pytest.approx(5 / 3)  # (2 + 3) / 3
    assert u1_l.item() == -1                    # -2 / 2
    # R_w - R_l = 2 - (-0.5) = 2.5, and so is -1/6 + 5/3 - (-1).
    assert (u0 + u1_w - u1_l).item() == pytest.approx(2.5)


def test_the_loss_of_equation_3():
    loss = pair_losses(*PAIR, loss="eq3")
    # -log sigma(2.5) = log(1 + exp(-2.5)) = log(1.082) = 0.079
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.5)))
    assert loss.item() == pytest.approx(0.079, abs=1e-3)


def test_the_loss_of_equation_4():
    loss = pair_losses(*PAIR, loss="eq4")
    # Without u0: 5/3 - (-1) = 8/3, and -log sigma(8/3) = log(1 + exp(-8/3)) = 0.067.
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-8 / 3)))
    assert loss.item() == pytest.approx(0.067, abs=1e-3)


def test_a_pair_with_equal_rewards_costs_log_2():
    zeros = (torch.zeros(1, 3), *PAIR[1:3], torch.zeros(1, 2), *PAIR[4:])
    for loss in ("eq3", "eq4", "sequence"):
        # -log sigma(0) = -log(1/2) = log 2 = 0.693
        assert pair_losses(*zeros, loss=loss).item() == pytest.approx(math.log(2))


def test_the_loss_of_the_sequence_level():
    assert sequence_rewards(R_W, torch.ones(1, 3)).item() == 3  # the last token's reward
    assert sequence_rewards(R_W, TWO_OF_THREE).item() == 2      # the last real token's
    loss = pair_losses(*PAIR, loss="sequence")
    # 3 - (-2) = 5, and -log sigma(5) = log(1 + exp(-5)) = 0.0067
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-5)))
    assert loss.item() == pytest.approx(0.0067, abs=1e-4)


def test_the_anchor():
    plain = pair_losses(*PAIR, loss="eq4")
    anchored = pair_losses(*PAIR, loss="eq4", anchor=0.5)
    # Two tokens are unchanged, one on each side: 0.5 * (1^2 + 1^2) / 2 = 0.5.
    assert (anchored - plain).item() == pytest.approx(0.5)


def test_equation_4_teaches_changed_tokens_only():
    r_w = R_W.clone().requires_grad_()
    r_l = R_L.clone().requires_grad_()
    pair_losses(r_w, *PAIR[1:3], r_l, *PAIR[4:], loss="eq4").sum().backward()
    # Of -log sigma(x) the slope is -sigma(-x), here -sigma(-8/3) = -0.065. Each changed token of w
    # gets a third of it, that of l gets half of it with the other sign.
    slope = 1 / (1 + math.exp(8 / 3))
    assert [0, -slope / 3, -slope / 3] == numbers(r_w.grad)
    assert [0, slope / 2] == numbers(r_l.grad)


def test_a_tie_is_half_right():
    assert [1, 0, 0.5] == numbers(hits(torch.tensor([2.0, -1.0, 0.0])))


# ---------------------------------------------------------------- the rewards that PPO gets

R_T = torch.tensor([[1.0, -2.0, 4.0]])


def test_rewards_at_every_token():
    shaped = shape_rewards(R_T, NO_KL, NO_KL, THREE, level="token", kl_coef=0.5)
    assert [1, -2, 4] == numbers(shaped)


def test_rewards_at_the_last_token():
    R = torch.tensor([7.0])
    shaped = shape_rewards(R, NO_KL, NO_KL, THREE, level="sequence", kl_coef=0.5)
    assert [0, 0, 7] == numbers(shaped)
    shaped = shape_rewards(R, NO_KL, NO_KL, TWO_OF_THREE, level="sequence", kl_coef=0.5)
    assert [0, 7, 0] == numbers(shaped)  # the last real token


def test_rewards_minus_kl():
    logprobs = torch.tensor([[-1.0, -1.0, -3.0]])
    ref_logprobs = torch.tensor([[-1.0, -3.0, -1.0]])
    # The KL is 0, 2 and -2. Half of it is subtracted.
    shaped = shape_rewards(R_T, logprobs, ref_logprobs, THREE, level="token", kl_coef=0.5)
    assert [1, -2 - 1, 4 + 1] == numbers(shaped)
    # AlpacaFarm's clamp makes -2 a 0.
    shaped = shape_rewards(R_T, logprobs, ref_logprobs, THREE, level="token", kl_coef=0.5,
                           clamp_kl=True)
    assert [1, -2 - 1, 4] == numbers(shaped)


def test_the_scales_of_the_rewards():
    def scaled(scale, fixed_length=None):
        return shape_rewards(R_T, NO_KL, NO_KL, THREE, level="token", kl_coef=0.0,
                             reward_scale=scale, fixed_length=fixed_length)

    assert [1, -2, 4] == numbers(scaled("sum"))
    assert [1 / 3, -2 / 3, 4 / 3] == numbers(scaled("mean"))   # by T = 3; their sum is R(tau) = 1
    assert [0.1, -0.2, 0.4] == numbers(scaled("fixed", 10))    # by 10, whatever T is


def test_the_penalty_for_a_missing_eos():
    def penalised(ended):
        return shape_rewards(R_T, NO_KL, NO_KL, THREE, level="token", kl_coef=0.0,
                             missing_eos_penalty=5.0, ended=torch.tensor([ended]))

    assert [1, -2, 4 - 5] == numbers(penalised(False))
    assert [1, -2, 4] == numbers(penalised(True))


def test_the_adaptive_kl_coefficient():
    # The KL is 10% above its target: b grows by 1%. It never moves by more than 2%.
    assert next_kl_coef(1.0, 6.6, 6.0) == pytest.approx(1.01)
    assert next_kl_coef(1.0, 60.0, 6.0) == pytest.approx(1.02)
    assert next_kl_coef(1.0, 0.0, 6.0) == pytest.approx(0.98)


# ---------------------------------------------------------------- advantages

REWARDS = torch.tensor([[1.0, 0.0, 4.0]])
VALUES = torch.tensor([[2.0, 2.0, 2.0]])


def test_gae_at_gamma_1():
    advantages, returns = gae(REWARDS, VALUES, THREE, gamma=1.0, lam=1.0)
    # What is still to come, 5, 4 and 4, minus V. V should learn what is still to come.
    assert [3, 2, 2] == numbers(advantages)
    assert [5, 4, 4] == numbers(returns)


def test_gae_at_gamma_0():
    advantages, returns = gae(REWARDS, VALUES, THREE, gamma=0.0, lam=1.0)
    # Each token alone: 1 - 2, 0 - 2, 4 - 2.
    assert [-1, -2, 2] == numbers(advantages)
    assert [1, 0, 4] == numbers(returns)


def test_gae_at_gamma_one_half():
    advantages, _ = gae(REWARDS, VALUES, THREE, gamma=0.5, lam=1.0)
    # From the right: 4; 0 + 4 / 2 = 2; 1 + 2 / 2 = 2. Minus V.
    assert [0, 0, 2] == numbers(advantages)


def test_gae_at_lambda_0():
    advantages, _ = gae(REWARDS, VALUES, THREE, gamma=1.0, lam=0.0)
    # The reward, plus the next V, minus this V: 1 + 2 - 2, 0 + 2 - 2, and at the end 4 + 0 - 2.
    assert [1, 0, 2] == numbers(advantages)


def test_gae_ends_with_the_response():
    advantages, _ = gae(REWARDS, VALUES, TWO_OF_THREE, gamma=1.0, lam=1.0)
    # The third column is padding: its 4 is not a reward. 1 + 0 - 2, 0 - 2.
    assert [-1, -2, 0] == numbers(advantages)


def test_whiten():
    x = torch.tensor([[1.0, 3.0, 100.0]])
    assert masked_mean(x, TWO_OF_THREE.bool()).item() == 2  # the 100 is padding
    # The mean is 2, the deviation is 1.
    assert [-1, 1, 0] == numbers(whiten(x, TWO_OF_THREE))
    assert [1, 3, 0] == numbers(whiten(x, TWO_OF_THREE, shift_mean=False))
    # The mean is 6, the deviation 2: 4 / 2 = 2 and 8 / 2 = 4, or -1 and 1.
    y = torch.tensor([[4.0, 8.0, 0.0]])
    assert [2, 4, 0] == numbers(whiten(y, TWO_OF_THREE, shift_mean=False))
    assert [-1, 1, 0] == numbers(whiten(y, TWO_OF_THREE))


# ---------------------------------------------------------------- the losses of PPO

def loss_and_gradient(ratio, advantage):
    """policy_loss of one token, and its slope in log pi. ratio: pi / pi_old. clip is 0.2"""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1),
                       clip=0.2)
    loss.sum().backward()
    return pytest.approx((loss.item(), logprobs.grad.item()))


def test_policy_loss_inside_the_clip():
    # -A ratio: the slope in log pi is the same, because a ratio's slope in its log is itself.
    assert (-2.0, -2.0) == loss_and_gradient(ratio=1.0, advantage=2.0)
    assert (-2.2, -2.2) == loss_and_gradient(ratio=1.1, advantage=2.0)


def test_policy_loss_beyond_the_clip():
    # A good token, already more probable: -2 * 1.2, and no slope.
    assert (-2.4, 0.0) == loss_and_gradient(ratio=1.5, advantage=2.0)
    # A bad token, already less probable: 2 * 0.8, and no slope.
    assert (1.6, 0.0) == loss_and_gradient(ratio=0.5, advantage=-2.0)


def test_policy_loss_of_a_token_that_moved_the_wrong_way():
    # A good token that became less probable, and a bad one that became more probable: no clip.
    assert (-1.0, -1.0) == loss_and_gradient(ratio=0.5, advantage=2.0)
    assert (3.0, 3.0) == loss_and_gradient(ratio=1.5, advantage=-2.0)


def test_value_loss():
    values = torch.tensor([[3.0, 1.0, 3.0]])
    old_values = torch.tensor([[1.0, 1.0, 1.0]])
    returns = torch.tensor([[4.0, 4.0, 1.0]])
    # Half of the squared error: 1/2 * 1, 1/2 * 9, 1/2 * 4.
    unclipped = value_loss(values, old_values, returns, THREE, clip=None)
    assert [0.5, 4.5, 2] == numbers(unclipped)
    # The clip keeps V within 1 of old V, so 3 becomes 2: 1/2 * 4, 1/2 * 9, 1/2 * 1. The larger
    # error of each token counts.
    clipped = value_loss(values, old_values, returns, THREE, clip=1.0)
    assert [2, 4.5, 2] == numbers(clipped)


# ---------------------------------------------------------------- the win rate

def test_win_rate():
    # A win, a loss, a draw, and a verdict that could not be read: 100, 0 and 50.
    figures = win_rate([2, 1, 1.5, None])
    assert figures["win_rate"] == 50
    assert (figures["n_wins"], figures["n_wins_base"], figures["n_draws"]) == (1, 1, 1)
    # The deviation of 100, 0 and 50 is 50, and the standard error is 50 / sqrt(3) = 28.9.
    assert figures["standard_error"] == pytest.approx(50 / math.sqrt(3))
