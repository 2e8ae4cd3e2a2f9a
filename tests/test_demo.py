"""demo.sh from beginning to end, with small sizes: OUT=/tmp/x bash demo.sh small.toml"""
import os, subprocess

from conftest import ROOT, python

SMALL = """
[prepare]
sft_rows = 96
pref_rows = 32
heldout_rows = 24
val_rows = 6
eval_rows = 6
hidden_size = 32
heads = 2
[sft]
seed = 7
[reward_model]
steps = 4
[ppo]
steps = 2
save_every = 1
rollout_batch = 8
batch = 8
response_len = 16
[evaluate.decode]
response_len = 16
"""
PRINTED = ["Table 1", "Table 2", "Table 3", "Fine-grained Token-level PPO", "a bag of tokens",
           "report.html"]


def demo(tmp_path):
    environment = os.environ | {"OUT": f"{tmp_path}/out", "PYTHON": python()}
    return subprocess.run(["bash", "demo.sh", f"{tmp_path}/small.toml"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=900)


def test_the_demo_runs_and_a_second_time_skips_what_is_finished(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    first = demo(tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for what in PRINTED:
        assert what in first.stdout, what
    record = (tmp_path / "out/sft/run.json").read_text()
    assert '"seed": 7' in record, "demo.sh must give its arguments to the stages"

    # The report needs no network: its pictures are inside, and it loads no script.
    page = (tmp_path / "out/report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page

    second = demo(tmp_path)
    assert second.returncode == 0
    assert second.stdout.count("is finished") >= 9
    assert "step 0 |" not in second.stdout
