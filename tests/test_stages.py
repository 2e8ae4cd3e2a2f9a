"""Each stage as a user runs it: outputs, one process against two ranks, kill and resume, every
refusal. pytest tests/test_stages.py"""

import json, math, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from conftest import PPO, RM, ROOT, SFT, rows_of, run
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import common, reward_model
from plumbing import files, record
from plumbing.record import save_model

TIMINGS = ("seconds", "rollout_s", "score_s", "update_s", "tokens_per_s", "peak_gb")


def same_metrics(one, two, tolerance):
    """The metrics of two runs agree but for timings"""
    one, two = rows_of(one / "metrics.jsonl"), rows_of(two / "metrics.jsonl")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two):
        for name in set(a) - set(TIMINGS):
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), (
                a["step"],
                name,
            )


def weights(folder):
    return {
        name: w
        for file in Path(folder).glob("*.safetensors")
        for name, w in load_file(file).items()
    }


# ---------------------------------------------------------------- what the stages write


def test_sft_learns_and_saves_what_transformers_loads(world):
    rows = rows_of(world / "sft/metrics.jsonl")
    vocabulary = AutoModelForCausalLM.from_pretrained(world / "sft").config.vocab_size
    assert (
        rows[0]["loss"] == pytest.approx(math.log(vocabulary), rel=0.1)
        and 0 < rows[-1]["loss"] < rows[0]["loss"] - 0.1
    )
    assert vocabulary == len(AutoTokenizer.from_pretrained(world / "sft"))
    assert json.loads((world / "sft/run.json").read_text())["config"]["batch"] == 32


