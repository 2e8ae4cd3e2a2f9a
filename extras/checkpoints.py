"""What a run keeps: the model that others load, and what a killed run goes on from, in safetensors by
torch.distributed.checkpoint. No mathematics is in here.

A checkpoint holds weights and Adam's moments. Everything else of a run follows from its config and the step (schedules,
the order of rows, the draws), but for PPO's adaptive KL coefficient, which metrics.jsonl holds. (DCP's default
format is not used: it unpickles.) Saved on any number of ranks, loaded on any other.
"""
import json, os, shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)

from common import RANK, WORLD, barrier

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def training_state(models, optimizer):
    """-> weights, optimizer state, and the tensors of both that a checkpoint holds: of tied weights one. All ranks."""
    weights, moments = get_state_dict(models, optimizer, options=FLAT)
    own = {name for name, _ in models.named_parameters()}  # a tied weight has its first name here
    return weights, moments, {k: v for k, v in {**weights, **moments}.items()
                              if isinstance(v, torch.Tensor) and (k in own or k in moments)}


def save_checkpoint(out, step, models, optimizer):
    """<out>/checkpoint_<step>/: weights and Adam's moments as safetensors, each rank its shard; the earlier one goes.
    All ranks."""
    final, temporary = Path(out, f"checkpoint_{step}"), Path(out, "checkpoint.tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    dcp.save(training_state(models, optimizer)[2], no_dist=not dist.is_initialized(),
             storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=WORLD > 1))
    if RANK == 0:
        os.replace(temporary, final)
        for folder in Path(out).glob("checkpoint_*"):
            if folder != final:
                shutil.rmtree(folder)
    barrier()


def load_checkpoint(out, models, optimizer):
    """Fill models and optimizer from the newest checkpoint -> the steps it has done, 0 without one. All ranks."""
    step = max((int(folder.name.split("_")[1]) for folder in Path(out).glob("checkpoint_*")), default=0)
    if step:
        weights, moments, tensors = training_state(models, optimizer)
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(Path(out, f"checkpoint_{step}"))),
                 no_dist=not dist.is_initialized())
        set_state_dict(models, optimizer, options=FLAT,  # of tied weights both names are filled
                       model_state_dict={k: tensors.get(k, w) for k, w in weights.items()},
                       optim_state_dict={k: tensors.get(k, m) for k, m in moments.items()})
    return step


def save_model(model, tokenizer, out, dtype, *, sequence=False):
    """A Hugging Face folder that anything loads; config.json comes last and makes it valid. All ranks.

    sequence: named ...ForSequenceClassification. That class pools the last id that is not pad: pad must not be eos."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        folder = Path(out, "saving.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, state_dict={name: w.to(dtype).contiguous() for name, w in state.items()})
        config = json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        if sequence:
            config["architectures"] = [name.replace("ForToken", "ForSequence") for name in config["architectures"]]
            ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
            config["pad_token_id"] = next(i for i in ids if i is not None and i != tokenizer.eos_token_id)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config["pad_token_id"])
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, Path(out, file.name))
        folder.rmdir()
    barrier()


def save_step(model, tokenizer, out, step, dtype):
    """<out>/step_<step>/: the model as it was then, a folder that is there only when whole. All ranks."""
    beside, final = Path(out, "saving_step.tmp"), Path(out, f"step_{step}")
    save_model(model, tokenizer, beside, dtype)
    if RANK == 0:
        shutil.rmtree(final, ignore_errors=True)  # of a run that was killed later, and goes on from before
        os.replace(beside, final)
