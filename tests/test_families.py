"""Families of models, each with a tiny random one: all stages, two ranks, generation token by token
as transformers does it, folders that plain transformers opens. docs/families.md is their table.

    pytest tests/test_families.py                 # the better known ones
    FAMILIES=all pytest tests/test_families.py    # all, some minutes
"""
import os, re

import pytest
import torch
from conftest import ROOT, run
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, CONFIG_MAPPING, Qwen2Tokenizer)

import common, ppo, reward_model, sft
from plumbing import models, record, watch

CPU = torch.device("cpu")
LLAMA_3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64, rope_theta=500_000.0)
LONG = dict(rope_type="longrope", short_factor=[1.1] * 4, long_factor=[3.0] * 4, rope_theta=1e4,
            original_max_position_embeddings=256)
WINDOW = dict(sliding_window=9)  # shorter than a prompt
MLA = dict(head_dim=4, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12, q_lora_rank=16,
           kv_lora_rank=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
           moe_intermediate_size=24, first_k_dense_replace=1, num_key_value_heads=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# name -> model_type, and fields of its config. All stages:
REWARDS = {
    "Llama 3": ("llama", dict(rope_parameters=LLAMA_3)),
    "SmolLM2": ("llama", dict(tie_word_embeddings=True)),
    "Mistral": ("mistral", WINDOW),
    "Qwen 2, 2.5": ("qwen2", dict(tie_word_embeddings=True)),
    "Qwen 3": ("qwen3", {}),
    "SmolLM3": ("smollm3", dict(no_rope_layers=[1, 1, 0])),
    "Phi-3": ("phi3", dict(rope_parameters=LONG, sliding_window=9)),
    "Gemma 2": ("gemma2", WINDOW),
    "StableLM": ("stablelm", dict(partial_rotary_factor=0.5)),
    "Mixtral": ("mixtral", dict(num_local_experts=4)),
}
MORE_REWARDS = {
    "Apertus": ("apertus", {}), "Arcee": ("arcee", {}), "DeepSeek V3": ("deepseek_v3", MLA),
    "DiffLlama": ("diffllama", {}), "EXAONE 4": ("exaone4", WINDOW), "Gemma": ("gemma", {}),
    "GLM": ("glm", {}), "GLM 4": ("glm4", {}), "GPT-OSS": ("gpt_oss", WINDOW),
    "Helium": ("helium", {}), "Ministral": ("ministral", WINDOW), "Ministral 3": ("ministral3", {}),
    "Nemotron": ("nemotron", {}), "Persimmon": ("persimmon", {}), "Phi 1, 2": ("phi", {}),
    "Qwen 2 MoE": ("qwen2_moe", EXPERTS), "Qwen 3 MoE": ("qwen3_moe", EXPERTS),
    "Seed-OSS": ("seed_oss", {}), "StarCoder 2": ("starcoder2", WINDOW),
}
# Policies only: transformers has no ...ForTokenClassification for them.
POLICIES = {
    "OLMo 2": ("olmo2", {}), "Granite": ("granite", dict(logits_scaling=2.0)),
    "Gemma 3": ("gemma3_text", WINDOW),
}
MORE_POLICIES = {
    "Cohere": ("cohere", {}), "Cohere 2": ("cohere2", WINDOW), "ERNIE 4.5": ("ernie4_5", {}),
    "GPT-NeoX": ("gpt_neox", {}), "Granite MoE": ("granitemoe", dict(num_local_experts=4)),
    "Hunyuan": ("hunyuan_v1_dense", {}), "OLMo": ("olmo", {}), "OLMo 3": ("olmo3", WINDOW),
    "OLMoE": ("olmoe", EXPERTS), "Phi-3.5 MoE": ("phimoe", dict(num_local_experts=4)),
}
# Neither: what a stage says of them.
REFUSED = {
    "GPT-2": ("gpt2", "like Llama's"), "OPT": ("opt", "like Llama's"),
    "BLOOM": ("bloom", "like Llama's"), "MPT": ("mpt", "like Llama's"),
    "Llama 4": ("llama4_text", "like Llama's"), "MiniMax": ("minimax", "linear"),
    "Qwen 3 Next": ("qwen3_next", "linear"),
}
if os.environ.get("FAMILIES") == "all":
    REWARDS |= MORE_REWARDS
    POLICIES |= MORE_POLICIES
ALL = REWARDS | POLICIES


def config_of(model_type, fields, vocabulary):
    usual = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=1,
                 bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    return CONFIG_MAPPING[model_type](vocab_size=vocabulary, **usual | fields)


def byte_level_tokenizer(text):
    """In a class that AutoTokenizer opens for each family, whatever class it has of its own"""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>", "<|pad|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return Qwen2Tokenizer(tokenizer_object=tokenizer, pad_token="<|pad|>")


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """name of a family -> the folder of a tiny model of it"""
    home = tmp_path_factory.mktemp("families")
    tokenizer = byte_level_tokenizer((world / "data/sft.jsonl").read_text() + common.PROMPT)

    def of(name):
        path = home / re.sub(r"\W+", "_", name)
        if not path.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_of(*ALL[name], len(tokenizer)))
            for parameter in model.parameters():
                if parameter.dim() > 1:  # so that the likeliest token is clear
                    torch.nn.init.normal_(parameter, std=0.15)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return of


