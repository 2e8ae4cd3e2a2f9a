"""Each public function against a slow loop in float64, with garbage in the padding. pytest tests/test_math.py"""
import functools, math, random

import pytest, torch

import diff, ppo, reward_model

GARBAGE = float("nan")


def ragged(seed, B=4, T=7, scale=1.0):
    """[B, T] float64 with NaN behind each row's length, and the mask"""
    torch.manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([T, 3, 1, 5])[:B, None]
    return (scale * torch.randn(B, T, dtype=torch.float64)).masked_fill(~mask, GARBAGE), mask


def lists(x, mask):
    return [[v for v, m in zip(row, keep) if m] for row, keep in zip(x.tolist(), mask.tolist())]


def equal(result, rows, mask):
    """result [B, T] is the slow loop's rows, and 0 where the mask is False"""
    assert torch.equal(result.isnan(), torch.zeros_like(result, dtype=torch.bool)) and (result[~mask] == 0).all()
    for got, want in zip(lists(result, mask), rows):
        assert got == pytest.approx(want, abs=1e-12)


# ---------------------------------------------------------------- diff.align

def brute_force_lcs(a, b):
    @functools.cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        return max(longest(i + 1, j), longest(i, j + 1), longest(i + 1, j + 1) + 1 if a[i] == b[j] else 0)
    return longest(0, 0)


def test_align_is_a_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(2000):
        letters = draw.choice([2, 3, 6])
        a, b = ([draw.randrange(letters) for _ in range(draw.randrange(10))] for _ in range(2))
        changed_a, changed_b = diff.align(a, b)
        kept_a, kept_b = ([x for x, c in zip(s, changed) if not c] for s, changed in ((a, changed_a), (b, changed_b)))
        assert kept_a == kept_b and len(kept_a) == brute_force_lcs(tuple(a), tuple(b)), (a, b)
        assert (changed_a, changed_b) == diff.align(a, b)


def test_align_prefers_few_runs():
    # "b" could stay in the middle of the insertion; one run is better than two
    assert diff.align([1, 2, 3, 9], [1, 2, 7, 2, 3, 9]) in (([0] * 4, [0, 1, 1, 0, 0, 0]), ([0] * 4, [0, 0, 1, 1, 0, 0]))
    assert diff.align([5, 1, 2, 3], [1, 8, 1, 2, 3, 6]) == ([1, 0, 0, 0], [1, 1, 0, 0, 0, 1])


def test_align_gaps_mark_the_token_at_a_pure_insertion():
    assert diff.align([1, 2, 9], [1, 2, 7, 8, 9], gaps=True) == ([0, 0, 1], [0, 0, 1, 1, 0])      # an EOS that came too early
    assert diff.align([1, 7, 2, 9], [1, 2, 9], gaps=True) == ([0, 1, 0, 0], [0, 1, 0])            # the other side
    assert diff.align([1, 7, 9], [1, 8, 9], gaps=True) == ([0, 1, 0], [0, 1, 0])                  # a replacement is no gap
    assert diff.align([1, 2, 9], [1, 2, 7, 8, 9]) == ([0, 0, 0], [0, 0, 1, 1, 0])


def test_gate_names_its_reason():
    def why(a, b, **limits):
        return diff.gate(a, b, *diff.align(a, b), **limits)
    assert why([1, 2, 9], [1, 3, 9]) is None
    assert why([9], [1, 9]) == "empty" and why([1, 9], [1, 9]) == "identical"
    assert why([1, 2, 9], [1, 3, 9], max_tokens=2) == "too long"
    assert why([1, 2, 9], [4, 5, 9], max_changed=0.5) == "changed share"


def test_draw_is_legible_without_colour_and_cannot_steer_the_terminal():
    text = diff.draw(["a", " b", "\x1b[2J", "!"], [0, 1, 1, 0], ["a", " c", "!"], [0, 1, 0], color=False)
    assert text == "a[- b␛[2J-]{+ c+}!"
    assert "\033[31m" in diff.draw(["x"], [1], ["y"], [1], color=True)


