"""Config, files, tokens, and generate against a slow loop. pytest tests/test_common.py"""

import errno, json, math
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import pytest, sentencepiece, torch
from conftest import ROOT
from transformers import (
    BartConfig,
    DynamicCache,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    Olmo2Config,
    Qwen2Config,
)

import common
from plumbing import files, models, record
from plumbing.command_line import load_config, one_line
from plumbing.cache import in_place_cache
from common import token_texts


@dataclass(frozen=True)
class Config:
    lr: float = 1e-3
    steps: int = 3
    name: str = "x"
    data: list[str] = ()
    clip: float | None = 0.2
    level: Literal["token", "sequence"] = "token"
    on: bool = False


def config(*argv):
    return load_config(Config, "ppo", list(argv))


def mistake(capsys, call, *parts):
    """call() ends with exit code 2 and one line on stderr that holds the parts"""
    with pytest.raises(SystemExit) as end:
        call()
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and all(part in line for part in parts), (
        line
    )


# ---------------------------------------------------------------- config


def test_flags_and_presets_the_rightmost_wins(tmp_path):
    (tmp_path / "a.toml").write_text(
        "[ppo]\nlr = 1\nsteps = 5\nclip = 'None'\ndata = ['p', 'q']\n[evaluate.decode]\nx = 1\n"
    )
    assert config(f"{tmp_path}/a.toml", "--steps=7", "--name=a=b") == Config(
        1.0, 7, "a=b", ["p", "q"], None
    )
    assert config("--steps=7", f"{tmp_path}/a.toml").steps == 5
    (tmp_path / "c.toml").write_text("[evaluate]\n[evaluate.decode]\nsteps = 9\n[ppo]\nsteps = 5\n")
    assert (
        load_config(Config, "evaluate.decode", [f"{tmp_path}/c.toml"]).steps == 9
    )  # a word of a stage has its own table
    assert config("--data=").data == config("--data=[]").data == []
    (tmp_path / "b.toml").write_text("[ppo]\ndata = []\n")
    assert config("--data=p", f"{tmp_path}/b.toml").data == []
    assert (
        config("one", "two").data == ["one", "two"]
        and config("--on=true").on
        and not config("--on=0").on
    )


def test_every_mistake_is_one_line(tmp_path, capsys):
    def preset(text):
        (tmp_path / "a.toml").write_text(text)
        return lambda: config(f"{tmp_path}/a.toml")

    mistake(capsys, lambda: config("--stepz=3"), "command line", "'stepz'", "Did you mean 'steps'")
    mistake(capsys, lambda: config("--steps=1e3"), "steps must be int, got '1e3'")
    mistake(capsys, lambda: config("--lr"), "write --lr=value")
    mistake(capsys, lambda: config("--on=yes"), "on must be bool", "'yes'")
    mistake(
        capsys, lambda: config("--level=word"), "level must be one of token, sequence", "'word'"
    )
    mistake(capsys, preset("[ppo]\nkl = 3\n"), "a.toml [ppo]", "'kl'")
    mistake(capsys, preset("[pppo]\nlr = 3\n"), "'pppo'", "Did you mean [ppo]")
    mistake(
        capsys,
        preset("[evaluate.decod]\nlr = 3\n"),
        "'evaluate.decod'",
        "Did you mean [evaluate.decode]",
    )
    mistake(capsys, preset("lr = 3\n"), "'lr' is not a table")
    mistake(capsys, preset("[zzzz]\n"), "'zzzz'", "there are: prepare, sft, ")
    mistake(capsys, preset("[ppo\n"), "a.toml")
    mistake(capsys, lambda: config("none.toml"), "none.toml", "No such file")


def test_help_is_the_docstring_and_the_config(capsys):
    with pytest.raises(SystemExit) as end:
        config("--help")
    assert end.value.code == 0 and "clip: float | None = 0.2" in capsys.readouterr().out


