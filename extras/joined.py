"""A forward without padding, for common.py: the rows of a micro-batch lie end to end in one row.

    ids         p q r a b   s t c   u a b c d      three rows of 5, 3 and 5 tokens
    positions   0 1 2 3 4   0 1 2   0 1 2 3 4

Everything but the attention treats each token alone, so nothing changes for it. The attention is
computed row by row, and for neighbours of one length at once. So the results are those of padded
rows, except for float noise. Logits are computed where a response token is predicted, and nowhere
else. Without this file, or where it is not exact, common.py computes padded rows.
"""
import itertools

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


PROBED = {}  # class of a model -> does it hand row_lengths to the attention of every layer?
ATTENDED = set()  # the layers whose attention has got row_lengths


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
    """Does row_lengths reach the attention of every layer? StableLM, for one, drops it. One token
    shows it. All ranks."""
    ATTENDED.clear()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    run(model, token, token, [1])
    return len(ATTENDED) == model.config.get_text_config().num_hidden_layers


def run(model, ids, positions, row_lengths, **options):
    """The model on rows that lie end to end, ids and positions [1, tokens] -> [tokens, V or 1]"""
    # transformers passes a mask of four dimensions on as it is. attend() needs none.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                 row_lengths=row_lengths, **options).logits[0]


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


def attend(module, query, key, value, attention_mask, *, row_lengths=None, **options):
    """transformers' sdpa attention -> [B, S, heads, size], None. With row_lengths: query, key and
    value [1, heads, tokens, size] are rows end to end, and so is the result [1, tokens, ...]."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    ATTENDED.add(id(module))
    # Neighbours of one length are a batch [B, heads, S, size] without padding, which needs no mask.
    # split() and unflatten() make no copies.
    runs = [list(run) for _, run in itertools.groupby(row_lengths)]
    splits = [x.split([sum(run) for run in runs], dim=2) for x in (query, key, value)]
    options["is_causal"] = True
    outputs = []
    for run, *parts in zip(runs, *splits):
        rows = [x[0].unflatten(1, (len(run), run[0])).transpose(0, 1) for x in parts]
        output, _ = sdpa_attention_forward(module, *rows, None, **options)  # [B, S, heads, size]
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register("sdpa", attend)
