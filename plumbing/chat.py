"""Prompts of a chat model: its folder's own chat template, where Alpaca's prompt is not used."""
import datetime, hashlib, re

from jinja2 import TemplateError

from plumbing.files import check_row, whole_characters
from plumbing.ranks import fail

TODAY = datetime.date(2024, 7, 26)  # for templates that print the date; Llama 3.1 has it built in

def use_template(tokenizer, path):
    """Prepare a tokenizer for template_prompt() -> the prompt format: "template" and its hash. The
    date in it is fixed, or a row's ids would change daily. eos becomes the end of a turn."""
    if not tokenizer.chat_template:
        fail(f"{path} has no chat template; train it in Alpaca's prompt: --prompt_format=alpaca")
    template = tokenizer.get_chat_template()
    for call, _, form in re.findall(r"(strftime_now\((['\"])(.*?)\2\))", template):
        template = template.replace(call, repr(TODAY.strftime(form)))
    tokenizer.chat_template = template

    # What does it write before an answer, and after it? Some write a space: "[/INST] Yes</s>".
    question = dict(role="user", content="QUESTION")
    answer = dict(role="assistant", content="ANSWER")
    try:
        prompt = tokenizer.apply_chat_template([question], tokenize=False,
                                               add_generation_prompt=True)
        dialogue = tokenizer.apply_chat_template([question, answer], tokenize=False)
    except TemplateError as error:
        fail(f"{path}: its chat template fails on a question and an answer: {error}")
    before, found, after = dialogue.rpartition("ANSWER")
    space = before.removeprefix(prompt)
    tokenizer.response_space = space if space.isspace() else ""
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False)
    if found and ids and ids[0] in tokenizer.added_tokens_decoder:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])

    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = map(re.escape, [*special, tokenizer.eos_token])
    tokenizer.special_texts = re.compile("|".join(texts))
    return "template " + hashlib.sha256(template.encode()).hexdigest()[:16]

def template_prompt(tokenizer, row):
    """A row's `messages`, or one turn with its instruction and input, as ids up to where the answer
    begins. None: a text holds a special token ("<|im_end|>"), which would be taken for one."""
    where = f"the messages of the row about {row['instruction'][:60]!r}"
    text = row["instruction"]
    if row.get("input"):
        text += "\n\n" + row["input"]
    turns = row.get("messages") or [dict(role="user", content=text)]
    check_row(dict(messages=turns), dict(messages=list), where)
    for turn in turns:
        check_row(turn, dict(role=str, content=str), where)
    if turns[-1]["role"] == "assistant":
        fail(f"{where} end with an answer; it has a field of its own (output, original, ...)")
    texts = [whole_characters(turn["content"]) for turn in turns]
    if any(map(tokenizer.special_texts.search, texts)):
        return None
    turns = [turn | dict(content=text) for turn, text in zip(turns, texts)]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        fail(f"{where}: the chat template refuses them: {error}")
