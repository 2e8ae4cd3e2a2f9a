"""Nothing is paid for twice or in vain; line ends are the original's. pytest tests/test_money.py"""
import json
import threading
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from conftest import ROOT, run

import edit
from plumbing import claude
from plumbing.files import write_jsonl

PAIR = dict(instruction="List four fruits.", input="", output_1="apple", output_2="pear\nsaw",
            preference=1)


# ---------------------------------------------------------------- torchrun

@pytest.mark.parametrize("words", [
    ["edit.py", "--editor=rules"], ["diff.py"], ["data/toy/prepare.py"], ["edit.py", "stats"],
    ["evaluate.py", "winrate"], ["evaluate.py", "report"], ["evaluate.py", "best"],
    ["evaluate.py", "judge", "--judge=gold"], ["diff.py", "show"], ["reward_model.py", "show"]])
def test_what_runs_in_one_process_refuses_torchrun(world, tmp_path, words):
    """WORLD_SIZE as torchrun sets it; --out, if there is one, is not touched"""
    out = [] if words[-1] in ("stats", "show", "winrate", "best") else [f"--out={tmp_path}/o.jsonl"]
    if words == ["data/toy/prepare.py"]:
        out = [f"--out={tmp_path}/o"]
    if "judge" in words:
        data = f"{world}/data/eval.jsonl"
        out += [f"--outputs={data}", f"--reference={data}"]
    done = run(*words, *out, ok=False, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2 and "not with torchrun" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- a service that cannot be reached

def asked(outcomes, concurrency=2):
    """ask_in_parallel over len(outcomes) requests whose replies are given"""
    requests = {str(k): k for k in range(len(outcomes))}
    client = SimpleNamespace(base_url="http://nowhere")
    return claude.ask_in_parallel(client, requests, lambda client, k: outcomes[k],
                                  threading.Event(), concurrency)


DEAD = claude.Reply(error="APIConnectionError Connection error.", again=True)
ALIVE = claude.Reply("x", "end_turn", {})
BUSY = claude.Reply(error="529 overloaded_error", again=True)


def test_nobody_there_ends_the_run_and_records_nothing(capsys):
    for outcomes, concurrency in (([DEAD] * 30, 4), ([DEAD], 16)):
        replies = []
        with pytest.raises(SystemExit) as end:
            for key, reply in asked(outcomes, concurrency):
                replies.append(key)
        said = capsys.readouterr().err
        assert end.value.code == 2 and replies == [] and said.count("\n") == 1
        assert "http://nowhere cannot be reached" in said


def test_a_service_that_goes_away(capsys):
    """After a success, three times the concurrency in a row; a few failures are failures"""
    replies = dict(asked([ALIVE] + [DEAD] * 5 + [ALIVE], 2))
    assert len(replies) == 7 and sum(bool(reply.error) for reply in replies.values()) == 5
    replies = dict(asked([BUSY, DEAD, BUSY], 1))
    assert len(replies) == 3, "an overloaded service is there"
    replies = []
    with pytest.raises(SystemExit):
        for key, reply in asked([ALIVE] + [DEAD] * 30, 2):
            replies.append(key)
    assert replies == ["0"] and "cannot be reached" in capsys.readouterr().err


def test_an_unreachable_address_is_one_line_and_no_row_fails(tmp_path):
    (tmp_path / "pref.jsonl").write_text(json.dumps(PAIR) + "\n")
    done = run("edit.py", f"{tmp_path}/pref.jsonl", "--retries=0", f"--out={tmp_path}/e.jsonl",
               ok=False, ANTHROPIC_API_KEY="any", ANTHROPIC_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 2 and "http://127.0.0.1:9" in done.stderr
    assert not (tmp_path / "e.jsonl").read_text()


# ---------------------------------------------------------------- batches

def test_a_404_gives_a_batch_up_only_when_its_time_is_over():
    """A passing 404 is an error that may pass: 10,000 paid rows are not asked for again"""
    anthropic = pytest.importorskip("anthropic")
    response = SimpleNamespace(request=None, status_code=404, headers={})

    def retrieve(id):
        raise anthropic.NotFoundError("not found", response=response, body=None)
    batches = SimpleNamespace(retrieve=retrieve)
    client = SimpleNamespace(messages=SimpleNamespace(batches=batches))
    now = datetime.now(timezone.utc)
    ages = {timedelta(0): False, timedelta(days=28): False, timedelta(days=30): True}
    for age, gone in ages.items():
        batch = dict(id="b", keys=["k"], at=(now - age).isoformat())
        if gone:
            assert claude.read(client, batch) == {}
        else:
            with pytest.raises(anthropic.NotFoundError):
                claude.read(client, batch)


# ---------------------------------------------------------------- proxies

@pytest.mark.parametrize("name, value", [
    ("ALL_PROXY", "socks://127.0.0.1:7890/"), ("HTTPS_PROXY", "socks5://127.0.0.1:7890/"),
    ("HTTPS_PROXY", "no address"), ("SSL_CERT_FILE", "/no/such/file")])
def test_a_proxy_that_the_http_library_refuses(tmp_path, name, value):
    """A dry run needs no client; else one line names the variable"""
    (tmp_path / "pref.jsonl").write_text(json.dumps(PAIR) + "\n")
    words = ["edit.py", f"{tmp_path}/pref.jsonl", f"--out={tmp_path}/e.jsonl"]
    for key in ("", "any"):
        done = run(*words, "--dry_run=true", ANTHROPIC_API_KEY=key, **{name: value})
        assert "requests       1" in done.stdout
    done = run(*words, "--retries=0", ok=False, ANTHROPIC_API_KEY="any",
               ANTHROPIC_BASE_URL="http://127.0.0.1:9", **{name: value})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert name in done.stderr or "cannot be reached" in done.stderr


# ---------------------------------------------------------------- line ends

@pytest.mark.parametrize("original, text, edited", [
    ("a\r\nb\r\nc", "a\nb\nc", "a\r\nb\r\nc"), ("a\nb", "a\r\nb", "a\nb"),
    ("a\r\nb\nc", "a\nb\nc", "a\r\nb\nc"), ("a\r\nb\nc", "a\nB\nc", "a\r\nB\nc"),
    ("a\rb", "a\nb\nc", "a\rb\rc"), ("one line", "one\r\nline", "one\nline"),
    ("a\r\nb\r\nc\n", "a\nx\nb\nc", "a\r\nx\r\nb\r\nc\n")])
def test_line_ends_are_the_originals(original, text, edited):
    reply = claude.Reply(text, "end_turn", {})
    assert edit.read_reply(reply, original, None) == (edited, None, False)


def test_an_answer_that_differs_in_line_ends_only_is_no_edit():
    original = "apple\r\npear\nplum\r\n"
    for ends in ("\n", "\r\n", "\r"):
        text = ends.join(["apple", "pear", "plum"])
        for reply, tag in ((text, None), (f"<edited>{text}</edited>", "edited")):
            reply = claude.Reply(reply, "end_turn", {})
            assert edit.read_reply(reply, original, tag)[0] == original


def test_what_the_judge_costs(tmp_path):
    """docs/by_hand.md has the dollars of --dry_run=true for texts as long as AlpacaEval's"""
    page = (ROOT / "docs/by_hand.md").read_text(encoding="utf-8")
    for questions, dollars in ((805, "1.85"), (300, "0.69")):
        rows = [dict(instruction=f"{i:0168}", output=f"{i:0515}", generator="reference")
                for i in range(questions)]
        write_jsonl(tmp_path / "eval.jsonl", rows)
        ours = [row | dict(output=row["output"][::-1], generator="ours") for row in rows]
        ours[0]["output"] = "1" * 515  # the reverse of zeros is no other answer
        write_jsonl(tmp_path / "outputs.jsonl", ours)
        done = run("evaluate.py", "judge", f"--outputs={tmp_path}/outputs.jsonl",
                   f"--reference={tmp_path}/eval.jsonl", f"--out={tmp_path}/a.jsonl", "--dry_run",
                   ANTHROPIC_API_KEY="")
        assert f"dollars        {dollars} " in done.stdout, done.stdout[:500]
        assert dollars in page and f"{questions} questions" in page
    # 13 = SFT and the four kept steps of three PPO runs
    total = 13 * 0.69 + 4 * 1.85
    assert f"{total:.0f} dollars, and {total + 27:.0f} with the edits" in page
