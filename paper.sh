#!/usr/bin/env bash
# The paper's complete run; demo.sh is the same in small. AlpacaFarm's data, Claude's edits, SFT,
# three reward models, three PPO runs, Claude as the judge, the tables. The defaults are the
# paper's: LLaMA-7B on 8 GPUs of 80 GB.
#
#     bash paper.sh                                   # -> out/paper; shows the price, then asks
#     bash paper.sh --yes mine.toml --seed=3          # --yes: does not ask. Presets and flags go to
#                                                     # every stage
#     OUT=out/small NPROC=1 bash paper.sh mine.toml   # one GPU: plain python, no torchrun
#
# ANTHROPIC_API_KEY pays for the edits and the verdicts. Stop it at any time: the same command skips
# what is finished, resumes the rest and pays for nothing twice. It does not ask again what Claude
# failed to answer: edit.py and evaluate.py judge do that. The report needs extras/.
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-out/paper}
NPROC=${NPROC:-8}
PYTHON=${PYTHON:-python}
HELDOUT=${HELDOUT:-500}     # the last preference pairs: no reward model learns from them (Table 2)
VAL=${VAL:-300}             # questions of val.jsonl that compare the models kept along training
# The anchor of the token-level reward model; 0 is the paper's. In the toy world PPO collapsed there
# and did not with 0.3 (EXPERIMENTS.md, section 1, d).
ANCHOR=${ANCHOR:-0}

# ppo.py's kl_coef of each arm: AlpacaFarm's for simulated preferences (0.02 for human ones). The
# three rewards have different units: compare kl_coef with return_sd in metrics.jsonl.
KL_RLHF=${KL_RLHF:-0.0067}
KL_FINE=${KL_FINE:-0.0067}
KL_TOKEN=${KL_TOKEN:-0.0067}

export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
SECONDS=0
trap 'echo "paper.sh: stopped; the same command resumes here" >&2; exit 130' INT TERM

YES=""
PRESETS=()
A=()  # the first arguments of every stage
for word in "$@"; do
    if [[ $word == --yes ]]; then
        YES=1
        continue
    fi
    if [[ $word == *.toml ]]; then PRESETS+=("$word"); fi
    A+=("$word")
done

title() { printf '\n== %s  (%ss)\n' "$1" "$SECONDS"; }

stage() {  # NAME WORDS...: runs a stage; each line that it prints begins with [NAME]
    local name=$1 status
    shift
    "$PYTHON" "$@" 2>&1 | (trap '' INT; exec sed -u "s|^|[$name] |") || {
        status=$?
        echo "paper.sh: $name failed; fix what it says, then the same command resumes here" >&2
        return $status
    }
}

ranks() {  # NAME WORDS...: runs a stage on all GPUs
    local name=$1
    shift
    if ((NPROC == 1)); then
        stage "$name" "$@"
    else
        stage "$name" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    fi
}

unpaid() { ! grep -qs '"finished": "' "$1.run.json"; }  # FILE: Claude has not yet finished it

agree() {  # asks before Claude is paid; with --yes it does not
    local answer=""
    if [[ $YES ]]; then return; fi
    read -rp "paper.sh: ask Claude and pay for it? [y/N] " answer || echo
    if [[ $answer != [yY]* ]]; then
        echo "paper.sh: nothing asked; the same command resumes here" >&2
        exit 2
    fi
}


title "data: AlpacaFarm's splits; the last $HELDOUT preference pairs are held out"
stage prepare data/alpacafarm/prepare.py ${PRESETS[@]+"${PRESETS[@]}"} --out="$OUT/data"
D=$OUT/data
LEARNT=$(($(wc -l < "$D/pref.jsonl") - HELDOUT))
if ((LEARNT <= 0)); then
    echo "paper.sh: HELDOUT=$HELDOUT leaves no preference pair to learn from" >&2
    exit 2
fi
head -n "$LEARNT" "$D/pref.jsonl" > "$OUT/pref.jsonl"
tail -n "$HELDOUT" "$D/pref.jsonl" > "$OUT/pref_heldout.jsonl"
head -n "$VAL" "$D/val.jsonl" > "$OUT/val.jsonl"


title "Claude's edits of the less preferred answers"
edits() {  # NAME FLAGS...: of the pairs to learn from, and of those held out
    local part
    for part in "" _heldout; do
        if unpaid "$OUT/edits$part.jsonl"; then
            stage "$1" edit.py "${A[@]}" --data="$OUT/pref$part.jsonl" \
                --out="$OUT/edits$part.jsonl" "${@:2}"
        fi
    done
}
if unpaid "$OUT/edits.jsonl" || unpaid "$OUT/edits_heldout.jsonl"; then
    edits price --dry_run=true
    agree
    edits claude