# ---------------------------------------------------------------- files


def test_a_malformed_row_ends_with_file_and_line(tmp_path, capsys):
    path, fields = (
        tmp_path / "a.jsonl",
        {"text": str, "preference": (1, 2), "maybe": (str, type(None))},
    )
    good = '{"text": "a", "preference": 1, "maybe": null, "more": 3}\n'
    path.write_text(good + "\n" + good)
    assert len(files.read_jsonl(path, fields)) == 2
    for line, parts in (
        ('{"text": "a"', ("not JSON",)),
        ("[1]", ("JSON object, got list",)),
        ('{"text": "a"}', ("no field 'preference'", "text")),
        ('{"text": 1, "preference": 1, "maybe": ""}', ("text must be str, got 1",)),
        ('{"text": "", "preference": 3, "maybe": ""}', ("preference must be 1 or 2, got 3",)),
        ('{"text": "", "preference": true, "maybe": ""}', ("preference must be 1 or 2, got true",)),
        ('{"text": "", "preference": 1, "maybe": 2}', ("maybe must be str or null, got 2",)),
    ):
        path.write_text(good + line + "\n")
        mistake(capsys, lambda: files.read_jsonl(path, fields), f"{path}:2: ", *parts)
    path.write_text("\n")
    mistake(capsys, lambda: files.read_jsonl(path, fields), str(path), "no rows")
    path.write_text("[" * 100_000)
    mistake(capsys, lambda: files.read_jsonl(path, fields), f"{path}:1: ", "not JSON")
    mistake(capsys, lambda: files.read_jsonl(tmp_path, fields), f"{tmp_path}: Is a directory")
    path.write_text('{"cut": null}\n{"cut": "output"}\n')
    mistake(capsys, lambda: files.read_jsonl(path, {}), f"{path}:2: cut must be a list")
    path.write_text('{"\\u001b[31m": 1}\n')
    mistake(capsys, lambda: files.read_jsonl(path, {"a": str}), "the row has: ?[31m")
    path.write_bytes(good.encode() + good.replace('"a"', '"é"').encode("latin-1"))
    mistake(capsys, lambda: files.read_jsonl(path, fields), f"{path}:2: ", "not JSON", "utf-8")
    path.write_bytes(
        b"\xef\xbb\xbf" + good.replace('"a"', '"é\u2028"').encode().replace(b"\n", b"\r\n")
    )  # an editor on Windows
    assert files.read_jsonl(path, fields)[0]["text"] == "é\u2028"


def test_a_model_is_a_folder_of_ours_or_a_name_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/ready").mkdir(parents=True)
    (tmp_path / "mine/ready/config.json").write_text("{}")
    mistake(
        capsys,
        lambda: models.check_model("mine/ready", "model", "python sft.py"),
        "--model=mine/ready holds no weights",
    )
    models.check_model("mine/ready", "model", "python sft.py", weights=False)
    (tmp_path / "mine/ready/model.safetensors").write_text("")
    for good in ("org/some-Model_1.5", "mine/ready", tmp_path / "mine/ready"):
        models.check_model(good, "model", "python sft.py")
    for bad in ("mine/unfinished", "out/sft", "data/model", "name", "./a/b", tmp_path / "none"):
        mistake(
            capsys,
            lambda: models.check_model(bad, "model", "python sft.py"),
            f"--model={bad}",
            "python sft.py",
        )


def test_pickled_weights_are_refused(tmp_path, capsys):
    """...and not taken for a folder without weights, which gets new ones"""
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    mistake(
        capsys,
        lambda: models.check_model(tmp_path, "model", "python sft.py"),
        f"--model={tmp_path}",
        "never loaded",
    )
    mistake(
        capsys,
        lambda: models.check_model(tmp_path, "model", "python sft.py", weights="new"),
        "never loaded",
    )
    models.check_model(tmp_path, "tokenizer", "python sft.py", weights=False)
    (tmp_path / "model.safetensors").write_text("")
    models.check_model(tmp_path, "model", "python sft.py")


