"""A local model's weights, checked before they are loaded: the headers of its safetensors files are
compared with the model, and what is wrong is named. Without this file the same mistakes end the run
when transformers has loaded the model (plumbing/models.py: check_loaded)."""
if __name__ == "__main__":
    raise SystemExit("weights.py is a part of: python ppo.py")

import json, re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import extract_weight_conversions_for_model

from plumbing.models import compare
from plumbing.ranks import fail


def check_headers(path, flag, model, head):
    """fail() unless the folder's tensors are the model's, by name and shape. Allowed: a new head
    (head="zero"), the head that it replaces, the second name of tied weights."""
    files = weight_files(Path(path), flag)
    if not files or extract_weight_conversions_for_model(model):
        return  # new weights; or tensors that transformers renames: load_model compares them
    prefix = model.base_model_prefix + "."  # backbones are saved with and without it
    stored = {n.removeprefix(prefix): s for n, s in stored_shapes(files, flag).items()}
    wanted = {n.removeprefix(prefix): tuple(w.shape) for n, w in model.state_dict().items()}

    missing = set(wanted) - set(stored)
    unexpected = set(stored) - set(wanted)
    reshaped = [n for n in wanted if stored.get(n, wanted[n]) != wanted[n]]
    compare(path, flag, model, head, missing, unexpected, reshaped)


def weight_files(folder, flag):
    """The safetensors files of a local model, [] without any; fail() if a shard is missing"""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return sorted(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors"))
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (folder / name).exists():
            fail(f"--{flag}={folder} lacks {name}, which {index.name} lists; copy it again")
    return [folder / name for name in names]


def stored_shapes(files, flag):
    """name -> shape of the tensors in the files, from their headers: no weight is read"""
    shapes = {}
    for file in files:
        if file.open("rb").read(19) == b"version https://git":
            fail(f"--{flag}: {file} is a Git LFS pointer, not the weights; run: git lfs pull")
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            fail(f"--{flag}: {file} is not a complete safetensors file ({error}); copy it again")
    return shapes


def looks_like(missing, unexpected, reshaped):
    """Sorted names of tensors -> "; it looks like ...", for the end of an error message"""
    text = " ".join(unexpected)
    if "lora_" in text:
        return "; it looks like an adapter: merge it into its base model first"
    if re.search("qweight|absmax|weight_scale|SCB", text):
        return "; it looks quantised: save it in bfloat16 first"
    prefix = common_prefix(missing, unexpected)
    if prefix:
        return f"; every name seems to begin with {prefix!r}: rename the tensors"
    if "score.weight" in reshaped:
        return "; a reward model has one label, this one has several"
    if missing == ["score.weight"] and unexpected:
        return f"; its head has another name: rename {unexpected[0]} to score.weight"
    if missing == ["lm_head.weight"]:
        return "; it looks like a backbone without its language-model head"
    if unexpected and not missing and all(name.endswith("bias") for name in unexpected):
        return "; it was trained with a bias that this model does not have"
    return "; was it saved by another tool, or for another model?"


def common_prefix(missing, unexpected):
    """What stands before a missing name in an unexpected one, such as "module." """
    for name in unexpected:
        for wanted in missing:
            if name.endswith("." + wanted):
                return name.removesuffix(wanted)
    return ""
