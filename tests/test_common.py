"""Config, files, tokens, and generate against a slow loop. pytest tests/test_common.py"""
import errno, json, math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest, sentencepiece, torch
from conftest import ROOT
from transformers import (BartConfig, DynamicCache, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig,
                          LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification,
                          LlamaTokenizer, Olmo2Config, Qwen2Config)

import common
from common import decode_response, encode_prompt, encode_response, load_tokenizer, pack
from extras.tokens import token_texts
from plumbing import files, models, record
from plumbing.cache import in_place_cache
from plumbing.command_line import load_config, one_line


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
    assert end.value.code == 2
    assert line.count("\n") == 1, line
    for part in parts:
        assert part in line, (part, line)


# ---------------------------------------------------------------- config

def test_flags_and_presets_the_rightmost_wins(tmp_path):
    preset = tmp_path / "a.toml"
    preset.write_text("[ppo]\nlr = 1\nsteps = 5\nclip = 'None'\ndata = ['p', 'q']\n"
                      "[evaluate.decode]\nx = 1\n")
    found = config(f"{preset}", "--steps=7", "--name=a=b")
    assert found == Config(lr=1.0, steps=7, name="a=b", data=["p", "q"], clip=None)
    assert config("--steps=7", f"{preset}").steps == 5

    # A word of a stage, such as evaluate.py's decode, has its own table.
    preset.write_text("[evaluate]\n[evaluate.decode]\nsteps = 9\n[ppo]\nsteps = 5\n")
    assert load_config(Config, "evaluate.decode", [f"{preset}"]).steps == 9


def test_lists_and_booleans_on_the_command_line(tmp_path):
    assert config("--data=").data == []
    assert config("--data=[]").data == []
    assert config("one", "two").data == ["one", "two"]
    assert config("--on=true").on
    assert not config("--on=0").on
    (tmp_path / "b.toml").write_text("[ppo]\ndata = []\n")
    assert config("--data=p", f"{tmp_path}/b.toml").data == []


def test_every_mistake_is_one_line(tmp_path, capsys):
    def flag(argument, *parts):
        mistake(capsys, lambda: config(argument), *parts)

    flag("--stepz=3", "command line", "'stepz'", "Did you mean 'steps'")
    flag("--steps=1e3", "steps must be int, got '1e3'")
    flag("--lr", "write --lr=value")
    flag("--on=yes", "on must be bool", "'yes'")
    flag("--level=word", "level must be one of token, sequence", "'word'")
    flag("none.toml", "none.toml", "No such file")

    def preset(text, *parts):
        (tmp_path / "a.toml").write_text(text)
        flag(f"{tmp_path}/a.toml", *parts)

    preset("[ppo]\nkl = 3\n", "a.toml [ppo]", "'kl'")
    preset("[pppo]\nlr = 3\n", "'pppo'", "Did you mean [ppo]")
    preset("[evaluate.decod]\nlr = 3\n", "'evaluate.decod'", "Did you mean [evaluate.decode]")
    preset("lr = 3\n", "'lr' is not a table")
    preset("[zzzz]\n", "'zzzz'", "there are: prepare, sft, ")
    preset("[ppo\n", "a.toml")


def test_help_is_the_docstring_and_the_config(capsys):
    with pytest.raises(SystemExit) as end:
        config("--help")
    assert end.value.code == 0
    assert "clip: float | None = 0.2" in capsys.readouterr().out


def test_ctrl_c_says_how_to_continue(capsys, monkeypatch):
    for words, said in (([], "the same command continues"),
                        (["--overwrite=true"], "the same command, without --overwrite, continues")):
        monkeypatch.setattr("sys.argv", ["sft.py", *words])
        one_line(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert said in capsys.readouterr().err


def test_a_full_disk_is_one_line_whoever_reports_it(capsys):
    as_python_reports_it = OSError(errno.ENOSPC, "No space left on device", "a.jsonl")
    as_safetensors_does = RuntimeError("I/O error: No space left on device (os error 28)")
    for error in (as_python_reports_it, as_safetensors_does):
        one_line(type(error), error, None)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "No space left on device; what was written before is valid" in said


# ---------------------------------------------------------------- files

FIELDS = {"text": str, "preference": (1, 2), "maybe": (str, type(None))}
GOOD = '{"text": "a", "preference": 1, "maybe": null, "more": 3}\n'


def test_blank_lines_are_skipped_and_unknown_fields_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "\n" + GOOD)
    rows = files.read_jsonl(path, FIELDS)
    assert len(rows) == 2
    assert rows[0]["more"] == 3