def test_diffs_hold_the_pair_and_its_masks(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    for row in rows_of(world / "diffs.jsonl"):
        assert common.decode_response(tokenizer, row["edited_ids"]) == row["edited"]
        assert common.decode_response(tokenizer, row["original_ids"]) == row["original"]
        kept = [
            [i for i, c in zip(row[f"{side}_ids"], row[f"{side}_changed"]) if not c]
            for side in ("edited", "original")
        ]
        assert kept[0] == kept[1] and 1 in row["edited_changed"] + row["original_changed"]


@pytest.mark.parametrize(
    "name, Auto",
    [("rm", AutoModelForTokenClassification), ("rm_sequence", AutoModelForSequenceClassification)],
)
def test_a_reward_model_opens_in_plain_transformers_with_the_same_rewards(world, name, Auto):
    ours = common.load_model(
        f"{world}/{name}", torch.device("cpu"), None, torch.float32, head="saved", frozen=True
    )
    plain, tokenizer = (
        Auto.from_pretrained(world / name).eval(),
        common.load_tokenizer(f"{world}/{name}"),
    )
    prompts = [
        common.encode_prompt(tokenizer, dict(instruction=text))
        for text in ("List four fruits.", "Name three tools for a quiz.")
    ]
    responses = [common.encode_response(tokenizer, text) for text in ("apple\npear\nEnjoy!", "saw")]
    packed = common.pack(prompts, responses, "cpu")
    r = common.token_heads(ours, *packed)
    assert r.abs().max() > 1e-3, "the head has learnt nothing: the comparison would be of zeros"
    width, pad = (
        max(map(len, map(sum, zip(prompts, responses), [[]] * 2))),
        plain.config.pad_token_id or 0,
    )
    rows = [p + a for p, a in zip(prompts, responses)]
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # right-padded, as usual
    logits = plain(
        ids,
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    ).logits
    for i, (p, a) in enumerate(zip(prompts, responses)):
        if name == "rm":
            assert torch.allclose(logits[i, len(p) : len(p) + len(a), 0], r[i, : len(a)], atol=1e-5)
        else:
            assert pad != tokenizer.eos_token_id and torch.allclose(
                logits[i, 0], r[i, len(a) - 1], atol=1e-5
            )
    assert plain.score.bias is None and common.reward_level(world / name) == (
        "token" if name == "rm" else "sequence"
    )


def test_a_sequence_model_is_never_padded_with_eos(world, tmp_path):
    """Its class pools the last id that is not pad: with a tokenizer whose pad is eos (SmolLM2's)
    EOS itself would be skipped"""
    model = common.load_model(
        f"{world}/rm_sequence", torch.device("cpu"), None, torch.float32, head="saved"
    )
    tokenizer = common.load_tokenizer(f"{world}/sft")
    tokenizer.pad_token = tokenizer.eos_token
    pad = reward_model.sequence_pad(tokenizer)
    save_model(model, tokenizer, tmp_path, torch.float32, sequence_pad=pad)
    pad = AutoModelForSequenceClassification.from_pretrained(tmp_path).config.pad_token_id
    assert (
        pad not in (None, tokenizer.eos_token_id)
        and pad == AutoTokenizer.from_pretrained(tmp_path).pad_token_id
    )


def test_a_models_config_comes_last(world, tmp_path, monkeypatch):
    """config.json makes a folder valid: a run that is killed before it leaves no model"""
    model = common.load_model(f"{world}/sft", torch.device("cpu"), None, torch.float32)
    replace = record.os.replace
    moved = []

    def spied_replace(old, new):
        moved.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(record.os, "replace", spied_replace)
    save_model(model, common.load_tokenizer(f"{world}/sft"), tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {w.dtype for w in weights(tmp_path).values()} == {torch.bfloat16}
    assert model.dtype == torch.float32
    assert len(moved) >= 4 and moved[-1] == "config.json"
    assert {"model.safetensors", "tokenizer.json"} <= set(moved)


def test_pref_file_marks_the_preferred_answer_as_w(world):
    for name, edits in (("rm", True), ("rm_sequence", False)):  # the report labels runs by it
        assert json.loads((world / name / "run.json").read_text())["edits"] is edits
    tokenizer = common.load_tokenizer(world / "sft")
    pairs, _ = reward_model.read_pairs(str(world / "data/pref.jsonl"), "data", tokenizer, 512)
    for row, pair in zip(rows_of(world / "data/pref.jsonl"), pairs):
        assert common.decode_response(tokenizer, pair[1]) == row[f"output_{row['preference']}"]


def test_steps_replace_epochs(world, tmp_path):
    """--steps: the same number for any number of pairs. It may go beyond one epoch, and the last
    batch is full."""
    run(
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/diffs.jsonl",
        f"--out={tmp_path}/out",
        *RM,
        "--steps=5",
    )
    rows = rows_of(tmp_path / "out/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(5)) and len(
        rows_of(world / "diffs.jsonl")
    ) < 5 * 16
    assert rows[-1]["lr"] < rows[1]["lr"] <= 1e-3  # the schedule ends with the steps
    refused(
        tmp_path / "no",
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/diffs.jsonl",
        "--steps=0",
        saying=("--steps",),
    )


def test_cut_answers_get_no_eos(world, tmp_path):
    tokenizer = common.load_tokenizer(world / "sft")
    row = dict(
        instruction="List four fruits.",
        input="",
        output_1="pear",
        output_2="plum",
        preference=1,
        cut=["output_2"],
    )
    files.write_jsonl(tmp_path / "pref.jsonl", [row])
    ((_, w, l, _, _),) = reward_model.read_pairs(
        str(tmp_path / "pref.jsonl"), "data", tokenizer, 512
    )[0]
    assert w[-1] == tokenizer.eos_token_id and l[-1] != tokenizer.eos_token_id


# ---------------------------------------------------------------- ppo


def test_ppo_first_ratio_is_one_and_kl_zero(world, ppo_flags, tmp_path):
    for level, extra in (
        ("token", []),
        ("sequence", []),
        ("sequence", [f"--reward_model={world}/rm_sequence"]),
    ):
        out = tmp_path / f"{level}{len(extra)}"
        run("ppo.py", *ppo_flags, f"--level={level}", f"--out={out}", "--save_every=1", *extra)
        rows = rows_of(out / "metrics.jsonl")
        assert (
            rows[0]["kl"] == 0
            and all(row["first_ratio_error"] < 1e-5 for row in rows)
            and rows[1]["kl"] != 0
        )
        assert all(row["response_length"] <= 12 and 0 <= row["eos_share"] <= 1 for row in rows)
        assert (out / "step_1/config.json").exists() and AutoModelForCausalLM.from_pretrained(out)
        sample = rows_of(out / "samples.jsonl")[0]
        assert len(sample["tokens"]) == len(sample["token_rewards"]) > 0
        assert (
            max(
                (a - b).abs().max().item()
                for a, b in zip(weights(out).values(), weights(world / "sft").values())
            )
            > 1e-5
        )


def test_ppo_raises_a_planted_reward(world, tmp_path):
    """A reward model whose r_t is high for one token only: after some steps the policy says it more
    often"""
    home, tokenizer = tmp_path / "planted", common.load_tokenizer(world / "sft")
    model = common.load_model(f"{world}/rm", torch.device("cpu"), None, torch.float32, head="saved")
    wanted = common.encode_response(tokenizer, "tea")[0]
    with torch.no_grad():  # no layers between embedding and head: r_t is the score of a_t alone
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:] = 0
        model.model.embed_tokens.weight[wanted, 0] = 1
        model.score.weight[:] = 0
        model.score.weight[0, 0] = 1
    home.mkdir()
    save_model(model, tokenizer, home, torch.float32)
    run(
        "ppo.py",
        f"--policy={world}/sft",
        f"--reward_model={home}",
        f"--data={world}/data/prompts.jsonl",
        f"--out={tmp_path}/out",
        *PPO,
        "--steps=12",
        "--rollout_batch=32",
        "--batch=16",
        "--micro_batch=16",
        "--lr=3e-3",
        "--kl_coef=0",
        "--lr_epochs=9",
        "--warmup_steps=1",
    )
    said = [row["token_reward"] for row in rows_of(tmp_path / "out/metrics.jsonl")]
    assert sum(said[-3:]) > 2 * sum(said[:3]) + 0.1, said


def test_a_policy_with_nan_logits_ends_in_one_line(world, ppo_flags, tmp_path):
    home, tokenizer = tmp_path / "nan", common.load_tokenizer(world / "sft")
    model = common.load_model(f"{world}/sft", torch.device("cpu"), None, torch.float32)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    home.mkdir()
    save_model(model, tokenizer, home, torch.float32)
    done = run("ppo.py", *ppo_flags, f"--policy={home}", f"--out={tmp_path}/out", ok=False)
    assert (
        done.returncode == 2 and "Traceback" not in done.stderr and "logits are NaN" in done.stderr
    )


def test_lr_zero_changes_nothing(world, ppo_flags, tmp_path):
    run("ppo.py", *ppo_flags, "--lr=0", f"--out={tmp_path}/out")
    assert all(
        torch.equal(w, weights(world / "sft")[name])
        for name, w in weights(tmp_path / "out").items()
    )
    assert all(
        row["kl"] == 0 and row["first_ratio_error"] == 0
        for row in rows_of(tmp_path / "out/metrics.jsonl")
    )


# ---------------------------------------------------------------- two ranks

SPY = """
import json, os, sys, runpy, torch
sys.path.insert(0, {root!r})
import common
from plumbing import ranks
from torch.distributed.tensor import DTensor
fed, shares = dict(), []
def spied(name):
    plain = getattr(common, name)
    def spy(model, ids, mask, response_mask, *rest, **options):
        key = name + ("+grad" if torch.is_grad_enabled() else "")
        fed[key] = fed.get(key, 0) + int(mask.sum())
        if ranks.WORLD > 1 and not shares:
            assert len(common.sharded_parts(model)) == (
                len(model.model.layers) + 1), "a layer is gathered alone, not all at once"
            for p in model.model.layers.parameters():
                shares.append(p.to_local().numel() / p.numel())
        return plain(model, ids, mask, response_mask, *rest, **options)
    setattr(common, name, spy)
for name in ("token_logprobs", "token_heads"):
    spied(name)
plain_generate = common.generate
def generate(model, prompt_ids, prompt_mask, **options):
    response_ids, mask = plain_generate(model, prompt_ids, prompt_mask, **options)
    fed["generate"] = fed.get("generate", 0) + int(mask.sum())
    return response_ids, mask
common.generate = generate
plain_load = common.load_model
def load_model(*args, **options):
    model = plain_load(*args, **options)
    # pairs with a shared prompt come with a mask of their own: every real token sees the prompt's
    # first
    def count(module, _, given):
        mask = given["attention_mask"]
        if mask.dim() == 4 and mask.numel() > 1:
            key = "pairs" + ("+grad" if torch.is_grad_enabled() else "")
            fed[key] = fed.get(key, 0) + int(mask[:, 0, :, 0].sum())
            if ranks.WORLD > 1 and not shares:
                for p in model.model.layers.parameters():
                    if hasattr(p, "to_local"):
                        shares.append(p.to_local().numel() / p.numel())
    model.register_forward_pre_hook(count, with_kwargs=True, prepend=True)
    return model
common.load_model = load_model
script = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
json.dump([fed, shares], open({log!r} + str(ranks.RANK), "w"))
"""


@pytest.mark.parametrize("stage", ["sft", "rm", "rm_sequence", "ppo"])
def test_two_ranks_are_one(world, ppo_flags, tmp_path, stage):
    """The same losses, each rank with at most 60% of the tokens of each phase and of every decoder
    layer"""
    spy = tmp_path / "spy.py"
    spy.write_text(SPY.format(root=str(ROOT), log=f"{tmp_path}/fed"))
    words = {
        "sft": [
            "sft.py",
            f"--model={world}/data/model",
            f"--data={world}/data/sft.jsonl",
            *SFT,
            "--dtype=float32",
        ],
        "rm": [
            "reward_model.py",
            f"--model={world}/sft",
            f"--data={world}/diffs.jsonl",
            *RM,
            "--batch=15",
            "--micro_batch=1",
        ],
        "rm_sequence": [
            "reward_model.py",
            f"--model={world}/sft",
            f"--data={world}/data/pref.jsonl",
            "--loss=sequence",
            *RM,
        ],
        "ppo": ["ppo.py", *ppo_flags, "--batch=7", "--micro_batch=1"],
    }[stage]
    if stage in (
        "rm",
        "ppo",
    ):  # odd batches: in some forwards a rank has nothing left, and runs a row that must not count
        run(*words, f"--out={tmp_path}/one")
    run(spy, ROOT / words[0], *words[1:], f"--out={tmp_path}/two", ranks=2)
    same_metrics(
        tmp_path / "one" if stage in ("rm", "ppo") else world / stage,
        tmp_path / "two",
        1e-3 if stage == "ppo" else 1e-4,
    )
    logs = [json.loads((tmp_path / f"fed{rank}").read_text()) for rank in range(2)]
    assert set(logs[0][0]) == set(logs[1][0]) and (
        stage in ("sft", "ppo") or set(logs[0][0]) == {"pairs+grad"}
    )
    for phase in logs[0][0]:
        share = logs[0][0][phase] / (logs[0][0][phase] + logs[1][0][phase])
        assert 0.4 <= share <= 0.6, (phase, share)
    assert all(shares and max(shares) <= 0.6 for _, shares in logs)


# ---------------------------------------------------------------- kill and resume


def start(*words):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_when(process, happened, seconds=120):
    """kill -9 as soon as happened()"""
    end = time.time() + seconds
    while not happened() and process.poll() is None and time.time() < end:
        time.sleep(0.005)
    assert process.poll() is None, "it was over before it was killed: the test would prove nothing"
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(path):
    return Path(path).read_text().count("\n") if Path(path).exists() else 0


@pytest.mark.parametrize("stage", ["sft", "reward_model"])  # ppo.py: test_ppo_night.py
def test_kill_and_run_again_equals_an_undisturbed_run(world, tmp_path, stage):
    words = {
        "sft": [
            "sft.py",
            f"--model={world}/data/model",
            f"--data={world}/data/sft.jsonl",
            *SFT,
            "--resume_every=2",
            "--epochs=4",
        ],
        "reward_model": [
            "reward_model.py",
            f"--model={world}/sft",
            f"--data={world}/diffs.jsonl",
            *RM,
            "--resume_every=2",
            "--epochs=6",
            "--head_lr_factor=0.5",
        ],
    }[stage]
    run(*words, f"--out={tmp_path}/undisturbed")
    for steps in (1, 3, 5):
        process = start(*words, f"--out={tmp_path}/killed")
        kill_when(process, lambda: lines(tmp_path / "killed/metrics.jsonl") >= steps)
        assert not (tmp_path / "killed/config.json").exists(), (
            "a model has its final name before it is complete"
        )
    run(*words, f"--out={tmp_path}/killed")
    undisturbed = weights(tmp_path / "undisturbed")
    killed = weights(tmp_path / "killed")
    assert undisturbed.keys() == killed.keys()
    assert all(torch.equal(undisturbed[name], killed[name]) for name in killed)
    same_metrics(tmp_path / "undisturbed", tmp_path / "killed", 0.0)
    again = run(*words, f"--out={tmp_path}/killed")
    assert "is finished" in again.stdout


def test_the_newest_checkpoint_counts_and_the_older_goes(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    ).save_pretrained(tmp_path / "model")

    def trained(steps, out):
        model = common.load_model(tmp_path / "model", torch.device("cpu"), None, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(1, steps + 1):
            model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
            common.optimizer_step(model.parameters(), optimizer, 0.1, 1.0, "")
            record.save_checkpoint(out, step, model, optimizer)
        return model, optimizer

    trained(1, tmp_path / "one")
    model, optimizer = trained(2, tmp_path / "two")
    assert [folder.name for folder in (tmp_path / "two").glob("checkpoint*")] == ["checkpoint_2"]
    names = {
        name
        for file in (tmp_path / "two/checkpoint_2").glob("*.safetensors")
        for name in load_file(file)
    }
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names, (
        "a tied weight is stored once"
    )
    shutil.copytree(
        tmp_path / "one/checkpoint_1", tmp_path / "two/checkpoint_1"
    )  # killed before the older was removed
    again, its_optimizer = trained(0, None)
    assert record.load_checkpoint(tmp_path / "two", again, its_optimizer) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert all(
        torch.equal(optimizer.state[a]["exp_avg"], its_optimizer.state[b]["exp_avg"])
        for a, b in zip(model.parameters(), again.parameters())
    )


def test_reward_model_micro_batches_change_nothing(world, tmp_path):
    run(
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/diffs.jsonl",
        *RM,
        "--micro_batch=3",
        f"--out={tmp_path}/rm",
    )
    same_metrics(world / "rm", tmp_path / "rm", 1e-4)


def test_ppo_continues_to_more_steps(world, ppo_flags, tmp_path):
    run("ppo.py", *ppo_flags, f"--out={tmp_path}/a", "--steps=3")
    run("ppo.py", *ppo_flags, f"--out={tmp_path}/b", "--steps=1")
    assert "1 of them done" in run("ppo.py", *ppo_flags, f"--out={tmp_path}/b", "--steps=3").stdout
    same_metrics(tmp_path / "a", tmp_path / "b", 0.0)
    run("ppo.py", *ppo_flags, f"--out={tmp_path}/c", "--steps=2", "--save_every=2")
    two = weights(tmp_path / "c")
    run(
        "ppo.py", *ppo_flags, f"--out={tmp_path}/c", "--steps=3", "--save_every=2"
    )  # what would be step_2 is kept
    assert all(torch.equal(x, weights(tmp_path / "c/step_2")[name]) for name, x in two.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "c/step_2") and common.load_tokenizer(
        tmp_path / "c/step_2"
    )
    assert any(not torch.equal(x, weights(tmp_path / "c")[name]) for name, x in two.items())
    done = run(
        "ppo.py",
        *ppo_flags,
        f"--out={tmp_path}/d",
        "--steps=3",
        "--resume_every=2",
        "--lr_epochs=0.01",
        "--warmup_steps=0",
    )
    assert "ALARM: the learning rate is 0" in done.stdout
    (tmp_path / "d/run.json").write_text(
        (tmp_path / "d/run.json").read_text().replace('"finished": "', '"finished": false, "x": "')
    )
    done = run(
        "ppo.py",
        *ppo_flags,
        f"--out={tmp_path}/d",
        "--steps=2",
        "--resume_every=2",
        "--lr_epochs=0.01",
        "--warmup_steps=0",
        ok=False,
    )
    assert done.returncode == 2 and "has 3 steps already, --steps=2 is less" in done.stderr
    (tmp_path / "d/metrics.jsonl").unlink()
    done = run(
        "ppo.py",
        *ppo_flags,
        f"--out={tmp_path}/d",
        "--steps=4",
        "--resume_every=2",
        "--lr_epochs=0.01",
        "--warmup_steps=0",
        ok=False,
    )
    assert done.returncode == 2 and "no metrics.jsonl to continue" in done.stderr


# ---------------------------------------- refusals: one line, exit code 2, nothing written


def refused(out, *words, saying, ranks=0):
    done = run(*words, f"--out={out}", ok=False, ranks=ranks)
    assert done.returncode == (1 if ranks else 2), done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(f"{words[0]}: ")]
    assert len(said) == 1 and all(part in said[0] for part in saying), done.stderr
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0] if not ranks else True
    assert not Path(out).exists()