def test_a_family_that_is_not_built_as_llama_is_refused(tmp_path, capsys):
    for name, config in (
        ("olmo", Olmo2Config()),
        ("llama", LlamaConfig()),
        ("qwen", Qwen2Config(max_position_embeddings=50)),
        ("gpt2", GPT2Config()),
        ("neox", GPTNeoXConfig()),
        ("bart", BartConfig()),
    ):  # GPT-2: no layers; NeoX: no score; Bart: no such class
        config.save_pretrained(tmp_path / name)
    models.check_fits(tmp_path / "llama", "model", 2048, head="zero")
    models.check_fits(tmp_path / "qwen", "model", 50, head="zero")
    models.check_fits(tmp_path / "olmo", "model", 50)  # a language model only
    mistake(
        capsys,
        lambda: models.check_fits(tmp_path / "qwen", "model", 51),
        "--model=",
        "positions for 50 tokens, this run needs 51",
    )
    mistake(
        capsys,
        lambda: models.check_fits(tmp_path / "gpt2", "model", 9),
        "built as Llama is",
    )
    for name in ("gpt2", "neox", "bart", "olmo"):
        mistake(
            capsys,
            lambda: models.check_fits(tmp_path / name, "model", 9, head="zero"),
            f"--model={tmp_path}/{name}",
            "built as Llama is",
        )


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    for words, said in (
        ([], "the same command continues"),
        (["--overwrite=true"], "the same command, without --overwrite, continues"),
    ):
        monkeypatch.setattr("sys.argv", ["sft.py", *words])
        one_line(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert said in capsys.readouterr().err


def test_a_full_disk_is_one_line_whoever_says_so(capsys):
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "a.jsonl"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):  # as safetensors and DCP say it
        one_line(type(error), error, None)
        said = capsys.readouterr().err
        assert (
            said.count("\n") == 1
            and "No space left on device; what was written before is valid" in said
        )


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new/a.jsonl"
    files.write_jsonl(path, [{"a": 1}])
    with pytest.raises(ZeroDivisionError):
        files.write_jsonl(path, ({"a": 1 / n} for n in (1, 0)))
    assert path.read_text() == '{"a": 1}\n'


def test_a_lone_surrogate_is_data(tmp_path):
    files.write_jsonl(tmp_path / "a.jsonl", [{"a": "half \ud83d <b>"}])
    assert "<b>" in files.read_jsonl(tmp_path / "a.jsonl", {"a": str})[0]["a"]


