"""What gamma means for token rewards: exact gradients of a tiny policy, over all its responses.

r_t from pairs is known only up to a function of the state, b(s): in Eq. 4 it cancels where both
answers are in the same state. At gamma 0 such a b(s) does not change the expected gradient. At
gamma 1 it is summed over time, and a positive b lengthens the responses."""
import itertools

import torch

from common import last_token
from ppo import gae, policy_loss, whiten

EOS, TOKENS, LONGEST = 0, 3, 3


def all_responses():
    """Every response of 1 to 3 tokens: it ends with EOS, or at the length limit -> ids, mask"""
    found = []
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(TOKENS), repeat=length):
            ended = ids[-1] == EOS or length == LONGEST
            if ended and EOS not in ids[:-1]:
                found.append(ids)
    ids = torch.tensor([[*row, *[0] * (LONGEST - len(row))] for row in found])             # [B, T]
    lengths = torch.tensor([[len(row)] for row in found])
    return ids, torch.arange(LONGEST) < lengths


def states_of(ids):
    """The number of the state s_t, one for each prefix: that of no token is 0, [B, T]"""
    states = torch.zeros_like(ids)
    for t in range(1, ids.shape[1]):
        states[:, t] = states[:, t - 1] * TOKENS + ids[:, t - 1] + 1
    return states


IDS, MASK = all_responses()
STATES = states_of(IDS)
N_STATES = int(STATES.max()) + 1


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


R = draw(1, N_STATES, TOKENS)  # r(s, a)
V = draw(2, N_STATES)          # a fixed V(s)
LOGITS = draw(3, N_STATES, TOKENS)
NOTHING = torch.zeros(N_STATES, dtype=torch.float64)


def advantages_of(rows, b, gamma, lam=0.7):
    rewards = R[STATES[rows], IDS[rows]] + b[STATES[rows]]
    return gae(rewards, V[STATES[rows]], MASK[rows], gamma=gamma, lam=lam)[0]


def gradient(logits, rows, advantages, row_weights):
    """Of sum over rows of weight * sum over tokens of policy_loss, at pi = pi_old -> [states, V]"""
    logits = logits.clone().requires_grad_()
    log_pi = torch.log_softmax(logits, -1)[STATES[rows], IDS[rows]]                        # [B, T]
    losses = policy_loss(log_pi, log_pi.detach(), advantages, MASK[rows], clip=0.2)
    (losses.sum(1) * row_weights).sum().backward()
    return logits.grad


def probabilities(logits):
    log_pi = torch.log_softmax(logits, -1)[STATES, IDS]
    return log_pi.masked_fill(~MASK, 0).sum(1).exp()                                       # [B]


def expected_gradient(b, gamma):
    rows = list(range(len(IDS)))
    advantages = advantages_of(rows, b, gamma)
    return gradient(LOGITS, rows, advantages, probabilities(LOGITS))


def test_all_responses_are_there():
    assert len(IDS) == 1 + 2 + 4 * 3
    assert abs(probabilities(LOGITS).sum().item() - 1) < 1e-12
    assert last_token(MASK).sum() == len(IDS)


def test_at_gamma_0_a_function_of_the_state_changes_nothing():
    plain = expected_gradient(NOTHING, gamma=0.0)
    for seed in (4, 5):
        with_b = expected_gradient(10 * draw(seed, N_STATES), gamma=0.0)
        assert (with_b - plain).abs().max() < 1e-12
    assert plain.abs().max() > 0.01

    # The formula itself, without gae() and policy_loss(): - P(s) pi(a|s) (A - sum_a pi A).
    pi = torch.softmax(LOGITS, -1)
    A = R - V[:, None]
    visits = torch.zeros(N_STATES, dtype=torch.float64)
    visits[0] = 1
    for state in range(N_STATES):
        for token in range(1, TOKENS):  # EOS ends
            after = state * TOKENS + token + 1
            if after < N_STATES:
                visits[after] = visits[state] * pi[state, token]
    expected = -visits[:, None] * pi * (A - (pi * A).sum(1, keepdim=True))
    assert (plain - expected).abs().max() < 1e-12


