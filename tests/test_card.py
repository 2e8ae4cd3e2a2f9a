"""A saved folder as other tools read it: the card, the sampling, pipelines, file modes.
pytest tests/test_card.py"""
import contextlib, io, json, os, re, shutil, stat, tomllib

import pytest
import torch
import yaml
from conftest import PPO, run
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, TopPLogitsWarper, pipeline)

import common, evaluate, ppo, reward_model, sft
from extras import card
from plumbing import record
from plumbing.command_line import load_config

CPU = torch.device("cpu")
NASTY = "a|b``c*_<img src=x>&amp;](x) é😀'\"\\.jsonl"


@pytest.fixture(scope="module")
def policy(world, tmp_path_factory):
    """The folder of a run of ppo.py, with step_1 in it. The base's card names a licence."""
    home = tmp_path_factory.mktemp("card")
    out = home / "ppo"
    run("ppo.py", f"--policy={world}/sft", f"--reward_model={world}/rm", "--save_every=1",
        f"--data={world}/data/prompts.jsonl", f"--out={out}", *PPO)
    return out


@pytest.fixture
def folders(world, policy):
    return {"sft": world / "sft", "rm": world / "rm", "rm_sequence": world / "rm_sequence",
            "ppo": policy, "step": policy / "step_1"}


def parts(folder):
    """The card of a folder -> its front matter, and language -> its fenced block"""
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    blocks = re.findall(r"^(```+)(\w+)\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(front[1]), {language: content for _, language, content in blocks}


def printed(code):
    """What a program prints, and its names"""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue(), names


# ---------------------------------------------------------------- the card

@pytest.mark.parametrize("name, Config, table, task", [
    ("sft", sft.Config, "sft", "text-generation"),
    ("rm", reward_model.Config, "reward_model", "token-classification"),
    ("rm_sequence", reward_model.Config, "reward_model", "text-classification"),
    ("ppo", ppo.Config, "ppo", "text-generation"), ("step", ppo.Config, "ppo", "text-generation")])
def test_a_card_says_what_the_run_was(folders, tmp_path, name, Config, table, task):
    """Its config is a preset that gives the run's own; its figures are those of the last step"""
    folder = folders[name]
    front, blocks = parts(folder)
    assert front == dict(library_name="transformers", pipeline_tag=task)
    (tmp_path / "card.toml").write_text(blocks["toml"], encoding="utf-8")
    run_folder = folder.parent if name == "step" else folder
    config = json.loads((run_folder / "run.json").read_text())["config"]
    assert load_config(Config, table, [str(tmp_path / "card.toml")]) == Config(**config)

    rows = record.logged(run_folder / "metrics.jsonl")
    last = rows[0 if name == "step" else -1]
    text = (folder / "README.md").read_text()
    figure = last["loss"] if "loss" in last else last["reward"]
    assert f"`{figure:.4g}`" in text and f"After {last['step'] + 1} steps" in text
    assert len(blocks["python"].splitlines()) == 6


@pytest.mark.parametrize("name", ["sft", "ppo", "step"])
def test_the_six_lines_open_a_policy(folders, name):
    """...with plain transformers, on the ids that it was trained on"""
    torch.manual_seed(0)
    said, names = printed(parts(folders[name])[1]["python"])
    tokenizer = common.load_tokenizer(folders[name])
    prompt = common.encode_prompt(tokenizer, dict(instruction=card.EXAMPLE, input=""))
    output = names["outputs"][0].tolist()
    assert output[:len(prompt)] == prompt and len(output) > len(prompt)
    assert said == common.decode_response(tokenizer, output[len(prompt):]) + "\n"


@pytest.mark.parametrize("name", ["rm", "rm_sequence"])
def test_the_six_lines_give_the_rewards(folders, name):
    said, _ = printed(parts(folders[name])[1]["python"])
    tokenizer = common.load_tokenizer(folders[name])
    prompt = common.encode_prompt(tokenizer, dict(instruction=card.EXAMPLE, input=""))
    answer = common.encode_response(tokenizer, "Apple, pear, plum.")
    model = common.load_model(folders[name], CPU, None, torch.float32, head="saved", frozen=True)
    r = common.token_heads(model, *common.pack([prompt], [answer], CPU))[0]            # [T]
    assert r.abs().max() > 1e-3, "the head has learnt nothing: the comparison would be of zeros"
    if name == "rm":
        rewards = [reward for _, reward in eval(said)]
        assert len(rewards) == len(prompt) + len(answer)
        assert rewards[len(prompt):] == pytest.approx(r.tolist(), abs=1e-5)
    else:
        assert float(said) == pytest.approx(r[-1].item(), abs=1e-5)


def saved(world, out, config=None, base=None, chat_template=None):
    """world's policy, saved by sft.py's record of a run -> its folder"""
    tokenizer = common.load_tokenizer(f"{world}/sft")
    if chat_template:
        tokenizer.chat_template = chat_template
    model = common.load_model(f"{world}/sft", CPU, None, torch.float32)
    out.mkdir(parents=True)
    run_json = json.loads((world / "sft/run.json").read_text())
    run_json["config"] |= dict(out=str(out)) | (config or {})
    if base:
        run_json["config"]["model"] = str(base)
    run_json["inputs"] = {run_json["config"][name]: "0" for name in ("model", "data")}
    (out / "run.json").write_text(json.dumps(run_json))
    record.save_model(model, tokenizer, out, torch.float32)
    return out


@pytest.mark.parametrize("readme, expected", [
    ("---\nlicense: apache-2.0\nbase_model: org/base\ntags: [x]\n---\n# x",
     {"license": "apache-2.0"}),
    ("﻿---\r\nlicense: other\r\nlicense_name: 'a: \"b\"'\r\n---\r\n",
     {"license": "other", "license_name": 'a: "b"'}),
    ("---\nlicense: [a, b]\n---\n", {}), ("---\nlicense: {\n---\n", {}), ("---\n- a\n---\n", {}),
    ("no front matter\nlicense: mit\n", {}), (None, {})])
def test_the_licence_of_the_base_is_carried_on(world, tmp_path, readme, expected):
    """...through all stages, if the base's card names one; a card that is not YAML ends no run"""
    base = tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme, encoding="utf-8", newline="")
    one = saved(world, tmp_path / "one", base=base)
    two = saved(world, tmp_path / "two", base=one)
    for folder in (one, two):
        front, _ = parts(folder)
        assert {name: front[name] for name in front if name.startswith("license")} == expected
        assert "base_model" not in front, "the base's base is not this model's"
        named = "names." in (folder / "README.md").read_text()
        assert named == ("license" in expected)


