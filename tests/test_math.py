"""Each public function against a slow loop in float64, with garbage in the padding. pytest
tests/test_math.py"""

import copy, dataclasses, functools, json, math, random, statistics
from types import SimpleNamespace

import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

import common, diff, ppo, reward_model
from extras.report import show_diffs
from plumbing import paint, record

GARBAGE = float("nan")


def ragged(seed, B=4, T=7, scale=1.0):
    """[B, T] float64 with NaN after each row's end, and the mask"""
    torch.manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([T, 3, 1, 5])[:B, None]
    return (scale * torch.randn(B, T, dtype=torch.float64)).masked_fill(~mask, GARBAGE), mask


def lists(x, mask):
    return [[v for v, m in zip(row, keep) if m] for row, keep in zip(x.tolist(), mask.tolist())]


def equal(result, rows, mask):
    """result [B, T] is the slow loop's rows, and 0 where the mask is False"""
    assert (
        torch.equal(result.isnan(), torch.zeros_like(result, dtype=torch.bool))
        and (result[~mask] == 0).all()
    )
    for got, want in zip(lists(result, mask), rows):
        assert got == pytest.approx(want, abs=1e-12)


# ---------------------------------------------------------------- diff.align


def brute_force_lcs(a, b):
    @functools.cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        return max(
            longest(i + 1, j), longest(i, j + 1), longest(i + 1, j + 1) + 1 if a[i] == b[j] else 0
        )

    return longest(0, 0)


def test_align_is_a_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(2000):
        letters = draw.choice([2, 3, 6])
        a = [draw.randrange(letters) for _ in range(draw.randrange(10))]
        b = [draw.randrange(letters) for _ in range(draw.randrange(10))]
        changed_a, changed_b = diff.align(a, b)
        kept_a = [x for x, changed in zip(a, changed_a) if not changed]
        kept_b = [x for x, changed in zip(b, changed_b) if not changed]
        assert kept_a == kept_b, (a, b)
        assert len(kept_a) == brute_force_lcs(tuple(a), tuple(b)), (a, b)
        assert (changed_a, changed_b) == diff.align(a, b)


def test_align_prefers_few_runs():
    # "b" could stay in the middle of the insertion; one run is better than two
    assert diff.align([1, 2, 3, 9], [1, 2, 7, 2, 3, 9]) in (
        ([0] * 4, [0, 1, 1, 0, 0, 0]),
        ([0] * 4, [0, 0, 1, 1, 0, 0]),
    )
    assert diff.align([5, 1, 2, 3], [1, 8, 1, 2, 3, 6]) == ([1, 0, 0, 0], [1, 1, 0, 0, 0, 1])


def test_align_gaps_mark_the_token_at_a_pure_insertion():
    assert diff.align([1, 2, 9], [1, 2, 7, 8, 9], gaps=True) == (
        [0, 0, 1],
        [0, 0, 1, 1, 0],
    )  # an EOS that came too early
    assert diff.align([1, 7, 2, 9], [1, 2, 9], gaps=True) == (
        [0, 1, 0, 0],
        [0, 1, 0],
    )  # the other side
    assert diff.align([1, 7, 9], [1, 8, 9], gaps=True) == (
        [0, 1, 0],
        [0, 1, 0],
    )  # a replacement is no gap
    assert diff.align([1, 2, 9], [1, 2, 7, 8, 9]) == ([0, 0, 0], [0, 0, 1, 1, 0])


def test_gate_names_its_reason():
    def why(a, b, **limits):
        return diff.gate(a, b, *diff.align(a, b), **limits)

    assert why([1, 2, 9], [1, 3, 9]) is None
    assert why([9], [1, 9]) == "empty" and why([1, 9], [1, 9]) == "identical"
    assert why([1, 2, 9], [1, 3, 9], max_tokens=2) == "too long"
    assert why([1, 2, 9], [4, 5, 9], max_changed=0.5) == "changed share"


def test_draw_is_legible_without_colour_and_cannot_steer_the_terminal():
    text = show_diffs.draw(
        ["a", " b", "\x1b[2J", "!"], [0, 1, 1, 0], ["a", " c", "!"], [0, 1, 0], color=False
    )
    assert text == "a[- b␛[2J-]{+ c+}!"
    assert "\033[31m" in show_diffs.draw(["x"], [1], ["y"], [1], color=True)
    # spaces of several scripts, a joined emoji, a soft hyphen
    harmless = "10\u202f000\u00a0€\u3000\U0001f469\u200d\U0001f680 co\u00adop"
    assert paint.plain(harmless) == harmless
    assert (
        paint.plain("\u202e\u2066\x9b\u2028") == "\ufffd" * 4
    )  # what turns the line round, or ends it


# ---------------------------------------------------------------- reward_model


def pairs(seed):
    r_w, response_w = ragged(seed, scale=2)
    r_l, response_l = ragged(seed + 100, scale=2)
    other_lengths = [1, 0, 3, 2]  # so that w and l of a pair differ in length
    r_l = r_l[other_lengths]
    response_l = response_l[other_lengths]
    changed_w = torch.rand(r_w.shape) < 0.5
    changed_l = torch.rand(r_l.shape) < 0.5
    changed_l[0] = False  # an empty U_1 side contributes 0
    return r_w, response_w, changed_w, r_l, response_l, changed_l


