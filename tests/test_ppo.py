"""ppo.py in numbers: a planted reward followed through a complete step, the gradient by finite
differences, what must not change a result, and what a user sees. pytest tests/test_ppo.py"""
import json, math, statistics
from types import SimpleNamespace

import pytest, torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification,
                          PreTrainedTokenizerFast)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import common, ppo
from extras import alarms
from plumbing import files, watch

CPU = torch.device("cpu")


# ---------------------------------------------------------------- a planted reward

@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A policy that draws one of the letters r, u, w, x, y, c, says the alphabet from there to z,
    and then EOS; and a reward model that pays 3 for an x and nothing else.
    -> folder with policy/, rm/, prompts.jsonl"""
    home = tmp_path_factory.mktemp("planted")
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>",
                                        eos_token="</s>")
    V = len(tokenizer)
    H = 264
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=H, intermediate_size=8, num_hidden_layers=2,
                         num_attention_heads=4, num_labels=1, token_classification_bias=False,
                         rms_norm_eps=1e-12, tie_word_embeddings=False)
    policy = LlamaForCausalLM(config)
    rm = LlamaForTokenClassification(config)

    with torch.no_grad():
        # No layer adds anything: the last hidden state is sqrt(H) at the token's own index.
        for model in (policy, rm):
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(V, H))

        policy.lm_head.weight.zero_()
        for letter, following in zip("cdefghijklmnopqrstuvwxyz", "defghijklmnopqrstuvwxyz"):
            policy.lm_head.weight[letters[following], letters[letter]] = 10.0
        policy.lm_head.weight[tokenizer.eos_token_id, letters["z"]] = 10.0
        for start in "ruwxyc":
            policy.lm_head.weight[letters[start], letters[":"]] = 10.0  # every prompt ends in ":"

        rm.score.weight.zero_()
        rm.score.weight[0, letters["x"]] = 3 / math.sqrt(H)

    for name, model in (("policy", policy), ("rm", rm)):
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    rows = [dict(instruction="x" * (1 + 7 * i % 19), input="") for i in range(24)]
    files.write_jsonl(home / "prompts.jsonl", rows)
    return home


def step_of(planted, tmp_path, monkeypatch, **fields):
    """One step of ppo.main up to its update -> the rollout that the update gets, and the row of
    metrics.jsonl"""
    defaults = dict(rollout_batch=24, rollout_micro_batch=7, score_micro_batch=5, batch=12,
                    micro_batch=5, response_len=8, steps=1, query_len=300, kl_coef=0.0,
                    whiten_rewards=False, whiten_advantages=False)
    cfg = ppo.Config(policy=str(planted / "policy"), reward_model=str(planted / "rm"),
                     out=str(tmp_path / "out"), data=str(planted / "prompts.jsonl"),
                     **(defaults | fields))
    seen = {}

    def update(models, optimizer, rollout, *rest):
        seen.update(rollout)
        return dict(first_ratio_error=0.0, clip_fraction=0.0, approx_kl=0.0, grad_norm=0.0)

    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(watch, "listen_for_signals", lambda: None)
    ppo.main(cfg)

    # What was said is what the planted policy can say.
    tokenizer = AutoTokenizer.from_pretrained(planted / "policy")
    said = [common.decode_response(tokenizer, ids) for ids in seen["responses"]]
    ended = [ids[-1] == tokenizer.eos_token_id for ids in seen["responses"]]
    assert {text[0] for text in said} == set("ruwxyc")
    assert len({len(ids) for ids in seen["prompts"]}) > 3, "left padding"
    assert all((text + "$")[:8] in "cdefghijklmnopqrstuvwxyz$" for text in said), said
    finished = {text for text, end in zip(said, ended) if end}
    assert finished == {"uvwxyz", "wxyz", "xyz", "yz"}, "these end in EOS; the rest is cut"
    return seen, said, ended, json.loads((tmp_path / "out/metrics.jsonl").read_text())


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_planted_reward_reaches_the_action_that_earned_it(planted, tmp_path, monkeypatch, lam):
    rollout, said, ended, row = step_of(planted, tmp_path, monkeypatch, lam=lam)
    for text, advantages in zip(said, rollout["advantages"].tolist()):
        t0 = text.find("x")  # -1: never said
        for t, A in enumerate(advantages):
            earned = t == t0 if lam == 0 else t <= t0
            want = pytest.approx(3.0, abs=1e-5) if earned else 0.0
            assert A == want, (text, t, advantages)
    tokens = sum(map(len, rollout["responses"]))
    paid = 3 * sum("x" in text for text in said)
    assert row["token_reward"] == pytest.approx(paid / tokens, abs=1e-6)
    assert row["eos_share"] == pytest.approx(sum(ended) / 24) and row["kl"] == 0
    assert row["response_length"] == tokens / 24


def test_a_planted_reward_at_sequence_level_is_spread_over_the_row(planted, tmp_path, monkeypatch):
    """level=sequence with a token-level reward model: R(tau) of Eq. 1 on every token of the row,
    and 0 after it"""
    rollout, said, _, _ = step_of(planted, tmp_path, monkeypatch, level="sequence")
    for text, ids, advantages in zip(said, rollout["responses"], rollout["advantages"].tolist()):
        R = 3 / len(ids) if "x" in text else 0.0
        padding = len(advantages) - len(ids)
        assert advantages == pytest.approx([R] * len(ids) + [0.0] * padding, abs=1e-6)


def test_a_step_saves_and_prints_samples(planted, tmp_path, monkeypatch, capsys):
    """Three samples with their token rewards, one of them printed; no alarm; b moves towards
    kl_target, by at most 2%"""
    rollout, said, _, row = step_of(planted, tmp_path, monkeypatch, kl_coef=0.5, kl_target=6.0,
                                    reward_scale="fixed", fixed_length=1000)
    lines = (tmp_path / "out/samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["output"] for sample in samples] == said[:3]
    for sample in samples:
        assert "".join(sample["tokens"]) in (sample["output"], sample["output"] + "</s>")
        want = [3.0 if token == "x" else 0.0 for token in sample["tokens"]]
        assert sample["token_rewards"] == pytest.approx(want, abs=1e-5)
    out = capsys.readouterr().out
    assert "R = +" in out and "ALARM" not in out
    assert row["kl_coef"] == 0.5
    assert row["next_kl_coef"] == pytest.approx(0.5 * 0.98)  # KL 0 is far below 6


def test_the_adaptive_kl_moves_by_at_most_two_percent():
    assert ppo.next_kl_coef(0.5, 6.6, 6.0) == pytest.approx(0.5 * 1.01)
    assert ppo.next_kl_coef(0.5, 60.0, 6.0) == pytest.approx(0.5 * 1.02)
    assert ppo.next_kl_coef(0.5, -60.0, 6.0) == pytest.approx(0.5 * 0.98)
    assert ppo.next_kl_coef(0.5, 60.0, None) == 0.5


def test_an_alarm_is_printed(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alarms, "length_pressure", lambda *_: "each extra token pays")
    monkeypatch.setattr(alarms, "alarms", lambda cfg, history, dtype: [f"{len(history)} step"])
    step_of(planted, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert "ALARM: each extra token pays\n" in out and "ALARM at step 0: 1 step\n" in out


def test_the_mean_scale_gives_R_at_the_first_token(planted, tmp_path, monkeypatch):
    rollout, said, _, row = step_of(planted, tmp_path, monkeypatch, reward_scale="mean")
    R = [3 / len(ids) if "x" in text else 0.0 for text, ids in zip(said, rollout["responses"])]
    assert rollout["advantages"][:, 0].tolist() == pytest.approx(R, abs=1e-6)
    assert row["reward"] == pytest.approx(sum(R) / 24, abs=1e-6)


def test_a_truncated_response_pays_at_its_last_token_only(planted, tmp_path, monkeypatch):
    rollout, said, ended, row = step_of(planted, tmp_path, monkeypatch, lam=0.0,
                                        missing_eos_penalty=2.0)
    for text, end, advantages in zip(said, ended, rollout["advantages"].tolist()):
        want = [3.0 * (t == text.find("x")) - 2.0 * (t == 7 and not end) for t in range(8)]
        assert advantages == pytest.approx(want, abs=1e-5), text


# ---------------------------------------------------------------- the update in float64

def exact_norm(self, x):
    """LlamaRMSNorm without its cast to float32"""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def tiny(monkeypatch):
    """-> cfg, models (two layers, float64), a rollout of six rows that lies on both sides of both
    clips"""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_labels=1, num_attention_heads=4, num_key_value_heads=2,
                         initializer_range=0.3, tie_word_embeddings=False,
                         token_classification_bias=False, classifier_dropout=0.0)
    policy = LlamaForCausalLM(config)
    value = LlamaForTokenClassification(config)
    models = torch.nn.ModuleDict(dict(policy=policy, value=value)).double()
    cfg = ppo.Config(rollout_batch=6, batch=6, micro_batch=2, ppo_epochs=1, max_grad_norm=None,
                     temperature=0.7, vf_coef=0.3, value_clip=0.1, data="d.jsonl", out="out")
    draw = torch.Generator().manual_seed(1)

    def random_ids(length):
        return torch.randint(1, 23, (length,), generator=draw).tolist()

    def noise(scale):
        return scale * torch.randn(6, 6, generator=draw, dtype=torch.float64)

    prompts = [random_ids(length) for length in (3, 1, 5, 2, 4, 2)]
    responses = [random_ids(length) for length in (4, 1, 2, 6, 3, 5)]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    packed = common.pack(prompts, responses, CPU)
    with torch.no_grad():
        old_logprobs = common.token_logprobs(models["policy"], *packed, 0.7) + noise(0.25)
        old_values = common.token_heads(models["value"], *packed, before=True) + noise(0.15)
    rollout = dict(prompts=prompts, responses=responses, lengths=lengths, numbers=range(11, 17),
                   old_logprobs=old_logprobs, old_values=old_values, advantages=noise(1.0),
                   returns=noise(1.0))
    return cfg, models, rollout


class Keep:
    """An optimizer that keeps the gradients it is given and changes nothing"""

    def __init__(self, models):
        self.param_groups = [dict(params=list(models.parameters()))]
        self.grads = None

    def step(self):
        self.grads = [p.grad.clone() for p in self.param_groups[0]["params"]]

    def zero_grad(self, set_to_none):
        for p in self.param_groups[0]["params"]:
            p.grad = None


def updated(cfg, models, rollout):
    optimizer = Keep(models)
    return ppo.update(models, optimizer, rollout, cfg, 0, 1.0, CPU), optimizer.grads


def slow_objective(cfg, models, rollout):
    """The figures of update() for one optimizer batch, a row and a token at a time, no padding"""
    policy = 0.0
    value = 0.0
    clipped = 0
    value_clipped = 0
    ratios = []
    for row, (prompt, response) in enumerate(zip(rollout["prompts"], rollout["responses"])):
        ids = torch.tensor([prompt + response])
        logits = models["policy"](ids).logits[0] / cfg.temperature
        heads = models["value"](ids).logits[0, :, 0]
        for t, token in enumerate(response):
            at = len(prompt) + t - 1  # the position that has read s_t and not yet a_t
            logprob = logits[at, token].item() - torch.logsumexp(logits[at], 0).item()
            v = heads[at].item()
            old_v = rollout["old_values"][row, t].item()
            A = rollout["advantages"][row, t].item()
            target = rollout["returns"][row, t].item()
            ratio = math.exp(logprob - rollout["old_logprobs"][row, t].item())
            policy -= min(ratio * A, min(max(ratio, 1 - cfg.clip), 1 + cfg.clip) * A)
            near = min(max(v, old_v - cfg.value_clip), old_v + cfg.value_clip)
            value += 0.5 * max((v - target) ** 2, (near - target) ** 2)
            ratios.append(ratio)
            clipped += abs(ratio - 1) > cfg.clip
            value_clipped += abs(v - old_v) > cfg.value_clip
    tokens = len(ratios)
    return dict(
        policy_loss=policy / tokens,
        value_loss=value / tokens,
        clip_fraction=clipped / tokens,
        value_clipped=value_clipped / tokens,
        ratio=sum(ratios) / tokens,
        approx_kl=sum(ratio - 1 - math.log(ratio) for ratio in ratios) / tokens,
        first_ratio_error=max(abs(ratio - 1) for ratio in ratios),
    )


@torch.no_grad()
def test_the_gradient_is_that_of_the_objective(tiny):
    """Central differences of the slow objective, at three entries of every parameter of both
    models"""
    cfg, models, rollout = tiny
    with torch.enable_grad():
        stats, grads = updated(cfg, models, rollout)
    slow = slow_objective(cfg, models, rollout)
    assert 0.2 < slow["clip_fraction"] < 0.8, "both sides of the clip of the ratio"
    assert 0.2 < slow["value_clipped"] < 0.8, "both sides of the clip of V"
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    assert stats == pytest.approx(slow | dict(grad_norm=norm), abs=1e-6)
    for name in ("policy_loss", "value_loss"):
        assert stats[name] == pytest.approx(slow[name], abs=1e-12)
    torch.manual_seed(2)

    def objective():
        losses = slow_objective(cfg, models, rollout)
        return losses["policy_loss"] + cfg.vf_coef * losses["value_loss"]

    for (name, parameter), grad in zip(models.named_parameters(), grads):
        entries = [grad.abs().argmax().item(), *torch.randint(grad.numel(), (2,)).tolist()]
        for i in entries:
            flat = parameter.view(-1)
            before = flat[i].item()
            flat[i] = before + 1e-6
            above = objective()
            flat[i] = before - 1e-6
            slope = (above - objective()) / 2e-6
            flat[i] = before
            assert grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-8), (name, i)


def wider(prompts, responses, device):
    ids, mask, response_mask = common.pack(prompts, responses, device)
    return F.pad(ids, (5, 0), value=7), F.pad(mask, (5, 0)), response_mask


def test_padding_micro_batches_and_order_change_nothing(tiny, monkeypatch):
    cfg, models, rollout = tiny
    stats, grads = updated(cfg, models, rollout)

    def reversed_deal(rows, lengths, micro_batch):
        return [part[::-1] for part in common.my_micro_batches(rows, lengths, micro_batch)]

    def unsorted_deal(rows, lengths, micro_batch):
        return [list(rows)[i:i + micro_batch] for i in range(0, len(rows), micro_batch)]

    for fields, name, other in (
        (dict(micro_batch=1), None, None),
        (dict(micro_batch=6), None, None),
        ({}, "pack", wider),
        ({}, "my_micro_batches", reversed_deal),
        (dict(micro_batch=4), "my_micro_batches", unsorted_deal),
    ):
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(ppo, name, other)
            stats_2, grads_2 = updated(ppo.Config(**(vars(cfg) | fields)), models, rollout)
        assert stats_2 == pytest.approx(stats, rel=1e-12, abs=1e-12), (fields, name)
        difference = max((a - b).abs().max().item() for a, b in zip(grads, grads_2))
        assert difference < 1e-13, (fields, name)


def test_without_a_value_clip_no_value_is_clipped(tiny):
    cfg, models, rollout = tiny
    clipped, _ = updated(cfg, models, rollout)
    stats, _ = updated(ppo.Config(**(vars(cfg) | dict(value_clip=None))), models, rollout)
    assert stats["value_clipped"] == 0
    assert stats["value_loss"] < clipped["value_loss"]


def test_padding_and_micro_batches_change_no_rollout_and_no_score(tiny, monkeypatch):
    cfg, models, _ = tiny
    fields = dict(rollout_batch=9, rollout_micro_batch=4, response_len=12, temperature=1.0)
    cfg = ppo.Config(**(vars(cfg) | fields))
    prompts = [[5, 6, 7], [4], [9] * 6, [1, 2], [3, 3, 3, 3], [8], [2, 9], [7] * 5, [6]]

    def heads(*packed):
        return common.token_heads(models["value"], *packed).float()

    def rolled():
        tokenizer = SimpleNamespace(eos_token_id=3)
        responses = ppo.roll_out(models["policy"], tokenizer, prompts, cfg, 0, CPU)
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
        parts = common.my_micro_batches(range(9), lengths, cfg.score_micro_batch)
        return responses, ppo.score(heads, parts, prompts, responses, CPU)

    responses, r = rolled()
    assert len({len(ids) for ids in responses}) > 2
    cfg = ppo.Config(**(vars(cfg) | dict(score_micro_batch=2)))
    monkeypatch.setattr(ppo, "pack", wider)
    responses_2, r_2 = rolled()
    assert responses == responses_2 and torch.allclose(r, r_2, atol=1e-6)
    # And it is what the model says of each row alone.
    for row, (prompt, ids) in enumerate(zip(prompts, responses)):
        alone = models["value"](torch.tensor([prompt + ids])).logits[0, len(prompt):, 0]
        assert torch.allclose(r[row, :len(ids)].double(), alone, atol=1e-6)
        assert (r[row, len(ids):] == 0).all()


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tiny, monkeypatch, capsys):
    cfg, models, rollout = tiny
    rollout["returns"][3, 2] = float("inf")
    optimizer = Keep(models)
    with pytest.raises(SystemExit) as end:
        ppo.update(models, optimizer, rollout, cfg, 5, 1.0, CPU)
    line = capsys.readouterr().err
    assert end.value.code == 2 and optimizer.grads is None, "nothing may be updated"
    assert "step 5: the loss is not finite in row(s) 14 of d.jsonl" in line
    assert line.count("\n") == 1


def test_many_rows_that_are_not_finite_are_still_one_line(capsys):
    with pytest.raises(SystemExit):
        ppo.stop_if(torch.ones(9).bool(), "r is", 0, range(1, 10), ppo.Config())
    assert "in row(s) 1, 2, 3, 4, 5, 6, 7, 8, ... of " in capsys.readouterr().err


# ---------------------------------------------------------------- what a user sees

def history(n, **last):
    """n rows of a metrics.jsonl without an alarm, and the fields `last` in the last row"""
    row = dict(reward=1.0, kl=1.0, approx_kl=0.01, eos_share=0.9, return_sd=1.0,
               first_ratio_error=0.0, response_length=40.0)
    rows = [row | dict(step=k, reward=1.0 + 0.1 * k) for k in range(n)]
    rows[-1] |= last
    return rows


@pytest.mark.parametrize(
    "last, words",
    [
        (dict(kl=80.0), "KL exploding: 80.0 nats"),
        (dict(approx_kl=0.9), "KL exploding"),
        (dict(eos_share=0.0), "all 512 responses truncated"),
        (dict(return_sd=0.0), "reward flat"),
        (dict(first_ratio_error=0.01), "ratio != 1 at the first minibatch"),
    ],
)
def test_alarms_are_words(last, words):
    assert alarms.alarms(ppo.Config(), history(7), torch.float32) == []
    (said,) = alarms.alarms(ppo.Config(), history(7, **last), torch.float32)
    assert words in said


def steps_with_an_alarm(rows):
    counts = range(1, len(rows) + 1)
    return [k for k in counts if alarms.alarms(ppo.Config(), rows[:k], torch.float32)]


def test_a_flat_reward_is_reported_every_twenty_steps():
    flat = [row | dict(reward=1.0 + 0.05 * (k % 3)) for k, row in enumerate(history(60))]
    assert steps_with_an_alarm(flat) == [20, 40, 60]
    assert steps_with_an_alarm(history(60)) == []


def test_growing_responses_are_reported_every_ten_steps():
    longer = [row | dict(response_length=40.0 + k) for k, row in enumerate(history(50))]
    assert steps_with_an_alarm(longer) == [30, 40, 50]  # after 20 steps it is 59: not yet 1.5 x 40
    (said,) = alarms.alarms(ppo.Config(), longer[:30], torch.float32)
    assert "responses grow: 69 tokens, 40 at first" in said
    assert alarms.alarms(ppo.Config(), longer[:20], torch.float32) == []


def test_length_pressure_is_reported_from_the_first_rollout():
    r = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 4.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    ended = torch.tensor([True, False])  # mean 2.4, sd 1.02, 3 at the only EOS
    said = alarms.length_pressure(ppo.Config(), r, mask, ended)
    assert said.startswith("each extra token pays +2.4 (mean r_t over all tokens; +3 at EOS")
    assert said.endswith("length pressure, see anchor, or reward_scale=mean")
    small = alarms.length_pressure(ppo.Config(), r - 2.0 * mask, mask, ended)
    assert small is None  # mean 0.4 < sd / 2
    negative = alarms.length_pressure(ppo.Config(), r - 5.0 * mask, mask, ended)
    assert negative.startswith("each extra token pays -2.6")
    assert alarms.length_pressure(ppo.Config(reward_scale="mean"), r, mask, ended) is None
    assert alarms.length_pressure(ppo.Config(level="sequence"), r, mask, ended) is None


def test_explained_variance_of_all_tokens_and_by_fifth():
    torch.manual_seed(0)
    mask = torch.arange(10) < torch.tensor([[10], [5], [7]])
    returns = torch.randn(3, 10)
    values = torch.randn(3, 10)
    values[:, 8:] = returns[:, 8:]  # V knows the last fifth of the row of ten
    said = alarms.explained_variance(values, returns, mask)

    def slow(keep):
        errors = []
        targets = []
        for i, T in enumerate((10, 5, 7)):
            for t in range(T):
                if keep(t, T):
                    targets.append(returns[i, t].item())
                    errors.append(returns[i, t].item() - values[i, t].item())
        return 1 - statistics.pvariance(errors) / statistics.pvariance(targets)

    assert said["explained_variance"] == pytest.approx(slow(lambda t, T: True), abs=1e-5)
    for k in range(5):
        want = slow(lambda t, T: k <= 5 * t / T < k + 1)
        assert said[f"explained_variance_{k + 1}"] == pytest.approx(want, abs=1e-5)
    assert set(alarms.explained_variance(values * 0, returns * 0, mask).values()) == {0.0}


def test_a_disk_too_small_is_reported_before_the_first_step(tiny, tmp_path, monkeypatch, capsys):
    _, models, _ = tiny
    n = sum(p.numel() for p in models.parameters())
    policy = sum(p.numel() for p in models["policy"].parameters())
    need = 2 * 12 * n + 4 * policy * 4  # two checkpoints; step_20, _40, _60 and the last model

    def check(free):
        monkeypatch.setattr(alarms.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        alarms.check_disk(ppo.Config(out=str(tmp_path)), models, torch.float32)

    def refused(free):
        with pytest.raises(SystemExit):
            check(free)
        assert "4 model folder(s)" in capsys.readouterr().err

    check(need)
    refused(need - 1)
    (tmp_path / "checkpoint_3").mkdir()  # one of the two is there already
    check(need - 12 * n)
    refused(need - 12 * n - 1)


def test_a_run_that_would_fill_the_disk_does_not_start(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alarms.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(SystemExit) as end:
        step_of(planted, tmp_path, monkeypatch)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert "has 1e-05 GB free, this run needs " in line
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "run.lock"}
