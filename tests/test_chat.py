"""Chat models: prompts in their own chat template, in every stage. pytest tests/test_chat.py"""
import datetime, json, shutil, threading

import pytest, torch
from conftest import PPO, ROOT, rows_of, run
from test_ends import byte_level
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForTokenClassification
from transformers.utils import chat_template_utils

import common, sft
from extras.editors import local
from extras.tokens import token_texts
from plumbing import files

# The templates as their makers publish them, without tools. Each with its special tokens, eos
# first, and the one that ends a turn.
QWEN = ("""\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>")
LLAMA3 = ("""\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] \
| trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
          ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>"], "<|eot_id|>")
MISTRAL = ("""\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}\
{% endif %}{% endfor %}""", ["</s>", "<s>", "[INST]", "[/INST]"], "</s>")
GEMMA = ("""\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
         ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>")
MODELS = dict(qwen=QWEN, llama3=LLAMA3, mistral=MISTRAL, gemma=GEMMA)
DAY = dict(date_string="26 Jul 2024")  # as the templates of Llama 3 take it; the others ignore it

ROW = dict(instruction="List two fruits.", input="", output="apple\npear")
WITH_INPUT = dict(instruction="Sum up.", input="The apple is\n\nred. ", output="Red apple!")
TURNS = [dict(role="user", content="List fruits."), dict(role="assistant", content="plum"),
         dict(role="user", content="Another one?")]
SEVERAL = dict(instruction="Another one?", input="User: List fruits.\n\nAssistant: plum",
               output="pear", messages=TURNS)
SYSTEM = [dict(role="system", content="Be brief."), *TURNS]


def chat_model(folder, name, *, hidden=16):
    """A tiny model with the tokens and the chat template of a family"""
    template, special, _ = MODELS[name]
    names = dict(eos_token=special[0])
    if name != "qwen":
        names["bos_token"] = special[1]
    tokenizer = byte_level(special, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    return folder


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(tmp_path, name):
    return chat_model(tmp_path / "model", name)


def refused(capsys, function, *args):
    """What is said by a call that ends the run: one line"""
    with pytest.raises(SystemExit) as end:
        function(*args)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    return said


# ---------------------------------------------------------------- ids


def test_prompts_are_those_of_transformers(model, name):
    """Of rows with and without input, and of several turns; bos once, for the families with one"""
    plain = AutoTokenizer.from_pretrained(model)
    ours = common.load_tokenizer(model)
    turns_of_rows = [
        (ROW, [dict(role="user", content="List two fruits.")]),
        (WITH_INPUT, [dict(role="user", content="Sum up.\n\nThe apple is\n\nred. ")]),
        (SEVERAL, TURNS)]
    if name in ("qwen", "llama3"):
        turns_of_rows.append((SEVERAL | dict(messages=SYSTEM), SYSTEM))
    for row, turns in turns_of_rows:
        expected = plain.apply_chat_template(turns, add_generation_prompt=True, return_dict=False,
                                             **DAY)
        found = common.encode_prompt(ours, row)
        assert found == expected
        assert plain.decode(found).count("plum") == (row["instruction"] == "Another one?")
        if name != "qwen":
            assert found[0] == plain.bos_token_id and found.count(found[0]) == 1


def test_prompt_and_response_are_the_whole_dialogue(model, name):
    """The response ends with what ends a turn; of the dialogue only white space is left"""
    plain = AutoTokenizer.from_pretrained(model)
    ours = common.load_tokenizer(model)
    end = plain.convert_tokens_to_ids(MODELS[name][2])
    for row in (ROW, SEVERAL):
        turns = row.get("messages") or [dict(role="user", content=row["instruction"])]
        answer = dict(role="assistant", content=row["output"])
        dialogue = plain.apply_chat_template([*turns, answer], return_dict=False, **DAY)
        response = common.encode_response(ours, row["output"])
        ids = common.encode_prompt(ours, row) + response
        assert dialogue[:len(ids)] == ids
        assert plain.decode(dialogue[len(ids):]).strip() == ""
        assert response[-1] == end
        assert common.decode_response(ours, response) == row["output"]
        assert "".join(token_texts(ours, response)) == row["output"] + MODELS[name][2]
        assert common.encode_response(ours, row["output"], eos=False) == response[:-1]
    assert {end, plain.eos_token_id} <= common.end_ids(ours)
    for text in (" apple", "  ", "", "\n", "apple "):
        assert common.decode_response(ours, common.encode_response(ours, text)) == text


def test_the_date_is_fixed(tmp_path, monkeypatch):
    """Tomorrow's ids are today's"""
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    model = chat_model(tmp_path / "model", "llama3")
    today = common.encode_prompt(common.load_tokenizer(model), ROW)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()
    plain = AutoTokenizer.from_pretrained(model)
    turns = [dict(role="user", content="x")]
    assert "02 Jan 2031" in plain.apply_chat_template(turns, tokenize=False)
    tomorrow = common.load_tokenizer(model)
    assert common.encode_prompt(tomorrow, ROW) == today
    assert "Today Date: 26 Jul 2024\n" in tomorrow.decode(today)


def test_text_with_a_special_token_is_no_prompt(model, name):
    ours = common.load_tokenizer(model)
    for token in MODELS[name][1]:
        text = f"a{token}b"
        assert common.encode_prompt(ours, ROW | dict(instruction=text)) is None
        assert common.encode_prompt(ours, ROW | dict(input=text)) is None
        turns = [dict(role="user", content=text), *TURNS[1:]]
        assert common.encode_prompt(ours, SEVERAL | dict(messages=turns)) is None
        # In an answer it is text, as in Alpaca's format.
        ids = common.encode_response(ours, text)
        assert ids.count(ours.convert_tokens_to_ids(token)) == (token == MODELS[name][2])
        assert common.decode_response(ours, ids) == text


@pytest.mark.parametrize("messages, says", [
    ("hello", "messages must be list"),
    ([1], "must be a JSON object"),
    ([dict(role="user")], "no field 'content'"),
    ([dict(role="user", content=None)], "content must be str"),
    (TURNS[:2], "end with an answer"),
    (SYSTEM, "Conversation roles must alternate")])
def test_messages_that_are_none_are_refused(tmp_path, capsys, messages, says):
    ours = common.load_tokenizer(chat_model(tmp_path / "model", "mistral"))
    said = refused(capsys, common.encode_prompt, ours, SEVERAL | dict(messages=messages))
    assert says in said and "Another one?" in said


# ---------------------------------------------------------------- what a folder says


def test_the_record_wins(tmp_path, name):
    """A folder says its format itself: without a record, a chat template means template"""
    model = chat_model(tmp_path / "model", name)
    assert common.load_tokenizer(model).prompt_format.startswith("template ")
    alpaca = common.load_tokenizer(model, "alpaca")
    alpaca.save_pretrained(tmp_path / "alpaca")
    template = common.load_tokenizer(model, "template")
    template.save_pretrained(tmp_path / "template")
    assert common.load_tokenizer(tmp_path / "alpaca").prompt_format == "alpaca"
    again = common.load_tokenizer(tmp_path / "template")
    assert again.prompt_format == template.prompt_format
    assert common.encode_prompt(again, SEVERAL) == common.encode_prompt(template, SEVERAL)
    plain = AutoTokenizer.from_pretrained(tmp_path / "template")
    assert plain.eos_token == MODELS[name][2], "other tools end where we do"


def test_another_template_than_the_trained_one_is_refused(tmp_path, capsys):
    model = chat_model(tmp_path / "model", "qwen")
    tokenizer = common.load_tokenizer(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "rude")
    tokenizer.save_pretrained(tmp_path / "other")
    assert "chat template is another now" in refused(capsys, common.load_tokenizer,
                                                     tmp_path / "other")


def test_template_needs_a_template(world, capsys):
    said = refused(capsys, common.load_tokenizer, world / "data/model", "template")
    assert "--prompt_format=alpaca" in said


@pytest.mark.parametrize("says", [True, False, None])
def test_bos_stays_what_the_base_says(world, tmp_path, says):
    """transformers does not save add_bos_token"""
    shutil.copytree(world / "data/model", tmp_path / "m")
    path = tmp_path / "m/tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("add_bos_token", None)
    if says is not None:
        config["add_bos_token"] = says
    path.write_text(json.dumps(config))
    first = common.load_tokenizer(tmp_path / "m")
    first.save_pretrained(tmp_path / "saved")
    second = common.load_tokenizer(tmp_path / "saved")
    assert common.encode_prompt(second, ROW) == common.encode_prompt(first, ROW)
    assert (common.encode_prompt(second, ROW)[0] == second.bos_token_id) is (says is not False)


# ---------------------------------------------------------------- Alpaca's prompt for other tools


def assert_other_tools_prompt_alike(tokenizer):
    template = sft.alpaca_template(tokenizer)
    texts = ["List two fruits.", " a\n\nb \n", "é {x} {{ y }} {% z %}"]
    rows = [(dict(instruction=text), [dict(role="user", content=text)]) for text in texts]
    rows.append((SEVERAL, TURNS))
    rows.append((SEVERAL | dict(input="System: Be brief.\n\n" + SEVERAL["input"]), SYSTEM))
    for row, turns in rows:
        found = tokenizer.apply_chat_template(turns, chat_template=template, return_dict=False,
                                              add_generation_prompt=True)
        assert found == common.encode_prompt(tokenizer, row)
        dialogue = tokenizer.apply_chat_template([*turns, dict(role="assistant", content="pear")],
                                                 chat_template=template, return_dict=False)
        assert dialogue == found + common.encode_response(tokenizer, "pear")


def test_other_tools_prompt_an_alpaca_model_as_we_do(world, model):
    assert_other_tools_prompt_alike(common.load_tokenizer(world / "data/model"))
    assert_other_tools_prompt_alike(common.load_tokenizer(model, "alpaca"))


def test_other_tools_prompt_llama_as_we_do():
    path = ROOT.parent / "shared/data/llama2_tokenizer"
    if not path.exists():
        pytest.skip("needs Llama 2's tokenizer.model in ../shared/data")
    tokenizer = common.load_tokenizer(path)
    template = sft.alpaca_template(tokenizer)
    found = tokenizer.apply_chat_template([dict(role="user", content="List two fruits.")],
                                          chat_template=template, return_dict=False,
                                          add_generation_prompt=True)
    assert found == common.encode_prompt(tokenizer, ROW)
    assert tokenizer.bos_token_id in found


def test_alpaca_after_sft_is_alpaca_later(tmp_path):
    """sft.py replaces the base's chat template; the next stage reads `alpaca`, not the template"""
    model = chat_model(tmp_path / "model", "qwen")
    files.write_jsonl(tmp_path / "sft.jsonl", [ROW, WITH_INPUT] * 4)
    done = run("sft.py", f"--model={model}", f"--data={tmp_path}/sft.jsonl", "--epochs=1",
               f"--out={tmp_path}/sft", "--batch=8")
    assert "--prompt_format=template" in done.stdout, "a hint that the model has its own"
    saved = common.load_tokenizer(tmp_path / "sft")
    base = common.load_tokenizer(model, "alpaca")
    assert saved.prompt_format == "alpaca"
    assert json.loads((tmp_path / "sft/run.json").read_text())["prompt_format"] == "alpaca"
    for row in (ROW, WITH_INPUT, SEVERAL):
        assert common.encode_prompt(saved, row) == common.encode_prompt(base, row)
        assert "### Instruction:" in saved.decode(common.encode_prompt(saved, row))
    plain = AutoTokenizer.from_pretrained(tmp_path / "sft")
    found = plain.apply_chat_template([dict(role="user", content=ROW["instruction"])],
                                      add_generation_prompt=True, return_dict=False)
    assert found == common.encode_prompt(saved, ROW)


# ---------------------------------------------------------------- all stages


def edit_of(row, number):
    kept = {name: row[name] for name in ("instruction", "input", "messages") if name in row}
    return dict(kept, id=str(number), original=row["output"] + " plum",
                edited=row["output"] + " apple")


def pref_of(row, number):
    kept = {name: row[name] for name in ("instruction", "input", "messages") if name in row}
    return dict(kept, output_1=row["output"] + " apple", output_2=row["output"] + f" plum {number}",
                preference=1)


BAD = dict(instruction="Say <|eot_id|> please.", input="", output="no")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder in which a chat model with Llama 3's template has gone through all stages; each file
    has four rows, and one more with a special token in its text"""
    home = tmp_path_factory.mktemp("chat")
    model = chat_model(home / "model", "llama3", hidden=32)
    rows = [ROW, WITH_INPUT, SEVERAL, SEVERAL | dict(messages=SYSTEM), BAD]
    files.write_jsonl(home / "sft.jsonl", rows)
    files.write_jsonl(home / "edits.jsonl", [edit_of(row, i) for i, row in enumerate(rows)])
    files.write_jsonl(home / "pref.jsonl", [pref_of(row, i) for i, row in enumerate(rows)])
    files.write_jsonl(home / "eval.jsonl", rows)
    said = {}

    def stage(name, *words):
        said[name] = run(*words).stdout

    stage("sft", "sft.py", f"--model={model}", f"--data={home}/sft.jsonl", f"--out={home}/sft",
          "--prompt_format=template", "--epochs=2", "--batch=4", "--lr=1e-3")
    stage("diff", "diff.py", f"--data={home}/edits.jsonl", f"--tokenizer={home}/sft",
          f"--out={home}/diffs.jsonl")
    stage("rm", "reward_model.py", f"--model={home}/sft", f"--data={home}/diffs.jsonl",
          f"--out={home}/rm", "--batch=2", "--lr=1e-3")
    stage("rm_sequence", "reward_model.py", f"--model={home}/sft", f"--data={home}/pref.jsonl",
          f"--out={home}/rm_sequence", "--batch=2", "--lr=1e-3", "--loss=sequence")
    stage("ppo", "ppo.py", f"--policy={home}/sft", f"--reward_model={home}/rm",
          f"--data={home}/eval.jsonl", f"--out={home}/ppo", *PPO, "--steps=1", "--query_len=300")
    stage("decode", "evaluate.py", "decode", f"--model={home}/ppo", f"--data={home}/eval.jsonl",
          f"--out={home}/outputs.jsonl", "--response_len=12")
    return home, said


def expected_prompts(home):
    """transformers' own ids of the four rows"""
    plain = AutoTokenizer.from_pretrained(home / "model")
    turns = [[dict(role="user", content="List two fruits.")],
             [dict(role="user", content="Sum up.\n\nThe apple is\n\nred. ")], TURNS, SYSTEM]
    return [plain.apply_chat_template(each, add_generation_prompt=True, return_dict=False, **DAY)
            for each in turns]


def test_all_stages_encode_as_the_chat_template_does(chat):
    home, said = chat
    diffs = rows_of(home / "diffs.jsonl")
    assert [row["prompt_ids"] for row in diffs] == expected_prompts(home)
    plain = AutoTokenizer.from_pretrained(home / "model")
    end = plain.convert_tokens_to_ids("<|eot_id|>")
    for row in diffs:
        assert row["edited_ids"][-1] == end
        assert plain.decode(row["edited_ids"][:-1]) == row["edited"]

    # The rows with a special token are counted, wherever they are read.
    assert "1 special token in the prompt" in said["diff"]
    assert "1 rows hold a special token's text" in said["sft"]
    assert "1 rows hold a special token's text" in said["rm_sequence"]
    assert "4 of 5 prompts fit in 300 tokens (1 hold a special token's text)" in said["ppo"]
    assert "1 rows hold a special token's text" in said["decode"]
    outputs = rows_of(home / "outputs.jsonl")
    assert [row["instruction"] for row in outputs] == [
        "List two fruits.", "Sum up.", "Another one?", "Another one?"]


def test_every_folder_names_the_format(chat):
    home, _ = chat
    formats = {common.load_tokenizer(home / name).prompt_format
               for name in ("model", "sft", "rm", "rm_sequence", "ppo")}
    (only,) = formats
    assert only.startswith("template ")
    for record in ("sft/run.json", "diffs.jsonl.run.json"):
        assert json.loads((home / record).read_text())["prompt_format"] == only
    for name in ("sft", "ppo"):
        plain = AutoTokenizer.from_pretrained(home / name)
        turns = [dict(role="user", content="List two fruits.")]
        found = plain.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert found == expected_prompts(home)[0], "the date is in the saved template"
        ends = set(GenerationConfig.from_pretrained(home / name).eos_token_id)
        assert ends == set(plain.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"]))


def test_training_teaches_the_end_of_a_turn(chat):
    """The first logged loss is that of transformers, on the answers with their <|eot_id|>"""
    home, _ = chat
    model = LlamaForCausalLM.from_pretrained(home / "model")
    plain = AutoTokenizer.from_pretrained(home / "model")
    end = plain.convert_tokens_to_ids("<|eot_id|>")
    losses = []
    for prompt, row in zip(expected_prompts(home), (ROW, WITH_INPUT, SEVERAL, SEVERAL)):
        answer = plain.encode(row["output"], add_special_tokens=False) + [end]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(answer), reduction="none").tolist()
    logged = rows_of(home / "sft/metrics.jsonl")[0]
    assert logged["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_a_reward_model_judges_and_shows_in_its_format(chat, tmp_path):
    home, _ = chat
    reference = [{name: row[name] for name in row if name not in ("generator", "cut")}
                 | dict(output="apple") for row in rows_of(home / "outputs.jsonl")]
    files.write_jsonl(tmp_path / "reference.jsonl", reference)
    judge = ["evaluate.py", "judge", "--judge=reward_model", f"--reward_model={home}/rm",
             f"--outputs={home}/outputs.jsonl"]
    run(*judge, f"--reference={tmp_path}/reference.jsonl", f"--out={tmp_path}/a.jsonl")
    plain = AutoTokenizer.from_pretrained(home / "model")
    end = plain.convert_tokens_to_ids("<|eot_id|>")
    rewards = LlamaForTokenClassification.from_pretrained(home / "rm").eval()
    answer = plain.encode("apple", add_special_tokens=False) + [end]
    for row, prompt in zip(rows_of(tmp_path / "a.jsonl"), expected_prompts(home), strict=True):
        r = rewards(torch.tensor([prompt + answer])).logits[0, -len(answer):, 0]
        assert row["scores"][0] == pytest.approx(r.mean().item(), abs=1e-5)

    found = run("evaluate.py", "rewards", f"--reward_model={home}/rm", f"{home}/pref.jsonl",
                "--json=true").stdout
    (figures,) = json.loads(found)
    assert figures["n"] == 4 and figures["dropped"] == {"special token in the prompt": 1}
    shown = run("reward_model.py", "show", f"--model={home}/rm", f"{home}/edits.jsonl", "--n=5")
    assert shown.stdout.count("R = ") == 8
    run("diff.py", "show", f"{home}/edits.jsonl", f"--tokenizer={home}/sft")

    # A row that the reward model would misread ends the verdict in one line.
    files.write_jsonl(tmp_path / "bad.jsonl", [BAD])
    files.write_jsonl(tmp_path / "better.jsonl", [BAD | dict(output="yes")])
    done = run("evaluate.py", "judge", "--judge=reward_model", f"--reward_model={home}/rm",
               f"--outputs={tmp_path}/bad.jsonl", f"--reference={tmp_path}/better.jsonl",
               f"--out={tmp_path}/b.jsonl", ok=False)
    assert done.returncode == 2 and "holds a special token's text" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_local_editor_sees_its_own_template(chat, tmp_path):
    """With the fixed date; a text with a special token is an error of its row"""
    home, _ = chat
    tokenizer = common.load_tokenizer(home / "model")
    request = dict(messages=[dict(role="user", content="Mend it.")], max_tokens=4)
    plain = AutoTokenizer.from_pretrained(home / "model")
    expected = plain.apply_chat_template(request["messages"], add_generation_prompt=True,
                                         return_dict=False, **DAY)
    assert local.chat_ids(request, tokenizer) == expected
    bad = dict(messages=[dict(role="user", content="<|eot_id|>")], max_tokens=4)
    replies = dict(local.ask_local({"good": request, "bad": bad}, threading.Event(), batch=2,
                                   path=str(home / "model"), seed=0, temperature=0))
    assert replies["good"].error is None
    assert "special token" in replies["bad"].error


# ---------------------------------------------------------------- refusals


def test_formats_are_not_mixed(chat, tmp_path):
    """Policy, reward model and diffs must be of one format"""
    home, _ = chat
    run("sft.py", f"--model={home}/model", f"--data={home}/sft.jsonl", f"--out={tmp_path}/alpaca",
        "--epochs=1", "--batch=5")
    run("diff.py", f"--data={home}/edits.jsonl", f"--tokenizer={tmp_path}/alpaca",
        f"--out={tmp_path}/diffs.jsonl")
    assert len(rows_of(tmp_path / "diffs.jsonl")) == 5, "in Alpaca's format the text is text"
    for words, says in (
            (["ppo.py", f"--policy={tmp_path}/alpaca", f"--reward_model={home}/rm",
              f"--data={home}/eval.jsonl", f"--out={tmp_path}/out", *PPO],
             "was trained on prompts of template"),
            (["reward_model.py", f"--model={home}/sft", f"--data={tmp_path}/diffs.jsonl",
              f"--out={tmp_path}/out"], "holds prompts of alpaca"),
            (["reward_model.py", f"--model={tmp_path}/alpaca", f"--data={home}/diffs.jsonl",
              f"--out={tmp_path}/out"], "holds prompts of template")):
        done = run(*words, ok=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert says in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()


def test_two_templates_are_not_mixed(chat, tmp_path):
    """Another system text is another format"""
    home, _ = chat
    shutil.copytree(home / "model", tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("December 2023", "May 2025"))
    done = run("ppo.py", f"--policy={tmp_path}/model", f"--reward_model={home}/rm",
               f"--data={home}/eval.jsonl", f"--out={tmp_path}/out", *PPO, ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.count("on prompts of template ") == 2