def slow_pair(i, r_w, response_w, changed_w, r_l, response_l, changed_l):
    def part(r, response, changed, which):
        ts = [t for t in range(r.shape[1]) if response[i, t]]
        return sum(r[i, t].item() for t in ts if bool(changed[i, t]) == which) / len(ts)

    return (
        part(r_w, response_w, changed_w, False) - part(r_l, response_l, changed_l, False),
        part(r_w, response_w, changed_w, True),
        part(r_l, response_l, changed_l, True),
    )


@pytest.mark.parametrize("seed", range(3))
def test_pair_terms_and_losses(seed):
    given = pairs(seed)
    terms = reward_model.pair_terms(*given)
    for i in range(4):
        u0, u1_w, u1_l = slow_pair(i, *given)
        assert [term[i].item() for term in terms] == pytest.approx([u0, u1_w, u1_l], abs=1e-12)

        def nll(margin):
            return math.log1p(math.exp(-margin))

        assert reward_model.pair_losses(*given, loss="eq3")[i].item() == pytest.approx(
            nll(u0 + u1_w - u1_l), abs=1e-12
        )
        assert reward_model.pair_losses(*given, loss="eq4")[i].item() == pytest.approx(
            nll(u1_w - u1_l), abs=1e-12
        )
        r_w, response_w, changed_w, r_l, response_l, changed_l = given
        squares = [
            r[i, t].item() ** 2
            for r, response, changed in ((r_w, response_w, changed_w), (r_l, response_l, changed_l))
            for t in range(r.shape[1])
            if response[i, t] and not changed[i, t]
        ]
        anchored = nll(u1_w - u1_l) + 0.3 * (sum(squares) / len(squares) if squares else 0)
        assert reward_model.pair_losses(*given, loss="eq4", anchor=0.3)[i].item() == pytest.approx(
            anchored, abs=1e-12
        )
        last_w, last_l = (
            r_w[i, response_w[i].sum() - 1].item(),
            r_l[i, response_l[i].sum() - 1].item(),
        )
        assert reward_model.pair_losses(*given, loss="sequence")[i].item() == pytest.approx(
            nll(last_w - last_l), abs=1e-12
        )


def test_anchor_has_no_meaning_for_a_sequence_reward():
    with pytest.raises(ValueError, match="anchor"):
        reward_model.pair_losses(*pairs(0), loss="sequence", anchor=0.1)


def test_padding_gets_no_gradient():
    r_w, response_w, changed_w, r_l, response_l, changed_l = pairs(0)
    r_w, r_l = r_w.nan_to_num(3.0).requires_grad_(), r_l.nan_to_num(3.0).requires_grad_()
    reward_model.pair_losses(
        r_w, response_w, changed_w, r_l, response_l, changed_l, loss="eq3", anchor=0.1
    ).sum().backward()
    assert (
        (r_w.grad[~response_w] == 0).all()
        and (r_l.grad[~response_l] == 0).all()
        and (r_w.grad[response_w] != 0).all()
    )


# ---------------------------------------------------------------- ppo


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", ["sum", "mean", "fixed"])
def test_shape_rewards(level, scale):
    logprobs, mask = ragged(0)
    ref_logprobs, r = (
        ragged(1)[0],
        ragged(2)[0] if level == "token" else torch.randn(4, dtype=torch.float64),
    )
    options = dict(
        level=level,
        kl_coef=0.3,
        reward_scale=scale,
        fixed_length=5 if scale == "fixed" else None,
        missing_eos_penalty=2.0,
        ended=torch.tensor([True, False, False, True]),
    )
    if level == "sequence" and scale != "sum":
        with pytest.raises(ValueError, match="reward_scale"):
            ppo.shape_rewards(r, logprobs, ref_logprobs, mask, **options)
        return
    rows = []
    for i in range(4):
        T = int(mask[i].sum())
        row = (
            [r[i, t].item() for t in range(T)]
            if level == "token"
            else [0.0] * (T - 1) + [r[i].item()]
        )
        row[-1] -= 2.0 * (i in (1, 2))
        row = [x / {"sum": 1, "mean": T, "fixed": 5}[scale] for x in row]
        rows.append(
            [x - 0.3 * (logprobs[i, t] - ref_logprobs[i, t]).item() for t, x in enumerate(row)]
        )
    equal(ppo.shape_rewards(r, logprobs, ref_logprobs, mask, **options), rows, mask)
    clamped = [
        [x - 0.3 * (max(0, k) - k) for x, k in zip(row, ks)]
        for row, ks in zip(rows, lists(logprobs - ref_logprobs, mask))
    ]
    equal(
        ppo.shape_rewards(r, logprobs, ref_logprobs, mask, **options, clamp_kl=True), clamped, mask
    )


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    rewards, mask = ragged(0)
    values = ragged(1)[0]
    rows = []
    for r, v in zip(lists(rewards, mask), lists(values, mask)):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        rows.append(
            [
                sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t))
                for t in range(len(r))
            ]
        )
    advantages, returns = ppo.gae(rewards, values, mask, gamma=gamma, lam=lam)
    equal(advantages, rows, mask)
    equal(
        returns, [[a + v for a, v in zip(*pair)] for pair in zip(rows, lists(values, mask))], mask
    )