def test_a_run_is_locked_compared_and_remembered(tmp_path, capsys, monkeypatch):
    @dataclass(frozen=True)
    class Run:
        out: str
        lr: float = 1.0
        micro_batch: int = 4
        overwrite: bool = False

    (tmp_path / "in.jsonl").write_text("a")

    def release():  # what the end of a process does
        while record.LOCKS:
            record.LOCKS.pop().close()

    def begin(**fields):
        return record.begin(
            Run(f"{tmp_path}/out", **fields),
            "stage",
            unimportant=("micro_batch",),
            inputs=[tmp_path / "in.jsonl"],
        )

    assert begin() is False
    mistake(capsys, begin, "another run is writing")
    release()
    record.finish(Run(f"{tmp_path}/out"))
    assert begin(micro_batch=8) is True
    release()
    old = record.record_of(tmp_path / "out")
    del old["config"]["lr"]  # a record from before the field was there: it had the default's effect
    (tmp_path / "out/run.json").write_text(json.dumps(old))
    assert begin() is True
    release()
    mistake(capsys, lambda: begin(lr=2.0), "lr: 1.0 then, 2.0 now", "--overwrite=true")
    release()
    (tmp_path / "in.jsonl").write_text("b")
    mistake(capsys, begin, "the content of")
    release()
    for name in ("checkpoint_3", "step_2", "mine"):  # of an earlier run, but for the last
        (tmp_path / "out" / name).mkdir()
    assert begin(lr=2.0, overwrite=True) is False and {
        f.name for f in (tmp_path / "out").iterdir() if f.is_dir()
    } == {"mine"}
    release()
    (tmp_path / "out/checkpoint_5").mkdir()
    record.finish(Run(f"{tmp_path}/out"))
    assert (tmp_path / "out/checkpoint_5").exists()
    record.finish(Run(f"{tmp_path}/out"), keep_checkpoint=False)
    assert not (tmp_path / "out/checkpoint_5").exists()
    assert (
        record.begin(Run(f"{tmp_path}/rm_0.3"), "stage") is False
        and (tmp_path / "rm_0.3/run.json").exists()
    )  # a folder all the same
    release()
    assert record.begin(Run(f"{tmp_path}/early"), "stage") is False
    release()
    assert (
        record.begin(Run(f"{tmp_path}/early", lr=2.0), "stage") is False
    )  # refused or killed before anything came of it
    release()
    assert record.record_of(tmp_path / "early")["config"]["lr"] == 2.0
    (tmp_path / "early/step_20").mkdir()
    for name in ("checkpoint.tmp", "saving.tmp"):
        (tmp_path / "early" / name).mkdir()
    mistake(
        capsys,
        lambda: record.begin(
            Run(f"{tmp_path}/early", overwrite=True), "stage", inputs=[tmp_path / "early/step_20"]
        ),
        "which this run reads",
    )
    release()
    assert record.begin(Run(f"{tmp_path}/early", lr=2.0), "stage") is False and not list(
        (tmp_path / "early").glob("*.tmp")
    )
    release()
    record.finish(Run(f"{tmp_path}/early"))
    monkeypatch.setattr(record.shutil, "rmtree", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.begin(Run(f"{tmp_path}/early", overwrite=True), "stage")
    release()
    assert record.record_of(tmp_path / "early") == {}, "half deleted is not finished"
    monkeypatch.undo()
    File = type("File", (Run,), {"out": "out/e.jsonl"})
    (tmp_path / "d.jsonl").mkdir()
    mistake(
        capsys, lambda: record.begin(File(f"{tmp_path}/d.jsonl"), "stage"), "is there as a folder"
    )
    mistake(
        capsys,
        lambda: record.begin(File(f"{tmp_path}/in.jsonl/e.jsonl"), "stage"),
        "below something that is not a folder",
    )
    mistake(
        capsys,
        lambda: record.begin(File(f"{tmp_path}/in.jsonl"), "stage", inputs=[tmp_path / "in.jsonl"]),
        "which this run reads",
    )
    (tmp_path / "e.jsonl.parts").mkdir()
    assert record.begin(File(f"{tmp_path}/e.jsonl"), "stage") is False
    release()
    mistake(
        capsys,
        lambda: record.begin(File(f"{tmp_path}/e.jsonl", lr=2.0), "stage"),
        "lr: 1.0 then, 2.0 now",
    )
    release()
    assert (
        record.begin(File(f"{tmp_path}/e.jsonl"), "stage") is False
        and (tmp_path / "e.jsonl.parts").exists()
    )
    release()
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    before = record.fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 19) + b"x" + bytes((1 << 19) - 1))
    assert record.fingerprint(tmp_path) != before, "other weights of the same size"
    (tmp_path / "source").mkdir()
    (tmp_path / "source/in.tsv").write_text(
        "a"
    )  # a source may lie in a folder that is written to: it stays
    Source = type("Source", (Run,), {"out": "data/x"})
    for overwrite in (False, True):
        assert (
            record.begin(
                Source(f"{tmp_path}/source", overwrite=overwrite),
                "stage",
                inputs=[tmp_path / "source/in.tsv"],
                beside=("in.tsv",),
            )
            is False
        )
        release()
    old = record.record_of(tmp_path / "source") | {
        "inputs": {str(tmp_path / "source/in.tsv"): "old", "gone": "old"}
    }
    record.record_path(tmp_path / "source").write_text(json.dumps(old))
    mistake(
        capsys,
        lambda: record.begin(
            Source(f"{tmp_path}/source"), "stage", inputs=[tmp_path / "source/in.tsv"], beside=()
        ),
        "the content of",
    )
    release()
    for usual, wrong, words in (
        ("out/sft", "a.jsonl", "a folder"),
        ("out/e.jsonl", "a", "a file"),
        ("out/e.jsonl", "a.txt", "a file"),
    ):
        Usual = type("Usual", (Run,), {"out": usual})
        mistake(
            capsys,
            lambda: record.begin(Usual(f"{tmp_path}/{wrong}"), "stage"),
            f"--out={tmp_path}/{wrong} must be {words}",
            usual,
        )
        assert not list(tmp_path.glob("a*"))
    monkeypatch.setenv("PATH", "")  # no git
    assert (
        record.begin(Run(f"{tmp_path}/sft.small"), "stage") is False
        and record.record_of(tmp_path / "sft.small")["commit"] == ""
    )
    assert (tmp_path / "sft.small/run.json").exists()
    release()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    mistake(capsys, lambda: record.begin(Run(f"{tmp_path}/other"), "stage"), "no run of ours wrote")
    release()


