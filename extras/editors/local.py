"""edit.py --editor=local: the same requests to any Hugging Face chat model, for private data"""
if __name__ == "__main__":
    raise SystemExit("local.py is a part of: python edit.py --editor=local")

import torch

from common import end_ids, generate, load_model, load_tokenizer, row_uniforms, setup
from plumbing.claude import Reply


def chat_ids(request, tokenizer):
    """The ids of a request's turns. If the last turn is the assistant's, the model continues it."""
    turns = request["messages"]
    if "system" in request:
        turns = [{"role": "system", "content": request["system"]}, *turns]
    begun = turns[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(turns, add_generation_prompt=not begun,
                                         continue_final_message=begun, return_dict=False)


def holds_special_token(request, tokenizer):
    """Does a turn contain, say, "<|im_end|>"? The model would take it for the end of the turn."""
    special = getattr(tokenizer, "special_texts", None)  # None: it is no chat template's
    return special and any(special.search(turn["content"]) for turn in request["messages"])


def ask_local(requests, stop, *, path, batch, seed, temperature):
    """requests: key -> arguments as for Claude's messages.create. Yields (key, Reply), short
    prompts first, until the event `stop` is set.

    temperature 0 is greedy. Otherwise each row has random numbers of its own, from seed and key."""
    device, _, dtype = setup()
    tokenizer = load_tokenizer(path)
    model = load_model(path, device, None, dtype, frozen=True)

    # A prompt that the model would misread, or that leaves no room for a reply, is an error of its
    # row.
    prompts = {}
    positions = model.config.max_position_embeddings
    for key, request in requests.items():
        ids = chat_ids(request, tokenizer)
        if holds_special_token(request, tokenizer):
            yield key, Reply(error="its text holds a special token of the model")
        elif len(ids) >= positions:
            yield key, Reply(
                error=f"the prompt's {len(ids)} tokens fill the model's {positions} positions")
        else:
            prompts[key] = ids

    order = sorted(prompts, key=lambda key: len(prompts[key]))
    for start in range(0, len(order), batch):
        if stop.is_set():
            return
        keys = order[start:start + batch]
        P = len(prompts[keys[-1]])  # the longest prompt of the batch
        T = min(max(requests[key]["max_tokens"] for key in keys), positions - P)

        # Left-padded prompts, as generate() wants them.
        padded = [[0] * (P - len(prompts[key])) + prompts[key] for key in keys]
        lengths = torch.tensor([[len(prompts[key])] for key in keys], device=device)  # [B, 1]
        prompt_ids = torch.tensor(padded, device=device)                              # [B, P]
        prompt_mask = torch.arange(P, device=device) >= P - lengths                   # [B, P]
        uniforms = torch.stack([row_uniforms(T, seed, key) for key in keys])          # [B, T]
        response_ids, response_mask = generate(                                       # [B, T] each
            model, prompt_ids, prompt_mask, max_new_tokens=T, eos_id=end_ids(tokenizer),
            temperature=temperature, uniforms=uniforms)

        # The text of a reply does not include EOS, its usage does.
        for key, ids, length in zip(keys, response_ids.tolist(), response_mask.sum(1).tolist()):
            ended = ids[length - 1] in end_ids(tokenizer)
            text = tokenizer.decode(ids[:length - 1] if ended else ids[:length])
            stop_reason = "end_turn" if ended else "max_tokens"
            usage = {"input_tokens": len(prompts[key]), "output_tokens": length}
            yield key, Reply(text, stop_reason, usage)
