"""Where a text begins and ends: eos, bos, pad and prefix spaces. pytest tests/test_ends.py"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer,
                          GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)

import common
import reward_model

END = "<|end|>"


def byte_level(specials=(END,), *, prefix_space=False, **names):
    """A byte-level BPE tokenizer, as GPT-2's and its relatives'"""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(specials),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(["apple pear plum, the apple"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": END} | names))


def save(folder, tokenizer, *, vocabulary=None, **generation):
    """A tiny Llama with this tokenizer"""
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=vocabulary or len(tokenizer), hidden_size=16,
                         intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- the ids that end a response

def test_all_ids_of_generation_config_end_a_response(tmp_path):
    """The tokenizer's eos and generation_config's, in generate() and in the decoded text"""
    tokenizer = byte_level([END, "<turn>"])
    ids = tokenizer.convert_tokens_to_ids([END, "<turn>"])
    loaded = common.load_tokenizer(save(tmp_path / "m", tokenizer, eos_token_id=ids))
    assert common.end_ids(loaded) == set(ids)
    text = common.encode_response(loaded, "apple", eos=False)
    for end in ids:
        assert common.decode_response(loaded, [*text, end]) == "apple"

    # Greedy decoding ends with whichever comes first.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    prompt = torch.tensor([[20, 21, 22]])
    options = dict(max_new_tokens=8, temperature=0)
    free, _ = common.generate(model, prompt, prompt > 0, eos_id=None, **options)
    second = int(free[0, 1])
    at = free[0].tolist().index(second) + 1
    for eos_id in (second, {second}, {second, 299}, [299, second]):
        cut, mask = common.generate(model, prompt, prompt > 0, eos_id=eos_id, **options)
        assert cut.tolist() == [free[0, :at].tolist()] and mask.all()


def test_a_saved_folder_names_one_eos(world, tmp_path):
    """tokenizer, config, generation_config, though the base model's differ; on one rank and two"""
    shutil.copytree(world / "sft", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    old = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(300)
    tokenizer.save_pretrained(tmp_path / "base")
    generation = GenerationConfig.from_pretrained(tmp_path / "base")
    generation.eos_token_id = [old, 301]
    generation.save_pretrained(tmp_path / "base")
    for ranks in (0, 2):
        out = tmp_path / f"out{ranks}"
        run("sft.py", f"--model={tmp_path}/base", f"--data={world}/data/sft.jsonl", f"--out={out}",
            "--epochs=1", "--batch=160", "--micro_batch=80", ranks=ranks)
        assert AutoTokenizer.from_pretrained(out).eos_token_id == 300
        assert AutoConfig.from_pretrained(out).eos_token_id == 300
        assert set(GenerationConfig.from_pretrained(out).eos_token_id) == {300, 301, old}
        assert common.end_ids(common.load_tokenizer(out)) == {300, 301, old}


# ---------------------------------------------------------------- bos

@pytest.mark.parametrize("says, expected", [(False, False), (True, True), (None, True)])
def test_bos_is_what_tokenizer_config_says(world, tmp_path, says, expected):
    """Where it is silent, <s> is put first, as Llama's own tokenizer.model needs it"""
    shutil.copytree(world / "sft", tmp_path / "m")
    path = tmp_path / "m/tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("add_bos_token", None)
    if says is not None:
        config["add_bos_token"] = says
    path.write_text(json.dumps(config))
    tokenizer = common.load_tokenizer(tmp_path / "m")
    ids = common.encode_prompt(tokenizer, dict(instruction="x"))
    assert (ids[0] == tokenizer.bos_token_id) is expected
    assert ids.count(tokenizer.bos_token_id) == int(expected)


# ---------------------------------------------------------------- prefix spaces

def test_a_tokenizer_with_a_prefix_space_gives_every_text_back(tmp_path):
    tokenizer = common.load_tokenizer(save(tmp_path / "m", byte_level(prefix_space=True)))
    for text in ("apple pear", "  two", " ", "://x", "\n\n1.", "", "é", "\n"):
        ids = common.encode_response(tokenizer, text)
        assert common.decode_response(tokenizer, ids) == text
    space = common.encode_response(tokenizer, " apple", eos=False)
    assert common.encode_response(tokenizer, "apple", eos=False) != space, "no space is added"


def test_a_tokenizer_that_changes_text_is_refused(tmp_path, capsys):
    from tokenizers import normalizers
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(SystemExit) as end:
        common.load_tokenizer(save(tmp_path / "m", tokenizer))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "does not give" in said and said.count("\n") == 1


# ---------------------------------------------------------------- pad, tokens without embeddings

def test_the_pad_of_a_sequence_model_is_no_word(tmp_path):
    """Not EOS, and not a token that text can contain: the score is read before the first pad"""
    def pad_of(*specials, **names):
        tokenizer = byte_level([END, *specials], **names)
        return reward_model.sequence_pad(common.load_tokenizer(save(tmp_path / "m", tokenizer)))
    assert pad_of() is None
    assert pad_of(bos_token=END, unk_token=END) is None
    assert pad_of("<pad>", pad_token="<pad>") == 1
    assert pad_of("<extra>", bos_token=END) == 1, "any other special token does"
    assert pad_of("<unk>", pad_token="apple", unk_token="<unk>") == 1, "a real word is no pad"


def test_a_sequence_model_without_a_pad_is_refused_before_training(world, tmp_path):
    save(tmp_path / "m", byte_level())
    done = run("reward_model.py", f"--model={tmp_path}/m", f"--data={world}/data/pref.jsonl",
               "--loss=sequence", f"--out={tmp_path}/rm", ok=False)
    assert done.returncode == 2 and "--loss=eq4" in done.stderr
    assert not Path(tmp_path, "rm").exists()


@pytest.mark.parametrize("added", ["eos", "word"])
def test_a_token_without_an_embedding_is_refused(world, tmp_path, added):
    shutil.copytree(world / "sft", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    if added == "eos":
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    else:
        tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.save_pretrained(tmp_path / "m")
    for words in (["sft.py", f"--data={world}/data/sft.jsonl"],
                  ["reward_model.py", f"--data={world}/data/pref.jsonl", "--loss=sequence"],
                  ["evaluate.py", "decode", f"--data={world}/data/eval.jsonl", "--response_len=9"]):
        out = tmp_path / ("o.jsonl" if "decode" in words else "o")
        done = run(*words, f"--model={tmp_path}/m", f"--out={out}", ok=False)
        assert done.returncode == 2 and "embeddings" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not out.exists()