@pytest.fixture(scope="module")
def demonstrations(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("demonstrations") / "sft.jsonl"
    path.write_text("\n".join((world / "data/sft.jsonl").read_text().splitlines()[:16]))
    return str(path)


@pytest.fixture(scope="module")
def diffs(world, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("diffs") / "diffs.jsonl"
    run("diff.py", f"--data={world}/edits.jsonl", f"--tokenizer={folder('SmolLM2')}",
        f"--out={path}")
    return str(path)


@pytest.fixture
def stage(world, tmp_path, monkeypatch):
    """Run a stage in this process -> the trained model as it was when it was saved"""
    monkeypatch.setattr(record, "LOCKS", [])
    kept = {}

    def save_model(model, *rest, **options):
        kept["model"] = model
        record.save_model(model, *rest, **options)

    for module in (sft, reward_model, ppo):
        monkeypatch.setattr(module, "save_model", save_model)
    for module in (sft, reward_model, watch):
        monkeypatch.setattr(module, "listen_for_signals", lambda: None)

    def run_stage(module, out, **fields):
        module.main(module.Config(out=str(tmp_path / out), lr=1e-3, micro_batch=4, **fields))
        return kept["model"].eval()

    return run_stage


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [4], [10, 11, 20]]
IDS = torch.tensor([PROMPTS[0] + [30, 31, 32, 0]])


def assert_opens(folder, Auto, model):
    """Plain transformers opens the folder, with the logits of the model that was saved"""
    plain, info = Auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(IDS, attention_mask=torch.ones_like(IDS)).logits
        assert torch.allclose(plain.eval()(IDS).logits, logits, atol=1e-5)
    assert logits.std() > 1e-3, "all logits are equal: the comparison would say nothing"


@torch.no_grad()
def assert_generates_as_transformers(path, model):
    """The likeliest tokens: a batch padded on the left, against each prompt alone"""
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    ids, mask, _ = common.pack(PROMPTS, [[]] * 3, CPU)
    ours, response_mask = common.generate(model, ids, mask, max_new_tokens=14, eos_id=0,
                                          temperature=0)
    assert len(set(ours.flatten().tolist())) > 5, "it repeats itself: any cache would do"
    for prompt, response, keep in zip(PROMPTS, ours, response_mask):
        alone = torch.tensor([prompt])
        wanted = plain.generate(alone, attention_mask=torch.ones_like(alone), do_sample=False,
                                max_new_tokens=14, eos_token_id=0, pad_token_id=1)
        assert response[keep].tolist() == wanted[0, len(prompt):].tolist()


@torch.no_grad()
def assert_scores_as_alone(model):
    """The reward of each answer, by the form that reward_model.py takes for this family"""
    pairs = [(PROMPTS[0], [20, 21, 22, 0], [24, 0], [1] * 4, [1] * 2),
             (PROMPTS[0], [30, 0], [31, 32, 33, 0], [1] * 2, [1] * 4),
             (PROMPTS[1], [40, 41, 0], [42, 0], [1] * 3, [1] * 2)]
    scored = reward_model.fastest_scorer(model)(model, pairs, CPU)
    for side in (0, 1):
        for i, pair in enumerate(pairs):
            prompt, answer = pair[0], pair[1 + side]
            ids = torch.tensor([prompt + answer])
            alone = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt):, 0]
            assert torch.allclose(scored[3 * side][i, :len(answer)], alone, atol=1e-5)