def test_the_mean_scale_sums_to_R():
    """reward_scale=mean, V = 0, no KL, gamma = lambda = 1, nothing whitened: the first advantage is
    R(tau), Eq. 1"""
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
    equal(
        ppo.whiten(x, mask, shift_mean=shift),
        [[(v - mean * shift) / std for v in row] for row in lists(x, mask)],
        mask,
    )
    constant = torch.full_like(x, 2.0)
    equal(
        ppo.whiten(constant, mask, shift_mean=shift),
        [[2.0] * len(row) for row in lists(x, mask)],
        mask,
    )


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
    assert (
        rates[0] == 0.2 and rates[4] == 1.0 and rates[5] == pytest.approx(1.0) and rates[390] == 0.0
    )
    assert (
        rates[200] == pytest.approx(190 / 385) and ppo.learning_rate(cfg, 500, rows=512 * 39) == 0
    )  # never below
    assert ppo.learning_rate(dataclasses.replace(cfg, warmup_steps=0), 0, rows=512 * 39) == 1
    assert (
        ppo.learning_rate(dataclasses.replace(cfg, lr_epochs=0.01), 0, rows=512 * 39) == 0.2
    )  # the warm-up is never cut away


# ---------------------------------------------------------------- a step of PPO, row by row


def tiny(Auto, seed):
    """A Llama of two layers in float64, weights large enough that everything moves"""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        tie_word_embeddings=False,
        num_labels=1,
        token_classification_bias=False,
        classifier_dropout=0.0,
    )
    return Auto(config).double()


def row_logprobs(model, prompt, response, temperature):
    """log pi(a_t | s_t) of one row, unpadded -> [T]"""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(len(response)), response]


def row_heads(model, prompt, response, before):
    heads = model(torch.tensor([prompt + response])).logits[0, :, 0]
    return heads[len(prompt) - 1 : -1] if before else heads[len(prompt) :]


def rollouts(n=10):
    draw = random.Random(1)

    def ids():
        return [draw.randrange(4, 23) for _ in range(draw.randint(1, 6))]

    prompts = [ids() for _ in range(n)]
    responses = [ids() for _ in range(n)]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    return prompts, responses, lengths


@pytest.mark.parametrize("value_clip, max_grad_norm", [(0.2, 0.5), (None, None)])
def test_update_is_adam_on_the_stated_loss(value_clip, max_grad_norm):
    """policy + vf_coef * value, each a mean over the real tokens of the optimizer batch; and what
    is logged, over those of the step"""
    cfg = ppo.Config(
        rollout_batch=10,
        batch=5,
        micro_batch=2,
        ppo_epochs=2,
        temperature=0.7,
        clip=0.1,
        value_clip=value_clip,
        vf_coef=0.3,
        max_grad_norm=max_grad_norm,
        seed=4,
    )
    prompts, responses, lengths = rollouts()
    T = max(map(len, responses))

    def two_models():
        policy = tiny(LlamaForCausalLM, 0)
        value = tiny(LlamaForTokenClassification, 1)
        return torch.nn.ModuleDict(dict(policy=policy, value=value))

    ours = two_models()
    slow = two_models()
    rollout = dict(prompts=prompts, responses=responses, lengths=lengths, numbers=range(1, 11))
    torch.manual_seed(2)
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        rollout[name] = torch.randn(10, T, dtype=torch.float64)
    with torch.no_grad():  # the policy's own, so that the first ratio is 1
        for i, (p, r) in enumerate(zip(prompts, responses)):
            rollout["old_logprobs"][i, : len(r)] = row_logprobs(ours["policy"], p, r, 0.7)
            rollout["old_values"][i, : len(r)] = row_heads(
                ours["value"], p, r, True
            ) + 0.1 * torch.randn(len(r), dtype=torch.float64)

    def adam(models):
        return torch.optim.AdamW(
            models.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0
        )

    stats = ppo.update(ours, adam(ours), rollout, cfg, 7, 0.02, torch.device("cpu"))

    optimizer = adam(slow)
    seen = []  # the figures of each token
    norms = []
    first = None
    for epoch in range(2):
        batches = ppo.optimizer_batches(cfg, 7, epoch)
        assert sorted(sum(batches, [])) == list(range(10)) and len(batches) == 2
        assert batches != ppo.optimizer_batches(cfg, 7, 1 - epoch)
        assert batches != ppo.optimizer_batches(cfg, 8, epoch)
        for batch in batches:
            loss = 0.0
            tokens = sum(len(responses[i]) for i in batch)
            for i in batch:
                logprobs = row_logprobs(slow["policy"], prompts[i], responses[i], 0.7)
                values = row_heads(slow["value"], prompts[i], responses[i], True)
                for t in range(len(responses[i])):
                    old = rollout["old_logprobs"][i, t]
                    old_value = rollout["old_values"][i, t]
                    A = rollout["advantages"][i, t]
                    target = rollout["returns"][i, t]
                    ratio = (logprobs[t] - old).exp()
                    error = (values[t] - target) ** 2
                    if value_clip is not None:
                        near = torch.minimum(
                            torch.maximum(values[t], old_value - value_clip), old_value + value_clip
                        )
                        error = torch.maximum(error, (near - target) ** 2)
                    policy_loss = -torch.minimum(ratio * A, torch.clamp(ratio, 0.9, 1.1) * A)
                    loss = loss + (policy_loss + 0.3 * error / 2) / tokens
                    moved = (values[t] - old_value).abs() > (value_clip or math.inf)
                    clipped = (ratio - 1).abs() > 0.1
                    approx_kl = ratio - 1 - ratio.log()
                    figures = (policy_loss, error / 2, ratio, clipped, moved, approx_kl)
                    seen.append([x.item() for x in figures])
            first = max(abs(row[2] - 1) for row in seen) if first is None else first
            loss.backward()
            norms_of_weights = [p.grad.norm() for p in slow.parameters() if p.grad is not None]
            norms.append(torch.stack(norms_of_weights).norm().item())
            for p in slow.parameters():
                if p.grad is not None and max_grad_norm and norms[-1] > max_grad_norm:
                    p.grad *= max_grad_norm / (norms[-1] + 1e-6)
            for group in optimizer.param_groups:
                group["lr"] = 0.02
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), (_, b) in zip(ours.named_parameters(), slow.named_parameters()):
        assert torch.allclose(a, b, atol=1e-9), name
    means = [sum(column) / len(seen) for column in zip(*seen)]
    names = ("policy_loss", "value_loss", "ratio", "clip_fraction", "value_clipped", "approx_kl")
    assert [stats[name] for name in names] == pytest.approx(means, abs=1e-9)
    assert means[3] > 0.1 and (means[4] > 0.1) == (value_clip is not None)
    assert stats["first_ratio_error"] == pytest.approx(first, abs=1e-12) and first < 1e-12
    assert stats["grad_norm"] == pytest.approx(sum(norms) / 4, abs=1e-9) and min(norms) > 0.5


