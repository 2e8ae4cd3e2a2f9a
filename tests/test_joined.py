"""Rows without padding (extras/joined.py): the same results, and what a step computes, counted.
pytest tests/test_joined.py"""
import copy, functools, sys
from types import SimpleNamespace

import pytest, torch
import torch.nn.functional as F
from transformers import (Gemma2Config, GlmConfig, HeliumConfig, LlamaConfig, MistralConfig,
                          Phi3Config, Qwen2Config, Qwen3Config, StableLmConfig)
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import common, evaluate, ppo
from conftest import ROOT, rows_of
from extras import joined
from plumbing import watch
from plumbing.files import write_jsonl

sys.path.insert(0, str(ROOT / "extras/bench"))
import child, world

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [4], [9, 9, 9, 9, 9], [8, 7]]
RESPONSES = [[8, 9], [10, 11, 12, 13, 3], [7], [6, 5, 4]]


def small(Config, Auto, **fields):
    """A model of the family with random weights, large enough that each position matters"""
    torch.manual_seed(0)
    fields = dict(num_key_value_heads=2, head_dim=8, pad_token_id=0, num_labels=1,
                  token_classification_bias=False, classifier_dropout=0.0) | fields
    config = Config(vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                    num_attention_heads=4, max_position_embeddings=64, **fields)
    config.update(dict(attention_dropout=0.0))
    model = Auto.from_config(config).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2)
    return model


def alone(model, is_head):
    """By plain transformers, each row alone: log pi, or r_t and V(s_t), [B, T] each"""
    results = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        logits = model(torch.tensor([prompt + response])).logits[0]
        P = len(prompt)
        if is_head:
            results.append((logits[P:, 0], logits[P - 1:-1, 0]))
        else:
            logprobs = torch.log_softmax(logits[P - 1:-1] / 0.7, -1)
            results.append((logprobs[range(len(response)), response],))
    T = max(map(len, RESPONSES))
    padded = [[F.pad(x, (0, T - len(x))) for x in row] for row in results]
    return [torch.stack(rows) for rows in zip(*padded)]


def together(model, is_head):
    packed = common.pack(PROMPTS, RESPONSES, CPU)
    if is_head:
        r = common.token_heads(model, *packed)
        return [r, common.token_heads(model, *packed, before=True)]
    return [common.token_logprobs(model, *packed, 0.7)]


def gradients(model, results):
    model.zero_grad()
    weights = torch.linspace(-1, 2, results[0].numel()).view_as(results[0])
    sum((x * weights).sum() for x in results).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


FAMILIES = [LlamaConfig, Qwen2Config, Qwen3Config, HeliumConfig, Phi3Config, GlmConfig,
            functools.partial(MistralConfig, sliding_window=None)]