@torch.no_grad()
def assert_opens_as_sequence_model(model, tmp_path):
    """The same weights: padded on the right, the reward at the last token"""
    tokenizer = common.load_tokenizer(str(tmp_path / "rm"))
    pad = reward_model.sequence_pad(tokenizer)
    record.save_model(model, tokenizer, tmp_path / "sequence", torch.float32, sequence_pad=pad)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sequence").eval()
    ids = torch.tensor([PROMPTS[0], PROMPTS[2] + [pad] * 9])
    rewards = plain(ids, attention_mask=(ids != pad).long()).logits[:, 0]
    alone = [model(torch.tensor([PROMPTS[i]])).logits[0, -1, 0] for i in (0, 2)]
    assert torch.allclose(rewards, torch.stack(alone), atol=1e-5)


def train_policy(stage, folder, data, tmp_path):
    """One step of sft.py, and what its folder gives"""
    model = stage(sft, "sft", model=str(folder), data=data, epochs=1, batch=16)
    rows = record.logged(tmp_path / "sft/metrics.jsonl")
    assert len(rows) == 1 and rows[0]["grad_norm"] > 0
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = dict(model.named_parameters())
    learnt = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
    assert len(learnt) > 0.9 * len(after), set(after) - set(learnt)
    assert_opens(tmp_path / "sft", AutoModelForCausalLM, model)
    assert_generates_as_transformers(tmp_path / "sft", model)


@pytest.mark.parametrize("name", REWARDS)
def test_a_family_goes_through_all_stages(world, folder, demonstrations, diffs, stage, tmp_path,
                                          capsys, name):
    train_policy(stage, folder(name), demonstrations, tmp_path)

    # The reward model, whose head is no longer zero after a step.
    model = stage(reward_model, "rm", model=str(tmp_path / "sft"), steps=2, batch=4,
                  data=[diffs], head_lr_factor=100.0)
    assert_opens(tmp_path / "rm", AutoModelForTokenClassification, model)
    assert_scores_as_alone(model)

    if name == "Apertus":  # transformers has no class that could open it as a sequence-level model
        with pytest.raises(SystemExit):
            stage(reward_model, "rm_sequence", model=str(tmp_path / "sft"), loss="sequence",
                  data=[f"{world}/data/pref.jsonl"])
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "no ...ForSequenceClassification for apertus" in said
        assert not (tmp_path / "rm_sequence").exists()
    else:
        assert_opens_as_sequence_model(model, tmp_path)

    # PPO: before the update, the ratio of new and old probabilities is 1.
    model = stage(ppo, "ppo", policy=str(tmp_path / "sft"), reward_model=str(tmp_path / "rm"),
                  data=f"{world}/data/prompts.jsonl", steps=1, rollout_batch=8, response_len=6,
                  batch=4, rollout_micro_batch=4, score_micro_batch=4)
    (row,) = record.logged(tmp_path / "ppo/metrics.jsonl")
    assert row["first_ratio_error"] < 1e-4 and row["kl"] == pytest.approx(0, abs=1e-4)
    assert row["grad_norm"] > 0
    assert_opens(tmp_path / "ppo", AutoModelForCausalLM, model)