def test_roll_out_draws_each_row_from_its_own_key():
    """Row by row, alone: the draws follow from (seed, step, row) and pi is at cfg.temperature"""
    cfg = ppo.Config(
        rollout_batch=10, rollout_micro_batch=4, response_len=9, temperature=0.6, seed=4
    )
    policy, prompts = tiny(LlamaForCausalLM, 0), rollouts()[0]
    policy.train()
    responses = ppo.roll_out(
        policy, SimpleNamespace(eos_token_id=3), prompts, cfg, 7, torch.device("cpu")
    )
    assert policy.training and len({len(r) for r in responses}) > 1
    for row, (p, r) in enumerate(zip(prompts, responses)):
        uniforms, alone = common.row_uniforms(9, 4, 7, row), []
        for t in range(9):
            cdf = torch.softmax(policy(torch.tensor([p + alone])).logits[0, -1] / 0.6, -1).cumsum(
                -1
            )
            alone.append(int((cdf <= uniforms[t] * cdf[-1]).sum()))
            if alone[-1] == 3:
                break
        assert r == alone


def test_score_is_the_same_alone():
    prompts, responses, lengths = rollouts()
    policy = tiny(LlamaForCausalLM, 0).float()
    value = tiny(LlamaForTokenClassification, 1).float()
    parts = common.my_micro_batches(range(10), lengths, 3) + [[]]

    def logprobs_of(*packed):
        return common.token_logprobs(policy, *packed)

    def rewards_of(*packed):
        return common.token_heads(value, *packed)

    logprobs = ppo.score(logprobs_of, parts, prompts, responses, torch.device("cpu"))
    r = ppo.score(rewards_of, parts, prompts, responses, torch.device("cpu"))
    for i, (p, a) in enumerate(zip(prompts, responses)):
        assert torch.allclose(logprobs[i, : len(a)], row_logprobs(policy, p, a, 1.0), atol=1e-5)
        assert torch.allclose(r[i, : len(a)], row_heads(value, p, a, False), atol=1e-5)
        assert (logprobs[i, len(a) :] == 0).all() and (r[i, len(a) :] == 0).all()


STEPS = [
    dict(
        level="token",
        reward_scale="mean",
        clamp_kl=True,
        whiten_rewards=False,
        whiten_advantages=True,
    ),
    dict(
        level="token",
        reward_scale="fixed",
        fixed_length=7,
        whiten_rewards=True,
        whiten_advantages=False,
    ),
    dict(level="sequence", whiten_rewards=True, whiten_advantages=True),
    dict(level="sequence", whiten_rewards=False, whiten_advantages=False),
]


