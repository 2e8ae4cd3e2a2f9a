"""edit.py --editor=local: the same requests to any Hugging Face chat model, for data that must not leave the machine"""
import torch

from common import generate, load_model, load_tokenizer, row_uniforms, setup
from plumbing.claude import Reply


def ask_local(requests, stop, *, path, batch, seed, temperature):
    """requests: key -> arguments as for Claude's messages.create. Yields (key, Reply), short prompts first.

    A trailing assistant turn is continued. temperature 0 is greedy; else each row has draws of its own."""
    device, _, dtype = setup()
    tokenizer, model, prompts = load_tokenizer(path), load_model(path, device, None, dtype, frozen=True), {}
    for key, request in requests.items():
        turns = request["messages"]
        if "system" in request:
            turns = [{"role": "system", "content": request["system"]}, *turns]
        begun = turns[-1]["role"] == "assistant"
        prompts[key] = tokenizer.apply_chat_template(turns, add_generation_prompt=not begun,
                                                     continue_final_message=begun, return_dict=False)
    positions = model.config.max_position_embeddings
    for key in [key for key in prompts if len(prompts[key]) >= positions]:
        yield key, Reply(error=f"the prompt's {len(prompts.pop(key))} tokens fill the model's {positions} positions")
    order = sorted(prompts, key=lambda key: len(prompts[key]))
    for start in range(0, len(order), batch):
        if stop.is_set():
            return
        keys = order[start:start + batch]
        P = len(prompts[keys[-1]])
        T = min(max(requests[key]["max_tokens"] for key in keys), positions - P)
        lengths = torch.tensor([[len(prompts[key])] for key in keys], device=device)
        ids = torch.tensor([[0] * (P - len(prompts[key])) + prompts[key] for key in keys], device=device)       # [B, P]
        out, mask = generate(model, ids, torch.arange(P, device=device) >= P - lengths, max_new_tokens=T,
                             eos_id=tokenizer.eos_token_id, temperature=temperature,
                             uniforms=torch.stack([row_uniforms(T, seed, key) for key in keys]))                # [B, T]
        for key, row, length in zip(keys, out.tolist(), mask.sum(1).tolist()):
            ended = row[length - 1] == tokenizer.eos_token_id
            yield key, Reply(tokenizer.decode(row[:length - ended]), "end_turn" if ended else "max_tokens",
                             {"input_tokens": len(prompts[key]), "output_tokens": length})