def test_a_torn_last_line_is_no_row(tmp_path):
    assert record.logged(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert [row["step"] for row in record.logged(tmp_path / "metrics.jsonl")] == [0, 1]
    record.trim_logs(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_a_stream_goes_through_every_row_each_epoch():
    stream = common.rows_at(0, 30, 10, 0)
    assert [sorted(stream[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3 and stream[
        :10
    ] != stream[10:20]
    assert stream[7:12] == common.rows_at(7, 12, 10, 0)


# ---------------------------------------------------------------- tokens

TEXTS = [
    "The",
    " The",
    "  two",
    " ",
    "://x",
    "\n\n1.",
    "",
    "</s> <s> <|im_end|>",
    "é😀\t x\r\n",
    "a" * 40,
    "{input} {instruction}",
    "it 's , n't . do not ?",
]


def tokenizers(world):
    yield world / "data/model"
    bare = ROOT.parent / "shared/data/llama2_tokenizer"
    if bare.exists():
        yield bare


def test_responses_come_back_to_the_character(world):
    for path in tokenizers(world):
        tokenizer = common.load_tokenizer(path)
        tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = (
            True  # some files ask for it
        )
        for text in TEXTS:
            ids = common.encode_response(tokenizer, text)
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
            assert common.decode_response(tokenizer, ids) == text
            assert common.encode_response(tokenizer, text, eos=False) == ids[:-1]
            assert "".join(token_texts(tokenizer, ids)) == text + tokenizer.eos_token
        assert common.encode_response(tokenizer, "The") != common.encode_response(tokenizer, " The")
        half = (
            common.encode_prompt(tokenizer, dict(instruction="half \ud83d")),
            common.encode_response(tokenizer, "half \ud83d"),
        )
        assert half == (
            common.encode_prompt(tokenizer, dict(instruction="half ?")),
            common.encode_response(tokenizer, "half ?"),
        )


def test_a_dummy_space_is_kept_out(tmp_path):
    """transformers' LlamaTokenizer puts sentencepiece's dummy space before every text"""
    with open(
        tmp_path / "tokenizer.model", "wb"
    ) as file:  # a few words, pieces at a word's beginning and inside
        words = "The cat then sat on the catalogue, breatheThe".split()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(words[i % 5 :]) for i in range(200)]),
            model_writer=file,
            vocab_size=310,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    bare = ROOT.parent / "shared/data/llama2_tokenizer"
    for path in [tmp_path] + [bare] * bare.exists():
        tokenizer = LlamaTokenizer.from_pretrained(path)
        assert tokenizer.convert_ids_to_tokens(
            tokenizer.encode("The", add_special_tokens=False)
        ) == ["▁The"]
        assert (
            "".join(tokenizer.convert_ids_to_tokens(common.encode_response(tokenizer, "The")))
            == "The</s>"
        )
        for text in TEXTS:
            assert (
                common.decode_response(tokenizer, common.encode_response(tokenizer, text)) == text
            )


def test_a_tokenizer_without_eos_is_refused(world, tmp_path, capsys):
    tokenizer = common.load_tokenizer(world / "sft")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    mistake(capsys, lambda: common.load_tokenizer(tmp_path), str(tmp_path), "no eos token")
    mistake(capsys, lambda: common.load_tokenizer(tmp_path / "none"), "no tokenizer in")


def test_prompts_are_alpacas_with_bos_once(world):
    for path in tokenizers(world):
        tokenizer = common.load_tokenizer(path)
        for row in (
            dict(instruction="Say {input}.", input=""),
            dict(instruction="Add.", input="1 {instruction}"),
            dict(instruction="<s>"),
        ):
            ids = common.encode_prompt(tokenizer, row)
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
            text = tokenizer.decode(ids[1:])
            assert f"### Instruction:\n{row['instruction']}\n\n" in text and text.endswith(
                "### Response:"
            )
            assert ("### Input:\n" in text) == bool(row.get("input")) and (
                row.get("input") or ""
            ) in text


def test_tokenizer_hash_tells_vocabularies_apart(world):
    hashes = [common.tokenizer_hash(common.load_tokenizer(path)) for path in tokenizers(world)]
    assert len(set(hashes)) == len(hashes) and hashes[0] == common.tokenizer_hash(
        common.load_tokenizer(world / "sft")
    )
    other = common.load_tokenizer(world / "sft")
    other.eos_token = other.convert_ids_to_tokens(
        300
    )  # the same vocabulary, but responses end otherwise
    assert common.tokenizer_hash(other) not in hashes


# ---------------------------------------------------------------- forward and generate


def test_the_cache_holds_what_transformers_own_holds():
    """Random appends, and rows that leave or move, in both"""
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    ours, plain = in_place_cache(config, room=40), DynamicCache(config=config)
    B, length = 6, 0
    for n, rows in (
        (5, [0, 1, 2, 3, 4, 5]),
        (1, [0, 5, 2, 4]),
        (1, [0, 1, 2, 3]),
        (3, [3, 1]),
        (1, [1]),
        (4, [0]),
    ):
        for layer in range(2):
            keys, values = torch.randn(2, B, 1, n, 4)
            for a, b in zip(ours.update(keys, values, layer), plain.update(keys, values, layer)):
                assert torch.equal(a, b)
        length += n
        assert ours.get_seq_length() == length
        for cache in (ours, plain):
            cache.batch_select_indices(torch.tensor(rows))
        B = len(rows)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def slow_generate(model, prompt, uniforms, max_new_tokens, eos_id, temperature, top_p=1.0, top_k=0):
    """Prompt + prefix again for every token, unpadded, without cache, in float64 -> ids, log pi of
    each"""
    ids, logprobs = list(prompt), []
    for u in uniforms[:max_new_tokens].tolist():
        logits = model(torch.tensor([ids])).logits[0, -1]
        p = torch.softmax(logits / (temperature or 1), -1).tolist()
        order = sorted(range(len(p)), key=lambda v: -p[v])
        allowed = set(order[:top_k] if top_k else order)
        mass, whole, nucleus = 0.0, sum(p[v] for v in allowed), set()
        for v in [v for v in order if v in allowed]:
            if mass < top_p * whole:
                nucleus.add(v)
            mass += p[v]
        whole, gone, token = sum(p[v] for v in nucleus), 0.0, None
        for v in range(len(p)):
            if v in nucleus:
                gone += p[v]
                if token is None and u * whole < gone:
                    token = v
        token = order[0] if temperature == 0 else token
        logprobs.append(math.log(p[token]))
        ids.append(token)
        if token == eos_id:
            break
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=0.7, top_p=0.8),
        dict(temperature=1.3, top_k=5),
        dict(temperature=0),
        dict(temperature=1.0, eos_id=None),
    ],
)
def test_generate_is_the_slow_loop(model, options):
    options = dict(eos_id=3) | options
    prompts = [
        [5, 6, 7, 8, 9],
        [4],
        [10, 11],
        [12, 3, 13],
        [7] * 9,
        [8, 8],
    ] * 3  # an EOS inside a prompt ends nothing
    uniforms = torch.stack([common.row_uniforms(25, 0, 0, row) for row in range(len(prompts))])
    ids, mask, _ = common.pack(prompts, [[]] * len(prompts), "cpu")
    response_ids, response_mask = common.generate(
        model, ids, mask, max_new_tokens=25, uniforms=uniforms, **options
    )
    exact = LlamaForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    want = [slow_generate(exact, p, u, 25, **options) for p, u in zip(prompts, uniforms)]
    got = [row[keep].tolist() for row, keep in zip(response_ids, response_mask)]
    assert got == [ids for ids, _ in want]
    assert (
        options["temperature"] == 0
        or options["eos_id"] is None
        or len({len(ids) for ids in got}) > 2
    ), "rows must leave at different times"
    assert (response_ids[~response_mask] == 0).all() and response_ids.shape[1] == max(map(len, got))
    if short := [
        i for i, row in enumerate(got) if len(row) < 25
    ]:  # alone, they are not followed to the limit
        alone, _ = common.generate(
            model, ids[short], mask[short], max_new_tokens=25, uniforms=uniforms[short], **options
        )
        assert alone.shape[1] == max(len(got[i]) for i in short)
    # the update's log-probs of the same tokens, in a batch with other padding, are the slow loop's
    if options["temperature"]:
        packed = common.pack(prompts, got, "cpu")
        logprobs = common.token_logprobs(model, *packed, options["temperature"])
        for row, keep, (_, slow) in zip(logprobs, packed[2], want):
            assert row[keep].tolist() == pytest.approx(slow, abs=1e-4)


