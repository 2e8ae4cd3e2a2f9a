"""The children of bench.py: each runs one trainer, a step at a time, when it is told to.

    python child.py ppo '{"code": ..., "world": ..., ...}'

A child says {"ready": true} on its standard output, waits for a line on its standard input, takes a
step, reports its figures, and so on until the input is closed. So several trainers alternate step
by step, and one that waits takes no CPU time.
"""
import contextlib, json, os, sys, time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import flops, world

CHANNEL = []  # the file to bench.py
COMPUTED = {}  # phase -> tokens that a model was given in this step
MARKS = []  # [phase, wall seconds, CPU seconds] at the beginning of each phase of this step


def tell(**message):
    print(json.dumps(message), file=CHANNEL[0], flush=True)


def wait():
    """Tell that a step can begin, and wait for it. The end of the input ends the process."""
    tell(ready=True)
    if not sys.stdin.readline():
        os._exit(0)
    COMPUTED.clear()
    MARKS.clear()


def phase(name):
    """What follows is this phase of the step"""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    MARKS.append((name, time.perf_counter(), time.process_time()))


def report(**figures):
    """The step has ended: seconds by phase, tokens computed by phase, peak memory of the process"""
    phase("end")
    wall, cpu = {}, {}
    for (name, w0, c0), (_, w1, c1) in zip(MARKS, MARKS[1:]):
        wall[name] = wall.get(name, 0) + w1 - w0
        cpu[name] = cpu.get(name, 0) + c1 - c0
    tell(wall=wall, cpu=cpu, computed=COMPUTED, peak_gb=peak_gb(), **figures)


def peak_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9


def count(model):
    """Count the tokens that the model is given, by phase -> the model"""
    def before(module, args, kwargs):
        name = MARKS[-1][0] if MARKS else "load"
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        COMPUTED[name] = COMPUTED.get(name, 0) + ids.numel()
    model.register_forward_pre_hook(before, with_kwargs=True)
    return model


# ---------------------------------------------------------------- ours

def ids_in(tokenizer, row):
    """Instead of encode_prompt"""
    return [int(i) for i in row["instruction"].split()]


def ids_of(tokenizer, text, *, eos=True):
    """Instead of encode_response"""
    return [int(i) for i in text.split()] + [tokenizer.eos_token_id] * eos


def draws_of_length(lengths, vocabulary, uniforms):
    """Instead of row_uniforms: numbers with which a response has its length from the list. Tokens
    are drawn by inverse CDF and EOS is the last id, so the largest number below 1 draws EOS."""
    def row_uniforms(length, seed, *key):
        row = key[-1]
        u = uniforms(length, seed, *key) * (1 - 64 / vocabulary)
        T = lengths[row % len(lengths)]
        if T < world.RESPONSE:
            u[T - 1] = 1 - 2 ** -24
        return u
    return row_uniforms


def counted(stage):
    load = stage.load_model
    stage.load_model = lambda *args, **options: count(load(*args, **options))


def ppo_child(cfg, size, lengths):
    """Steps of ppo.main"""
    import ppo
    from plumbing import watch
    roll_out, update = ppo.roll_out, ppo.update
    counted(ppo)
    ppo.encode_prompt = ids_in
    ppo.row_uniforms = draws_of_length(lengths, size.vocabulary, ppo.row_uniforms)
    watch.listen_for_signals = lambda: None

    def timed_roll_out(*args):
        wait()
        phase("rollout")
        responses = roll_out(*args)
        assert [len(ids) for ids in responses] == lengths, "a response has another length"
        phase("score")
        return responses

    def timed_update(*args):
        phase("update")
        stats = update(*args)
        report()
        return stats

    ppo.roll_out, ppo.update = timed_roll_out, timed_update
    home = cfg["world"]
    ppo.main(ppo.Config(
        policy=f"{home}/policy", reward_model=f"{home}/rm", data=f"{home}/prompts.jsonl",
        out=cfg["out"], overwrite=True, dtype=cfg["dtype"], steps=1_000_000, lr_epochs=1e9,
        save_every=1_000_000, resume_every=1_000_000, rollout_batch=size.rows,
        rollout_micro_batch=size.rows, score_micro_batch=size.rows, batch=size.rows // 2,
        micro_batch=size.micro_batch, query_len=world.PROMPT, response_len=world.RESPONSE))


def timed_steps(stage):
    """A step of sft.py or reward_model.py begins where it looks for signals"""
    def step_begins(*args):
        if MARKS:
            report()
        wait()
        phase("step")
    stage.stop_if_told = step_begins
    stage.listen_for_signals = lambda: None
    counted(stage)
    stage.encode_prompt, stage.encode_response = ids_in, ids_of


def sft_child(cfg, size, lengths):
    import sft
    timed_steps(sft)
    sft.alpaca_template = lambda tokenizer: None  # it is made of words, and nothing is saved here
    home = cfg["world"]
    sft.main(sft.Config(model=f"{home}/policy", data=f"{home}/sft.jsonl", out=cfg["out"],
                        overwrite=True, dtype=cfg["dtype"], epochs=1_000_000, batch=size.rows,
                        micro_batch=size.micro_batch, resume_every=10 ** 9))


