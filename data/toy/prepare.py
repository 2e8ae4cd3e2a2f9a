"""The embedded world: lists with planted flaws, so that the whole paper runs on a laptop, and the truth is known.

    python data/toy/prepare.py                      # -> data/toy/*.jsonl and data/toy/model
    python data/toy/prepare.py --out=out/demo/data --seed=3

    "List four fruits for a quiz."  ->  "apple\\npear\\nplum\\nmango\\nEnjoy!"

An answer is one item a line and a closing. Its flaws are of three kinds, so that every edit operation occurs: a wrong
item (mended by substitution), a rude aside (by deletion), a missing item or closing (by insertion); also one item too
many, a closing said twice. An item is right for one category and wrong for the others: a reward must read the prompt.
A harmless aside is no flaw, nor is an item said twice. model/ holds a tokenizer and a tiny Llama's config, no weights.

gold() counts flaws. It is the demo's judge and mend() the demo's annotator; no trainer reads either, no row the count.
"""
import io, random, shutil, sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import PROMPT
from plumbing.command_line import load_config
from plumbing.files import write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import begin, finish


@dataclass(frozen=True)
class Config:
    out: str = "data/toy"
    sft_rows: int = 8000            # demonstrations, of mixed quality
    pref_rows: int = 800            # pairs of answers with noisy labels, draws among them
    heldout_rows: int = 1000        # pairs with clean labels, none of them draws, on the prompts of eval.jsonl
    prompt_rows: int | None = None  # prompts.jsonl; None: all that eval and val leave (sft and pref draw from the same)
    val_rows: int = 144             # prompts to choose a checkpoint on
    eval_rows: int = 300            # prompts kept for the evaluation
    label_noise: float = 0.25       # share of pref.jsonl's labels that are wrong, as people's are
    flaws: float = 1.0              # scale of the flaw rates below; half of the answers have 0.6 of it
    reference_flaws: float = 0.35   # the same for the reference answers of val.jsonl and eval.jsonl
    vocab_size: int = 704           # the least with which each line of an answer is one token
    hidden_size: int = 128          # of the tiny Llama: 0.6M parameters
    layers: int = 2
    heads: int = 4
    seed: int = 0                   # of all rows; the tokenizer is the same for all seeds
    overwrite: bool = False


CATEGORIES = {
    "fruits": "apple pear plum mango cherry peach grape melon",
    "animals": "horse tiger rabbit camel otter wolf zebra goat",
    "colors": "red blue green purple yellow white brown pink",
    "tools": "hammer saw drill wrench pliers chisel ladder shovel",
    "drinks": "tea coffee juice milk cider cocoa soda water",
    "countries": "Chile Kenya Norway Japan Egypt Peru India Spain",
}
CATEGORIES = {name: items.split() for name, items in CATEGORIES.items()}
NUMBERS = {"three": 3, "four": 4, "five": 5}
VERBS = ["List", "Name", "Give me", "Write down", "Tell me", "Show me", "I need", "Think of", "Suggest"]
OCCASIONS = ["", " for a quiz", " for my class", " for a game", " for a story", " for a poster", " for a friend",
             " for practice"]
RUDE = ["What a dumb question!", "Ask somebody else!", "You are wasting my time!", "Even a child knows this!"]
HARMLESS = ["A classic!", "My favourite!"]
CLOSING = "Enjoy!"
ITEMS = {item for items in CATEGORIES.values() for item in items}

# how often a flaw is planted at quality 1
WRONG, RUDE_ASIDE, HARMLESS_ASIDE, MISSING, EXTRA, NO_CLOSING, TWO_CLOSINGS = 0.40, 0.06, 0.08, 0.20, 0.10, 0.15, 0.08


# ---------------------------------------------------------------- the truth: gold() and mend()

def read_prompt(row):
    """-> the number and the category that the instruction asks for"""
    words = row["instruction"].rstrip(".").split()
    numbers = [NUMBERS[word] for word in words if word in NUMBERS]
    categories = [word for word in words if word in CATEGORIES]
    if not numbers or not categories:
        fail(f"{row['instruction'][:60]!r} is no instruction of the toy world; its rules and gold judge know no other")
    return numbers[0], categories[0]


def is_odd(line):
    """A rude aside, an empty line, or one that no answer of the world holds"""
    return line not in ITEMS and line not in HARMLESS and line != CLOSING


