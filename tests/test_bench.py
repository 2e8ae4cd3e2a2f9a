"""extras/bench: what it counts, and that its command runs. Times are not tested.
pytest tests/test_bench.py"""
import json, sys
from types import SimpleNamespace

import pytest, torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "extras/bench"))
import flops, gpu, world


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
               "--stages=ppo,sft,reward_model,decode", "--repeats=1", f"--out={tmp_path}",
               f"--before={ROOT}")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ppo")]
    assert [row[1] for row in rows] == ["before, fp32", "ours, fp32"]
    for row in rows:
        rollout, score, update = map(float, row[6].split(", "))
        assert rollout == 1.0 and 1.0 <= score < 2 and 1.0 <= update < 2
        wall, cpu, gb = float(row[2].split()[0]), float(row[4]), float(row[5])
        assert wall > 0 and cpu > 0 and 0.1 < gb < 3
    for stage in ("sft", "reward_model", "decode"):
        rows = [line.split(" | ") for line in done.stdout.splitlines() if f"| {stage} " in line]
        assert [row[1] for row in rows] == ["before, fp32", "ours, fp32"]
        assert all(1.0 <= float(row[6]) < 2 for row in rows)
    assert done.stdout.count("| floor |") == 4


def test_a_trainer_that_fails_is_reported(tmp_path):
    done = run("extras/bench/bench.py", "--sizes=tiny", "--repeats=1", "--dtypes=float32",
               f"--before={tmp_path}", f"--out={tmp_path}/out", ok=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "before, fp32 ended early" in done.stderr and "No module named 'ppo'" in done.stderr


def test_the_checks_of_a_gpu(tmp_path):
    """The complete command, tiny, without a GPU"""
    done = run("extras/bench/gpu.py", "--small", f"--out={tmp_path}")
    words = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    names = ["first ratio", "KL at step 0", "log-probs", "resume after a kill"]
    assert [line[7:].partition(":")[0] for line in words] == names
    assert "NOT ok" not in done.stdout and "all checks ok" in done.stdout
    row = [line for line in done.stdout.splitlines() if line.startswith("| tiny")][0].split(" | ")
    tokens_per_s, mfu, memory = float(row[1]), float(row[2].rstrip("%")), float(row[4].split()[0])
    assert tokens_per_s > 0 and 0 <= mfu < 100 and 0.1 < memory < 3

    # The killed run really was: its third step began twice.
    assert (tmp_path / "killed.log").exists() and (tmp_path / "resumed.log").exists()
    assert "2 of them done" in (tmp_path / "resumed.log").read_text()

    # A single bit of difference is found.
    args = SimpleNamespace(out=str(tmp_path))
    assert gpu.differences(args, "whole", "again") == []
    weights = tmp_path / "again/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    log = tmp_path / "again/metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[3]["kl"] += 1e-9
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu.differences(args, "whole", "again") == ["the model's weights", "step 3: kl"]


def test_a_run_that_fails_is_not_ok(tmp_path, capsys):
    args = SimpleNamespace(out=str(tmp_path), ranks=1)
    assert not gpu.run(args, "whole", dict(policy=str(tmp_path / "nothing")))
    assert "NOT ok whole: exit code 2" in capsys.readouterr().out
    assert gpu.FAILED == ["whole"]
