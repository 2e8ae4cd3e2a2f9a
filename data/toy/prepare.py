"""The embedded world: lists with planted flaws, so that the whole paper runs on a laptop, and the truth is known.

    python data/toy/prepare.py                      # -> data/toy/*.jsonl and data/toy/model (a tokenizer and a tiny Llama's config)
    python data/toy/prepare.py --out=out/demo/data --seed=3

    "List four fruits for a quiz."  ->  "apple\\npear\\nplum\\nmango\\nEnjoy!"

An answer is one item a line and a closing. Its flaws are of three kinds, so that every edit operation occurs: a wrong item (mended
by substitution), a rude aside (by deletion), a missing item or closing (by insertion); also one item too many, a closing said twice.
An item is right for one category and wrong for the others: a reward must read the prompt. A harmless aside is no flaw.

gold() counts flaws. It is the demo's judge, and mend() the demo's annotator; no trainer reads either, nor is the count in any row.
"""
import io, json, random, sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import PROMPT, begin, fail, finish, load_config, say, write_jsonl


@dataclass(frozen=True)
class Config:
    out: str = "data/toy"
    sft_rows: int = 8000            # demonstrations, of mixed quality
    pref_rows: int = 800            # pairs of answers with noisy labels
    heldout_rows: int = 1000        # pairs with clean labels, none of them draws
    eval_rows: int = 300            # prompts kept for the evaluation, in no other file but the held-out pairs
    label_noise: float = 0.25       # share of pref.jsonl's labels that are wrong, as people's are
    quality: float = 1.0            # scale of the flaw rates of answers; half of them have 0.6 of it
    reference_quality: float = 0.35 # the same for the reference answers of eval.jsonl
    vocab_size: int = 800
    hidden_size: int = 128          # of the tiny Llama
    layers: int = 2
    heads: int = 4
    seed: int = 0
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
VERBS = ["List", "Name", "Give me", "Write down", "Tell me", "Show me", "I need", "Think of"]
OCCASIONS = ["", " for a quiz", " for my class", " for a game", " for a story", " for a poster", " for a friend", " for practice"]
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
    number = next(NUMBERS[word] for word in words if word in NUMBERS)
    return number, next(word for word in words if word in CATEGORIES)


def gold(row, answer):
    """The number of flaws of an answer (any text) to row's instruction: rude asides, lines that are nothing known, items of
    another category, items too many or too few, closings too many or too few, something behind the closing."""
    number, category = read_prompt(row)
    lines = answer.split("\n") if answer else []
    items, closings = [line for line in lines if line in ITEMS], lines.count(CLOSING)
    odd = sum(line not in ITEMS and line not in HARMLESS and line != CLOSING for line in lines)  # rude, unknown, empty
    wrong = sum(item not in CATEGORIES[category] for item in items)
    return odd + wrong + abs(len(items) - number) + abs(closings - 1) + (closings > 0 and lines[-1] != CLOSING)


def mend(row, answer, rng, p=0.9):
    """Mend each flaw with probability p, by the least edit: replace, delete or insert a line; the rest stays to the character.
    rng: a random.Random. p=1 leaves no flaw; an answer without flaws comes back as it is."""
    number, category = read_prompt(row)
    lines, mended = answer.split("\n") if answer else [], []
    unused = [item for item in CATEGORIES[category] if item not in lines]
    rng.shuffle(unused)
    surplus = max(0, sum(line in ITEMS for line in lines) - number)
    for line in reversed(lines):  # from the end: what is too many goes there
        if line in ITEMS and surplus and rng.random() < p:
            surplus -= 1
        elif line in ITEMS and line not in CATEGORIES[category] and rng.random() < p:
            mended.append(unused.pop() if unused else rng.choice(CATEGORIES[category]))
        elif line in ITEMS or line in HARMLESS or line == CLOSING or rng.random() >= p:
            mended.append(line)
    lines = mended[::-1]
    while lines.count(CLOSING) > 1 and rng.random() < p:
        lines.pop(lines.index(CLOSING))
    at = max((i + 1 for i, line in enumerate(lines) if line in ITEMS), default=0)
    for _ in range(number - sum(line in ITEMS for line in lines)):
        if rng.random() < p:
            lines.insert(at, unused.pop() if unused else rng.choice(CATEGORIES[category]))
            at += 1
    if lines and CLOSING in lines and lines[-1] != CLOSING and rng.random() < p:
        lines.remove(CLOSING)
        lines.append(CLOSING)
    if CLOSING not in lines and rng.random() < p:
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