def test_missing_inputs_name_the_stage_that_makes_them(world, tmp_path):
    out = tmp_path / "out"
    refused(out, "ppo.py", f"--policy={tmp_path}/sft", saying=("--policy=", "python sft.py"))
    refused(
        out,
        "ppo.py",
        f"--policy={world}/sft",
        f"--reward_model={tmp_path}/rm",
        saying=("--reward_model=", "python reward_model.py"),
    )
    refused(
        out,
        "ppo.py",
        f"--policy={world}/sft",
        f"--reward_model={world}/rm",
        f"--data={tmp_path}/p.jsonl",
        saying=("--data=", "prepare.py"),
    )
    refused(out, "reward_model.py", f"--model={tmp_path}/sft", saying=("--model=", "python sft.py"))
    refused(
        out,
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={tmp_path}/d",
        saying=("--data=", "python diff.py"),
    )
    refused(out, "sft.py", f"--model={tmp_path}/base", saying=("--model=", "prepare.py"))
    refused(
        tmp_path / "out.jsonl",
        "diff.py",
        f"--data={tmp_path}/e.jsonl",
        saying=("--data=", "python edit.py"),
    )


def test_torchrun_in_a_fresh_clone_says_what_is_missing(tmp_path):
    refused(
        tmp_path / "out",
        "ppo.py",
        f"--policy={tmp_path}/out/sft",
        ranks=2,
        saying=("holds no finished model", "python sft.py"),
    )


