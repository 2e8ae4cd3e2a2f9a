"""The toy world: lists with planted flaws, so that the paper's method runs on a laptop and the
truth is known.

    python data/toy/prepare.py                      # -> data/toy/*.jsonl and data/toy/model
    python data/toy/prepare.py --out=out/demo/data --items=medium --seed=3

    "List four fruits for a quiz."  ->  "apple\\npear\\nplum\\nmango\\nEnjoy!"

An answer has one item per line and a closing at the end. Its flaws are of three kinds, so that
every edit operation occurs: a wrong item (fixed by a substitution), a rude aside (by a deletion), a
missing item or closing (by an insertion). There can also be one item too many, or two closings. An
item is right for one category and wrong for the others: a reward model must read the prompt. A
harmless aside is not a flaw, and neither is a repeated item. The folder model/ gets a tokenizer and
the config of a tiny Llama, but no weights.

--items is the horizon: answers of 3 to 5, of 8 to 12 or of 20 to 30 items, about 10, 22 and 53
tokens. A longer answer has as many flaws as a short one, so each of its lines has fewer.

gold() counts the flaws of an answer and mend() fixes them: gold() is the demo's judge, mend() the
demo's annotator. No trainer calls either of them, and no row contains the count.
"""
import io, random, shutil, sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import PROMPT
from plumbing.command_line import load_config
from plumbing.files import ABOVE_0, ANY, AT_LEAST_0, COUNT, SHARE, check_numbers, write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import begin, finish


@dataclass(frozen=True)
class Config:
    out: str = "data/toy"
    items: Literal["short", "medium", "long"] = "short"  # of an answer: 3 to 5, 8 to 12, 20 to 30
    flaws_per: Literal["answer", "line"] = "answer"  # answer: as many as in short; line: as often
    sft_rows: int = 8000            # demonstrations, of mixed quality
    pref_rows: int = 800            # pairs of answers with noisy labels; some pairs are draws
    heldout_rows: int = 1000        # pairs with correct labels and no draws, on eval's prompts
    prompt_rows: int | None = None  # of prompts.jsonl; None: all that are not in eval or val
    val_rows: int = 144             # prompts on which a checkpoint is chosen
    eval_rows: int = 300            # prompts kept for the evaluation
    label_noise: float = 0.25       # share of wrong labels in pref.jsonl: people err, too
    flaws: float = 1.0              # scale of the flaw rates below; half of the answers use 0.6
    reference_flaws: float = 0.35   # the same for the references of val.jsonl and eval.jsonl
    vocab_size: int | None = None   # None: so that each line is one token
    hidden_size: int = 128          # of the tiny Llama: 0.6M parameters
    layers: int = 2
    heads: int = 4
    seed: int = 0                   # of all rows; the tokenizer is the same for all seeds
    overwrite: bool = False


# 40 items a category: short answers use the first 8, medium ones 16, long ones all.
CATEGORIES = {
    "fruits": "apple pear plum mango cherry peach grape melon "
              "lemon fig kiwi banana papaya apricot guava quince "
              "date lychee nectarine orange tangerine grapefruit pineapple coconut "
              "pomegranate persimmon raspberry strawberry blueberry blackberry cranberry plantain "
              "currant elderberry mulberry kumquat durian jackfruit clementine watermelon",
    "animals": "horse tiger rabbit camel otter wolf zebra goat "
               "lion bear fox deer sheep donkey monkey badger "
               "elephant giraffe kangaroo hedgehog squirrel beaver moose bison "
               "leopard cheetah panther jaguar hyena jackal lynx weasel "
               "hamster mouse gorilla buffalo llama antelope gazelle walrus",
    "colors": "red blue green purple yellow white brown pink "
              "black grey violet scarlet beige turquoise crimson indigo "
              "teal maroon navy olive ivory amber magenta cyan "
              "lavender lilac mauve khaki ochre sienna cobalt emerald "
              "ruby jade bronze silver golden copper azure burgundy",
    "tools": "hammer saw drill wrench pliers chisel ladder shovel "
             "rake axe file clamp level mallet trowel sander "
             "spade hoe scythe sickle crowbar hatchet anvil vise "
             "tongs tweezers scissors knife router lathe plane awl "
             "ruler stapler grinder jack pickaxe wheelbarrow pitchfork screwdriver",
    "drinks": "tea coffee juice milk cider cocoa soda water "
              "lemonade espresso latte beer wine punch smoothie kefir "
              "cappuccino mocha chai matcha kombucha milkshake eggnog cordial "
              "champagne whisky vodka gin rum brandy sherry tonic "
              "cola mead sake tequila vermouth buttermilk horchata sangria",
    "countries": "Chile Kenya Norway Japan Egypt Peru India Spain "
                 "France Greece Brazil Mexico Canada Sweden Turkey Ghana "
                 "Germany Italy Portugal Poland Austria Belgium Denmark Finland "
                 "China Vietnam Thailand Nepal Iran Iraq Jordan Israel "
                 "Morocco Nigeria Senegal Uganda Cuba Panama Ecuador Bolivia",
}