def test_at_gamma_1_a_constant_lengthens_the_responses():
    one = torch.ones(N_STATES, dtype=torch.float64)
    change = expected_gradient(one, gamma=1.0) - expected_gradient(NOTHING, gamma=1.0)
    step = -change  # gradient descent
    pi = torch.softmax(LOGITS, -1)
    log_eos_change = step[:, EOS] - (pi * step).sum(1)  # of log pi(EOS | s), per unit of step

    # Before the last position EOS gives up the rewards to come; at the limit it gives up nothing.
    reached = STATES[MASK].unique()
    for state in reached.tolist():
        if state < 1 + TOKENS:
            assert log_eos_change[state] < -1e-3, state
        else:
            assert abs(log_eos_change[state]) < 1e-12, state


# ---------------------------------------------------------------- what ppo.py adds

UNIFORM = torch.zeros(N_STATES, TOKENS, dtype=torch.float64)


def mean_gradient(batches, b, *, whitened):
    """The mean over batches [N, B] of the gradient of the mean loss per token, at gamma 0, under a
    uniform policy: autograd's result in closed form -> [states, V]"""
    ids = IDS[batches]                                                                  # [N, B, T]
    states = STATES[batches]
    mask = MASK[batches].double()
    A = (R[states, ids] + b[states] - V[states]) * mask
    tokens = mask.sum((1, 2), keepdim=True)
    if whitened:
        mean = A.sum((1, 2), keepdim=True) / tokens
        centred = (A - mean) * mask
        std = (centred.square().sum((1, 2), keepdim=True) / tokens).sqrt()
        A = torch.where(std < 1e-8, A, centred / std)  # as whiten() does
    A = A / tokens / len(batches)

    # d log pi(a|s) / d logits(s) is onehot(a) - pi.
    taken = torch.zeros(N_STATES * TOKENS, dtype=torch.float64)
    taken.index_add_(0, (states * TOKENS + ids).flatten(), A.flatten())
    in_state = torch.zeros(N_STATES, dtype=torch.float64)
    in_state.index_add_(0, states.flatten(), A.flatten())
    return in_state[:, None] / TOKENS - taken.view(N_STATES, TOKENS)


def test_the_closed_form_is_ppos():
    batch = torch.tensor([0, 3, 5, 8, 11])
    b = draw(4, N_STATES)
    advantages = whiten(advantages_of(batch.tolist(), b, gamma=0.0), MASK[batch])
    weights = torch.full((5,), 1 / int(MASK[batch].sum()), dtype=torch.float64)
    expected = gradient(UNIFORM, batch.tolist(), advantages, weights)
    assert (mean_gradient(batch[None], b, whitened=True) - expected).abs().max() < 1e-12


def test_what_whitening_and_the_token_mean_add():
    """ppo.py whitens the advantages of a rollout batch and divides by its tokens. Both depend on
    the drawn responses, so b(s) is felt even at gamma 0: the less, the larger the batch. Measured
    with a b(s) as large as r: its part in the direction of the expected gradient, 1 - cosine, falls
    from a few percent at 8 responses to a ten-thousandth at 128. What stays is the scale: whitening
    divides by a standard deviation that holds b(s)."""
    b = draw(4, N_STATES)
    generator = torch.Generator().manual_seed(0)
    share = probabilities(UNIFORM)
    turned = {}
    for size in (8, 32, 128):
        drawn = torch.multinomial(share, 800_000, replacement=True, generator=generator)
        batches = drawn.view(-1, size)
        for whitened in (False, True):
            plain = mean_gradient(batches, NOTHING, whitened=whitened)
            with_b = mean_gradient(batches, b, whitened=whitened)
            turned[size, whitened] = 1 - cosine(plain, with_b)
            shrunk = with_b.norm().item() / plain.norm().item()
            if size == 128:  # the token mean keeps the scale, whitening does not
                assert 0.35 < shrunk < 0.55 if whitened else 0.95 < shrunk < 1.05, shrunk
    print("1 - cosine at (responses, whitened):", turned)
    for whitened in (False, True):
        assert turned[8, whitened] > 3e-3
        assert turned[32, whitened] < 5e-3
        assert turned[128, whitened] < 1e-3


def cosine(a, b):
    return (a * b).sum().item() / (a.norm().item() * b.norm().item())
