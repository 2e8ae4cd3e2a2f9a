"""What bench.py trains on: Llamas with random weights, prompts of random tokens, lengths of
responses. Nothing is downloaded.

A: hidden 256, 6 layers, vocabulary 4,096, 64 responses a step. B: the width of SmolLM2-135M (576,
vocabulary 49,152), 10 layers, 16 responses a step. Prompts have 32 tokens, responses up to 64.
"""
import json, math, random
from dataclasses import dataclass
from pathlib import Path

PROMPT, RESPONSE = 32, 64  # tokens
PROMPTS = 1024  # rows of prompts.jsonl


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int           # responses a step; half of them are an optimizer batch
    micro_batch: int    # rows per forward of the update


SIZES = {
    "tiny": Size(32, 88, 2, 2, 1, 300, 16, 4),  # for the tests
    "A": Size(256, 688, 6, 4, 4, 4096, 64, 16),
    "B": Size(576, 1536, 10, 9, 3, 49152, 16, 8),
    "135M": Size(576, 1536, 30, 9, 3, 49152, 256, 16),  # SmolLM2's and Llama 3.2's, for gpu.sh
    "1B": Size(2048, 8192, 16, 32, 8, 128256, 128, 8)}


def response_lengths(kind, n):
    """The lengths of n responses. full: all have 64 tokens. natural: most are short and a few are
    cut at 64, as many as an exponential distribution has, in a random order (always the same)"""
    if kind == "full":
        return [RESPONSE] * n
    lengths = []
    for k in range(n):
        length = round(-28 * math.log(1 - (k + 0.5) / n))
        lengths.append(min(max(length, 2), RESPONSE))
    random.Random(0).shuffle(lengths)
    return lengths


def random_ids(seed, length, vocabulary):
    """Ids of ordinary tokens; the last id is EOS, and never among them"""
    rng = random.Random(seed)
    return [rng.randrange(3, vocabulary - 1) for _ in range(length)]


def as_text(ids):
    """A row holds ids as text; the children read it instead of tokenizing"""
    return " ".join(map(str, ids))


def make(folder, size, kind):
    """Write policy/, rm/ (one number per token), prompts.jsonl, sft.jsonl and pref.jsonl, once"""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification,
                              PreTrainedTokenizerFast)

    folder = Path(folder)
    if (folder / "pref.jsonl").exists():
        return

    # A tokenizer of bytes, and as many words that no text has. EOS is the last id.
    V = size.vocabulary
    names = ["<s>", "<pad>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"word{i}" for i in range(len(names), V - 1)]
    words = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", pad_token="<pad>",
                                        eos_token="</s>")
    assert tokenizer.eos_token_id == V - 1 and len(tokenizer) == V

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, tie_word_embeddings=True, num_labels=1,
        token_classification_bias=False, classifier_dropout=0.0, max_position_embeddings=512,
        bos_token_id=0, pad_token_id=1, eos_token_id=V - 1)
    for name, Model in (("policy", LlamaForCausalLM), ("rm", LlamaForTokenClassification)):
        Model(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    # Rows of sft.py and pairs of reward_model.py: exactly a batch, so every step has these lengths.
    lengths = response_lengths(kind, size.rows)
    half = size.rows // 2
    prompts = []
    for k in range(PROMPTS):
        prompts.append(dict(instruction=as_text(random_ids(k, PROMPT, V)), input=""))
    answers = []
    for k, length in enumerate(lengths):
        answers.append(as_text(random_ids(f"answer {k}", length - 1, V)))  # EOS follows
    sft = [row | dict(output=answer) for row, answer in zip(prompts, answers)]
    pref = []
    for row, answer, other in zip(prompts, answers[:half], answers[half:]):
        pref.append(row | dict(output_1=answer, output_2=other, preference=1))
    for name, rows in dict(prompts=prompts, sft=sft, pref=pref).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
