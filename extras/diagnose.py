"""What most likely happened to weights that do not belong to a model, and how to fix it"""
import re


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