class World(NamedTuple):
    numbers: dict     # the word in the instruction -> how many items it asks for
    categories: dict  # name -> its items
    vocab_size: int   # a multiple of 64; each line of an answer is one token


def world_of(numbers, items_a_category, vocab_size):
    categories = {name: words.split()[:items_a_category] for name, words in CATEGORIES.items()}
    return World(numbers, categories, vocab_size)


WORLDS = {
    "short": world_of({"three": 3, "four": 4, "five": 5}, 8, 704),
    "medium": world_of({"eight": 8, "ten": 10, "twelve": 12}, 16, 832),
    "long": world_of({"twenty": 20, "twenty-five": 25, "thirty": 30}, 40, 1280),
}
VERBS = ["List", "Name", "Give me", "Write down", "Tell me", "Show me", "I need", "Think of",
         "Suggest"]
OCCASIONS = ["", " for a quiz", " for my class", " for a game", " for a story", " for a poster",
             " for a friend", " for practice"]
RUDE = ["What a dumb question!", "Ask somebody else!", "You are wasting my time!",
        "Even a child knows this!"]
HARMLESS = ["A classic!", "My favourite!"]
CLOSING = "Enjoy!"

# How often each flaw is planted when the scale is 1: the first and the asides per line of a short
# answer (longer ones: see line_rate), the others per answer.
WRONG = 0.40
RUDE_ASIDE = 0.06
HARMLESS_ASIDE = 0.08  # not a flaw, so --flaws does not scale it
MISSING = 0.20
EXTRA = 0.10
NO_CLOSING = 0.15
TWO_CLOSINGS = 0.08


# ---------------------------------------------------------------- the truth: gold() and mend()

def read_prompt(row):
    """-> the number and the category that the row's instruction asks for, and its world"""
    words = row["instruction"].rstrip(".").split()
    for world in WORLDS.values():
        numbers = [world.numbers[word] for word in words if word in world.numbers]
        categories = [word for word in words if word in world.categories]
        if numbers and categories:
            return numbers[0], categories[0], world
    fail(f"{row['instruction'][:60]!r} is not an instruction of the toy world; "
         "its rules and its gold judge know no other")


def items_of(world):
    """The items of all its categories"""
    return {item for items in world.categories.values() for item in items}


def split_lines(answer):
    return answer.split("\n") if answer else []


def is_odd(line, world_items):
    """True for a rude aside, an empty line, or any line that is not of the world"""
    return line not in world_items and line not in HARMLESS and line != CLOSING


def gold(row, answer):
    """The number of flaws of an answer (any text) to the row's instruction.

    Flaws are: rude asides and other odd lines, items of another category, each item too many or too
    few, each closing too many or too few, and anything after the closing."""
    number, category, world = read_prompt(row)
    world_items = items_of(world)
    lines = split_lines(answer)
    items = [line for line in lines if line in world_items]
    wrong_items = [item for item in items if item not in world.categories[category]]
    odd_lines = [line for line in lines if is_odd(line, world_items)]
    closings = lines.count(CLOSING)

    flaws = len(odd_lines) + len(wrong_items)
    flaws += abs(len(items) - number)
    flaws += abs(closings - 1)
    if closings > 0 and lines[-1] != CLOSING:
        flaws += 1
    return flaws


