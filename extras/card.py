"""The README.md of a saved model's folder: a model card, made from the record of its run. It says
what the model is and what it was made of, and has its last figures and six lines of Python that
open it with plain transformers. Without this file a folder has no card."""
if __name__ == "__main__":
    raise SystemExit("card.py is a part of: python sft.py, reward_model.py and ppo.py")

import json, re
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download
from jinja2 import TemplateError

from common import PROMPT, encode_prompt
from plumbing.files import whole_characters
from plumbing.models import is_on_hub
from plumbing.record import logged, record_of

EXAMPLE = "Name three fruits."
PAPER = '"Aligning Large Language Models via Fine-grained Supervision" (Xu et al. 2024)'

# Class of the model, its task on the hub, and the end of the six lines.
KINDS = {
    "policy": ("AutoModelForCausalLM", "text-generation", """\
outputs = model.generate(inputs.input_ids, max_new_tokens=300)
print(tokenizer.decode(outputs[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))"""),
    "token": ("AutoModelForTokenClassification", "token-classification", """\
rewards = model(inputs.input_ids).logits[0, :, 0]  # one per token, the prompt's too
print(list(zip(tokenizer.convert_ids_to_tokens(inputs.input_ids[0]), rewards.tolist())))"""),
    "sequence": ("AutoModelForSequenceClassification", "text-classification", """\
reward = model(inputs.input_ids).logits[0, 0]
print(reward.item())""")}


def write(folder, out, tokenizer):
    """Write folder/README.md, for a model that save_model() is about to move to `out`. Nothing is
    written where no run.json of ours says what the model is."""
    # out/saving_step.tmp will be out/step_N.
    is_step = Path(out).name == "saving_step.tmp"
    run = Path(out).parent if is_step else Path(out)
    record = record_of(run)
    stage = next((name for name in record.get("code", ()) if name != "common"), None)
    if stage not in ("sft", "reward_model", "ppo"):
        return
    rows = logged(run / "metrics.jsonl")
    figures = rows[-1] if rows else {}
    steps = figures.get("step", -1) + 1
    name = run / f"step_{steps}" if is_step else run

    architectures = json.loads((folder / "config.json").read_text())["architectures"]
    kind = "policy"
    if stage == "reward_model":
        kind = "sequence" if "ForSequence" in " ".join(architectures) else "token"
    config = dict(record["config"])
    if stage == "ppo" and not is_step:
        config["steps"] = steps  # the record still has the former number where it was raised
    base = config.get("policy" if stage == "ppo" else "model", "")
    front = front_matter(base, KINDS[kind][1])
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {inline(name.name or run.resolve().name)}",
        description(stage, kind, config, steps),
        licence(front, base),
        "## Use", python(kind, name, tokenizer), reading(kind),
        "## How it was made", provenance(stage, record, base),
        "## Figures", f"After {steps} steps, from metrics.jsonl.", table(figures.items()),
        "## Config", "As a preset, it makes the same run again.", preset(stage, config)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "README.md").write_text(whole_characters(text), encoding="utf-8")


# ---------------------------------------------------------------- text that is safe in markdown

def inline(text):
    """Any text in a line of markdown: each sign that may mean something there is escaped"""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", visible(text))


def code(text):
    """Any text as a code span, in a table, too: its fence is longer than any fence within it"""
    text = visible(text)
    fence = "`" * (longest_run(text) + 1)
    space = " " if text[:1] in ("", "`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", r"\|")


def block(language, text):
    """Lines of text as a fenced block"""
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def visible(text):
    """One line, without control characters"""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def longest_run(text):
    """The most backticks in a row"""
    return max(map(len, re.findall("`+", text)), default=0)


def table(rows):
    """Pairs of a name and a value as a table; the names are ours, without anything to escape"""
    lines = ["| | |", "|---|---|"]
    for name, value in rows:
        shown = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"| {name} | {code(shown)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the parts of a card

def front_matter(base, task):
    """What the hub reads, as a dict. The licence is the one that the base's card names; a base that
    is a run of ours hands on its own base, too."""
    front = dict(library_name="transformers", pipeline_tag=task)
    said = base_card(base)
    for name in ("license", "license_name", "license_link"):
        if isinstance(said.get(name), str):
            front[name] = said[name]
    if is_on_hub(base):
        front["base_model"] = str(base)
    elif Path(base, "run.json").exists() and isinstance(said.get("base_model"), str):
        front["base_model"] = said["base_model"]
    return front