@pytest.mark.parametrize(
    "rm, options",
    list(zip(("rm", "rm", "rm", "rm_sequence"), STEPS)),
    ids=["mean", "fixed", "R(tau)", "sequence"],
)
def test_a_step_of_main_is_its_definition(world, tmp_path, monkeypatch, rm, options):
    """What the second step's update is given, and what is logged, against plain transformers and
    loops over rows"""
    tokenizer = common.load_tokenizer(world / "sft")
    prompt_lengths = sorted(
        len(common.encode_prompt(tokenizer, row))
        for row in record.logged(world / "data/prompts.jsonl")
    )
    query_len = max(n for n in prompt_lengths if n < prompt_lengths[-1])  # some are too long
    cfg = ppo.Config(
        policy=f"{world}/sft",
        reward_model=f"{world}/{rm}",
        data=f"{world}/data/prompts.jsonl",
        out=f"{tmp_path}/out",
        steps=2,
        rollout_batch=12,
        rollout_micro_batch=6,
        score_micro_batch=5,
        batch=6,
        micro_batch=4,
        ppo_epochs=1,
        query_len=query_len,
        response_len=20,
        temperature=0.8,
        kl_coef=0.2,
        kl_target=0.01,
        missing_eos_penalty=0.5,
        gamma=0.9,
        lam=0.8,
        lr=5e-3,
        warmup_steps=2,
        lr_epochs=1e9,
        seed=3,
        **options,
    )
    update, caught = ppo.update, []

    def spy(models, optimizer, rollout, cfg, step, lr, device):
        if step == 0:
            assert (rollout["old_values"] == 0).all()  # a new head
        if step == 1:
            caught.append((copy.deepcopy(models), rollout, lr, optimizer))
        return update(models, optimizer, rollout, cfg, step, lr, device)

    monkeypatch.setattr(ppo, "update", spy)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(
        common.encode_response(tokenizer, "\n")[0]
    )  # a model of 5 steps says it, at times
    tokenizer.more_end_ids = ()
    monkeypatch.setattr(ppo, "load_tokenizer", lambda path: tokenizer)
    ppo.main(cfg)
    while record.LOCKS:
        record.LOCKS.pop().close()
    models, rollout, lr, optimizer = caught[0]
    logged = record.logged(tmp_path / "out/metrics.jsonl")

    def frozen_model(name, head):
        path = world / name
        return common.load_model(path, torch.device("cpu"), None, torch.float32, head=head,
                                 frozen=True)

    reference = frozen_model("sft", None)
    rewarder = frozen_model(rm, "saved")
    assert max(map(len, rollout["prompts"])) <= query_len < prompt_lengths[-1]
    models.eval()
    rows = []
    with torch.no_grad():
        for p, a in zip(rollout["prompts"], rollout["responses"]):
            rows.append(
                dict(
                    old=row_logprobs(models["policy"], p, a, 0.8).tolist(),
                    ref=row_logprobs(reference, p, a, 0.8).tolist(),
                    r=row_heads(rewarder, p, a, False).tolist(),
                    v=row_heads(models["value"], p, a, True).tolist(),
                    ended=a[-1] == tokenizer.eos_token_id,
                )
            )
    kl_coef = logged[1]["kl_coef"]
    assert kl_coef == pytest.approx(
        0.2 * (1 + 0.1 * max(-0.2, min(0.2, logged[0]["kl"] / 0.01 - 1)))
    )  # the first step's is 0
    for row in rows:
        T = len(row["r"])
        R = sum(row["r"]) / T if rm == "rm" else row["r"][-1]
        rewards = row["r"][:] if cfg.level == "token" else [0.0] * (T - 1) + [R]
        rewards[-1] -= 0.5 * (not row["ended"])
        scale = {"mean": T, "fixed": 7, "sum": 1}[cfg.reward_scale]
        kls = [max(0.0, o - f) if cfg.clamp_kl else o - f for o, f in zip(row["old"], row["ref"])]
        row |= dict(
            R=R,
            rewards=[x / scale - kl_coef * k for x, k in zip(rewards, kls)],
            kl=sum(row["old"]) - sum(row["ref"]),
        )

    def flat(name):
        return [x for row in rows for x in row[name]]

    returned = [sum(row["rewards"]) for row in rows]
    if cfg.whiten_rewards:
        std = statistics.pstdev(flat("rewards"))
        for row in rows:
            row["rewards"] = [x / std for x in row["rewards"]]
    for row in rows:
        T, v = len(row["r"]), [*row["v"], 0.0]
        delta = [row["rewards"][t] + 0.9 * v[t + 1] - v[t] for t in range(T)]
        row["A"] = [sum(0.72**k * delta[t + k] for k in range(T - t)) for t in range(T)]
        row["target"] = [a + x for a, x in zip(row["A"], row["v"])]
    explained = 1 - statistics.pvariance(
        [t - x for t, x in zip(flat("target"), flat("v"))]
    ) / statistics.pvariance(flat("target"))
    if cfg.whiten_advantages:
        mean, std = statistics.fmean(flat("A")), statistics.pstdev(flat("A"))
        for row in rows:
            row["A"] = [(x - mean) / std for x in row["A"]]
    for name, ours in (
        ("old", "old_logprobs"),
        ("v", "old_values"),
        ("A", "advantages"),
        ("target", "returns"),
    ):
        for i, row in enumerate(rows):
            assert rollout[ours][i, : len(row[name])].tolist() == pytest.approx(
                row[name], abs=2e-4
            ), (name, i)
    n = len(flat("r"))
    want = dict(
        reward=statistics.fmean(row["R"] for row in rows),
        token_reward=sum(flat("r")) / n,
        kl=statistics.fmean(row["kl"] for row in rows),
        return_sd=statistics.pstdev(returned),
        response_length=n / 12,
        entropy=-sum(flat("old")) / n,
        explained_variance=explained,
        eos_share=sum(row["ended"] for row in rows) / 12,
        lr=5e-3,
    )
    assert (
        {name: logged[1][name] for name in want} == pytest.approx(want, abs=2e-4)
        and lr == 5e-3
        and abs(want["kl"]) > 2e-3
    )
    assert (
        logged[0]["lr"] == 2.5e-3 and 0 < want["eos_share"] < 1 and max(map(abs, flat("v"))) > 1e-3
    )
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["eps"], group["betas"]) == (0.0, 1e-5, (0.9, 0.999))