@pytest.mark.parametrize("Config", FAMILIES)
@pytest.mark.parametrize("is_head", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_results_and_gradients_are_those_of_rows_alone(Config, is_head, checkpointing):
    model = small(Config, AutoModelForTokenClassification if is_head else AutoModelForCausalLM)
    assert joined.is_exact(model)
    want = alone(model, is_head)
    want_gradients = gradients(model, want)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = together(model, is_head)
    for x, y in zip(found, want, strict=True):
        assert torch.allclose(x, y, atol=1e-5, rtol=1e-5)
        assert y.abs().max() > 0.1
    found_gradients = gradients(model, found)
    for name, gradient in want_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert torch.allclose(found_gradients[name], gradient, atol=1e-5 * scale), name


NOT_EXACT = {
    "Gemma 2: windows and soft-capping": dict(Config=Gemma2Config, sliding_window=4),
    "Mistral with a window": dict(Config=MistralConfig, sliding_window=4),
    "Qwen 2 with a window above": dict(Config=Qwen2Config, use_sliding_window=True,
                                       sliding_window=4, max_window_layers=1),
    "Llama in eager attention": dict(Config=LlamaConfig, attn_implementation="eager"),
    "StableLM, which drops slots and grid": dict(Config=StableLmConfig),
}


@pytest.mark.parametrize("name", NOT_EXACT)
@torch.no_grad()
def test_other_models_get_padded_rows(name):
    model = small(Auto=AutoModelForCausalLM, **NOT_EXACT[name])
    assert not joined.is_exact(model)
    found, want = together(model, False), alone(model, False)
    assert torch.allclose(found[0], want[0], atol=1e-5)


@pytest.mark.parametrize("is_head", [False, True])
def test_without_extras_rows_are_padded(is_head, monkeypatch):
    """Results and gradients are the same except for float noise"""
    model = small(LlamaConfig, AutoModelForTokenClassification if is_head else AutoModelForCausalLM)
    with_extras = together(model, is_head)
    with_gradients = gradients(model, with_extras)
    widths = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, given, output: widths.append(tuple(given[0].shape)))
    monkeypatch.setattr(common, "extra", lambda name: None)
    without = together(model, is_head)
    hook.remove()
    assert set(widths) == {(4, 6)}
    for x, y in zip(with_extras, without, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    for name, gradient in gradients(model, without).items():
        assert torch.allclose(with_gradients[name], gradient, atol=1e-5), name


@pytest.mark.parametrize("is_head", [False, True])
def test_bfloat16_is_as_near_to_float64_as_padded_rows(is_head, monkeypatch):
    """On a CPU the attention of joined rows is in float32, and the rest in bfloat16"""
    Auto = AutoModelForTokenClassification if is_head else AutoModelForCausalLM
    model = small(LlamaConfig, Auto).bfloat16()
    want = alone(copy.deepcopy(model).double(), is_head)
    plain = joined.sdpa_attention_forward
    attended = set()

    def attention(module, query, *words, **options):
        attended.add(query.dtype)
        return plain(module, query, *words, **options)

    monkeypatch.setattr(joined, "sdpa_attention_forward", attention)
    found = together(model, is_head)
    assert attended == {torch.float32}
    found_gradients = gradients(model, found)
    assert {gradient.dtype for gradient in found_gradients.values()} == {torch.bfloat16}
    monkeypatch.setattr(common, "extra", lambda name: None)
    padded = together(model, is_head)
    for x, y, exact in zip(found, padded, want, strict=True):
        assert x.dtype == torch.float32
        error, padded_error = (x - exact).norm(), (y - exact).norm()
        assert 0 < error < 1.5 * padded_error < 0.1 * exact.norm()


def test_the_attention_of_ordinary_calls_is_transformers_own():
    """attend() replaces sdpa in the process; a model that is called in the usual way must not see
    it: padded rows, with a cache, next to the eager attention"""
    model = small(LlamaConfig, AutoModelForCausalLM).eval()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids, mask, _ = common.pack(PROMPTS, RESPONSES, CPU)
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask).logits[mask] for m in (model, eager))
        assert torch.allclose(a, b, atol=1e-4)
        said = [m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
                for m in (model, eager)]
    assert said[0].tolist() == said[1].tolist()


# ---------------------------------------------------------------- what a step computes

@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Two steps of ppo.main at natural lengths -> for the second one: forwards and tokens that the
    models were given, by phase; rows of logits by phase; the lengths of prompt and response"""
    size = world.SIZES["tiny"]
    home = tmp_path_factory.mktemp("natural")
    world.make(home, size, "natural")
    lengths = world.response_lengths("natural", size.rows)
    seen = SimpleNamespace(phase="load", forwards={}, tokens={}, logits={}, lengths=lengths)

    def add(figures, n):
        figures[seen.phase] = figures.get(seen.phase, 0) + n

    def before(module, args, given):
        add(seen.forwards, 1)
        add(seen.tokens, given["input_ids"].numel())

    def load_model(*args, **options):
        model = common.load_model(*args, **options)
        model.register_forward_pre_hook(before, with_kwargs=True)
        if hasattr(model, "lm_head"):
            model.lm_head.register_forward_pre_hook(
                lambda module, args: add(seen.logits, args[0].shape[:-1].numel()))
        return model

    def phase(name, function, following):
        def run(*args):
            if name == "rollout":
                seen.forwards, seen.tokens, seen.logits = {}, {}, {}
            seen.phase = name
            result = function(*args)
            seen.phase = following
            return result
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "load_model", load_model)
        patch.setattr(ppo, "roll_out", phase("rollout", ppo.roll_out, "score"))
        patch.setattr(ppo, "update", phase("update", ppo.update, "after"))
        patch.setattr(ppo, "encode_prompt", child.ids_in)
        draws = child.draws_of_length(lengths, size.vocabulary, ppo.row_uniforms)
        patch.setattr(ppo, "row_uniforms", draws)
        patch.setattr(watch, "listen_for_signals", lambda: None)
        ppo.main(ppo.Config(
            policy=f"{home}/policy", reward_model=f"{home}/rm", data=f"{home}/prompts.jsonl",
            out=f"{home}/out", steps=2, rollout_batch=16, rollout_micro_batch=16, batch=8,
            micro_batch=4, score_micro_batch=8, query_len=world.PROMPT,
            response_len=world.RESPONSE))
    return seen


def test_a_step_makes_these_forwards(counted):
    """Nothing is computed twice: one forward per decoded token; four scores, the log-probs in the
    update's 4 micro-batches and the others in 2; two epochs of 4 micro-batches for two models"""
    forwards = dict(rollout=max(counted.lengths), score=2 * 4 + 2 * 2, update=2 * 4 * 2)
    assert counted.forwards == forwards