def write_pairs(prompts, count, cfg, rng, *, noise, draws):
    """Rows of pref.jsonl: two answers of mixed quality, the one with fewer flaws preferred, but for a share `noise`"""
    rows = []
    while len(rows) < count:
        row = rng.choice(prompts)
        one, two = (write_answer(row, cfg.quality * rng.choice([0.6, 1.0]), rng) for _ in range(2))
        difference = gold(row, one) - gold(row, two)
        if one == two or not difference and not draws:
            continue
        preference = 1 if difference < 0 else 2 if difference > 0 else rng.choice([1, 2])
        rows.append(row | dict(output_1=one, output_2=two, preference=3 - preference if rng.random() < noise else preference))
    return rows


# ---------------------------------------------------------------- the tokenizer

def train_tokenizer(out, vocab_size):
    """A sentencepiece BPE in a Hugging Face folder. It learns from the two halves of the template and from single words and lines:
    the template costs two tokens (pieces may cross spaces), and no piece crosses the lines of an answer, so that an edit of a
    line is an edit of its tokens."""
    import sentencepiece
    from transformers import AutoTokenizer
    words = [*VERBS, *(f" {word}" for word in (*NUMBERS, *CATEGORIES)), *filter(None, OCCASIONS)]
    corpus = PROMPT.split("{instruction}") * 30 + [*words, *sorted(ITEMS), *RUDE, *HARMLESS, CLOSING] * 10
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, split_by_whitespace=False,
        split_by_unicode_script=False, split_by_number=False, max_sentencepiece_length=128, character_coverage=1.0,
        num_threads=1, minloglevel=2)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.save_pretrained(out)
    return tokenizer


def main(cfg):
    prompts = [dict(instruction=f"{verb} {number} {category}{occasion}.", input="")
               for verb in VERBS for number in NUMBERS for category in CATEGORIES for occasion in OCCASIONS]
    if not 0 < cfg.eval_rows < len(prompts) // 2:
        fail(f"--eval_rows must be from 1 to {len(prompts) // 2 - 1}: the world has {len(prompts)} prompts")
    if begin(cfg, beside=("prepare.py",)):
        return say(f"{cfg.out} is finished; nothing to do")
    rng, out = random.Random(f"toy world {cfg.seed}"), Path(cfg.out)
    rng.shuffle(prompts)
    held_out, prompts = prompts[:cfg.eval_rows], prompts[cfg.eval_rows:]
    write_jsonl(out / "sft.jsonl", [row | dict(output=write_answer(row, cfg.quality * rng.choice([0.6, 1.0]), rng))
                                    for row in rng.choices(prompts, k=cfg.sft_rows)])
    write_jsonl(out / "pref.jsonl", write_pairs(prompts, cfg.pref_rows, cfg, rng, noise=cfg.label_noise, draws=True))
    write_jsonl(out / "pref_heldout.jsonl", write_pairs(held_out, cfg.heldout_rows, cfg, rng, noise=0.0, draws=False))
    write_jsonl(out / "prompts.jsonl", prompts)
    write_jsonl(out / "eval.jsonl", [row | dict(output=write_answer(row, cfg.reference_quality, rng), generator="reference", dataset="toy")
                                     for row in held_out])

    from transformers import LlamaConfig
    tokenizer = train_tokenizer(out / "model", cfg.vocab_size)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=cfg.hidden_size, intermediate_size=cfg.hidden_size * 11 // 4,
                         num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, max_position_embeddings=256,
                         tie_word_embeddings=False, initializer_range=0.08,  # tied, or with the usual 0.02, it learns much later
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, architectures=["LlamaForCausalLM"])
    config.save_pretrained(out / "model")
    finish(cfg)
    say(f"{cfg.out}: {len(prompts)} prompts and {len(held_out)} for the evaluation, vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    main(load_config(Config))