def mend(row, answer, rng, p=0.9):
    """Fix each flaw with probability p, by the smallest edit: replace, delete or insert one line.

    All other lines keep every character. rng: a random.Random. With p=1 no flaw is left. An answer
    without flaws is returned unchanged."""
    number, category, world = read_prompt(row)
    world_items = items_of(world)
    right_items = world.categories[category]
    lines = split_lines(answer)
    unused = [item for item in right_items if item not in lines]
    rng.shuffle(unused)

    def fresh_item():
        return unused.pop() if unused else rng.choice(right_items)

    def worst_first(at):  # items of another category before right ones, late ones before early ones
        return lines[at] in right_items, -at

    # Deletions: odd lines, items too many, and all closings but the last.
    odd = [at for at, line in enumerate(lines) if is_odd(line, world_items)]
    items = [at for at, line in enumerate(lines) if line in world_items]
    surplus = sorted(items, key=worst_first)[:max(0, len(items) - number)]
    closings = [at for at, line in enumerate(lines) if line == CLOSING]
    deleted = [at for at in odd + surplus + closings[:-1] if rng.random() < p]
    lines = [line for at, line in enumerate(lines) if at not in deleted]

    # Substitutions: items of another category.
    for at, line in enumerate(lines):
        wrong = line in world_items and line not in right_items
        if wrong and rng.random() < p:
            lines[at] = fresh_item()

    # Insertions: the missing items after the last item.
    missing = number - len(items)
    for _ in range(missing):
        if rng.random() < p:
            items = [at for at, line in enumerate(lines) if line in world_items]
            after_items = items[-1] + 1 if items else 0
            lines.insert(after_items, fresh_item())

    # The closing belongs at the end. If there is one earlier, it moves.
    closed = len(lines) > 0 and lines[-1] == CLOSING
    if not closed and rng.random() < p:
        if CLOSING in lines:
            steps_from_end = lines[::-1].index(CLOSING)
            lines.pop(len(lines) - 1 - steps_from_end)
        lines.append(CLOSING)
    return "\n".join(lines)


# ---------------------------------------------------------------- flawed answers

def line_rate(world, flaws_per):
    """What the rates per line are multiplied by: an answer of any length then has as many flaws and
    asides as a short one. flaws_per="line": 1, so it has as many per line"""
    if flaws_per == "line":
        return 1.0
    return mean(WORLDS["short"].numbers.values()) / mean(world.numbers.values())


def write_answer(row, x, rng, flaws_per="answer"):
    """An answer with flaws, planted at x times their rates"""
    number, category, world = read_prompt(row)
    right_items = world.categories[category]
    rate = line_rate(world, flaws_per)
    items = rng.sample(right_items, number)

    # Items: some are of another category, one can be missing, one can be too many.
    others = sorted(items_of(world) - set(right_items))
    for at in range(number):
        if rng.random() < WRONG * x * rate:
            items[at] = rng.choice(others)
    if rng.random() < MISSING * x:
        items.pop(rng.randrange(len(items)))
    if rng.random() < EXTRA * x:
        unused = [item for item in right_items if item not in items]
        items.append(rng.choice(unused))

    # The closing: it can be missing, or there twice.
    if rng.random() >= NO_CLOSING * x:
        items.append(CLOSING)
    if rng.random() < TWO_CLOSINGS * x:
        items.append(CLOSING)

    # Asides, before any of these lines.
    lines = []
    for item in items:
        if rng.random() < RUDE_ASIDE * x * rate:
            lines.append(rng.choice(RUDE))
        if rng.random() < HARMLESS_ASIDE * rate:
            lines.append(rng.choice(HARMLESS))
        lines.append(item)
    return "\n".join(lines)


def mixed_quality(cfg, rng):
    """Half of the answers use the full flaw rates, half use 0.6 of them"""
    return cfg.flaws * rng.choice([0.6, 1.0])