def test_bad_input_is_refused_before_any_model(world, ppo_flags, tmp_path):
    out, bad = tmp_path / "out", tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "input": ""}\n{"instruction": 3, "input": ""}\n')
    refused(
        out,
        "ppo.py",
        *ppo_flags,
        f"--data={bad}",
        saying=(f"{bad}:2: instruction must be str, got 3",),
    )
    bad.write_text("")
    refused(out, "sft.py", f"--model={world}/data/model", f"--data={bad}", saying=("no rows",))
    refused(out, "ppo.py", *ppo_flags, "--steps=x", saying=("steps must be int",))
    refused(
        out,
        "ppo.py",
        *ppo_flags,
        "--rollout_batch=0",
        saying=("--rollout_batch must be at least 1 and finite, got 0",),
    )
    refused(
        out,
        "sft.py",
        f"--model={world}/data/model",
        f"--data={world}/data/sft.jsonl",
        "--micro_batch=0",
        saying=("--micro_batch must",),
    )
    refused(
        out,
        "sft.py",
        f"--model={world}/data/model",
        f"--data={world}/data",
        saying=("Is a directory",),
    )
    refused(
        out,
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/diffs.jsonl",
        "--steps=0",
        saying=("--steps must be",),
    )
    refused(
        out,
        "reward_model.py",
        f"--model={world}/data/model",
        f"--data={world}/diffs.jsonl",
        saying=("holds no weights",),
    )
    refused(
        out, "ppo.py", *ppo_flags, f"--policy={world}/rm", saying=("--policy=", "is a reward model")
    )
    refused(out, "ppo.py", *ppo_flags, "--reward_model=runs/rm", saying=("runs/rm is no model",))
    refused(out, "ppo.py", *ppo_flags, "--kl_target=0", saying=("--kl_target must be above 0",))
    adaptive = ["--kl_target=6", "--kl_coef=0"]
    refused(out, "ppo.py", *ppo_flags, *adaptive, saying=("--kl_target=6", "set a --kl_coef"))
    refused(
        out,
        "ppo.py",
        *ppo_flags,
        "--reward_scale=fixed",
        "--fixed_length=-3",
        saying=("--fixed_length must be",),
    )
    refused(
        out,
        "sft.py",
        f"--model={world}/data/model",
        f"--data={world}/data/sft.jsonl",
        "--lr=nan",
        saying=("--lr must be",),
    )
    refused(
        out,
        "sft.py",
        f"--model={world}/data/model",
        f"--data={world}/data/sft.jsonl",
        "--warmup=100",
        saying=("--warmup must be at least 0 and at most 1",),
    )
    wrong = rows_of(world / "diffs.jsonl")
    wrong[1]["edited_ids"][0] = 100_000
    files.write_jsonl(tmp_path / "wrong.jsonl", wrong)
    (tmp_path / "wrong.jsonl.run.json").write_text((world / "diffs.jsonl.run.json").read_text())
    refused(
        out,
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={tmp_path}/wrong.jsonl",
        saying=("wrong.jsonl:2", "ids that no token has"),
    )
    refused(
        out,
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/diffs.jsonl",
        "--log_every=0",
        saying=("--log_every must",),
    )
    refused(
        out, "ppo.py", *ppo_flags, f"--reward_model={world}/sft", saying=("is no reward model",)
    )
    refused(
        out,
        "ppo.py",
        *ppo_flags,
        f"--reward_model={world}/rm_sequence",
        saying=("--level=sequence",),
    )
    refused(
        out,
        "ppo.py",
        *ppo_flags,
        "--level=sequence",
        "--reward_scale=mean",
        saying=("--level=token",),
    )
    refused(out, "ppo.py", *ppo_flags, "--response_len=300", saying=("positions for 256 tokens",))
    refused(
        out, "ppo.py", *ppo_flags, "--rollout_micro_batch=16", ranks=2, saying=("without rollouts",)
    )
    refused(
        out,
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/diffs.jsonl",
        "--loss=sequence",
        "--anchor=0.1",
        saying=("--anchor",),
    )
    refused(
        out,
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/diffs.jsonl",
        "--head_lr_factor=0",
        saying=("--head_lr_factor",),
    )
    refused(
        out,
        "reward_model.py",
        f"--model={world}/sft",
        f"--data={world}/data/pref.jsonl",
        saying=("no edited_ids", "diff.py"),
    )


