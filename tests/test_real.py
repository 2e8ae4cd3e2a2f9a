"""Llama's own tokenizer (no pad token, a dummy space) and real text, through diff and reward model.
pytest tests/test_real.py"""
import json

import pytest, torch
from conftest import ROOT, rows_of, run
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import common
from plumbing import files

SHARED = ROOT.parent / "shared/data"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny random Llama with Llama 2's tokenizer.model"""
    if not (SHARED / "llama2_tokenizer").exists():
        pytest.skip("needs Llama 2's tokenizer.model and AlpacaEval's pairs in ../shared/data")
    home = tmp_path_factory.mktemp("llama")
    tokenizer = common.load_tokenizer(SHARED / "llama2_tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def pairs():
    """24 short pairs of AlpacaEval"""
    rows = rows_of(SHARED / "alpaca_eval/pref.jsonl")
    return [row for row in rows if len(row["output_1"] + row["output_2"]) < 600][:24]


def edited(number, row):
    """A row of edits.jsonl: an article is exchanged, and a line with rare characters is added"""
    text = row["output_1"].replace(" the ", " a ", 1) + "\n\n“Çà va?” 😀"
    return dict(id=str(number), instruction=row["instruction"], input="",
                original=row["output_1"], edited=text)


def plain_rewards(path, prompts, responses, pad):
    """The rewards of transformers' own class, for rows that are padded on the right, [B]"""
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])             # [B, S]
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])   # [B, S]
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    return model(ids, attention_mask=mask).logits[:, 0]


def test_llama_without_pad_goes_through_diff_and_reward_model(llama, pairs, tmp_path):
    edits = [edited(number, row) for number, row in enumerate(pairs)]
    files.write_jsonl(tmp_path / "edits.jsonl", edits)
    files.write_jsonl(tmp_path / "pref.jsonl", pairs)
    tokenizer = common.load_tokenizer(llama)
    assert tokenizer.pad_token is None

    # diff: one bos, the edited text comes back, and the unchanged EOS is in U_0.
    diffs = tmp_path / "diffs.jsonl"
    run("diff.py", tmp_path / "edits.jsonl", f"--tokenizer={llama}", f"--out={diffs}")
    for row in rows_of(diffs):
        ids = row["edited_ids"]
        changed = row["edited_changed"]
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert common.decode_response(tokenizer, ids) == row["edited"]
        assert 0 < sum(changed) < len(ids)
        assert changed[-1] == 0

    # Both kinds of reward model can be trained.
    flags = [f"--model={llama}", "--batch=8", "--micro_batch=4", "--lr=1e-3"]
    run("reward_model.py", diffs, *flags, f"--out={tmp_path}/rm", "--anchor=0.1")
    for row in rows_of(tmp_path / "rm/metrics.jsonl"):
        assert row["loss"] > 0
    folder = tmp_path / "rm_sequence"
    run("reward_model.py", tmp_path / "pref.jsonl", *flags, "--loss=sequence", f"--out={folder}")

    # Plain transformers, with the padding of the saved config, gives the same sequence rewards.
    prompts = [common.encode_prompt(tokenizer, row) for row in pairs[:4]]
    responses = [common.encode_response(tokenizer, row["output_1"]) for row in pairs[:4]]
    ours = common.load_model(folder, CPU, None, torch.float32, head="saved", frozen=True)
    ids, mask, response_mask = common.pack(prompts, responses, CPU)
    r = common.token_heads(ours, ids, mask, response_mask)                             # [B, T]
    assert r.abs().max() > 1e-4
    pad = json.loads((folder / "config.json").read_text())["pad_token_id"]
    assert pad != tokenizer.eos_token_id
    expected = plain_rewards(folder, prompts, responses, pad)
    found = torch.stack([r[i, len(response) - 1] for i, response in enumerate(responses)])
    assert torch.allclose(found, expected, atol=1e-5)