@pytest.mark.parametrize("line, parts", [
    ('{"text": "a"', ["not JSON"]),
    ("[1]", ["JSON object, got list"]),
    ('{"text": "a"}', ["no field 'preference'", "text"]),
    ('{"text": 1, "preference": 1, "maybe": ""}', ["text must be str, got 1"]),
    ('{"text": "", "preference": 3, "maybe": ""}', ["preference must be 1 or 2, got 3"]),
    ('{"text": "", "preference": true, "maybe": ""}', ["preference must be 1 or 2, got true"]),
    ('{"text": "", "preference": 1, "maybe": 2}', ["maybe must be str or null, got 2"]),
])
def test_a_malformed_row_ends_with_file_and_line(tmp_path, capsys, line, parts):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + line + "\n")
    mistake(capsys, lambda: files.read_jsonl(path, FIELDS), f"{path}:2: ", *parts)


def test_a_malformed_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "a.jsonl"

    def refused(content, fields, *parts):
        path.write_bytes(content)
        mistake(capsys, lambda: files.read_jsonl(path, fields), *parts)

    refused(b"\n", FIELDS, str(path), "no rows")
    refused(b"[" * 100_000, FIELDS, f"{path}:1: ", "not JSON")
    refused(b'{"cut": null}\n{"cut": "output"}\n', {}, f"{path}:2: cut must be a list")
    refused(b'{"\\u001b[31m": 1}\n', {"a": str}, "the row has: ?[31m")
    latin = GOOD.replace('"a"', '"é"').encode("latin-1")
    refused(GOOD.encode() + latin, FIELDS, f"{path}:2: ", "not JSON", "utf-8")
    mistake(capsys, lambda: files.read_jsonl(tmp_path, FIELDS), f"{tmp_path}: Is a directory")


def test_a_file_from_an_editor_on_windows_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    text = GOOD.replace('"a"', '"é\u2028"').replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert files.read_jsonl(path, FIELDS)[0]["text"] == "é\u2028"


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new/a.jsonl"
    files.write_jsonl(path, [{"a": 1}])
    with pytest.raises(ZeroDivisionError):
        files.write_jsonl(path, ({"a": 1 / n} for n in (1, 0)))
    assert path.read_text() == '{"a": 1}\n'


def test_a_lone_surrogate_is_data(tmp_path):
    path = tmp_path / "a.jsonl"
    files.write_jsonl(path, [{"a": "half \ud83d <b>"}])
    assert "<b>" in files.read_jsonl(path, {"a": str})[0]["a"]


# ---------------------------------------------------------------- models in a folder

def check_model(path, **options):
    models.check_model(path, "model", "python sft.py", **options)


def test_a_model_is_a_folder_or_a_name_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine/ready"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    mistake(capsys, lambda: check_model("mine/ready"), "--model=mine/ready holds no weights")
    check_model("mine/ready", weights=False)

    (folder / "model.safetensors").write_text("")
    for good in ("org/some-Model_1.5", "mine/ready", folder):
        check_model(good)
    for bad in ("mine/unfinished", "out/sft", "data/model", "name", "./a/b", tmp_path / "none"):
        mistake(capsys, lambda: check_model(bad), f"--model={bad}", "python sft.py")


def test_pickled_weights_are_refused(tmp_path, capsys):
    """...and not taken for a folder without weights, which gets new ones"""
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    mistake(capsys, lambda: check_model(tmp_path), f"--model={tmp_path}", "never loaded")
    mistake(capsys, lambda: check_model(tmp_path, weights="new"), "never loaded")
    models.check_model(tmp_path, "tokenizer", "python sft.py", weights=False)
    (tmp_path / "model.safetensors").write_text("")
    check_model(tmp_path)


