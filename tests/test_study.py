"""The study of the toy world, small: its parts run, resume, refuse other settings; the changed
equations of variants.py are what their names say."""
import json, os, subprocess, sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, rows_of
from plumbing.files import write_jsonl

SMALL = """
[prepare]
sft_rows = 64
pref_rows = 24
heldout_rows = 12
val_rows = 4
eval_rows = 6
hidden_size = 32
heads = 2
[diff]
gaps = true
[reward_model]
steps = 2
batch = 8
[ppo]
rollout_batch = 8
rollout_micro_batch = 8
batch = 8
micro_batch = 8
query_len = 64
lr = 1e-3
[evaluate.rewards]
resamples = 2
"""

# A study of few cells: two arms on two worlds, the other loss, the answers of a round.
FEW = """
import sys
sys.path.insert(0, ".")
from extras.study import toy
toy.PRESET = sys.argv.pop(1)
toy.REPORTED_STEPS = 2
toy.REPORTED_SEEDS = [300]
toy.SAMPLES = 2
chosen = toy.chosen
def short_run(*words, **changes):
    return chosen(*words, **changes)._replace(steps=2, judge_every=1)
toy.chosen = short_run
toy.RESPONSE_LEN = dict(short=16, medium=24, long=24)
def few(part, *names):
    def cells():
        found = [cell for cell in part() if f"{cell.world} {cell.name}" in names]
        assert len(found) == len(names), names
        return found
    return cells
toy.PARTS = dict(
    horizons=few(toy.horizons, "short horizons_sequence", "medium horizons_gamma0"),
    losses=few(toy.losses, "medium losses_gamma0_rm_keep"),
    why=few(toy.why, "medium why_gamma0_state"))
toy.main(toy.load_config(toy.Config, "study"))
"""


def study(home, *words):
    (home / "small.toml").write_text(SMALL)
    (home / "few.py").write_text(FEW)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, home / "few.py", home / "small.toml", *words,
                           f"--out={home}/runs", f"--results={home}/toy.jsonl"],
                          cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_parts_run_and_a_second_time_nothing(tmp_path):
    first = study(tmp_path, "horizons", "losses", "why", "data", "rounds")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    rows = {(row["world"], row["name"]): row for row in rows_of(tmp_path / "toy.jsonl")}
    for world, name in (("short", "horizons_sequence"), ("medium", "horizons_gamma0"),
                        ("medium", "losses_gamma0_rm_keep"), ("medium", "why_gamma0_state")):
        row = rows[world, name]
        assert list(row["curve"]) == ["1", "2"]
        assert 0 <= row["curve"]["2"]["win_rate"] <= row["ceiling"] <= 100
        assert row["kl_coef"] > 0
    for name in ("data_sft", "data_sft_edited", "data_best_rm_token", "rounds_gamma0_two"):
        assert ("medium", name) in rows, name
    assert set(rows["medium", "rm_token"]) >= {"probe", "accuracy", "accuracy_edited"}
    assert len(rows["medium", "rm_rounds"]["probe"]) == 6
    assert not list((tmp_path / "runs").glob("*/*/horizons*/*.safetensors"))

    before = (tmp_path / "toy.jsonl").read_bytes()
    second = study(tmp_path, "horizons", "losses", "why", "data", "rounds")
    assert second.returncode == 0 and " of " not in second.stdout, second.stdout
    assert (tmp_path / "toy.jsonl").read_bytes() == before

    # A run that was killed before it wrote its rows loses no finished cell.
    lines = before.decode().splitlines(keepends=True)
    lost = [line for line in lines if '"horizons_gamma0"' not in line]
    assert len(lost) == len(lines) - 1
    (tmp_path / "toy.jsonl").write_text("".join(lost))
    again = study(tmp_path, "horizons")
    assert again.returncode == 0 and " of " not in again.stdout, again.stdout
    assert (tmp_path / "toy.jsonl").read_bytes() == before

    # A row that was made with other settings is not silently taken for this cell.
    rows["medium", "horizons_gamma0"]["kl_share"] = 9.0
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    third = study(tmp_path, "horizons")
    assert third.returncode == 2 and "other settings" in third.stderr
    assert third.stderr.count("\n") == 1


def test_the_grid_runs_on_tuning_seeds_alone():
    from extras.study import toy
    cells = toy.grid() + toy.paper() + toy.lengths()
    assert {cell.seed for cell in cells} <= set(range(100, 106))
    for arm in ("rlhf", "sequence", "token"):
        mine = [cell for cell in toy.grid() if f"_{arm}_" in cell.name]
        assert len({cell.name for cell in mine if cell.seed == 105}) == 12
        shares = 7 if arm == "rlhf" else 6
        assert len({cell.name for cell in mine}) == shares * len(toy.CREDIT[toy.ARMS[arm][1]])
    reported = toy.horizons() + toy.edits() + toy.losses() + toy.why()
    assert {cell.seed for cell in reported} == set(range(300, 305))
    names = [(cell.world, cell.seed, cell.name) for cell in cells + reported]
    assert len(set(names)) == len(names)


def test_peoples_edits_become_continuations():
    """Only words differ, both sides begin with the same two words, a comment is used once"""
    from extras.study.people import continuations
    rows = [dict(original="You are a damn fool , sir .", edited="You are wrong, sir."),
            dict(original="You are a damn fool , sir .", edited="You are a fool, sir"),
            dict(original="What the hell is this ?", edited="what is this?"),
            dict(original="same thing , only spaces .", edited="Same thing, only spaces"),
            dict(original="no edit here at all", edited=None)]
    own, others = continuations(rows)
    assert [(row["input"], row["original"], row["edited"]) for row in own] == [
        ("you are", " a damn fool, sir", " wrong, sir")]
    assert others == [dict(original="what the hell is this?", edited="what is this?")]

    # Another rewrite of a comment that is used already, with another beginning
    rows.append(dict(original="You are a damn fool , sir .", edited="Sir, please stop"))
    assert continuations(rows) == (own, others)


