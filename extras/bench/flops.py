"""The floor of a step: the floating-point operations of its real tokens, over the machine's rate.

Counted are the matrix products of a Llama; norms, softmax, sampling and Adam are not. A backward
costs twice its forward. No recomputation, no padding, and logits only where a response token is
predicted."""
import time


def forward_flops(size, lengths, logits=0):
    """Of rows of these lengths through the layers, and of so many rows of logits"""
    head_dim = size.hidden // size.heads
    kv = 2 * size.kv_heads * head_dim
    weights = size.hidden * (2 * size.hidden + kv + 3 * size.intermediate)  # of a layer
    tokens = sum(lengths)
    pairs = sum(length * (length + 1) // 2 for length in lengths)  # a token and one that it sees
    layers = size.layers * (2 * weights * tokens + 4 * size.hidden * pairs)
    return layers + 2 * size.hidden * size.vocabulary * logits


def ppo_flops(size, prompt, responses, epochs=2):
    """{phase: operations} of a PPO step. responses: their lengths"""
    tokens = sum(responses)
    rows = [prompt + length for length in responses]
    with_logits = forward_flops(size, rows, logits=tokens)
    without = forward_flops(size, rows)
    # The last token of a response is drawn, but not read by the policy.
    decode = forward_flops(size, [length - 1 for length in rows], logits=tokens)
    return dict(rollout=decode, score=2 * (with_logits + without),
                update=3 * epochs * (with_logits + without))


def matmul_rate(dtype, device="cpu", n=1024, seconds=0.4):
    """The most operations per second that this machine does in a product of two [n, n]"""
    import torch
    left = torch.randn(n, n).to(device, getattr(torch, dtype))
    right = torch.randn(n, n).to(device, getattr(torch, dtype))
    least = float("inf")
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        start = time.perf_counter()
        (left @ right).sum().item()  # .item() waits for a GPU
        least = min(least, time.perf_counter() - start)
    return 2 * n ** 3 / least