def test_a_family_that_is_not_built_as_llama_is_refused(tmp_path, capsys):
    def check_fits(name, length, **options):
        models.check_fits(tmp_path / name, "model", length, **options)

    families = {
        "llama": LlamaConfig(),
        "qwen": Qwen2Config(max_position_embeddings=50),
        "olmo": Olmo2Config(),   # a language model, but no model with a head per token
        "gpt2": GPT2Config(),    # no layers
        "neox": GPTNeoXConfig(),  # no score
        "bart": BartConfig(),    # no such class
    }
    for name, family in families.items():
        family.save_pretrained(tmp_path / name)

    check_fits("llama", 2048, head="zero")
    check_fits("qwen", 50, head="zero")
    check_fits("olmo", 50)
    said = "positions for 50 tokens, this run needs 51"
    mistake(capsys, lambda: check_fits("qwen", 51), "--model=", said)
    mistake(capsys, lambda: check_fits("gpt2", 9), "like Llama's: docs/families.md")
    for name in ("gpt2", "neox", "bart", "olmo"):
        path = f"--model={tmp_path}/{name}"
        mistake(capsys, lambda: check_fits(name, 9, head="zero"), path, "like Llama's")


# ---------------------------------------------------------------- the record of a run

@dataclass(frozen=True)
class Run:
    out: str
    lr: float = 1.0
    micro_batch: int = 4
    overwrite: bool = False


File = type("File", (Run,), {"out": "out/e.jsonl"})  # a stage whose usual output is a file


def release():
    """Release the locks, as the end of a process does"""
    while record.LOCKS:
        record.LOCKS.pop().close()


@pytest.fixture(autouse=True)
def no_lock_is_left():
    yield
    release()


def begin(cfg, **options):
    """A run that begins and ends; True if it continues an earlier one"""
    try:
        return record.begin(cfg, "stage", **options)
    finally:
        release()


def test_a_run_locks_its_output(tmp_path, capsys):
    assert record.begin(Run(f"{tmp_path}/out"), "stage") is False
    mistake(capsys, lambda: record.begin(Run(f"{tmp_path}/out"), "stage"), "another run is writing")


def test_a_run_is_compared_with_its_record(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text("a")

    def again(**fields):
        cfg = Run(f"{tmp_path}/out", **fields)
        return begin(cfg, unimportant=("micro_batch",), inputs=[source])

    assert again() is False
    record.finish(Run(f"{tmp_path}/out"))
    assert again(micro_batch=8) is True

    # An older record lacks a newer field; the run was made with that field's default.
    old = record.record_of(tmp_path / "out")
    del old["config"]["lr"]
    (tmp_path / "out/run.json").write_text(json.dumps(old))
    assert again() is True

    mistake(capsys, lambda: again(lr=2.0), "lr: 1.0 then, 2.0 now", "--overwrite=true")
    source.write_text("b")
    mistake(capsys, again, "the content of")


def test_overwrite_removes_the_results_of_the_earlier_run_only(tmp_path):
    out = tmp_path / "out"
    begin(Run(f"{out}"))
    record.finish(Run(f"{out}"))
    for name in ("checkpoint_3", "step_2", "mine"):
        (out / name).mkdir()
    assert begin(Run(f"{out}", lr=2.0, overwrite=True)) is False
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"mine"}


def test_finish_keeps_the_checkpoint_unless_told(tmp_path):
    out = tmp_path / "out"
    begin(Run(f"{out}"))
    (out / "checkpoint_5").mkdir()
    record.finish(Run(f"{out}"))
    assert (out / "checkpoint_5").exists()
    record.finish(Run(f"{out}"), keep_checkpoint=False)
    assert not (out / "checkpoint_5").exists()


def test_a_folder_may_have_a_dot_in_its_name(tmp_path):
    assert begin(Run(f"{tmp_path}/rm_0.3")) is False
    assert (tmp_path / "rm_0.3/run.json").exists()


def test_a_run_that_left_nothing_may_change_its_config(tmp_path):
    out = tmp_path / "early"
    assert begin(Run(f"{out}")) is False
    assert begin(Run(f"{out}", lr=2.0)) is False
    assert record.record_of(out)["config"]["lr"] == 2.0


def test_overwrite_does_not_remove_what_the_run_reads(tmp_path, capsys):
    out = tmp_path / "early"
    begin(Run(f"{out}", lr=2.0))
    for name in ("step_20", "checkpoint.tmp", "saving.tmp"):
        (out / name).mkdir()
    cfg = Run(f"{out}", overwrite=True)
    mistake(capsys, lambda: begin(cfg, inputs=[out / "step_20"]), "which this run reads")

    # The same run removes what was not completely written.
    assert begin(Run(f"{out}", lr=2.0)) is False
    assert not list(out.glob("*.tmp"))