def test_the_judge_of_peoples_edits_learns_nothing_from_length():
    from extras.study.people import as_many_longer_as_shorter
    pairs = [dict(original="a b c", edited=" ".join("x" * n)) for n in (1, 1, 2, 2, 3, 3, 4, 5)]
    lengths = sorted(len(pair["edited"].split()) for pair in as_many_longer_as_shorter(pairs))
    assert [n < 3 for n in lengths].count(True) == [n > 3 for n in lengths].count(True) == 2
    assert lengths.count(3) == 2


def test_no_comment_of_peoples_edits_is_in_two_files(tmp_path, monkeypatch):
    from extras.study import people

    def comments(name, n):
        same = [dict(original=f"{name} is a damn {i}", edited=f"{name} is a {i}")
                for i in range(n)]
        shorter = [dict(original=f"what the hell is {name} {i}", edited=f"what is {name} {i}")
                   for i in range(n)]
        longer = [dict(original=f"damn you {name} {i}", edited=f"i do not like {name} {i}")
                  for i in range(n)]
        return same + shorter + longer

    for name, value in dict(SFT_ROWS=4, EDITS=3, JUDGE_HELDOUT=4, TEST=2).items():
        monkeypatch.setattr(people, name, value)
    test = comments("tom", 3)
    write_jsonl(tmp_path / "edits_test.jsonl", test)
    write_jsonl(tmp_path / "edits_train.jsonl", comments("ann", 10) + test)
    people.prepare(people.Config(data=str(tmp_path), out=str(tmp_path / "out")))
    data = tmp_path / "out/data"
    used = [row["input"] + row["output"] for row in rows_of(data / "sft.jsonl")]
    used += [row["input"] + row["original"] for row in rows_of(data / "edits.jsonl")]
    for name in ("judge", "judge_heldout"):
        used += [row["output_1"] for row in rows_of(data / f"{name}.jsonl")]
    used += [row["input"] + row["original"] for row in rows_of(data / "test.jsonl")]
    assert len(set(used)) == len(used) == 4 + 3 + 20 + 2
    assert not [comment for comment in used[:-2] if "tom" in comment]
    assert len(rows_of(data / "prompts.jsonl")) == 3


def test_the_table_of_peoples_edits_is_that_of_experiments(capsys):
    from extras.study.people import print_table
    rows = {(row["arm"], row["seed"]): row for row in rows_of(ROOT / "extras/study/people.jsonl")}
    print_table(rows)
    table = capsys.readouterr().out.strip()
    assert table.count("\n") == 4
    assert table in (ROOT / "EXPERIMENTS.md").read_text()


# ---------------------------------------------------------------- the changed equations

def draws(seed):
    torch.manual_seed(seed)
    r_w, r_l = torch.randn(2, 5), torch.randn(2, 4)
    response_w = torch.arange(5) < torch.tensor([[5], [3]])
    response_l = torch.arange(4) < torch.tensor([[2], [4]])
    return (r_w, response_w, torch.rand(2, 5) < 0.5, r_l, response_l, torch.rand(2, 4) < 0.5)


def test_the_sum_instead_of_the_mean(monkeypatch):
    import reward_model
    from extras.study import variants
    r_w, response_w, changed_w, r_l, response_l, changed_l = drawn = draws(0)
    monkeypatch.setattr(reward_model, "mean_rewards", variants.sum_rewards)
    losses = reward_model.pair_losses(*drawn, loss="eq4")
    for i in range(2):
        w = sum(r for r, real, u1 in zip(r_w[i], response_w[i], changed_w[i]) if real and u1)
        l = sum(r for r, real, u1 in zip(r_l[i], response_l[i], changed_l[i]) if real and u1)
        assert losses[i] == pytest.approx(-F.logsigmoid(torch.as_tensor(w - l)).item(), abs=1e-6)


def test_the_likelihood_that_a_token_is_kept():
    from extras.study import variants
    _, _, _, r_l, response_l, changed_l = drawn = draws(1)
    losses = variants.keep_losses(*drawn, loss="eq4")
    for i in range(2):
        p = torch.sigmoid(r_l[i])
        terms = [-torch.log(1 - p[t] if changed_l[i, t] else p[t])
                 for t in range(4) if response_l[i, t]]
        assert losses[i] == pytest.approx((sum(terms) / len(terms)).item(), abs=1e-6)


def test_b_is_a_function_of_the_last_token_alone(world):
    """plus_state() - token_heads(): the same after the same token, in any row and place"""
    import common
    from extras.study import variants
    device, mesh, dtype = common.setup("float32")
    model = common.load_model(f"{world}/rm", device, mesh, dtype, head="saved", frozen=True)
    prompts, responses = [[5, 6, 7], [9, 6]], [[6, 7, 8, 2], [7, 6, 2]]
    packed = common.pack(prompts, responses, device)
    b = variants.plus_state(model, *packed) - common.token_heads(model, *packed)
    after = {}
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        for t, token in enumerate([prompt[-1], *response[:-1]]):
            after.setdefault(token, []).append(b[row, t].item())
    assert {len(set(round(x, 4) for x in found)) for found in after.values()} == {1}
    assert {round(abs(x), 4) for found in after.values() for x in found} == {0.5}
    value = variants.plus_state(model, *packed, before=True)
    assert torch.equal(value, common.token_heads(model, *packed, before=True))
