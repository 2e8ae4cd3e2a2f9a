"""Claude's replies to the judge's requests, none lost or paid for twice; by edit.py's client, which bounds waits"""
import json
from collections import Counter
from pathlib import Path

from common import fail, say, write_jsonl
from extras.runs import logged, progress
from edit import ask_claude, dollars, stopping
from evaluate import parse_verdict


def ask_judge(cfg, requests):
    """requests: (pair, output shown first) -> arguments of messages.create. -> replies and errors by the same keys.

    Each reply is on disk (<out>.replies) as soon as it is there: a run that was killed asks only for what is missing.
    What cannot be read is asked up to three times, and again by the next run."""
    log, usage = Path(f"{cfg.out}.replies"), Counter(input_tokens=0, output_tokens=0)
    if cfg.overwrite:
        for rest in (".replies", ".batches"):
            Path(cfg.out + rest).unlink(missing_ok=True)
    batches = Path(f"{cfg.out}.batches")
    if not cfg.batch_api and batches.exists() and any(batch["keys"] for batch in json.loads(batches.read_text())):
        fail(f"{cfg.out}: the Batches API has some of it, paid for: go on with --batch_api=true "
             f"(or remove {cfg.out}.batches)")
    kept = logged(log) or [dict(case=[i, first], reply=reply) for i, row in enumerate(logged(cfg.out))
                           for first, reply in zip(row["shown_first"], row["verdicts"])]
    write_jsonl(log, kept)  # without a line that a kill has torn
    replies, errors, hopeless = {tuple(row["case"]): row["reply"] for row in kept}, {}, set()
    with stopping() as stop, open(log, "a", encoding="utf-8") as file:
        for _ in range(3):
            asked = {f"{i}-{first}": (i, first) for i, first in requests
                     if (i, first) not in hopeless and parse_verdict(replies.get((i, first))) is None}
            if not asked or stop.is_set():
                break
            with progress(list(asked), "judge", len(requests)) as bar:
                todo = {key: requests[case] for key, case in asked.items()}
                for key, reply in ask_claude(todo, stop, concurrency=cfg.concurrency,
                                             batches=batches if cfg.batch_api else None):
                    case = asked[key]
                    replies[case], errors[case] = reply.text, reply.error or f"no verdict ({reply.stop_reason})"
                    if parse_verdict(reply.text) is not None:
                        del errors[case]
                    elif reply.stop_reason == "refusal" or reply.error and not reply.again:
                        hopeless.add(case)
                    usage.update(reply.usage or {})
                    file.write(json.dumps(dict(case=case, reply=reply.text)) + "\n")
                    file.flush()
                    bar.update()
    if stop.is_set():
        say(f"stopped; the replies are in {log}, the same command goes on")
        raise SystemExit(130)
    cost = dollars(cfg.model, usage, cfg.batch_api)
    say(f"{usage['input_tokens']:,} tokens in, {usage['output_tokens']:,} out, "
        f"{'unknown' if cost is None else f'{cost:.2f}'} dollars")
    return replies, errors