def test_another_tokenizer_is_refused(world, ppo_flags, tmp_path):
    run(
        "data/toy/prepare.py",
        f"--out={tmp_path}/data",
        "--vocab_size=700",
        "--hidden_size=32",
        "--heads=2",
        "--sft_rows=32",
        "--pref_rows=8",
    )
    run(
        "sft.py",
        f"--model={tmp_path}/data/model",
        f"--data={tmp_path}/data/sft.jsonl",
        f"--out={tmp_path}/sft",
        *SFT,
    )
    refused(
        tmp_path / "out",
        "reward_model.py",
        f"--model={tmp_path}/sft",
        f"--data={world}/diffs.jsonl",
        saying=("another tokenizer", "diff.py"),
    )
    refused(
        tmp_path / "out",
        "ppo.py",
        *ppo_flags,
        f"--policy={tmp_path}/sft",
        saying=("another tokenizer",),
    )


# ---------------------------------------------------------------- what must stay true of the source


def test_no_trainer_reads_the_world():
    """The gold score is the judge's and the editor's alone"""
    for name in ("common.py", "sft.py", "diff.py", "reward_model.py", "ppo.py"):
        text = (ROOT / name).read_text()
        assert (
            "gold" not in text
            and "data.toy" not in text
            and "mend" not in text.replace("recommend", "")
        ), name


def test_no_row_holds_the_truth(world):
    for file in (world / "data").glob("*.jsonl"):
        assert not {name for row in rows_of(file) for name in row} & {"gold", "flaws", "quality"}


def test_every_field_is_read():
    """A field of a Config that nothing reads is a promise broken"""
    for name in ("sft", "edit", "diff", "reward_model", "ppo"):
        text = (ROOT / f"{name}.py").read_text()
        fields = __import__(name).Config.__dataclass_fields__
        for field in fields:
            assert (
                f"cfg.{field}" in text
                or field in ("overwrite", "seed", "allow_changed_code")
                or f'"{field}"' in text
            ), (name, field)


def test_nothing_unpickles_or_runs_foreign_code():
    for file in ROOT.rglob("*.py"):
        if "tests" not in file.parts and ".venv" not in file.parts:
            text = file.read_text().replace("trust_remote_code=False", "")
            assert not any(
                word in text
                for word in (
                    "import pickle",
                    "torch.load(",
                    "trust_remote_code",
                    "exec(",
                    "eval(\"",
                )
            ), file
