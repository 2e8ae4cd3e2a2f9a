"""Llama's own tokenizer (no pad token, a dummy space) and real text, through diff and reward model.
pytest tests/test_real.py"""

import json

import pytest, torch
from conftest import ROOT, rows_of, run
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import common
from plumbing import files

SHARED = ROOT.parent / "shared/data"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random tiny Llama around Llama 2's tokenizer.model, as a folder"""
    if not (SHARED / "llama2_tokenizer").exists():
        pytest.skip("needs Llama 2's tokenizer.model and AlpacaEval's pairs in ../shared/data")
    home = tmp_path_factory.mktemp("llama")
    tokenizer = common.load_tokenizer(SHARED / "llama2_tokenizer")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
    ).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


def test_llama_without_pad_goes_through_diff_and_reward_model(llama, tmp_path):
    pairs = [
        row
        for row in rows_of(SHARED / "alpaca_eval/pref.jsonl")
        if len(row["output_1"] + row["output_2"]) < 600
    ][:24]
    edits = [
        dict(
            id=str(i),
            instruction=row["instruction"],
            input="",
            original=row["output_1"],
            edited=row["output_1"].replace(" the ", " a ", 1) + "\n\n“Çà va?” 😀",
        )
        for i, row in enumerate(pairs)
    ]
    files.write_jsonl(tmp_path / "edits.jsonl", edits)
    files.write_jsonl(tmp_path / "pref.jsonl", pairs)
    run(
        "diff.py", tmp_path / "edits.jsonl", f"--tokenizer={llama}", f"--out={tmp_path}/diffs.jsonl"
    )
    tokenizer = common.load_tokenizer(llama)
    assert tokenizer.pad_token is None
    for row in rows_of(tmp_path / "diffs.jsonl"):
        assert (
            row["prompt_ids"].count(tokenizer.bos_token_id) == 1
            and row["edited_ids"][-1] == tokenizer.eos_token_id
        )
        assert common.decode_response(tokenizer, row["edited_ids"]) == row["edited"]
        assert (
            0 < sum(row["edited_changed"]) < len(row["edited_ids"])
            and row["edited_changed"][-1] == 0
        )  # EOS is in U_0
    flags = [f"--model={llama}", "--batch=8", "--micro_batch=4", "--lr=1e-3"]
    run("reward_model.py", tmp_path / "diffs.jsonl", *flags, f"--out={tmp_path}/rm", "--anchor=0.1")
    assert all(row["loss"] > 0 for row in rows_of(tmp_path / "rm/metrics.jsonl"))
    run(
        "reward_model.py",
        tmp_path / "pref.jsonl",
        *flags,
        "--loss=sequence",
        f"--out={tmp_path}/rm_sequence",
    )
    # the sequence model in plain transformers, padded as its own config says, gives our rewards
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm_sequence").eval()
    pad = json.loads((tmp_path / "rm_sequence/config.json").read_text())["pad_token_id"]
    ours = common.load_model(
        tmp_path / "rm_sequence",
        torch.device("cpu"),
        None,
        torch.float32,
        head="saved",
        frozen=True,
    )
    prompts = [common.encode_prompt(tokenizer, row) for row in pairs[:4]]
    answers = [common.encode_response(tokenizer, row["output_1"]) for row in pairs[:4]]
    r = common.token_heads(ours, *common.pack(prompts, answers, "cpu"))
    rows = [p + a for p, a in zip(prompts, answers)]
    width = max(map(len, rows))
    logits = plain(
        torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    ).logits[:, 0]
    assert pad != tokenizer.eos_token_id and r.abs().max() > 1e-4
    assert torch.allclose(
        logits, torch.stack([r[i, len(a) - 1] for i, a in enumerate(answers)]), atol=1e-5
    )
