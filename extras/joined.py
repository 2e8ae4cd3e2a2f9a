"""A forward without padding, for common.py: the rows of a micro-batch lie end to end in one row.

    ids         p q r a b   s t c   u a b c d      three rows of 5, 3 and 5 tokens
    positions   0 1 2 3 4   0 1 2   0 1 2 3 4

Everything but the attention treats each token alone, so nothing changes for it. The attention alone
pads the rows, at their ends: there no real token sees the padding. So the results are those of
padded rows, except for float noise. Logits are computed where a response token is predicted, and
nowhere else. Without this file, or where it is not exact, common.py computes padded rows.
"""
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


PROBED = {}  # class of a model -> does it hand slots and grid to the attention of every layer?
ATTENDED = set()  # the layers whose attention has got them


def is_exact(model):
    """Only with full attention in every layer, computed by torch's sdpa. A sliding window is a mask
    of its own, which ours would replace. sdpa has no soft-capping. All ranks."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    if any(layer_type != "full_attention" for layer_type in layer_types):
        return False
    if getattr(config, "sliding_window", None) is not None:
        return False
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    if config._attn_implementation != "sdpa":
        return False
    if type(model) not in PROBED:
        PROBED[type(model)] = hands_on(model)
    return PROBED[type(model)]


@torch.no_grad()
def hands_on(model):
    """Do slots and grid reach the attention of every layer? StableLM, for one, drops them. One
    token shows it. All ranks."""
    ATTENDED.clear()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    run(model, token, token, [1])
    return len(ATTENDED) == model.config.get_text_config().num_hidden_layers


def run(model, ids, positions, row_lengths, **options):
    """The model on rows that lie end to end, ids and positions [1, tokens] -> [tokens, V or 1]"""
    # A row's tokens get the first slots of its line in a grid of B lines and S columns.
    B, S = len(row_lengths), max(row_lengths)
    slots = [torch.arange(length) + row * S for row, length in enumerate(row_lengths)]
    slots = torch.cat(slots).to(ids.device)  # [tokens]

    # transformers passes a mask of four dimensions on as it is. attend() needs none.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                 slots=slots, grid=(B, S), **options).logits[0]


def forward(model, ids, mask, read):
    """The outputs of left-padded rows [B, S] at the tokens where read [B, S] is True, row by row:
    [tokens, V] or [tokens, 1]"""
    positions = mask.long().cumsum(1) - 1                           # [B, S]
    read = read[mask].nonzero()[:, 0]                               # [tokens]
    is_head = hasattr(model, "score")  # one number per token: all of them cost next to nothing
    keep = {} if is_head else dict(logits_to_keep=read)
    lengths = mask.sum(1).tolist()
    outputs = run(model, ids[mask][None], positions[mask][None], lengths, **keep)
    return outputs[read] if is_head else outputs


def attention_dtype(x):
    """The dtype to attend in. On a CPU the backward of attention takes twice as long in bfloat16 as
    in float32."""
    return torch.promote_types(x.dtype, torch.float32) if x.is_cpu else x.dtype


def attend(module, query, key, value, attention_mask, *, slots=None, grid=None, **options):
    """transformers' sdpa attention -> [B, S, heads, size], None. With slots and grid: query, key
    and value [1, heads, tokens, size] are rows end to end; so is the result [1, tokens, ...]."""
    if slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    ATTENDED.add(id(module))

    # The padding is behind each row, so a causal attention needs no mask to leave it out.
    padded = []
    dtype = attention_dtype(query)
    for x in (query, key, value):
        rows = x.new_zeros(x.shape[1], grid[0] * grid[1], x.shape[3], dtype=dtype)
        rows = rows.index_copy(1, slots, x[0].to(dtype))               # [heads, B * S, size]
        padded.append(rows.unflatten(1, grid).transpose(0, 1))         # [B, heads, S, size]
    options["is_causal"] = True
    output, _ = sdpa_attention_forward(module, *padded, None, **options)  # [B, S, heads, size]
    output = output.flatten(0, 1)[slots].to(query.dtype)               # [tokens, heads, size]
    return output[None], None


AttentionInterface.register("sdpa", attend)