def base_card(base):
    """The front matter of the base's README.md, {} without one. base: a folder, or on the hub"""
    try:
        path = hf_hub_download(base, "README.md") if is_on_hub(base) else Path(base, "README.md")
        text = Path(path).read_text(encoding="utf-8-sig")
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        said = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, no network, or not YAML
        return {}
    return said if isinstance(said, dict) else {}


def description(stage, kind, config, steps):
    """A paragraph: what the model is. A field that a copy of a stage does not have is None."""
    data = config.get("data")
    data = ", ".join(map(code, data)) if isinstance(data, list) else code(data)
    if stage == "sft":
        return (f"A policy: it was trained on demonstrations ({data}). The loss is the mean of "
                "-log pi over the tokens of the response.")
    if kind == "token":
        equation = "Eq. 3" if config.get("loss") == "eq3" else "Eq. 4"
        return ("A reward model: a number for each token of an answer. It was trained on pairs of "
                f"an edited and an original answer ({data}), with {equation} of {PAPER}.")
    if kind == "sequence":
        return ("A reward model: one number for an answer, read at its last token. It was trained "
                f"on pairs of answers ({data}), with the Bradley-Terry loss.")
    dense = "one reward per answer" if config.get("level") == "sequence" else "a reward per token"
    return (f"A policy: {code(config.get('policy'))} after {steps} steps of PPO with {dense}, "
            f"given by {code(config.get('reward_model'))}, on the prompts of {data}. See {PAPER}.")


def licence(front, base):
    """A sentence on the licence, and what nobody did"""
    if "license" in front:
        named = f"{code(front['license'])}, which the card of {code(base)} names."
    else:
        named = f"none was found in a card of {code(base)}; it depends on that model and the data."
    return f"Licence: {named} Nobody has checked what the model says."


def python(kind, name, tokenizer):
    """Six lines that open the folder with plain transformers"""
    auto, _, end = KINDS[kind]
    prompt, options = prompt_expression(tokenizer)
    answer = "" if kind == "policy" else ' + "Apple, pear, plum." + tokenizer.eos_token'
    return block("python", f"""\
from transformers import {auto}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(name)!r})
model = {auto}.from_pretrained({str(name)!r}, dtype="auto")
inputs = tokenizer({prompt}{answer}, return_tensors="pt"{options})
{end}""")


def prompt_expression(tokenizer):
    """A Python expression for the text of a prompt, and the options with which the tokenizer gives
    it the ids that the model was trained on"""
    want = encode_prompt(tokenizer, dict(instruction=EXAMPLE, input=""))
    options = {"": {}, ", add_special_tokens=False": dict(add_special_tokens=False)}
    prompt = PROMPT.format(instruction=EXAMPLE)
    texts = {repr(prompt): prompt}
    if tokenizer.bos_token:
        texts[repr(tokenizer.bos_token + prompt)] = tokenizer.bos_token + prompt
    if tokenizer.chat_template:
        turns = [dict(role="user", content=EXAMPLE)]
        options_text = "tokenize=False, add_generation_prompt=True"
        with suppress(TemplateError, TypeError, ValueError):  # a template may want other turns
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            texts[f"tokenizer.apply_chat_template({turns}, {options_text})"] = text
    for option, given in options.items():
        for expression, text in texts.items():
            if tokenizer(text, **given).input_ids == want:
                return expression, option
    return repr(prompt), ""


def reading(kind):
    """What the numbers of a reward model mean"""
    if kind == "token":
        return ("The reward of an answer is the mean of its tokens' numbers, the end-of-text token "
                "included. `pipeline(\"token-classification\")` names each token `reward`, but its "
                "score is a softmax over this one label, always 1.0: use the lines above.")
    if kind == "sequence":
        return "`pipeline(\"text-classification\")` gives the same number for the same text."
    return ("By default it samples as the evaluation does: temperature 0.7, top-p 0.9 "
            "(generation_config.json).")


def provenance(stage, record, base):
    """A table: what the run read, and where it ran"""
    rows = [("stage", stage), ("base", base)]
    for path, fingerprint in record["inputs"].items():
        rows.append(("read", f"{path} (fingerprint {fingerprint})"))
    for name in ("prompt_format", "started", "command", "commit", "device", "world_size", "torch",
                 "transformers"):
        rows.append((name, record.get(name, "")))
    return table(rows)


def preset(stage, config):
    """The config as a table of TOML. TOML has no null: None is a word"""
    lines = [f"[{stage}]"]
    for name, value in config.items():
        text = json.dumps("None" if value is None else value, ensure_ascii=False)
        lines.append(f"{name} = {text}".replace("\x7f", "\\u007f"))
    return block("toml", "\n".join(lines))
