"""--wandb_project in sft.py, reward_model.py and ppo.py, with a stand-in for wandb.
pytest tests/test_wandb.py"""
import dataclasses, sys
from types import SimpleNamespace

import pytest
from conftest import rows_of

import ppo, reward_model, sft
from plumbing import record, watch

STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo}


class Wandb:
    """Stands in for the module: notes what it is given, or refuses as wandb does"""

    class Error(Exception):
        pass

    def __init__(self, refuses=""):
        self.refuses = refuses
        self.calls = []
        self.rows = []

    def login(self):
        self.calls.append("login")
        if self.refuses == "login":
            raise self.Error("No API key configured.\nUse `wandb login` to log in.")

    def init(self, **fields):
        self.calls.append("init")
        self.fields = fields
        if self.refuses == "init":
            raise self.Error("permission denied: no such project")
        return SimpleNamespace(log=lambda row, step: self.rows.append((step, row)))


@pytest.fixture
def config(world, tmp_path, monkeypatch):
    """name of a stage -> a Config with which it takes a second"""
    monkeypatch.setattr(record, "LOCKS", [])
    for stage in (sft, reward_model):
        monkeypatch.setattr(stage, "listen_for_signals", lambda: None)
    monkeypatch.setattr(watch, "listen_for_signals", lambda: None)
    fields = {
        "sft": dict(model=f"{world}/data/model", data=f"{world}/data/sft.jsonl", epochs=1,
                    batch=64, micro_batch=32),
        "reward_model": dict(model=f"{world}/sft", data=[f"{world}/diffs.jsonl"], steps=2, batch=8),
        "ppo": dict(policy=f"{world}/sft", reward_model=f"{world}/rm", steps=2, rollout_batch=8,
                    data=f"{world}/data/prompts.jsonl", batch=8, response_len=4)}

    def of(name, **more):
        Config = STAGES[name].Config
        return Config(out=str(tmp_path / name), wandb_project="mine", **(fields[name] | more))

    return of


@pytest.mark.parametrize("name", STAGES)
def test_each_row_of_metrics_is_sent(config, monkeypatch, name):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = config(name)
    STAGES[name].main(cfg)
    rows = rows_of(f"{cfg.out}/metrics.jsonl")
    assert len(rows) >= 2 and wandb.rows == [(row["step"], row) for row in rows]
    assert wandb.calls == ["login", "init"]
    assert wandb.fields["config"] == dataclasses.asdict(cfg)
    assert (wandb.fields["project"], wandb.fields["resume"]) == ("mine", "allow")
    first = wandb.fields["id"]

    # The project cannot change the result, so the finished run is finished without it, too.
    record.LOCKS.clear()
    STAGES[name].main(dataclasses.replace(cfg, wandb_project=None))
    assert wandb.calls == ["login", "init"]
    assert rows_of(f"{cfg.out}/metrics.jsonl") == rows
    if name != "ppo":
        return

    # A continued run is the same run there.
    record.LOCKS.clear()
    ppo.main(dataclasses.replace(cfg, steps=3))
    assert wandb.fields["id"] == first and [step for step, _ in wandb.rows] == [0, 1, 2]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("why, said", [
    ("package", "wandb is not installed; pip install wandb"),
    ("extras", "--wandb_project needs the folder extras/"),
    ("login", "--wandb_project=mine: No API key configured. Run: wandb login")])
def test_a_mirror_that_cannot_be_had_ends_the_run_before_it_starts(config, monkeypatch, capsys,
                                                                   name, why, said):
    """Nothing is written, no model is loaded, and what an earlier run left there stays"""
    module = {"package": None, "extras": Wandb(), "login": Wandb("login")}[why]
    monkeypatch.setitem(sys.modules, "wandb", module)
    if why == "extras":
        monkeypatch.setitem(sys.modules, "extras.wandb_mirror", None)  # as if it were deleted
    stage = STAGES[name]
    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    cfg = config(name, overwrite=True)
    for left in ([], ["run.json"]):
        for file in left:
            (record.Path(cfg.out)).mkdir()
            (record.Path(cfg.out) / file).write_text("{}")
        with pytest.raises(SystemExit) as end:
            stage.main(cfg)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and said in line, line
        assert [path.name for path in record.Path(cfg.out).glob("*")] == left


def test_a_project_that_is_refused_ends_the_run_in_one_line(config, monkeypatch, capsys):
    """Only wandb.init can know it: no model is loaded, and the same command starts later"""
    monkeypatch.setitem(sys.modules, "wandb", Wandb("init"))
    cfg = config("sft")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sft, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        sft.main(cfg)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "no such project" in line

    record.LOCKS.clear()
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sft.main(cfg)
    assert len(wandb.rows) == len(rows_of(f"{cfg.out}/metrics.jsonl")) > 0