def test_few_of_the_tokens_are_padding(counted):
    rows = [world.PROMPT + length for length in counted.lengths]
    real = dict(rollout=sum(rows) - len(rows), score=4 * sum(rows), update=2 * 2 * sum(rows))
    for phase, tokens in counted.tokens.items():
        assert 1 <= tokens / real[phase] <= 1.15, phase


def test_logits_are_computed_where_a_response_token_is_predicted(counted):
    """Of the policy and the reference in scoring, and of the policy in two epochs"""
    responses = sum(counted.lengths)
    assert counted.logits == dict(rollout=responses, score=2 * responses, update=2 * responses)


def test_decode_computes_little_padding(world, tmp_path, monkeypatch):
    """evaluate.py decode gives the model nearly the real tokens alone: a group has prompts of
    similar lengths, and a finished row leaves it. The last token of a row is never given"""
    asked = rows_of(world / "data/sft.jsonl")[:64]
    for number, row in enumerate(asked):
        row["instruction"] += " please" * (number % 16)
    write_jsonl(tmp_path / "asked.jsonl", asked)
    given = []

    def load_model(*args, **options):
        model = common.load_model(*args, **options)
        model.register_forward_pre_hook(
            lambda module, args, inputs: given.append(inputs["input_ids"].numel()),
            with_kwargs=True)
        return model

    def generate(model, prompt_ids, prompt_mask, **options):
        ids, response_mask = common.generate(model, prompt_ids, prompt_mask, **options)
        prompts.extend(prompt_mask.sum(1).tolist())
        responses.extend(response_mask.sum(1).tolist())
        return ids, response_mask

    prompts = []
    responses = []
    monkeypatch.setattr(evaluate, "load_model", load_model)
    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "end_ids", lambda tokenizer: set(range(20)))  # of many lengths
    evaluate.decode(evaluate.DecodeConfig(
        model=f"{world}/sft", data=f"{tmp_path}/asked.jsonl", out=f"{tmp_path}/outputs.jsonl",
        batch=16, temperature=1.0, top_p=1.0, response_len=48))
    assert len(set(prompts)) > 8 and len(set(responses)) > 8
    real = sum(prompts) + sum(responses) - len(prompts)
    assert 1 <= sum(given) / real <= 1.15


def test_no_float32_copy_of_all_logits():
    """The backward keeps the logits once, in the dtype of the model"""
    model = small(LlamaConfig, AutoModelForCausalLM).bfloat16()
    model.config.vocab_size = model.vocab_size = 5000
    model.lm_head = torch.nn.Linear(32, 5000, bias=False).bfloat16()
    prompts, responses = [[5, 6]] * 8, [[7] * 60] * 8
    packed = common.pack(prompts, responses, CPU)
    kept = {}

    def keep(x):
        if x.numel() >= 480 * 5000 / 4:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs = common.token_logprobs(model, *packed)
    assert logprobs.dtype == torch.float32
    assert sum(kept.values()) <= 480 * 5000 * 2
