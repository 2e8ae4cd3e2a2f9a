"""reward_model.py's two forwards and its pictures, the data of people's edits, and the baselines
that their figures are compared with.

    pytest tests/test_reward_model.py
"""
import json, random, re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest, torch
from transformers import (AutoModelForTokenClassification, Gemma2Config, LlamaConfig,
                          MistralConfig, Qwen2Config, Qwen3Config)

import common, reward_model
from plumbing import files
from extras.report import show_rewards
from plumbing import record
from conftest import rows_of
from data.paradetox import prepare as paradetox
from data.qa_feedback import prepare as qa_feedback
from extras.study import baselines, tables as study_tables
from test_diff import Text


# ---------------------------------------------------------------- the rewards of pairs

def tiny_model(Config=LlamaConfig, attention="sdpa", **options):
    """Three layers with random weights, and a head that gives one number per token"""
    torch.manual_seed(0)
    config = Config(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                    num_attention_heads=4, num_key_value_heads=2, num_labels=1, head_dim=8,
                    token_classification_bias=False, classifier_dropout=0.0, **options)
    Auto = AutoModelForTokenClassification
    return Auto.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def tiny():
    return tiny_model().double()


def drawn_pairs(seed, prompts):
    """One pair for each name in prompts. The same name is the same prompt; ids and lengths are
    drawn."""
    draw = random.Random(seed)

    def ids(longest):
        return [draw.randrange(50) for _ in range(draw.randint(1, longest))]

    drawn = {}
    for name in sorted(set(prompts)):
        drawn[name] = ids(12)
    pairs = []
    for name in prompts:
        w = ids(9)
        l = ids(9)
        changed_w = [draw.randrange(2) for _ in w]
        changed_l = [draw.randrange(2) for _ in l]
        pairs.append((drawn[name], w, l, changed_w, changed_l))
    return pairs


def alone(model, prompt, answer):
    """The rewards of an answer in a row of its own: no padding, no other answer, [T]"""
    ids = torch.tensor([prompt + answer])
    return model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt):, 0]


def assert_as_alone(model, pairs, scored, tolerance):
    """Each answer has the rewards that it gets alone, and 0 after its end"""
    for side in (0, 1):  # w, l
        r, response_mask, changed = scored[3 * side:3 * side + 3]
        for i, pair in enumerate(pairs):
            answer = pair[1 + side]
            T = len(answer)
            want = alone(model, pair[0], answer)
            assert torch.allclose(r[i, :T], want, atol=tolerance, rtol=0)
            assert want.abs().max() > 1e-3, "all rewards are 0: the comparison would say nothing"
            assert (r[i, T:] == 0).all()
            assert response_mask[i, :T].all() and response_mask[i].sum() == T
            assert changed[i, :T].tolist() == pair[3 + side] and changed[i, T:].sum() == 0


FORMS = [reward_model.score_pairs, reward_model.score_pairs_shared_prompt]
PROMPTS = [(0,), (0, 1, 2), (0, 1, 0, 2, 0)]  # one pair; no prompt twice; three pairs share one


