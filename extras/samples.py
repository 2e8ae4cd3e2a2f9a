"""samples.jsonl of a ppo.py run: some responses with their rewards"""
if __name__ == "__main__":
    raise SystemExit("samples.py is a part of: python ppo.py")

import json
from pathlib import Path

from common import decode_response
from extras.tokens import token_texts
from plumbing.paint import paint
from plumbing.ranks import RANK, say


def save_samples(out, tokenizer, step, rows, responses, r, R):
    """Add a step's first three responses to samples.jsonl, and print the first, painted by its r_t
    (rank 0). rows: their rows in the data; r [rows, T], R [rows]"""
    if RANK > 0:
        return
    samples = []
    for row, ids, token_rewards, reward in zip(rows[:3], responses, r, R):
        sample = dict(step=step, instruction=row["instruction"], input=row.get("input") or "")
        sample |= dict(output=decode_response(tokenizer, ids), tokens=token_texts(tokenizer, ids))
        sample |= dict(token_rewards=token_rewards[:len(ids)].tolist(), reward=reward.item())
        samples.append(sample)
    with open(Path(out, "samples.jsonl"), "a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample) + "\n")

    first = samples[0]
    scale = max(map(abs, first["token_rewards"])) or 1.0  # of the deepest red or green
    say(f"R = {first['reward']:+.3f} for {json.dumps(first['instruction'])[:80]}:",
        paint(first["tokens"], first["token_rewards"], scale))