else
    echo "finished; nothing to pay"
fi


title "SFT: the starting policy"
ranks sft sft.py "${A[@]}" --data="$D/sft.jsonl" --out="$OUT/sft"
stage diff diff.py "${A[@]}" --data="$OUT/edits.jsonl" --tokenizer="$OUT/sft" \
    --out="$OUT/diffs.jsonl"


title "three reward models: the same less preferred answers and start, one epoch each"
reward() {  # NAME FLAGS...: trains a reward model, then measures it on held-out pairs
    ranks "$1" reward_model.py "${A[@]}" --model="$OUT/sft" --eval_data="$OUT/pref_heldout.jsonl" \
        "${@:2}" --out="$OUT/$1"
    ranks "$1" evaluate.py rewards "${A[@]}" --reward_model="$OUT/$1" \
        --data="$OUT/pref_heldout.jsonl,$OUT/edits_heldout.jsonl" --out="$OUT/$1/rewards.json"
}
reward rm_original --data="$OUT/pref.jsonl" --loss=sequence
reward rm_edited --data="$OUT/diffs.jsonl" --loss=sequence
reward rm_token --data="$OUT/diffs.jsonl" --loss=eq4 --anchor="$ANCHOR"


# With activation checkpointing the update takes 35 GB per GPU instead of 57, so the rollout's 55
# are the peak (python ppo.py --plan=true).
title "three PPO runs: the same settings except for the reward"
ppo() {  # NAME REWARD_MODEL LEVEL KL_COEF
    ranks "$1" ppo.py --activation_checkpointing=true "${A[@]}" --policy="$OUT/sft" \
        --data="$D/prompts.jsonl" --reward_model="$OUT/$2" --level="$3" --kl_coef="$4" \
        --out="$OUT/$1"
}
ppo ppo_rlhf rm_original sequence "$KL_RLHF"
ppo ppo_fine rm_edited sequence "$KL_FINE"
ppo ppo_token rm_token token "$KL_TOKEN"


title "along training: $VAL questions of val.jsonl to every model that was kept"
answers() {  # MODEL NAME QUESTIONS PREFIX
    ranks "$2" evaluate.py decode "${A[@]}" --model="$1" --data="$3" --generator="$2" \
        --out="$4outputs.jsonl"
}
verdict() {  # NAME QUESTIONS PREFIX FLAGS...: Claude compares the answers with the reference's
    stage "$1" evaluate.py judge "${A[@]}" --outputs="$3outputs.jsonl" --reference="$2" \
        --out="$3annotations.jsonl" "${@:4}"
}
verdicts() {  # QUESTIONS PREFIX...: shows the price of the first, asks, then judges all of them
    local questions=$1 prefix rest=()
    for prefix in "${@:2}"; do
        if unpaid "${prefix}annotations.jsonl"; then rest+=("$prefix"); fi
    done
    if ((${#rest[@]} == 0)); then
        echo "finished; nothing to pay"
        return
    fi
    verdict price "$questions" "${rest[0]}" --dry_run=true
    if ((${#rest[@]} > 1)); then
        echo "There are ${#rest[@]} of these, each at about that price; nothing is paid twice."
    fi
    agree
    for prefix in "${rest[@]}"; do
        verdict claude "$questions" "$prefix"
    done
}
KEPT=()
for run in sft ppo_rlhf ppo_fine ppo_token; do
    for model in "$OUT/$run" "$OUT/$run"/step_*; do
        if [[ ! -e $model/config.json ]]; then continue; fi
        answers "$model" "$run" "$OUT/val.jsonl" "$model/val_"
        KEPT+=("$model/val_")
    done
done
verdicts "$OUT/val.jsonl" "${KEPT[@]}"


title "the evaluation: the best model of each run there"
BEST=$("$PYTHON" evaluate.py best "$OUT/sft" "$OUT"/ppo_*/)
CHOSEN=()
while read -r run model; do
    answers "$model" "$run" "$D/eval.jsonl" "$OUT/$run/"
    CHOSEN+=("$OUT/$run/")
done <<< "$BEST"
verdicts "$D/eval.jsonl" "${CHOSEN[@]}"


title "the report: what came out, the paper's tables"
stage paint reward_model.py show "${A[@]}" --model="$OUT/rm_token" --n=20 \
    --json="$OUT/painted.json" "$OUT"/sft/outputs.jsonl "$OUT"/ppo_*/outputs.jsonl
"$PYTHON" evaluate.py report "${A[@]}" --data="$OUT" --out="$OUT/report.html"
title "done: open $OUT/report.html"