def test_generate_feeds_only_real_tokens(model):
    """Rows that have ended leave the batch: what decoding computes is what it returns"""
    fed = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: fed.append(inputs[0].numel())
    )
    ids, mask, _ = common.pack([[5]] * 32, [[]] * 32, "cpu")
    torch.manual_seed(0)
    _, response_mask = common.generate(model, ids, mask, max_new_tokens=60, eos_id=3)
    hook.remove()
    assert (
        sum(fed) <= 1.1 * response_mask.sum()
        and response_mask.sum(1).max() > 3 * response_mask.sum(1).min()
    )


def test_generate_refuses_train_mode(model):
    with pytest.raises(ValueError, match="eval"):
        common.generate(
            model.train(),
            torch.tensor([[1]]),
            torch.tensor([[True]]),
            max_new_tokens=1,
            eos_id=None,
        )
    model.eval()


def test_a_row_does_not_see_its_neighbours(model):
    """Log-probs and heads are the same alone and in any batch; the value of a_t stands one position
    before its reward"""
    from transformers import LlamaForTokenClassification

    (
        model.config.num_labels,
        model.config.token_classification_bias,
        model.config.classifier_dropout,
    ) = 1, False, 0.0
    torch.manual_seed(1)
    head = LlamaForTokenClassification(model.config).eval()
    prompts, responses = [[5, 6, 7], [4], [9, 9, 9, 9, 9]], [[8, 9], [10, 11, 12, 13, 3], [7]]
    together = [
        common.token_logprobs(model, *common.pack(prompts, responses, "cpu")),
        common.token_heads(head, *common.pack(prompts, responses, "cpu")),
        common.token_heads(head, *common.pack(prompts, responses, "cpu"), before=True),
    ]
    for i, (p, r) in enumerate(zip(prompts, responses)):
        plain = head(torch.tensor([p + r])).logits[0, :, 0]
        assert torch.allclose(
            together[1][i, : len(r)], plain[len(p) :], atol=1e-5
        )  # r_t: the model has read a_t
        assert torch.allclose(
            together[2][i, : len(r)], plain[len(p) - 1 : -1], atol=1e-5
        )  # V(s_t): it has not
        slow = torch.log_softmax(model(torch.tensor([p + r])).logits[0], -1)
        assert torch.allclose(
            together[0][i, : len(r)], slow[range(len(p) - 1, len(p) + len(r) - 1), r], atol=1e-5
        )
        assert all((x[i, len(r) :] == 0).all() for x in together)