def test_a_half_deleted_run_is_not_finished(tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(Run(f"{out}"))
    (out / "step_20").mkdir()
    record.finish(Run(f"{out}"))
    monkeypatch.setattr(record.shutil, "rmtree", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begin(Run(f"{out}", overwrite=True))
    assert record.record_of(out) == {}


def test_an_output_that_is_a_file(tmp_path, capsys):
    out = f"{tmp_path}/e.jsonl"
    parts = Path(f"{out}.parts")
    parts.mkdir()
    assert begin(File(out)) is False
    mistake(capsys, lambda: begin(File(out, lr=2.0)), "lr: 1.0 then, 2.0 now")
    assert begin(File(out)) is False
    assert parts.exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text("a")
    (tmp_path / "d.jsonl").mkdir()
    mistake(capsys, lambda: begin(File(f"{tmp_path}/d.jsonl")), "is there as a folder")
    said = "below something that is not a folder"
    mistake(capsys, lambda: begin(File(f"{source}/e.jsonl")), said)
    mistake(capsys, lambda: begin(File(f"{source}"), inputs=[source]), "which this run reads")


def test_a_fingerprint_sees_other_weights_of_the_same_size(tmp_path):
    weights = tmp_path / "model.safetensors"
    half = 1 << 19
    weights.write_bytes(bytes(2 * half))
    before = record.fingerprint(tmp_path)
    weights.write_bytes(bytes(half) + b"x" + bytes(half - 1))
    assert record.fingerprint(tmp_path) != before


def test_a_source_may_lie_in_the_output_folder(tmp_path, capsys):
    source = tmp_path / "source/in.tsv"
    source.parent.mkdir()
    source.write_text("a")
    Source = type("Source", (Run,), {"out": "data/x"})
    out = f"{source.parent}"
    for overwrite in (False, True):
        cfg = Source(out, overwrite=overwrite)
        assert begin(cfg, inputs=[source], beside=("in.tsv",)) is False
        assert source.exists()

    old = record.record_of(out)
    old["inputs"] = {str(source): "old", "gone": "old"}
    record.record_path(out).write_text(json.dumps(old))
    mistake(capsys, lambda: begin(Source(out), inputs=[source], beside=()), "the content of")


@pytest.mark.parametrize("usual, wrong, words", [
    ("out/sft", "a.jsonl", "a folder"),
    ("out/e.jsonl", "a", "a file"),
    ("out/e.jsonl", "a.txt", "a file"),
])
def test_a_folder_is_not_taken_for_a_file(tmp_path, capsys, usual, wrong, words):
    Usual = type("Usual", (Run,), {"out": usual})
    said = f"--out={tmp_path}/{wrong} must be {words}"
    mistake(capsys, lambda: begin(Usual(f"{tmp_path}/{wrong}")), said, usual)
    assert not list(tmp_path.glob("a*"))


def test_a_run_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert begin(Run(f"{tmp_path}/sft.small")) is False
    assert record.record_of(tmp_path / "sft.small")["commit"] == ""
    assert (tmp_path / "sft.small/run.json").exists()


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    mistake(capsys, lambda: begin(Run(f"{tmp_path}/other")), "no run of ours wrote")


def test_a_torn_last_line_is_no_row(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert record.logged(log) == []
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert [row["step"] for row in record.logged(log)] == [0, 1]
    record.trim_logs(tmp_path, 1)
    assert log.read_text() == '{"step": 0}\n'


# ---------------------------------------------------------------- tokens

TEXTS = ["The", " The", "  two", " ", "://x", "\n\n1.", "", "</s> <s> <|im_end|>", "é😀\t x\r\n",
         "a" * 40, "{input} {instruction}", "it 's , n't . do not ?"]
BARE_LLAMA = ROOT.parent / "shared/data/llama2_tokenizer"


def tokenizers(world):
    """The toy world's tokenizer, and Llama 2's own if it is here"""
    paths = [world / "data/model"]
    if BARE_LLAMA.exists():
        paths.append(BARE_LLAMA)
    return [load_tokenizer(path) for path in paths]


def test_responses_come_back_to_the_character(world):
    for tokenizer in tokenizers(world):
        # Some tokenizer files ask for a clean-up that changes the text.
        option = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        setattr(tokenizer, option, True)
        for text in TEXTS:
            ids = encode_response(tokenizer, text)
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in ids[:-1]
            assert decode_response(tokenizer, ids) == text
            assert encode_response(tokenizer, text, eos=False) == ids[:-1]
            texts = token_texts(tokenizer, ids)
            assert "".join(texts) == text + tokenizer.eos_token
        assert encode_response(tokenizer, "The") != encode_response(tokenizer, " The")


def test_a_lone_surrogate_is_encoded_as_a_question_mark(world):
    half = "half \ud83d"
    for tokenizer in tokenizers(world):
        assert encode_response(tokenizer, half) == encode_response(tokenizer, "half ?")
        ids = encode_prompt(tokenizer, dict(instruction=half))
        assert ids == encode_prompt(tokenizer, dict(instruction="half ?"))


def test_a_response_gets_no_dummy_space(tmp_path):
    """transformers' LlamaTokenizer puts SentencePiece's dummy space before every text"""
    # A vocabulary of a few words, with pieces at the beginning of a word and inside it.
    words = "The cat then sat on the catalogue, breatheThe".split()
    sentences = [" ".join(words[i % 5:]) for i in range(200)]
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=310, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2)

    paths = [tmp_path]
    if BARE_LLAMA.exists():
        paths.append(BARE_LLAMA)
    for path in paths:
        tokenizer = LlamaTokenizer.from_pretrained(path)
        plain = tokenizer.encode("The", add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(plain) == ["▁The"]
        ours = encode_response(tokenizer, "The")
        assert "".join(tokenizer.convert_ids_to_tokens(ours)) == "The</s>"
        for text in TEXTS:
            assert decode_response(tokenizer, encode_response(tokenizer, text)) == text


def test_a_tokenizer_without_eos_is_refused(world, tmp_path, capsys):
    tokenizer = load_tokenizer(world / "sft")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    mistake(capsys, lambda: load_tokenizer(tmp_path), str(tmp_path), "no eos token")
    mistake(capsys, lambda: load_tokenizer(tmp_path / "none"), "no tokenizer in")


@pytest.mark.parametrize("row", [
    dict(instruction="Say {input}.", input=""),
    dict(instruction="Add.", input="1 {instruction}"),
    dict(instruction="<s>"),
])
def test_prompts_are_alpacas_with_bos_once(world, row):
    for tokenizer in tokenizers(world):
        ids = encode_prompt(tokenizer, row)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        text = tokenizer.decode(ids[1:])
        assert f"### Instruction:\n{row['instruction']}\n\n" in text
        assert text.endswith("### Response:")
        has_input = bool(row.get("input"))
        assert ("### Input:\n" in text) == has_input
        if has_input:
            assert row["input"] in text


def test_tokenizer_hash_tells_vocabularies_apart(world):
    hashes = [common.tokenizer_hash(tokenizer) for tokenizer in tokenizers(world)]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == common.tokenizer_hash(load_tokenizer(world / "sft"))

    # The same vocabulary, but another token ends a response.
    other = load_tokenizer(world / "sft")
    other.eos_token = other.convert_ids_to_tokens(300)
    assert common.tokenizer_hash(other) not in hashes


# ---------------------------------------------------------------- rows and random numbers

def test_a_stream_has_every_row_once_an_epoch():
    stream = common.rows_at(0, 30, 10, 0)
    for start in (0, 10, 20):
        assert sorted(stream[start:start + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert stream[7:12] == common.rows_at(7, 12, 10, 0)


def test_random_numbers_are_uniform_and_depend_on_the_row():
    draws = torch.stack([common.row_uniforms(200, 0, 0, row) for row in range(50)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.02
    assert len(set(draws.flatten().tolist())) > 9900
    assert torch.equal(draws[7, :10], common.row_uniforms(10, 0, 0, 7))


def dealt_to(world, monkeypatch, rows, lengths, micro_batch):
    """my_micro_batches of each rank"""
    monkeypatch.setattr(common, "WORLD", world)
    dealt = []
    for rank in range(world):
        monkeypatch.setattr(common, "RANK", rank)
        dealt.append(common.my_micro_batches(rows, lengths, micro_batch))
    return dealt


def tokens_of(micro_batches, lengths):
    return sum(lengths[row] for rows in micro_batches for row in rows)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_row_is_dealt_once_and_every_rank_gets_as_many_lists(monkeypatch, world):
    lengths = [((7 * i) % 50) + 1 for i in range(37)]
    dealt = dealt_to(world, monkeypatch, range(37), lengths, 4)
    rows = [row for micro_batches in dealt for rows in micro_batches for row in rows]
    assert sorted(rows) == list(range(37))
    assert len({len(micro_batches) for micro_batches in dealt}) == 1
    tokens = [tokens_of(micro_batches, lengths) for micro_batches in dealt]
    assert max(tokens) <= 1.2 * sum(tokens) / world


def test_rows_are_dealt_in_snake_order(monkeypatch):
    """If one rank had the longer row of each turn, it would have 52% of these tokens, not 50"""
    lengths = [n * n for n in range(1, 41)]
    dealt = dealt_to(2, monkeypatch, range(40), lengths, 4)
    tokens = [tokens_of(micro_batches, lengths) for micro_batches in dealt]
    assert max(tokens) <= 0.502 * sum(tokens)


# ---------------------------------------------------------------- forward and generate

def test_the_cache_holds_what_transformers_own_holds():
    """Random appends, and rows that leave or move, in both"""
    config = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1)
    ours = in_place_cache(config, room=40)
    plain = DynamicCache(config=config)
    B = 6
    length = 0
    for n, rows in ((5, [0, 1, 2, 3, 4, 5]), (1, [0, 5, 2, 4]), (1, [0, 1, 2, 3]), (3, [3, 1]),
                    (1, [1]), (4, [0])):
        for layer in range(2):
            keys, values = torch.randn(2, B, 1, n, 4)
            found = ours.update(keys, values, layer)
            expected = plain.update(keys, values, layer)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        length += n
        assert ours.get_seq_length() == length
        ours.batch_select_indices(torch.tensor(rows))
        plain.batch_select_indices(torch.tensor(rows))
        B = len(rows)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
                         tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


def slow_draw(p, u, temperature, top_p, top_k):
    """One token from the probabilities p, a list, by the number u"""
    order = sorted(range(len(p)), key=lambda v: -p[v])
    if temperature == 0:
        return order[0]
    allowed = order[:top_k] if top_k else order

    # The nucleus: the likeliest tokens, until their share is at least top_p.
    nucleus = set()
    mass = 0.0
    limit = top_p * sum(p[v] for v in sorted(allowed))
    for v in allowed:
        if mass < limit:
            nucleus.add(v)
        mass += p[v]

    # The first token whose cumulative share exceeds u.
    total = sum(p[v] for v in sorted(nucleus))
    passed = 0.0
    for v in sorted(nucleus):
        passed += p[v]
        if u * total < passed:
            return v


def slow_generate(model, prompt, uniforms, max_new_tokens, eos_id, temperature, top_p=1.0, top_k=0):
    """Reads the prompt and all tokens again for every token, unpadded and without a cache -> the
    response's ids, and log pi of each"""
    ids = list(prompt)
    logprobs = []
    for u in uniforms[:max_new_tokens].tolist():
        logits = model(torch.tensor([ids])).logits[0, -1]
        p = torch.softmax(logits / (temperature or 1), -1).tolist()
        token = slow_draw(p, u, temperature, top_p, top_k)
        logprobs.append(math.log(p[token]))
        ids.append(token)
        if token == eos_id:
            break
    return ids[len(prompt):], logprobs


@pytest.mark.parametrize("options", [
    dict(eos_id=3, temperature=1.0),
    dict(eos_id=3, temperature=0.7, top_p=0.8),
    dict(eos_id=3, temperature=1.3, top_k=5),
    dict(eos_id=3, temperature=0),
    dict(eos_id=None, temperature=1.0),
])
def test_generate_is_the_slow_loop(model, options):
    # An EOS inside a prompt ends nothing.
    prompts = [[5, 6, 7, 8, 9], [4], [10, 11], [12, 3, 13], [7] * 9, [8, 8]] * 3
    uniforms = torch.stack([common.row_uniforms(25, 0, 0, row) for row in range(len(prompts))])
    ids, mask, _ = pack(prompts, [[]] * len(prompts), "cpu")
    response_ids, response_mask = common.generate(model, ids, mask, max_new_tokens=25,
                                                  uniforms=uniforms, **options)
    responses = [row[keep].tolist() for row, keep in zip(response_ids, response_mask)]

    # The slow loop computes in float64.
    exact = LlamaForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    expected, expected_logprobs = [], []
    for prompt, row_uniforms in zip(prompts, uniforms):
        response, logprobs = slow_generate(exact, prompt, row_uniforms, 25, **options)
        expected.append(response)
        expected_logprobs.append(logprobs)
    assert responses == expected
    assert (response_ids[~response_mask] == 0).all()
    assert response_ids.shape[1] == max(map(len, responses))
    if options["temperature"] and options["eos_id"] is not None:
        assert len({len(response) for response in responses}) > 2, "rows must leave at many times"

    # Rows that end early, alone in a batch, are not followed to the limit.
    short = [i for i, response in enumerate(responses) if len(response) < 25]
    if short:
        alone, _ = common.generate(model, ids[short], mask[short], max_new_tokens=25,
                                   uniforms=uniforms[short], **options)
        assert alone.shape[1] == max(len(responses[i]) for i in short)

    # The update's log-probs of the same tokens, in a batch with other padding, are the same.
    if options["temperature"]:
        packed = pack(prompts, responses, "cpu")
        logprobs = common.token_logprobs(model, *packed, options["temperature"])
        for row, keep, slow in zip(logprobs, packed[2], expected_logprobs):
            assert row[keep].tolist() == pytest.approx(slow, abs=1e-4)


def test_generate_feeds_only_real_tokens(model):
    """Finished rows leave the batch: decoding computes just what it returns"""
    fed = []

    def count(module, inputs, output):
        fed.append(inputs[0].numel())

    hook = model.model.embed_tokens.register_forward_hook(count)
    ids, mask, _ = pack([[5]] * 32, [[]] * 32, "cpu")
    torch.manual_seed(0)
    _, response_mask = common.generate(model, ids, mask, max_new_tokens=60, eos_id=3)
    hook.remove()
    lengths = response_mask.sum(1)
    assert sum(fed) <= 1.1 * lengths.sum()
    assert lengths.max() > 3 * lengths.min()


def test_generate_refuses_train_mode(model):
    ids = torch.tensor([[1]])
    with pytest.raises(ValueError, match="eval"):
        common.generate(model.train(), ids, ids > 0, max_new_tokens=1, eos_id=None)
    model.eval()


PROMPTS = [[5, 6, 7], [4], [9, 9, 9, 9, 9]]
RESPONSES = [[8, 9], [10, 11, 12, 13, 3], [7]]


def slow_logprobs(model, prompt, response):
    """log pi of a response's tokens, of one row alone"""
    logprobs = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0], -1)
    before = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logprobs[before, response]


def test_a_row_does_not_see_its_neighbours(model):
    """Log-probs and heads are the same alone and in a batch; V(s_t) is read one position before
    r_t"""
    model.config.update(dict(num_labels=1, token_classification_bias=False,
                             classifier_dropout=0.0))
    torch.manual_seed(1)
    head = LlamaForTokenClassification(model.config).eval()
    packed = pack(PROMPTS, RESPONSES, "cpu")
    logprobs = common.token_logprobs(model, *packed)
    rewards = common.token_heads(head, *packed)
    values = common.token_heads(head, *packed, before=True)

    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        P, T = len(prompt), len(response)
        alone = head(torch.tensor([prompt + response])).logits[0, :, 0]
        slow = slow_logprobs(model, prompt, response)
        assert torch.allclose(rewards[i, :T], alone[P:], atol=1e-5)         # it has read a_t
        assert torch.allclose(values[i, :T], alone[P - 1:-1], atol=1e-5)    # it has not
        assert torch.allclose(logprobs[i, :T], slow, atol=1e-5)
        for x in (logprobs, rewards, values):
            assert (x[i, T:] == 0).all()


@torch.no_grad()
def test_positions_begin_at_the_prompt_not_at_the_padding():
    """Llama's positions are relative, so that a shift changes nothing; GPT-2's are absolute"""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                        initializer_range=0.5)
    absolute = GPT2LMHeadModel(config).eval()
    logprobs = common.token_logprobs(absolute, *pack(PROMPTS, RESPONSES, "cpu"))
    for row, prompt, response in zip(logprobs, PROMPTS, RESPONSES):
        slow = slow_logprobs(absolute, prompt, response)
        assert torch.allclose(row[:len(response)], slow, atol=1e-5)

    ids, mask, _ = pack(PROMPTS, [[]] * 3, "cpu")
    said, _ = common.generate(absolute, ids, mask, max_new_tokens=6, eos_id=None, temperature=0)
    for prompt, response in zip(PROMPTS, said.tolist()):
        expected, _ = slow_generate(absolute, prompt, torch.zeros(6), 6, None, 0)
        assert response == expected
