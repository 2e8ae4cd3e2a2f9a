"""The text of each token of a response, for pictures and lists of tokens"""
if __name__ == "__main__":
    raise SystemExit("tokens.py is a part of: python reward_model.py show")

from common import decode_response


def token_texts(tokenizer, ids):
    """The text of each token; joined, the response. A character goes to its last token."""
    texts = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = decode_response(tokenizer, [*ids[:end], tokenizer.eos_token_id])
        complete = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(done):] if complete else "")
        done = text if complete else done
    return texts