def test_a_base_on_the_hub_is_named(world, tmp_path, monkeypatch):
    """...and handed on by our own cards; its licence is read from its card there"""
    (tmp_path / "there.md").write_text("---\nlicense: llama2\n---\n")
    asked = []

    def download(name, file):
        asked.append((name, file))
        if len(asked) > 1:
            raise OSError("no network")
        return str(tmp_path / "there.md")

    monkeypatch.setattr(card, "hf_hub_download", download)
    one = saved(world, tmp_path / "one", base="org/llama")
    two = saved(world, tmp_path / "two", base=one)
    for folder in (one, two):
        assert parts(folder)[0]["base_model"] == "org/llama"
        assert parts(folder)[0]["license"] == "llama2"
    three = saved(world, tmp_path / "three", base="org/llama")
    assert asked == [("org/llama", "README.md")] * 2
    assert parts(three)[0] == dict(library_name="transformers", pipeline_tag="text-generation",
                                   base_model="org/llama")


def test_names_are_text_in_the_card(world, tmp_path):
    """A path that looks like markdown or HTML, with a line break and half a character"""
    data = f"{tmp_path}/{NASTY}\n# x\udcff```"
    folder = saved(world, tmp_path / "<b>*o*[u](t)", config=dict(data=data))
    text = (folder / "README.md").read_text(encoding="utf-8")

    # The preset gives the name back; only what cannot be written as UTF-8 became "?".
    assert tomllib.loads(parts(folder)[1]["toml"])["sft"]["data"] == data.replace("\udcff", "?")
    assert "\\<b\\>\\*o\\*\\[u\\]\\(t\\)" in text

    # Without fenced blocks and code spans nothing of it is left, and each row has two cells.
    text = re.sub(r"^(```+)\w+\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    rest = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)
    for part in ("`", "img", "&amp", "# x"):
        assert part not in rest, part


def test_a_markdown_reader_finds_no_markup_in_names(world, tmp_path):
    """The same, read by markdown-it"""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", dict(linkify=False))
    folder = saved(world, tmp_path / "<b>*o*[u](t)", config=dict(data=f"{tmp_path}/{NASTY}"))
    text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    html = markdown.render(text)
    for tag in ("<img", "<b>", "<em", "<a ", "<strong"):
        assert tag not in html, tag
    cells = [row.count("<td") for row in html.split("<tr>")[1:]]
    assert set(cells) <= {0, 2} and 2 in cells
    assert NASTY.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace(
        '"', "&quot;") in html


def test_a_chat_template_that_was_not_trained_with_is_not_used(world, tmp_path):
    """The six lines encode the prompt as the stages do; a template that fails ends no run"""
    other = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    for name, template in (("a", other), ("b", "{{ raise_exception('no') }}")):
        code = parts(saved(world, tmp_path / name, chat_template=template))[1]["python"]
        assert "apply_chat_template" not in code and "### Response:" in code


def test_a_model_that_was_trained_in_its_chat_template_is_asked_in_it(world, tmp_path):
    """...with the ids of the stages, whether or not the tokenizer adds a token of its own"""
    shutil.copytree(world / "sft", tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text(
        "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    tokenizer = common.load_tokenizer(tmp_path / "chat", "template")
    assert tokenizer.prompt_format != "alpaca"
    wanted = common.encode_prompt(tokenizer, dict(instruction=card.EXAMPLE, input=""))
    expression, options = card.prompt_expression(tokenizer)
    assert expression.startswith("tokenizer.apply_chat_template(")
    ids = eval(f"tokenizer({expression}{options}).input_ids", dict(tokenizer=tokenizer))
    assert ids == wanted


# ---------------------------------------------------------------- sampling

def test_a_policy_samples_as_the_evaluation_does(folders):
    """Whatever the base's generation_config says"""
    for name in ("sft", "ppo", "step"):
        config = GenerationConfig.from_pretrained(folders[name])
        decode = evaluate.DecodeConfig()
        assert config.do_sample is True and config.eos_token_id == 2
        assert (config.temperature, config.top_p) == (decode.temperature, decode.top_p)
    assert not (folders["rm"] / "generation_config.json").exists()


def test_the_sampling_of_the_base_is_replaced(tmp_path):
    """Its penalty and its top-k are not the evaluation's. transformers draws from the same tokens,
    with the same probabilities, as common.draw_tokens"""
    from test_ends import byte_level, save
    folder = save(tmp_path / "base", byte_level(), do_sample=True, temperature=0.3, top_k=3,
                  repetition_penalty=1.5)
    tokenizer = common.load_tokenizer(folder)
    model = common.load_model(folder, CPU, None, torch.float32)
    record.save_model(model, tokenizer, tmp_path / "out", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7]])
    options = dict(max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    scores = plain.generate(ids, attention_mask=ids > 0, **options).scores[0]
    expected = TopPLogitsWarper(0.9)(None, plain(ids).logits[:, -1] / 0.7)
    assert torch.isfinite(expected).sum() > 60, "the test needs more tokens than a top-k of 50"
    assert torch.allclose(scores.softmax(-1), expected.softmax(-1), atol=1e-6)


# ---------------------------------------------------------------- pipelines

TEXT = "<s>" + common.PROMPT.format(instruction="List four fruits.")


def test_the_pipeline_continues_as_generate_does(folders):
    tokenizer = common.load_tokenizer(folders["ppo"])
    model = common.load_model(folders["ppo"], CPU, None, torch.float32, frozen=True)
    prompt = common.encode_prompt(tokenizer, dict(instruction="List four fruits.", input=""))
    ids, mask, _ = common.pack([prompt], [[]], CPU)
    ours, _ = common.generate(model, ids, mask, max_new_tokens=8, eos_id=2, temperature=0)
    writer = pipeline("text-generation", str(folders["ppo"]))
    said = writer(TEXT, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"] == common.decode_response(tokenizer, ours[0].tolist())


def test_the_pipeline_gives_the_reward_of_an_answer(folders):
    """No sigmoid over it, and its name"""
    judge = pipeline("text-classification", str(folders["rm_sequence"]))
    model = common.load_model(folders["rm_sequence"], CPU, None, torch.float32, head="saved",
                              frozen=True)
    tokenizer = common.load_tokenizer(folders["rm_sequence"])
    prompt = common.encode_prompt(tokenizer, dict(instruction="List four fruits.", input=""))
    rewards = []
    for answer in ("pear\nplum", "tea"):
        packed = common.pack([prompt], [common.encode_response(tokenizer, answer)], CPU)
        r = common.token_heads(model, *packed)
        rewards.append(common.sequence_rewards(r, packed[2]).item())
        found = judge(TEXT + answer + tokenizer.eos_token)[0]
        assert found["label"] == "reward"
        assert found["score"] == pytest.approx(rewards[-1], abs=1e-5)
    assert min(rewards) < 0 or max(rewards) > 1, "a sigmoid would give the same kind of number"
    assert AutoModelForSequenceClassification.from_pretrained(
        folders["rm_sequence"]).config.problem_type == "regression"


def test_the_pipeline_names_each_token_a_reward(folders):
    found = pipeline("token-classification", str(folders["rm"]))("pear\nplum")
    tokenizer = AutoTokenizer.from_pretrained(folders["rm"])
    ids = tokenizer("pear\nplum").input_ids
    assert [token["entity"] for token in found] == ["reward"] * len(ids)


# ---------------------------------------------------------------- modes

@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_files_have_the_mode_of_the_umask(world, tmp_path, umask, mode):
    """safetensors' own is 0600, and a colleague could not read the weights"""
    before = os.umask(umask)
    try:
        folder = saved(world, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert "model.safetensors" in modes and "README.md" in modes
    assert modes == dict.fromkeys(modes, mode)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