def write_pairs(prompts, count, cfg, rng, *, noise, draws):
    """Rows of pref.jsonl: two answers of mixed quality; the one with fewer flaws is preferred.

    noise: share of the rows whose label is wrong. draws: True labels a draw by a coin, False leaves
    it out."""
    rows = []
    while len(rows) < count:
        row = rng.choice(prompts)
        output_1 = write_answer(row, mixed_quality(cfg, rng), rng, cfg.flaws_per)
        output_2 = write_answer(row, mixed_quality(cfg, rng), rng, cfg.flaws_per)
        flaws_1 = gold(row, output_1)
        flaws_2 = gold(row, output_2)
        if output_1 == output_2:
            continue
        if flaws_1 == flaws_2 and not draws:
            continue

        if flaws_1 < flaws_2:
            better = 1
        elif flaws_1 > flaws_2:
            better = 2
        else:
            better = rng.choice([1, 2])
        mislabelled = rng.random() < noise
        preference = 3 - better if mislabelled else better
        rows.append(row | dict(output_1=output_1, output_2=output_2, preference=preference))
    return rows


def write_probe(questions, rng):
    """Rows of probe.jsonl: one prefix, and how the answer goes on: better, or worse by one flaw.
    Empty: the answer ends there. `kind` names the flaw of the worse one."""
    rows = []
    for question in questions:
        number, category, world = read_prompt(question)
        right_items = world.categories[category]
        lines = rng.sample(right_items, number)
        at = rng.randrange(number)  # a line in the middle of the answer
        begun = "".join(f"{line}\n" for line in lines[:at])
        but_one = "".join(f"{line}\n" for line in lines[:-1])
        all_items = "\n".join(lines)
        wrong_item = rng.choice(sorted(items_of(world) - set(right_items)))
        extra_item = rng.choice([item for item in right_items if item not in lines])

        rows += [
            question | dict(kind="wrong item", prefix=begun, better=lines[at], worse=wrong_item),
            question | dict(kind="rude aside", prefix=begun, better=lines[at],
                            worse=rng.choice(RUDE)),
            question | dict(kind="closing one item early", prefix=but_one, better=lines[-1],
                            worse=CLOSING),
            question | dict(kind="no closing", prefix=all_items, better=f"\n{CLOSING}", worse=""),
            question | dict(kind="one item too many", prefix=f"{all_items}\n", better=CLOSING,
                            worse=extra_item),
            question | dict(kind="more after the closing", prefix=f"{all_items}\n{CLOSING}",
                            better="", worse=f"\n{CLOSING}"),
        ]
    return rows


# ---------------------------------------------------------------- the tokenizer and the tiny Llama

def train_tokenizer(world, vocab_size):
    """A SentencePiece BPE -> the bytes of its tokenizer.model

    It learns from the two halves of the prompt template, the parts of instructions and the lines of
    answers, each as a text of its own. Pieces may cross spaces: the template takes three tokens, a
    line of an answer one. No piece crosses lines: an edited line is an edited token. Decoding
    returns every text exactly, except U+2581, which is SentencePiece's own mark for a space."""
    import sentencepiece
    template = PROMPT.split("{instruction}")
    words = [f" {word}" for word in [*world.numbers, *world.categories]]
    instructions = VERBS + words + OCCASIONS[1:]
    answers = sorted(items_of(world)) + RUDE + HARMLESS + [CLOSING]
    sentences = template + instructions + answers + ["."]
    exact_text = dict(normalization_rule_name="identity", remove_extra_whitespaces=False,
                      add_dummy_prefix=False, byte_fallback=True, character_coverage=1.0)
    long_pieces = dict(split_by_whitespace=False, split_by_unicode_script=False,
                       split_by_number=False, max_sentencepiece_length=128)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model,
            model_type="bpe", vocab_size=vocab_size, **exact_text, **long_pieces,
            num_threads=1, minloglevel=2)
    except RuntimeError as error:
        reason = str(error).split("] ")[-1]
        fail(f"--vocab_size={vocab_size} does not fit the words of the toy world: {reason}")
    return model.getvalue()