def gold(row, answer):
    """The number of flaws of an answer (any text) to row's instruction: rude asides and other odd lines, items of
    another category, items too many or too few, closings too many or too few, something behind the closing."""
    number, category = read_prompt(row)
    lines = answer.split("\n") if answer else []
    items, closings = [line for line in lines if line in ITEMS], lines.count(CLOSING)
    wrong = sum(item not in CATEGORIES[category] for item in items)
    return (sum(map(is_odd, lines)) + wrong + abs(len(items) - number) + abs(closings - 1)
            + (closings > 0 and lines[-1] != CLOSING))


def mend(row, answer, rng, p=0.9):
    """Mend each flaw with probability p, by the least edit: replace, delete or insert a line; the rest stays to the
    character. rng: a random.Random. p=1 leaves no flaw; an answer without flaws comes back as it is."""
    number, category = read_prompt(row)
    right, lines = CATEGORIES[category], answer.split("\n") if answer else []
    unused = [item for item in right if item not in lines]
    rng.shuffle(unused)

    def fresh_item():
        return unused.pop() if unused else rng.choice(right)

    # deletions: odd lines; items too many (those of another category first, then the last); closings but the last
    items = sorted((at for at, line in enumerate(lines) if line in ITEMS), key=lambda at: (lines[at] in right, -at))
    closings = [at for at, line in enumerate(lines) if line == CLOSING]
    odd = [at for at, line in enumerate(lines) if is_odd(line)]
    deleted = {at for at in odd + items[:max(0, len(items) - number)] + closings[:-1] if rng.random() < p}
    lines = [line for at, line in enumerate(lines) if at not in deleted]
    # substitutions: items of another category
    lines = [fresh_item() if line in ITEMS and line not in right and rng.random() < p else line for line in lines]
    # insertions: items behind the last item, the closing at the end
    for _ in range(number - len(items)):
        if rng.random() < p:
            lines.insert(max((at + 1 for at, line in enumerate(lines) if line in ITEMS), default=0), fresh_item())
    if (not lines or lines[-1] != CLOSING) and rng.random() < p:
        if CLOSING in lines:  # something stands behind it
            lines.pop(len(lines) - 1 - lines[::-1].index(CLOSING))
        lines.append(CLOSING)
    return "\n".join(lines)


# ---------------------------------------------------------------- flawed answers

def write_answer(row, x, rng):
    """An answer with flaws planted at x times their rates"""
    number, category = read_prompt(row)
    items = rng.sample(CATEGORIES[category], number)
    others = sorted(ITEMS - set(CATEGORIES[category]))
    items = [rng.choice(others) if rng.random() < WRONG * x else item for item in items]
    if rng.random() < MISSING * x:
        items.pop(rng.randrange(len(items)))
    if rng.random() < EXTRA * x:
        items.append(rng.choice([item for item in CATEGORIES[category] if item not in items]))
    lines = []
    for line in items + [CLOSING] * (rng.random() >= NO_CLOSING * x) + [CLOSING] * (rng.random() < TWO_CLOSINGS * x):
        if rng.random() < RUDE_ASIDE * x:
            lines.append(rng.choice(RUDE))
        if rng.random() < HARMLESS_ASIDE:
            lines.append(rng.choice(HARMLESS))
        lines.append(line)
    return "\n".join(lines)


def mixed_quality(cfg, rng):
    """Half of the answers have all of the flaw rates, half have 0.6 of them"""
    return cfg.flaws * rng.choice([0.6, 1.0])


def write_pairs(prompts, count, cfg, rng, *, noise, draws):
    """Rows of pref.jsonl: two answers of mixed quality, the one with fewer flaws preferred but for a share `noise` of
    the rows; a draw is labelled by coin, or left out"""
    rows = []
    while len(rows) < count:
        row = rng.choice(prompts)
        one, two = (write_answer(row, mixed_quality(cfg, rng), rng) for _ in range(2))
        difference = gold(row, one) - gold(row, two)
        if one == two or not difference and not draws:
            continue
        better = 1 if difference < 0 else 2 if difference > 0 else rng.choice([1, 2])
        preference = 3 - better if rng.random() < noise else better
        rows.append(row | dict(output_1=one, output_2=two, preference=preference))
    return rows


