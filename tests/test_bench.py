"""extras/bench: what it counts, and that its command runs. Times are not tested.
pytest tests/test_bench.py"""
import sys

import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "extras/bench"))
import flops, world


@pytest.mark.parametrize("name", ["tiny", "A"])
def test_the_floor_counts_what_torch_counts(name):
    """One row through transformers' Llama under torch's counter. It counts each pair of tokens;
    the floor only those in which the second token sees the first."""
    size = world.SIZES[name]
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_hidden_layers=size.layers,
        intermediate_size=size.intermediate, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, attn_implementation="eager")
    S = 40
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, S, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, logits_to_keep=7)
    unseen = 4 * size.hidden * size.layers * S * (S - 1) // 2
    counted = flops.forward_flops(size, [S], logits=7) + unseen
    assert counted == pytest.approx(counter.get_total_flops(), rel=2e-3)  # the rest: rotary angles


def test_a_step_is_its_phases():
    """A rollout reads each token but the last of a response; four models score; two learn, and a
    backward is two forwards"""
    size = world.SIZES["A"]
    parts = flops.ppo_flops(size, 32, [64, 10], epochs=2)
    one = flops.forward_flops(size, [96, 42], logits=74)
    other = flops.forward_flops(size, [96, 42])
    assert parts["score"] == 2 * one + 2 * other
    assert parts["update"] == 3 * 2 * (one + other)
    assert parts["rollout"] == flops.forward_flops(size, [95, 41], logits=74)


def test_natural_lengths():
    lengths = world.response_lengths("natural", 64)
    assert lengths == world.response_lengths("natural", 64)
    assert 20 < sum(lengths) / 64 < 30 and max(lengths) == 64 and min(lengths) >= 2
    assert world.response_lengths("full", 3) == [64] * 3


def test_the_command(tmp_path):
    """Each trainer alternates with the floor, and the table has what the models were given. A
    rollout reads real tokens only."""
    done = run("extras/bench/bench.py", "--sizes=tiny", "--lengths=natural", "--dtypes=float32",
               "--stages=ppo,decode", "--repeats=1", f"--out={tmp_path}", f"--before={ROOT}")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ppo")]
    assert [row[1] for row in rows] == ["before, fp32", "ours, fp32"]
    for row in rows:
        rollout, score, update = map(float, row[6].split(", "))
        assert rollout == 1.0 and 1.0 <= score < 2 and 1.0 <= update < 2
        wall, cpu, gb = float(row[2].split()[0]), float(row[4]), float(row[5])
        assert wall > 0 and cpu > 0 and 0.1 < gb < 3
    assert "| floor |" in done.stdout and "| decode tiny" in done.stdout


def test_a_trainer_that_fails_is_reported(tmp_path):
    done = run("extras/bench/bench.py", "--sizes=tiny", "--repeats=1", "--dtypes=float32",
               f"--before={tmp_path}", f"--out={tmp_path}/out", ok=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "before, fp32 ended early" in done.stderr and "No module named 'ppo'" in done.stderr