def reward_model_child(cfg, size, lengths):
    import reward_model
    timed_steps(reward_model)
    home = cfg["world"]
    reward_model.main(reward_model.Config(
        model=f"{home}/policy", data=[f"{home}/pref.jsonl"], out=cfg["out"], loss="sequence",
        overwrite=True, dtype=cfg["dtype"], epochs=1_000_000, batch=size.rows // 2,
        micro_batch=size.micro_batch // 2, resume_every=10 ** 9))


def decode_child(cfg, size, lengths):
    """A step is a group of evaluate.py decode"""
    import evaluate
    answer = evaluate.answer
    counted(evaluate)
    evaluate.encode_prompt = ids_in
    evaluate.row_uniforms = draws_of_length(lengths, size.vocabulary, evaluate.row_uniforms)

    def timed_answer(*args):
        wait()
        phase("step")
        answers = answer(*args)
        report()
        return answers

    evaluate.answer = timed_answer
    home = cfg["world"]
    evaluate.decode(evaluate.DecodeConfig(
        model=f"{home}/policy", data=f"{home}/prompts.jsonl", out=f"{cfg['out']}.jsonl",
        overwrite=True, dtype=cfg["dtype"], batch=size.rows, response_len=world.RESPONSE,
        temperature=1.0, top_p=1.0))


def floor_child(cfg, size, lengths):
    """The machine's rate, measured between the others' steps"""
    while True:
        wait()
        phase("rate")
        rates = {dtype: flops.matmul_rate(dtype) for dtype in ("float32", "bfloat16")}
        report(rates=rates)


# ---------------------------------------------------------------- TRL

def trl_child(cfg, size, lengths):
    """Steps of TRL's PPOTrainer, on the same models, lengths and batches"""
    if cfg["dtype"] == "bfloat16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from datasets import Dataset
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                              AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback)
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    home = cfg["world"]
    tokenizer = AutoTokenizer.from_pretrained(f"{home}/policy", padding_side="left")
    load = dict(dtype=torch.float32, attn_implementation="sdpa")

    def classifier():
        model = AutoModelForSequenceClassification.from_pretrained(f"{home}/rm", num_labels=1,
                                                                   **load)
        count(model.model)
        return model

    policy = count(AutoModelForCausalLM.from_pretrained(f"{home}/policy", **load))
    reference = count(AutoModelForCausalLM.from_pretrained(f"{home}/policy", **load))
    value, reward_model = classifier(), classifier()

    class EndAt(LogitsProcessor):
        """A response ends where the list says, and not before"""
        def __call__(self, input_ids, scores):
            t = input_ids.shape[1] - world.PROMPT
            scores[:, [tokenizer.pad_token_id, tokenizer.eos_token_id]] = -torch.inf
            for row, length in enumerate(lengths):
                if t == length - 1 and length < world.RESPONSE:
                    scores[row] = -torch.inf
                    scores[row, tokenizer.eos_token_id] = 0
            return scores

    generate = policy.generate
    policy.generate = lambda **options: generate(
        logits_processor=LogitsProcessorList([EndAt()]), **options)

    batch_generation, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def timed_generation(*args):
        wait()
        phase("rollout")
        result = batch_generation(*args)
        ids = result[0][:, world.PROMPT:]
        found = (ids != tokenizer.pad_token_id).sum(1).tolist()
        assert found == lengths, "a response has another length"
        phase("score")
        return result

    def timed_whiten(values, mask, shift_mean=True):
        whitened = whiten(values, mask, shift_mean)
        if shift_mean:  # of the advantages: the last one before the update
            phase("update")
        return whitened

    class Reports(TrainerCallback):
        def on_step_end(self, *args, **options):
            report()

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generation, timed_whiten
    rows = [ids_in(tokenizer, json.loads(line)) for line in open(f"{home}/prompts.jsonl")]
    args = PPOConfig(
        output_dir=cfg["out"], report_to=[], save_strategy="no", logging_strategy="no",
        num_sample_generations=0, disable_tqdm=True, gradient_checkpointing=False, bf16=False,
        per_device_train_batch_size=size.micro_batch,
        gradient_accumulation_steps=size.rows // size.micro_batch, num_mini_batches=2,
        num_ppo_epochs=2, total_episodes=1_000_000 * size.rows,
        local_rollout_forward_batch_size=size.rows, response_length=world.RESPONSE,
        stop_token="eos", temperature=1.0, kl_coef=0.0067, cliprange=0.2, vf_coef=0.1,
        cliprange_value=0.2, gamma=1.0, lam=1.0, whiten_rewards=True, learning_rate=1e-5,
        use_cpu=not torch.cuda.is_available())
    trainer = PPOTrainer(args, tokenizer, policy, reference, reward_model,
                         Dataset.from_dict({"input_ids": rows}), value, callbacks=[Reports()])
    trainer.train()


CHILDREN = dict(ppo=ppo_child, trl=trl_child, sft=sft_child, reward_model=reward_model_child,
                decode=decode_child, floor=floor_child)


def main(kind, cfg):
    size = world.SIZES[cfg["size"]]
    lengths = world.response_lengths(cfg["lengths"], size.rows)
    CHANNEL.append(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what the trainers print
    sys.argv = [f"{kind}.py"]
    if kind == "floor":
        world.make(cfg["world"], size, cfg["lengths"])
    if kind != "trl":
        sys.path.insert(0, cfg["code"])
    with contextlib.suppress(KeyboardInterrupt):
        CHILDREN[kind](cfg, size, lengths)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