# ---------------------------------------------------------------- reward_model

def pairs(seed):
    r_w, response_w = ragged(seed, scale=2)
    r_l, response_l = (x[[1, 0, 3, 2]] for x in ragged(seed + 100, scale=2))
    changed_w, changed_l = torch.rand(r_w.shape) < 0.5, torch.rand(r_l.shape) < 0.5
    changed_l[0] = False  # an empty U_1 side contributes 0
    return r_w, response_w, changed_w, r_l, response_l, changed_l


def slow_pair(i, r_w, response_w, changed_w, r_l, response_l, changed_l):
    def part(r, response, changed, which):
        ts = [t for t in range(r.shape[1]) if response[i, t]]
        return sum(r[i, t].item() for t in ts if bool(changed[i, t]) == which) / len(ts)
    return (part(r_w, response_w, changed_w, False) - part(r_l, response_l, changed_l, False),
            part(r_w, response_w, changed_w, True), part(r_l, response_l, changed_l, True))


@pytest.mark.parametrize("seed", range(3))
def test_pair_terms_and_losses(seed):
    given = pairs(seed)
    terms = reward_model.pair_terms(*given)
    for i in range(4):
        u0, u1_w, u1_l = slow_pair(i, *given)
        assert [term[i].item() for term in terms] == pytest.approx([u0, u1_w, u1_l], abs=1e-12)
        def nll(margin):
            return math.log1p(math.exp(-margin))
        assert reward_model.pair_losses(*given, loss="eq3")[i].item() == pytest.approx(nll(u0 + u1_w - u1_l), abs=1e-12)
        assert reward_model.pair_losses(*given, loss="eq4")[i].item() == pytest.approx(nll(u1_w - u1_l), abs=1e-12)
        r_w, response_w, changed_w, r_l, response_l, changed_l = given
        squares = [r[i, t].item() ** 2 for r, response, changed in ((r_w, response_w, changed_w), (r_l, response_l, changed_l))
                   for t in range(r.shape[1]) if response[i, t] and not changed[i, t]]
        anchored = nll(u1_w - u1_l) + 0.3 * (sum(squares) / len(squares) if squares else 0)
        assert reward_model.pair_losses(*given, loss="eq4", anchor=0.3)[i].item() == pytest.approx(anchored, abs=1e-12)
        last_w, last_l = r_w[i, response_w[i].sum() - 1].item(), r_l[i, response_l[i].sum() - 1].item()
        assert reward_model.pair_losses(*given, loss="sequence")[i].item() == pytest.approx(nll(last_w - last_l), abs=1e-12)


def test_anchor_has_no_meaning_for_a_sequence_reward():
    with pytest.raises(ValueError, match="anchor"):
        reward_model.pair_losses(*pairs(0), loss="sequence", anchor=0.1)


def test_padding_gets_no_gradient():
    r_w, response_w, changed_w, r_l, response_l, changed_l = pairs(0)
    r_w, r_l = r_w.nan_to_num(3.0).requires_grad_(), r_l.nan_to_num(3.0).requires_grad_()
    reward_model.pair_losses(r_w, response_w, changed_w, r_l, response_l, changed_l, loss="eq3", anchor=0.1).sum().backward()
    assert (r_w.grad[~response_w] == 0).all() and (r_l.grad[~response_l] == 0).all() and (r_w.grad[response_w] != 0).all()


# ---------------------------------------------------------------- ppo