def write_model(folder, sentencepiece_model, cfg):
    """A Hugging Face folder: the tokenizer and a Llama's config, no weights (sft.py draws them)"""
    from transformers import AutoTokenizer, LlamaConfig
    temporary = folder.with_suffix(".tmp")  # renamed at the end: a folder is never half-written
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    (temporary / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = AutoTokenizer.from_pretrained(temporary)
    tokenizer.save_pretrained(temporary)

    # With tied embeddings, or with the usual initializer_range of 0.02, it learns much later.
    size = dict(hidden_size=cfg.hidden_size, intermediate_size=cfg.hidden_size * 11 // 4,
                num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads)
    config = LlamaConfig(
        vocab_size=len(tokenizer), **size, max_position_embeddings=256,
        tie_word_embeddings=False, initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"])
    config.save_pretrained(temporary)

    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# ---------------------------------------------------------------- the files

def all_prompts(world):
    prompts = []
    for verb, number, category, occasion in product(VERBS, world.numbers, CATEGORIES, OCCASIONS):
        instruction = f"{verb} {number} {category}{occasion}."
        prompts.append(dict(instruction=instruction, input=""))
    return prompts


def check_sizes(cfg, prompt_count):
    """One line for a user's impossible numbers, before anything is written"""
    check_numbers(cfg, sft_rows=COUNT, pref_rows=COUNT, heldout_rows=COUNT, prompt_rows=COUNT,
                  val_rows=COUNT, eval_rows=COUNT, label_noise=SHARE, flaws=ABOVE_0,
                  reference_flaws=AT_LEAST_0, vocab_size=COUNT, hidden_size=COUNT, layers=COUNT,
                  heads=COUNT, seed=ANY)
    prompt_rows = 1 if cfg.prompt_rows is None else cfg.prompt_rows
    used = cfg.eval_rows + cfg.val_rows + prompt_rows
    if used > prompt_count:
        fail(f"eval_rows + val_rows + prompt_rows = {used}, "
             f"but the toy world has only {prompt_count} prompts")
    if cfg.hidden_size % (2 * cfg.heads):
        fail(f"--hidden_size={cfg.hidden_size} must be an even multiple of --heads={cfg.heads}")


def main(cfg):
    world = WORLDS[cfg.items]
    prompts = all_prompts(world)
    check_sizes(cfg, len(prompts))
    sentencepiece_model = train_tokenizer(world, cfg.vocab_size or world.vocab_size)
    if begin(cfg, "prepare", paid=True, beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")

    # Three sets of prompts that share none: eval, val, and the rest to train on.
    rng = random.Random(f"toy world {cfg.seed}")
    rng.shuffle(prompts)
    val_end = cfg.eval_rows + cfg.val_rows
    held_out = prompts[:cfg.eval_rows]
    val = prompts[cfg.eval_rows:val_end]
    prompts = prompts[val_end:]

    def demonstration(row):
        return row | dict(output=write_answer(row, mixed_quality(cfg, rng), rng, cfg.flaws_per))

    def reference(row):
        answer = write_answer(row, cfg.reference_flaws, rng, cfg.flaws_per)
        return row | dict(output=answer, generator="reference", dataset="toy")

    # All rows come from one stream of random numbers: the order of these lines fixes the data.
    sft = [demonstration(row) for row in rng.choices(prompts, k=cfg.sft_rows)]
    pref = write_pairs(prompts, cfg.pref_rows, cfg, rng, noise=cfg.label_noise, draws=True)
    pref_heldout = write_pairs(held_out, cfg.heldout_rows, cfg, rng, noise=0.0, draws=False)
    val_references = [reference(row) for row in val]
    eval_references = [reference(row) for row in held_out]

    out = Path(cfg.out)
    write_jsonl(out / "sft.jsonl", sft)
    write_jsonl(out / "pref.jsonl", pref)
    write_jsonl(out / "pref_heldout.jsonl", pref_heldout)
    write_jsonl(out / "prompts.jsonl", prompts[:cfg.prompt_rows])
    write_jsonl(out / "val.jsonl", val_references)
    write_jsonl(out / "eval.jsonl", eval_references)
    write_jsonl(out / "probe.jsonl", write_probe(held_out, random.Random(f"probe {cfg.seed}")))
    write_model(out / "model", sentencepiece_model, cfg)
    finish(cfg)
    say(f"{cfg.out}: {len(prompts)} prompts to train on, {len(val)} to choose a checkpoint on, "
        f"{len(held_out)} for the evaluation; next: python sft.py --model={cfg.out}/model "
        f"--data={cfg.out}/sft.jsonl")


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