# ---------------------------------------- the reward model's training, pair by pair


@pytest.mark.parametrize(
    "loss, anchor, data",
    [
        ("eq4", 0.3, "diffs.jsonl"),
        ("eq3", 0.0, "diffs.jsonl"),
        ("sequence", 0.0, "data/pref.jsonl"),
    ],
)
def test_training_is_adam_on_the_mean_loss_of_the_batch(
    world, tmp_path, monkeypatch, loss, anchor, data
):
    """Every logged figure of every step, and the held-out ones at the end, against plain
    transformers, one answer at a time"""
    factor = 0.2 if loss == "eq4" else 1.0
    held_out = f"{world}/data/pref_heldout.jsonl"
    cfg = reward_model.Config(
        model=f"{world}/sft",
        data=[f"{world}/{data}"],
        eval_data=held_out,
        out=f"{tmp_path}/out",
        loss=loss,
        anchor=anchor,
        epochs=2,
        batch=14,
        micro_batch=3,
        lr=2e-3,
        warmup=0.4,
        head_lr_factor=factor,
        max_tokens=22,
        max_grad_norm=0.5,
        seed=2,
    )
    adam = torch.optim.AdamW
    made = []

    def spied_adam(*words, **options):
        made.append(options)
        return adam(*words, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spied_adam)
    reward_model.main(cfg)
    assert made == [dict(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                         fused=True)]
    while record.LOCKS:
        record.LOCKS.pop().close()
    tokenizer = common.load_tokenizer(world / "sft")
    names = ("prompt_ids", "edited_ids", "original_ids", "edited_changed", "original_changed")

    def read(path):
        """Its pairs: prompt, w, l, changed_w, changed_l"""
        for row in record.logged(path):
            if "edited_ids" in row:
                yield tuple(row[name] for name in names)
            else:
                prompt = common.encode_prompt(tokenizer, row)
                w = common.encode_response(tokenizer, row[f"output_{row['preference']}"])
                l = common.encode_response(tokenizer, row[f"output_{3 - row['preference']}"])
                yield prompt, w, l, [1] * len(w), [1] * len(l)

    def fits(pair):
        prompt, w, l, _, _ = pair
        return len(prompt) + max(len(w), len(l)) <= 22

    pairs = [pair for pair in read(*cfg.data) if fits(pair)]
    assert 14 < len(pairs) < len(list(read(*cfg.data))), "some pairs must be too long"

    # The same model and optimizer, made by plain transformers and torch.
    config = LlamaConfig.from_pretrained(world / "sft")
    config.num_labels = 1
    config.token_classification_bias = False
    config.classifier_dropout = 0.0
    model = LlamaForTokenClassification.from_pretrained(world / "sft", config=config)
    torch.nn.init.zeros_(model.score.weight)
    model.model.embed_tokens.padding_idx = None
    backbone = dict(params=model.model.parameters())
    head = dict(params=model.score.parameters())
    optimizer = adam([backbone, head], **made[0])

    def rewards(pair):
        prompt, w, l, _, _ = pair
        return row_heads(model, prompt, w, False), row_heads(model, prompt, l, False)

    def margin(r_w, r_l):
        if loss == "sequence":
            return r_w[-1] - r_l[-1]
        return r_w.mean() - r_l.mean()

    def part(r, changed):
        """The sum over U_1 / T"""
        return sum(x for x, c in zip(r, changed) if c) / len(r)

    def hit(m):
        return (m > 0) + 0.5 * (m == 0)

    names = ("loss", "accuracy", "margin", "u0", "u1_w", "u1_l", "r_eos")
    steps = math.ceil(2 * len(pairs) / 14)
    warm = max(1, round(0.4 * steps))
    for step, row in zip(range(steps), record.logged(tmp_path / "out/metrics.jsonl"), strict=True):
        stop = min(step * 14 + 14, 2 * len(pairs))
        batch = common.rows_at(step * 14, stop, len(pairs), 2)
        figures = []
        batch_loss = 0.0
        for i in batch:
            _, _, _, changed_w, changed_l = pairs[i]
            r_w, r_l = rewards(pairs[i])
            u1_w = part(r_w, changed_w)
            u1_l = part(r_l, changed_l)
            u0 = r_w.mean() - u1_w - (r_l.mean() - u1_l)
            z = {"sequence": r_w[-1] - r_l[-1], "eq3": u0 + u1_w - u1_l, "eq4": u1_w - u1_l}[loss]
            pair_loss = -torch.nn.functional.logsigmoid(z)

            squares = [x**2 for x, c in zip(r_w, changed_w) if not c]
            squares += [x**2 for x, c in zip(r_l, changed_l) if not c]
            if anchor and squares:
                pair_loss = pair_loss + anchor * sum(squares) / len(squares)
            batch_loss = batch_loss + pair_loss / len(batch)

            m = margin(r_w, r_l)
            r_eos = (r_w[-1] + r_l[-1]) / 2
            logged = (pair_loss, hit(m), m, u0, u1_w, u1_l, r_eos)
            figures.append([torch.as_tensor(x).item() for x in logged])

        batch_loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        share = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
        if step < warm:
            share = (step + 1) / warm
        lr = 2e-3 * share
        want = dict(zip(names, map(statistics.fmean, zip(*figures))), lr=lr, grad_norm=norm)
        assert {name: row[name] for name in want} == pytest.approx(want, rel=5e-3, abs=1e-4), step
        optimizer.param_groups[0]["lr"] = lr
        optimizer.param_groups[1]["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()

    # The held-out figures in the last row.
    with torch.no_grad():
        m = [margin(*rewards(pair)).item() for pair in read(held_out) if fits(pair)]
    want = dict(
        eval_margin=statistics.fmean(m),
        eval_loss=statistics.fmean(math.log1p(math.exp(-x)) for x in m),
        eval_accuracy=statistics.fmean(hit(x) for x in m),
    )
    assert {name: row[name] for name in want} == pytest.approx(want, rel=1e-2, abs=1e-3)
    assert len(set(m)) > 5


def test_a_tie_is_half_a_hit(world):
    """With a head of zeros every answer has reward 0 exactly; elsewhere float noise breaks ties"""
    model = common.load_model(
        world / "rm", torch.device("cpu"), None, torch.float32, head="zero", frozen=True
    )
    pair = ([1, 5, 6], [7, 8], [7, 8], [1, 1], [1, 1])
    said = reward_model.held_out_figures(model, [pair], reward_model.Config(), torch.device("cpu"))
    assert said == {
        "eval_accuracy": 0.5,
        "eval_margin": 0.0,
        "eval_loss": pytest.approx(math.log(2)),
    }


# ---------------------------------------------------------------- schedules, clipping, drawing


def test_cosine_warms_up_and_ends_at_zero():
    rates = [common.cosine(step, 100, 0.03) for step in range(101)]
    assert (
        rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
        and rates[100] == pytest.approx(0)
        and rates[3 + 97 // 2] == pytest.approx(0.5, abs=0.01)
    )
    assert all(a >= b for a, b in zip(rates[2:], rates[3:]))
    assert (
        common.cosine(0, 1, 0.03) == common.cosine(0, 4, 0) == common.cosine(1, 4, 0) == 1
    )  # a run of one step trains


def test_optimizer_step_clips_all_gradients_together():
    for limit, scale in ((1.0, 1 / 13), (None, 1.0), (20.0, 1.0)):
        a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
        a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
        optimizer = torch.optim.SGD([a, b], lr=1.0)
        assert common.optimizer_step([a, b], optimizer, 0.5, limit, "step 0") == pytest.approx(13.0)
        assert torch.cat([a.data, b.data]).tolist() == pytest.approx(
            [-0.5 * scale * g for g in (3, 4, 12)], rel=1e-4
        )
        assert a.grad is None and b.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(bad, capsys):
    a = torch.nn.Parameter(torch.ones(2))
    a.grad = torch.tensor([1.0, bad])
    with pytest.raises(SystemExit) as end:
        common.optimizer_step([a], torch.optim.SGD([a], lr=1.0), 0.5, 1.0, "step 3, rows [7]")
    assert (
        end.value.code == 2
        and "step 3, rows [7]: the gradient's norm is" in capsys.readouterr().err
        and a.tolist() == [1.0, 1.0]
    )


def test_draw_tokens_is_the_inverse_cdf_up_to_its_ends():
    logits = torch.tensor([[0.0, math.log(2), math.log(5), -math.inf]]).repeat(
        5, 1
    )  # 1/8, 2/8, 5/8, 0
    u = torch.tensor([[0.0], [0.124], [0.126], [0.376], [1 - 2**-24]])
    assert common.draw_tokens(logits, u, 1.0, 1.0, 0).tolist() == [0, 0, 1, 2, 2]
    assert (
        common.draw_tokens(logits, u, 1.0, 1.0, 1).tolist() == [2] * 5
        and common.draw_tokens(logits, u, 0, 1.0, 0).tolist() == [2] * 5
    )
    assert (
        common.draw_tokens(logits, u, 1.0, 0.625, 0).tolist() == [2] * 5
    )  # the first alone holds top_p of the mass
    assert common.draw_tokens(logits, u, 1.0, 0.63, 0).tolist() == [1, 1, 1, 2, 2]
    assert (
        common.draw_tokens(logits, u, 1.0, 0.7, 2).tolist() == [2] * 5
    )  # 5/7 of what top_k leaves: 0.714
    nearly_one = torch.full(
        (5, 1), 1 - 1e-12, dtype=torch.float64
    )  # 1.0 in float32: still not the end
    assert common.draw_tokens(logits, nearly_one, 1.0, 1.0, 0).tolist() == [2] * 5
    assert (
        common.draw_tokens(logits * math.nan, u, 1.0, 1.0, 0).tolist() == [4] * 5
    )  # no token: generate() ends the run
    big = torch.zeros(
        1, 50_000
    )  # the sum of many parts in float32 is not 1: u times it must not reach the end
    big[0, -1] = -math.inf
    assert common.draw_tokens(big, torch.tensor([[1 - 2**-24]]), 1.0, 1.0, 0).item() < 49_999
    big[0, -1] = 0
    assert common.draw_tokens(
        big.bfloat16(), torch.tensor([[0.5]]), 1.0, 1.0, 0
    ).item() == pytest.approx(25_000, abs=2)  # half precision is raised


def test_masks_may_be_numbers_and_rows_empty():
    """0/1 masks are as good as bool; a row without a token gives 0, not NaN"""
    x, mask = ragged(0)
    mask = mask.clone()
    mask[2] = False
    number = mask.long()
    x = x.masked_fill(~mask, GARBAGE)
    y = ragged(1)[0].masked_fill(~mask, GARBAGE)
    z = ragged(2)[0].masked_fill(~mask, GARBAGE)
    for call in (
        lambda m: ppo.shape_rewards(x, y, z, m, level="token", kl_coef=0.1, reward_scale="mean"),
        lambda m: ppo.gae(x, y, m, gamma=0.9, lam=0.8)[1],
        lambda m: ppo.whiten(x, m),
        lambda m: ppo.whiten(x, m, shift_mean=False),
        lambda m: ppo.policy_loss(x, y, z, m, clip=0.2),
        lambda m: ppo.value_loss(x, y, z, m, clip=0.2),
        lambda m: reward_model.pair_losses(x, m, m, y, m, 0 * number, loss="eq3", anchor=0.1),
        lambda m: reward_model.pair_losses(x, m, 0 * number, y, m, m, loss="eq4"),
        lambda m: reward_model.mean_rewards(x, m),
    ):
        assert (
            torch.equal(call(mask), call(number))
            and not call(mask).isnan().any()
            and (call(mask)[2] == call(mask)[2]).all()
        )
    assert (
        ppo.whiten(x, torch.zeros_like(mask)).abs().max() == 0
        and ppo.masked_mean(x, torch.zeros_like(mask)) == 0
    )


def test_shape_rewards_refuses_what_has_no_meaning():
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="fixed_length"):
        ppo.shape_rewards(x, x, x, mask, level="token", kl_coef=0.1, reward_scale="fixed")
    with pytest.raises(ValueError, match="ended"):
        ppo.shape_rewards(x, x, x, mask, level="token", kl_coef=0.1, missing_eos_penalty=1.0)


def test_value_loss_with_a_clip_of_zero_keeps_the_old_value():
    v = torch.tensor([[3.0]])
    old = torch.tensor([[1.0]])
    target = torch.tensor([[2.5]])
    mask = torch.tensor([[1]])
    kept = ppo.value_loss(v, old, target, mask, clip=0.0)
    assert kept.item() == pytest.approx(0.5 * 1.5**2)
    unclipped = ppo.value_loss(v, old, target, mask, clip=None)
    assert unclipped.item() == pytest.approx(0.5 * 0.5**2)


def test_a_response_that_was_cut_keeps_its_last_token(world):
    tokenizer = common.load_tokenizer(world / "sft")
    for text in ("apple\npear", " two", "x"):
        ids = common.encode_response(tokenizer, text, eos=False)
        assert (
            common.decode_response(tokenizer, ids)
            == common.decode_response(tokenizer, [*ids, tokenizer.eos_token_id])
            == text
        )


def test_streams_and_draws_follow_their_key():
    assert common.rows_at(0, 50, 50, 0) != common.rows_at(0, 50, 50, 1)
    draws = common.row_uniforms(2000, 0, 1, 2)
    assert (
        draws * 2**24 % 1 == 0
    ).all() and draws.max() < 1  # exact in float32: no draw is rounded up to 1
    assert not torch.equal(draws, common.row_uniforms(2000, 0, 2, 1)) and not torch.equal(
        draws, common.row_uniforms(2000, 1, 1, 2)
    )


def test_no_model_drops_out(world, tmp_path):
    for file in (world / "sft").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    model = common.load_model(tmp_path, torch.device("cpu"), None, torch.float32, head="zero")
    assert (
        model.training
        and model.config.attention_dropout == 0
        and {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    )