@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", ["sum", "mean", "fixed"])
def test_shape_rewards(level, scale):
    logprobs, mask = ragged(0)
    ref_logprobs, r = ragged(1)[0], ragged(2)[0] if level == "token" else torch.randn(4, dtype=torch.float64)
    options = dict(level=level, kl_coef=0.3, reward_scale=scale, fixed_length=5 if scale == "fixed" else None,
                   missing_eos_penalty=2.0, ended=torch.tensor([True, False, False, True]))
    if level == "sequence" and scale != "sum":
        with pytest.raises(ValueError, match="reward_scale"):
            ppo.shape_rewards(r, logprobs, ref_logprobs, mask, **options)
        return
    rows = []
    for i in range(4):
        T = int(mask[i].sum())
        row = [r[i, t].item() for t in range(T)] if level == "token" else [0.0] * (T - 1) + [r[i].item()]
        row[-1] -= 2.0 * (i in (1, 2))
        row = [x / {"sum": 1, "mean": T, "fixed": 5}[scale] for x in row]
        rows.append([x - 0.3 * (logprobs[i, t] - ref_logprobs[i, t]).item() for t, x in enumerate(row)])
    equal(ppo.shape_rewards(r, logprobs, ref_logprobs, mask, **options), rows, mask)
    clamped = [[x - 0.3 * (max(0, k) - k) for x, k in zip(row, ks)] for row, ks in zip(rows, lists(logprobs - ref_logprobs, mask))]
    equal(ppo.shape_rewards(r, logprobs, ref_logprobs, mask, **options, clamp_kl=True), clamped, mask)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    rewards, mask = ragged(0)
    values = ragged(1)[0]
    rows = []
    for r, v in zip(lists(rewards, mask), lists(values, mask)):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        rows.append([sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=gamma, lam=lam)
    equal(advantages, rows, mask)
    equal(returns, [[a + v for a, v in zip(*pair)] for pair in zip(rows, lists(values, mask))], mask)


def test_the_mean_scale_sums_to_R():
    """reward_scale=mean, V = 0, no KL, gamma = lambda = 1, nothing whitened: the first advantage is R(tau), Eq. 1"""
    r, mask = ragged(0)
    zero = torch.zeros_like(r)
    shaped = ppo.shape_rewards(r, zero, zero, mask, level="token", kl_coef=0.0, reward_scale="mean")
    advantages, _ = ppo.gae(shaped, zero, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(advantages[:, 0], reward_model.mean_rewards(r, mask), atol=1e-14)


@pytest.mark.parametrize("shift", [True, False])
def test_whiten(shift):
    x, mask = ragged(0, scale=3)
    flat = [v for row in lists(x, mask) for v in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((v - mean) ** 2 for v in flat) / len(flat))
    equal(ppo.whiten(x, mask, shift_mean=shift), [[(v - mean * shift) / std for v in row] for row in lists(x, mask)], mask)
    constant = torch.full_like(x, 2.0)
    equal(ppo.whiten(constant, mask, shift_mean=shift), [[2.0] * len(row) for row in lists(x, mask)], mask)


def test_policy_and_value_loss():
    logprobs, mask = ragged(0)
    old, A = ragged(1)[0], ragged(2)[0]
    rows = []
    for lp, o, a in zip(*(lists(x, mask) for x in (logprobs, old, A))):
        ratios = [math.exp(p - q) for p, q in zip(lp, o)]
        rows.append([-min(r * x, max(0.8, min(1.2, r)) * x) for r, x in zip(ratios, a)])
    equal(ppo.policy_loss(logprobs, old, A, mask, clip=0.2), rows, mask)
    for clip in (0.2, None):
        rows = []
        for v, o, target in zip(*(lists(x, mask) for x in (logprobs, old, A))):
            near = v if clip is None else [max(q - clip, min(q + clip, p)) for p, q in zip(v, o)]
            rows.append([0.5 * max((p - t) ** 2, (n - t) ** 2) for p, n, t in zip(v, near, target)])
        equal(ppo.value_loss(logprobs, old, A, mask, clip=clip), rows, mask)


def test_learning_rate_moves_as_stated():
    cfg = ppo.Config(lr=1.0, warmup_steps=5, lr_epochs=10, rollout_batch=512)
    rates = [ppo.learning_rate(cfg, k, rows=512 * 39) for k in range(391)]
    assert rates[0] == 0.2 and rates[4] == 1.0 and rates[5] == pytest.approx(1.0) and rates[390] == 0.0
    assert rates[200] == pytest.approx(190 / 385)