@pytest.mark.parametrize("name", POLICIES)
def test_a_family_without_a_token_classifier_can_only_be_a_policy(folder, demonstrations, diffs,
                                                                  stage, tmp_path, capsys, name):
    """sft.py says so, reward_model.py refuses it by name before anything is written"""
    train_policy(stage, folder(name), demonstrations, tmp_path)
    assert "no reward model can be made" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        stage(reward_model, "rm", model=str(tmp_path / "sft"), data=[diffs])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ALL[name][0] in said and "ForTokenClassification" in said
    assert not (tmp_path / "rm").exists()


# What two ranks run. argv: the folders of the models.
TWO_RANKS = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
import common
from plumbing import ranks
from plumbing.models import meta_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 10, 11]]
RESPONSES = [[30, 31, 0], [32, 33, 34, 35, 0]]
device, mesh, _ = common.setup("float32")
packed = common.pack(PROMPTS, RESPONSES, device)


def norm(model):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return torch.stack([g.norm() for g in gradients]).norm().item()


def compare(path, Auto, head, function):
    '''Results and gradients of a sharded model are plain transformers', half from each rank'''
    options = dict(num_labels=1) if head else {{}}
    plain = Auto.from_pretrained(path, dtype=torch.float32, **options).eval()
    model = common.load_model(path, device, mesh, torch.float32, head=head).eval()
    for layer in model.base_model.layers:
        for name, p in layer.named_parameters():
            assert p.to_local().numel() <= 0.6 * p.numel() or p.shape[0] < 2, (path, name)
    if head:
        plain.score.bias = None
        with torch.no_grad():
            plain.score.weight.fill_(0.1)
            model.score.weight.fill_(0.1)
    wanted = function(plain, *packed)
    wanted.sum().backward()
    rows = function(model, *packed)
    assert torch.allclose(rows, wanted, atol=1e-5), (path, head, (rows - wanted).abs().max())
    (rows.sum() / ranks.WORLD).backward()
    assert abs(norm(model) / norm(plain) - 1) < 1e-4, (path, head, norm(model), norm(plain))
    return model, plain


for path in sys.argv[1:]:
    model, plain = compare(path, AutoModelForCausalLM, None, common.token_logprobs)
    ids, mask, _ = common.pack(PROMPTS, [[]] * 2, device)
    with common.unsharded(model):
        said, kept = common.generate(model, ids, mask, max_new_tokens=8, eos_id=0, temperature=0)
    for prompt, response, keep in zip(PROMPTS, said, kept):
        alone = torch.tensor([prompt])
        wanted = plain.generate(alone, attention_mask=alone > -1, do_sample=False, eos_token_id=0,
                                max_new_tokens=8, pad_token_id=1)
        assert response[keep].tolist() == wanted[0, len(prompt):].tolist(), path
    if meta_model(plain.config, "zero"):
        compare(path, AutoModelForTokenClassification, "zero", common.token_heads)
    ranks.say("ran", path)
"""


def test_two_ranks_compute_what_transformers_computes(folder, tmp_path):
    """Each family in turn: log-probs, rewards, gradients, tokens"""
    (tmp_path / "check.py").write_text(TWO_RANKS.format(root=str(ROOT)))
    folders = [folder(name) for name in ALL]
    done = run(tmp_path / "check.py", *folders, ranks=2)
    assert done.stdout.count("ran ") == len(ALL)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_built_otherwise_is_refused_by_name(tmp_path, capsys, name):
    model_type, why = REFUSED[name]
    config = config_of(model_type, {}, 64)
    config.save_pretrained(tmp_path)
    for head in (None, "zero"):
        with pytest.raises(SystemExit) as end:
            models.check_fits(tmp_path, "model", 16, head=head)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and model_type in said
        assert why in said, said