def test_positions_begin_at_the_prompt_not_at_the_padding():
    """Llama's positions are relative and forgive it; GPT-2's are not"""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    absolute = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=23, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
        )
    ).eval()
    prompts, responses = [[5, 6, 7], [4], [9, 9, 9, 9, 9]], [[8, 9], [10, 11, 12, 13, 3], [7]]
    with torch.no_grad():
        together = common.token_logprobs(absolute, *common.pack(prompts, responses, "cpu"))
        for i, (p, r) in enumerate(zip(prompts, responses)):
            slow = torch.log_softmax(absolute(torch.tensor([p + r])).logits[0], -1)[
                range(len(p) - 1, len(p) + len(r) - 1), r
            ]
            assert torch.allclose(together[i, : len(r)], slow, atol=1e-5)
        ids, mask, _ = common.pack(prompts, [[]] * 3, "cpu")
        said, _ = common.generate(absolute, ids, mask, max_new_tokens=6, eos_id=None, temperature=0)
        for p, ours in zip(prompts, said.tolist()):
            assert ours == slow_generate(absolute, p, torch.zeros(6), 6, None, 0)[0]


def test_draws_are_uniform_and_a_rows_own():
    draws = torch.stack([common.row_uniforms(200, 0, 0, row) for row in range(50)])
    assert (
        draws.min() >= 0
        and draws.max() < 1
        and abs(draws.mean() - 0.5) < 0.02
        and len(set(draws.flatten().tolist())) > 9900
    )
    assert torch.equal(draws[7, :10], common.row_uniforms(10, 0, 0, 7))


def test_deal_gives_every_row_once_and_every_rank_as_many_forwards(monkeypatch):
    lengths = [((7 * i) % 50) + 1 for i in range(37)]
    for world in (1, 2, 3, 4):
        monkeypatch.setattr(common, "WORLD", world)
        dealt = []
        for rank in range(world):
            monkeypatch.setattr(common, "RANK", rank)
            dealt.append(common.my_micro_batches(range(37), lengths, 4))
        assert sorted(row for parts in dealt for part in parts for row in part) == list(range(37))
        assert len({len(parts) for parts in dealt}) == 1
        shares = [sum(lengths[row] for part in parts for row in part) for parts in dealt]
        assert max(shares) <= 1.2 * sum(shares) / world


def test_deal_goes_to_and_fro(monkeypatch):
    """If one rank had the longer row of each turn, it would have 52% of these tokens, not 50"""
    monkeypatch.setattr(common, "WORLD", 2)
    lengths, shares = [n * n for n in range(1, 41)], []
    for rank in range(2):
        monkeypatch.setattr(common, "RANK", rank)
        shares.append(
            sum(
                lengths[row]
                for part in common.my_micro_batches(range(40), lengths, 4)
                for row in part
            )
        )
    assert max(shares) <= 0.502 * sum(shares)