@pytest.mark.parametrize("score", FORMS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_answers_get_the_rewards_that_they_get_alone(tiny, score, prompts):
    pairs = drawn_pairs(len(prompts), prompts)
    assert_as_alone(tiny, pairs, score(tiny, pairs, "cpu"), 1e-12)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_both_forms_agree(prompts):
    """float32, answers and prompts of different lengths"""
    model = tiny_model()
    pairs = drawn_pairs(len(prompts), prompts)
    plain = reward_model.score_pairs(model, pairs, "cpu")
    shared = reward_model.score_pairs_shared_prompt(model, pairs, "cpu")
    for a, b in zip(plain, shared, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.allclose(a.double(), b.double(), atol=1e-5, rtol=0)
    assert plain[0].abs().max() > 1e-3 and plain[3].abs().max() > 1e-3


GEMMA_2 = dict(Config=Gemma2Config, attention="eager", sliding_window=4)
OTHERS = {
    "Gemma 2": GEMMA_2,  # a sliding window in every second layer, and soft-capping
    "Gemma 2, soft-capping alone": GEMMA_2 | dict(layer_types=["full_attention"] * 3),
    "Qwen 2, a window in its upper layers": dict(
        Config=Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "Mistral, a window in all layers": dict(Config=MistralConfig, sliding_window=4),
    "Llama in eager attention": dict(attention="eager"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_plain_form_is_used_where_the_mask_is_not_exact(name):
    model = tiny_model(**OTHERS[name])
    assert not reward_model.prompt_can_be_shared(model)
    score = reward_model.fastest_scorer(model)
    assert score is reward_model.score_pairs
    pairs = drawn_pairs(5, (0, 1, 0, 2, 0))
    assert_as_alone(model, pairs, score(model, pairs, "cpu"), 1e-5)


@pytest.mark.parametrize("name", ["Qwen 2, a window in its upper layers",
                                  "Mistral, a window in all layers", "Llama in eager attention"])
def test_the_shared_prompt_would_be_wrong_there(name):
    """What prompt_can_be_shared prevents: without it the rewards would be others"""
    model = tiny_model(**OTHERS[name])
    pairs = drawn_pairs(5, (0, 1, 0, 2, 0))
    plain = reward_model.score_pairs(model, pairs, "cpu")
    shared = reward_model.score_pairs_shared_prompt(model, pairs, "cpu")
    assert (plain[0] - shared[0]).abs().max() > 1e-3


@pytest.mark.parametrize("Config", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_the_prompt_is_shared_where_the_mask_is_exact(Config):
    model = tiny_model(Config)
    score = reward_model.fastest_scorer(model)
    assert score is reward_model.score_pairs_shared_prompt
    pairs = drawn_pairs(5, (0, 1, 0, 2, 0))
    assert_as_alone(model, pairs, score(model, pairs, "cpu"), 1e-5)


@pytest.mark.parametrize("score", FORMS)
def test_the_gradient_is_that_of_answers_alone(tiny, score):
    pairs = drawn_pairs(7, (0, 1, 0))

    def gradient(parts):
        tiny.zero_grad()
        for part in parts:
            scored = score(tiny, part, "cpu")
            losses = reward_model.pair_losses(*scored, loss="eq3", anchor=0.1)
            losses.sum().backward()
        gradients = [p.grad.flatten() for p in tiny.parameters() if p.grad is not None]
        return torch.cat(gradients)

    together = gradient([pairs])
    one_by_one = gradient([[pair] for pair in pairs])
    assert torch.allclose(together, one_by_one, atol=1e-7)  # Llama's norms round to float32


@contextmanager
def tokens_fed(model):
    """-> a list that gets the number of ids of each forward, padding included"""
    fed = []

    def count(module, positional, given):
        fed.append(given["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield fed
    hook.remove()


def test_a_prompt_is_computed_once(tiny):
    pairs = [([1] * 30, [2] * 5, [3] * 5, [0] * 5, [0] * 5)] * 4
    with tokens_fed(tiny) as fed:
        reward_model.score_pairs_shared_prompt(tiny, pairs, "cpu")
    assert fed == [30 + 4 * 10], "the prompt once, no padding"
    with tokens_fed(tiny) as fed:
        reward_model.score_pairs(tiny, pairs, "cpu")
    assert fed == [8 * 35], "the plain form: two rows a pair"


def test_pair_files_are_packed_without_much_padding(tiny):
    """Micro-batches of similar length: of what is computed, at most a seventh is padding"""
    draw = random.Random(0)
    pairs = []
    for k in range(49):
        prompt = [k + 1] * draw.randint(10, 100)
        w = [2] * draw.randint(5, 80)
        l = [2] * draw.randint(5, 80)
        pairs.append((prompt, w, l, [1] * len(w), [1] * len(l)))
    costs = [reward_model.pair_cost(pair) for pair in pairs]
    with torch.no_grad(), tokens_fed(tiny) as fed:
        for part in common.my_micro_batches(range(len(pairs)), costs, 4):
            mine = [pairs[i] for i in part]
            reward_model.score_pairs_shared_prompt(tiny, mine, "cpu")
    assert sum(costs) <= sum(fed) <= sum(costs) * 7 / 6, (sum(fed), sum(costs))


# ---------------------------------------------------------------- show

ROWS = [
    dict(
        id="<1>",
        instruction="List <b>four</b> fruits.",
        input="",
        original="apple\nbear<script>",
        edited="apple\npear",
    ),
    dict(id="2", instruction="x", input="long " * 100, original="tea\x1b[2J", edited="milk"),
]


def test_show_paints_tokens_in_the_terminal_and_in_a_page(world, tmp_path, capsys):
    files.write_jsonl(tmp_path / "edits.jsonl", ROWS)
    flags = [f"--model={world}/rm", f"{tmp_path}/edits.jsonl"]
    show_rewards.main(flags)
    shown = capsys.readouterr().out
    assert (
        shown.count("R = ") == 4
        and "\x1b" not in shown
        and "bear" in re.sub(r"\([+-]\d+\.\d\)", "", shown)
    )
    page = tmp_path / "page.html"
    show_rewards.main([*flags, f"--html={page}"])
    text = Text(page.read_text(encoding="utf-8"))
    tokens = "".join(data for tag, data in text.spans if tag in ("span", "div"))
    assert (
        "script" not in text.tags
        and "apple↵\nbear<script></s>" in tokens
        and "apple↵\npear</s>" in tokens
        and "tea␛[2J" in tokens
    )
    assert any(tag == "b" and data == "List <b>four</b> fruits." for tag, data in text.spans)
    assert page.read_text().count('class="changed"') >= 2 and "://" not in page.read_text()


def test_show_writes_the_numbers_of_its_page(world, tmp_path, capsys):
    """--json: r_t and R of every answer. The page has the same r_t, on one scale for all rows, and
    the strongest have their number. A file of somebody else is not replaced."""
    files.write_jsonl(tmp_path / "edits.jsonl", ROWS)
    flags = [f"--model={world}/rm", f"{tmp_path}/edits.jsonl"]
    path = tmp_path / "painted.json"
    page = tmp_path / "page.html"
    show_rewards.main([*flags, f"--json={path}", f"--html={page}"])
    assert "R = " not in capsys.readouterr().out
    numbers = json.loads(path.read_text())
    assert numbers["level"] == "token" and numbers["reward_model"] == f"{world}/rm"
    answers = [answer for row in numbers["rows"] for answer in row["answers"]]
    assert [answer["field"] for answer in answers] == ["original", "edited"] * 2
    assert [answer["text"] for answer in answers] == ["apple\nbear<script>", "apple\npear",
                                                      "tea\x1b[2J", "milk"]
    rewards = []
    for answer in answers:
        mean = sum(answer["rewards"]) / len(answer["rewards"])
        assert answer["R"] == pytest.approx(mean, abs=1e-5)
        assert "".join(answer["tokens"]).startswith(answer["text"])
        rewards += answer["rewards"]

    text = page.read_text()
    assert re.findall(r'title="([-+][\d.]+)"', text) == [f"{r:+.3f}" for r in rewards]
    largest = max(map(abs, rewards))
    shades = re.findall(r'style="background:rgb\(var\(--\w+\) / ([\d.]+)\)"', text)
    expected = [0.75 * (abs(r) / largest) ** 0.5 for r in rewards]
    assert [float(shade) for shade in shades] == pytest.approx(expected, abs=0.006)
    strong = [f"{r:+.1f}" for r in rewards if abs(r) > largest / 2]
    assert re.findall(r'data-r="(.*?)"', text) == strong
    assert "<h2>row 1 <small>&lt;1&gt;</small></h2>" in text

    show_rewards.main([*flags, f"--json={path}"])
    path.write_text("{}")
    with pytest.raises(SystemExit):
        show_rewards.main([*flags, f"--json={path}"])
    assert "is no file of show's" in capsys.readouterr().err and path.read_text() == "{}"


def test_show_pairs_answers_by_their_question(world, tmp_path, capsys):
    questions = [dict(instruction=f"List {n} fruits.", input="") for n in ("two", "three")]
    files.write_jsonl(
        tmp_path / "a.jsonl",
        [row | {"output": f"apple {i}", "cut": None} for i, row in enumerate(questions)],
    )
    files.write_jsonl(
        tmp_path / "b.jsonl",
        [row | {"output": f"pear {i}"} for i, row in enumerate(questions)][::-1],
    )
    show_rewards.main([f"--model={world}/rm", f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"])
    shown = re.sub(r"\([+-]\d+\.\d\)", "", capsys.readouterr().out)
    first, second = shown.split("List three")
    assert "apple 0" in first and "pear 0" in first and "apple 1" in second and "pear 1" in second
    for flag, words in (
        (f"{world}/data/pref.jsonl", "holds no answers to show"),
        ("--n=0", "--n must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            show_rewards.main([f"--model={world}/rm", f"{tmp_path}/a.jsonl", flag])
        assert words in capsys.readouterr().err


# ---------------------------------------------------------------- the data of people's edits

TSV = """toxic\tneutral1\tneutral2\tneutral3
you damn fool , go .\tYou should go.\tyou , go .\t
what "" crap\tWhat ""\t\t
a broken line\t\t\t
shit , no\tno\tNo\tOh no
"""


def prepared(module, **options):
    record.LOCKS.clear()
    module.main(module.Config(**options))


def test_paradetox(tmp_path, capsys):
    (tmp_path / "paradetox.tsv").write_text(TSV)
    prepared(paradetox, source=str(tmp_path / "paradetox.tsv"), out=str(tmp_path / "out"), test=1)
    train, test = (
        rows_of(tmp_path / "out/edits_train.jsonl"),
        rows_of(tmp_path / "out/edits_test.jsonl"),
    )
    assert "1 of 4 lines left out" in capsys.readouterr().out
    assert len(test) == 1 and not {row["original"] for row in train} & {
        row["original"] for row in test
    }
    every = {(row["original"], row["edited"]) for row in train + test}
    assert (
        every
        <= {
            ("you damn fool , go .", "You should go."),
            ("you damn fool , go .", "you , go ."),
            ('what "" crap', 'What ""'),
            ("shit , no", "no"),
            ("shit , no", "No"),
            ("shit , no", "Oh no"),
        }
        and len(every) >= 4
    )
    assert (
        all(row["editor"] == "human" and row["instruction"] for row in train + test)
        and test[0]["id"] == "paradetox-1-0"
    )
    assert files.read_jsonl(tmp_path / "out/edits_train.jsonl", __import__("diff").EDIT_FIELDS)


def test_prepare_reads_an_address_and_refuses_what_is_no_such_file(tmp_path, capsys):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/paradetox.tsv" else 404)
            self.end_headers()
            self.wfile.write(TSV.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    prepared(paradetox, source=f"{address}/paradetox.tsv", out=str(tmp_path / "out"), test=1)
    assert len(rows_of(tmp_path / "out/edits_test.jsonl")) == 1
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    (tmp_path / "other.json").write_text('[{"question": "q"}]')
    for module, source, message in (
        (paradetox, f"{address}/none", "404"),
        (paradetox, str(tmp_path / "none.tsv"), "FileNotFoundError"),
        (paradetox, str(tmp_path / "other.tsv"), "toxic, neutral1"),
        (qa_feedback, str(tmp_path / "other.json"), "no dev_feedback.json (KeyError: 'feedback')"),
        (qa_feedback, str(tmp_path / "other.tsv"), "no dev_feedback.json"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            prepared(module, source=source, out=str(tmp_path / "none"))
        said = capsys.readouterr().err
        assert (
            end.value.code == 2
            and message in said
            and len(said.strip().splitlines()) == 1
            and "--source=" in said
        )
    server.shutdown()
    assert not (tmp_path / "none").exists()


def test_qa_feedback(tmp_path):
    def question(k):
        return {
            "question": f"q{k}",
            "passages": [["Title", "Title\n\nOne two.", "Three."], ["Other", "four five six"]],
            **{f"prediction {i}": f"answer {i} of {k}" for i in (1, 2, 3, 4)},
            "preference": [0, 1, 2, 0, 0, 1],
            "feedback": {
                "errors": [{"error type": "Irrelevant", "explanation": "", "start": 0, "end": 6}],
                "missing-info": [],
                "corrected-prediction": f"better {k} ",
            },
        }

    (tmp_path / "dev.json").write_text(json.dumps([question(k) for k in range(4)]))
    prepared(qa_feedback, source=str(tmp_path / "dev.json"), out=str(tmp_path / "out"), words=5)
    halves = [
        [rows_of(tmp_path / f"out/{kind}_{half}.jsonl") for kind in ("edits", "pref")]
        for half in ("train", "test")
    ]
    assert [[len(rows) for rows in half] for half in halves] == [[2, 6], [2, 6]]
    questions = [{row["instruction"] for rows in half for row in rows} for half in halves]
    assert (
        questions[0] | questions[1] == {"q0", "q1", "q2", "q3"} and not questions[0] & questions[1]
    )
    row = next(row for half in halves for row in half[0] if row["id"] == "qa-2")
    assert (row["input"], row["original"], row["edited"]) == (
        "One two. Three. four five",
        "answer 1 of 2",
        "better 2",
    )
    assert row["error_spans"] == [[0, 6, "Irrelevant"]]
    assert [
        (r["output_1"][7], r["output_2"][7], r["preference"])
        for half in halves
        for r in half[1]
        if r["instruction"] == "q2"
    ] == [("1", "3", 1), ("1", "4", 2), ("3", "4", 1)]


# ---------------------------------------------------------------- the baselines


def test_surface_reads_spacing_and_capitals_only():
    surface, won = baselines.surface, baselines.won
    assert (
        won(surface("Go away."), surface("go away .")) == 100
        and won(surface("go ."), surface("Go.")) == 0
    )
    assert (
        won(surface("Go."), surface("go.")) == 100 and won(surface("kind"), surface("rude")) == 50
    )
    assert baselines.careless(["go", " away", " .", "!", " no"]) == [1, 0, 1, 0, 0]
    assert baselines.careless(["Go"]) == [0]


def test_bag_of_tokens_finds_what_was_always_removed(world, tmp_path):
    """In every train pair "bear" is replaced: the bag finds it, what looks at spacing does not;
    with other rewrites, people agree"""

    def row(k, original, edited):
        return dict(id=str(k), instruction="x", input="", original=original, edited=edited)

    files.write_jsonl(
        tmp_path / "train.jsonl",
        [
            row(0, "apple\nbear", "apple\npear"),
            row(1, "bear\nplum", "tea\nplum"),
            row(2, "apple\nbear", "apple\nplum"),
        ],
    )
    files.write_jsonl(tmp_path / "test.jsonl", [row(3, "plum\nbear", "plum\napple")])
    record.LOCKS.clear()
    baselines.main(
        baselines.Config(
            train=str(tmp_path / "train.jsonl"),
            data=str(tmp_path / "test.jsonl"),
            tokenizer=f"{world}/sft",
            out=str(tmp_path / "figures.jsonl"),
            resamples=2,
        )
    )
    (figures,) = rows_of(tmp_path / "figures.jsonl")
    assert figures["removed_bag"]["auroc"] == 1 and figures["removed_surface"]["auroc"] < 0.7
    assert (
        figures["removed_people"] == dict(auroc=1.0, texts=1)
        and figures["n"] == 1
        and figures["n_train"] == 3
    )


def test_study_tables_say_what_the_run_folders_hold(tmp_path):
    def group(auroc):
        return dict(auroc=auroc, standard_error=0.01)

    for seed, removed in ((0, 0.7), (1, 0.9)):
        home = tmp_path / f"study/people/seed{seed}/eq4"
        home.mkdir(parents=True)
        figures = dict(
            n=7,
            accuracy=90.0 + 4 * seed,
            standard_error=1.0,
            longer_wins=12.5,
            kind="edits",
            tokens=dict(
                removed=group(removed),
                added=group(0.6),
                unchanged=dict(mean=-1.0, sd=2.0),
                eos=dict(mean=0.5),
            ),
        )
        (home / "rewards.json").write_text(json.dumps([figures]))
        (home / "run.json").write_text(json.dumps(dict(config=dict(batch=4, lr=1e-4), pairs=8)))
        (home / "metrics.jsonl").write_text('{"step": 1}\n')
        (home.parent / "eq4.cpu.jsonl").write_text(
            '{"stage": "reward_model.py", "cpu_s": 120}\n{"stage": "x", "cpu_s": 9}\n'
        )
    out = tmp_path / "EXPERIMENTS.md"
    out.write_text(f"before\n{study_tables.BEGIN}\nold\n{study_tables.END}\nafter\n")
    study_tables.main(study_tables.Config(data=str(tmp_path / "study"), out=str(out)))
    text = out.read_text()
    assert (
        "| Eq. 4 | 92.0 ± 2.0 | 0.800 ± 0.100 | 0.600 ± 0.000 | -1.00 (sd 2.00) | +0.50 | 2 | 2.0 |"
        in text
    )
    assert "8 pairs, 2 steps of 4, lr 0.0001; tested on 7 others" in text and "12.5%" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    study_tables.main(study_tables.Config(data=str(tmp_path / "study"), out=str(out)))
    assert out.read_text() == text
    out.write_text("no place")
    with pytest.raises(SystemExit):
        study_tables.main(study_tables.Config(data=str(tmp_path / "study"), out=str(out)))