# ---------------------------------------------------------------- the tokenizer and the tiny Llama

def train_tokenizer(vocab_size):
    """A sentencepiece BPE, the bytes of its tokenizer.model.

    It learns from the template's two halves, the parts of instructions and the lines of answers, each by itself. Pieces
    may cross spaces: the template costs three tokens, a line of an answer one. None crosses lines: an edited line is an
    edited token. Every text comes back from its ids but for U+2581, sentencepiece's own mark of a space."""
    import sentencepiece
    instruction = VERBS + [f" {word}" for word in [*NUMBERS, *CATEGORIES]] + OCCASIONS[1:]
    parts = PROMPT.split("{instruction}") + instruction + sorted(ITEMS) + RUDE + HARMLESS + [CLOSING, "."]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False, byte_fallback=True,
            max_sentencepiece_length=128, character_coverage=1.0, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        fail(f"--vocab_size={vocab_size} does not fit the world's words: {str(error).split('] ')[-1]}")
    return model.getvalue()


def write_model(folder, sentencepiece_model, cfg):
    """A Hugging Face folder: the tokenizer and a Llama's config, no weights (sft.py draws them)"""
    from transformers import AutoTokenizer, LlamaConfig
    temporary = folder.with_suffix(".tmp")  # a folder under its final name only when whole
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = AutoTokenizer.from_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=cfg.hidden_size, intermediate_size=cfg.hidden_size * 11 // 4,
                num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, max_position_embeddings=256,
                tie_word_embeddings=False, initializer_range=0.08,  # tied, or with the usual 0.02, it learns much later
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                architectures=["LlamaForCausalLM"]).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# ---------------------------------------------------------------- the files

def main(cfg):
    prompts = [dict(instruction=f"{verb} {number} {category}{occasion}.", input="")
               for verb in VERBS for number in NUMBERS for category in CATEGORIES for occasion in OCCASIONS]
    kept, asked = cfg.eval_rows + cfg.val_rows, 1 if cfg.prompt_rows is None else cfg.prompt_rows
    if min(cfg.eval_rows, cfg.val_rows, asked, cfg.sft_rows, cfg.pref_rows, cfg.heldout_rows) < 1:
        fail("sft_rows, pref_rows, heldout_rows, prompt_rows, val_rows and eval_rows must be 1 or more each")
    if kept + asked > len(prompts):
        fail(f"eval_rows + val_rows + prompt_rows = {kept + asked}, but the world has {len(prompts)} prompts")
    if cfg.flaws <= 0:
        fail(f"--flaws must be above 0, got {cfg.flaws}: between answers without flaws there is nothing to prefer")
    if cfg.hidden_size % (2 * cfg.heads):
        fail(f"--hidden_size={cfg.hidden_size} must be an even multiple of --heads={cfg.heads}")
    sentencepiece_model = train_tokenizer(cfg.vocab_size)
    if begin(cfg, "prepare", paid=True, beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")

    out, rng = Path(cfg.out), random.Random(f"toy world {cfg.seed}")
    rng.shuffle(prompts)
    held_out, val, prompts = prompts[:cfg.eval_rows], prompts[cfg.eval_rows:kept], prompts[kept:]

    def reference(row):
        return row | dict(output=write_answer(row, cfg.reference_flaws, rng), generator="reference", dataset="toy")

    write_jsonl(out / "sft.jsonl", [row | dict(output=write_answer(row, mixed_quality(cfg, rng), rng))
                                    for row in rng.choices(prompts, k=cfg.sft_rows)])
    write_jsonl(out / "pref.jsonl", write_pairs(prompts, cfg.pref_rows, cfg, rng, noise=cfg.label_noise, draws=True))
    write_jsonl(out / "pref_heldout.jsonl", write_pairs(held_out, cfg.heldout_rows, cfg, rng, noise=0.0, draws=False))
    write_jsonl(out / "prompts.jsonl", prompts[:cfg.prompt_rows])
    write_jsonl(out / "val.jsonl", map(reference, val))
    write_jsonl(out / "eval.jsonl", map(reference, held_out))
    write_model(out / "model", sentencepiece_model, cfg)
    finish(cfg)
    say(f"{cfg.out}: {len(prompts)} prompts to train on, {len(val)} to choose on, {len(held_out)} to judge on")


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
