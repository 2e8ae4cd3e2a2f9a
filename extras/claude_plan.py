"""--dry_run=true of edit.py and evaluate.py judge: requests, tokens and dollars before anything is asked"""
import re

from common import say
from diff import plain
from edit import PRICES, claude_client, dollars, why


def show_plan(requests, answers, *, batch=False):
    """Dry run: requests, tokens, dollars, the first prompt. answers: texts as long as the replies will be"""
    first, client, step = requests[0], claude_client(), -(-len(requests) // 100)
    lengths = [sum(len(turn["content"]) for turn in request["messages"]) for request in requests]
    tokens, how = sum(lengths) / 4 + len(requests) * len(first.get("system", "")) / 4, "estimated at 4 characters each"
    if client:
        import anthropic
        try:
            counts = [client.messages.count_tokens(**{name: request[name] for name in request if name != "max_tokens"})
                      .input_tokens for request in requests[::step]]
            tokens = sum(counts) * sum(lengths) / sum(lengths[::step])
            how = "the API's count" + (f" of {len(counts)} requests, scaled by length" if step > 1 else "")
        except (anthropic.APIError, ValueError, AttributeError, TypeError) as error:
            how += f"; the API would not count: {why(error)}"
    usage = {"input_tokens": round(tokens), "output_tokens": sum(map(len, answers)) // 4}
    cost, price = dollars(first["model"], usage, batch), PRICES.get(re.sub(r"-20\d{6}$", "", first["model"]))
    say(f"requests       {len(requests):,} to {first['model']}{' by the Batches API' if batch else ''}\n"
        f"input tokens   {usage['input_tokens']:,} ({how})\n"
        f"output tokens  {usage['output_tokens']:,} (estimated: answers as long as now; thinking comes on top)")
    say(f"dollars        unknown: {first['model']} is not in the price table of edit.py" if cost is None else
        f"dollars        {cost:,.2f} (${price[0]} and ${price[1]} per million tokens in and out, as of {price[2]}"
        f"{'; half of that in batches' if batch else ''})")
    for turn in [{"role": "system", "content": first.get("system")}, *first["messages"]]:
        say(f"\n--- first prompt, {turn['role']}:\n{plain(turn['content'])}" if turn["content"] else "")
