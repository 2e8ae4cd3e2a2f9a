#!/usr/bin/env bash
# The complete paper in the toy world, on two CPU cores: data, SFT, edits, diffs, three reward
# models, four PPO runs, the judge, the tables.
#
#     bash demo.sh                            # -> out/demo, ends with the tables and report.html
#     OUT=out/demo3 bash demo.sh --seed=3     # arguments go to every stage: a seed, or a preset
#                                             # that changes sizes
#
# Stop it at any time: the same command skips what is finished and resumes the rest. At most two
# jobs run at a time, one per core. The pictures and the report need extras/.
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-out/demo}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
A=("config/demo.toml" "$@")  # the first arguments of every stage
SECONDS=0

# Ctrl-C ends all jobs. If one of two jobs fails, the other one still finishes.
trap 'trap "" TERM; kill 0; echo "demo.sh: stopped; the same command resumes here" >&2; exit 130' \
    INT TERM
trap wait EXIT

title() { printf '\n== %s  (%ss)\n' "$1" "$SECONDS"; }

stage() {  # NAME WORDS...: runs a stage; each line that it prints begins with [NAME]
    local name=$1 status
    shift
    "$PYTHON" "$@" 2>&1 | (trap '' INT TERM; exec sed -u "s|^|[$name] |") || {
        status=$?
        echo "demo.sh: $name failed ($1); fix what it says, then the same command resumes here" >&2
        return $status
    }
}


title "data: prompts, demonstrations, pairs with 25% wrong labels"
stage prepare data/toy/prepare.py "${A[@]}" --out="$OUT/data"
PROBE=$OUT/data/probe.jsonl
PAIRS=$OUT/data/pref.jsonl
HELDOUT=$OUT/data/pref_heldout.jsonl


title "SFT: the starting policy"
stage sft sft.py "${A[@]}" --model="$OUT/data/model" --data="$OUT/data/sft.jsonl" --out="$OUT/sft"


title "edits of the less preferred answers, and which tokens they changed"
stage edit edit.py "${A[@]}" --editor=rules --data="$PAIRS" --out="$OUT/edits.jsonl"
stage diff diff.py "${A[@]}" --data="$OUT/edits.jsonl" --tokenizer="$OUT/sft" \
    --out="$OUT/diffs.jsonl"
stage edit edit.py "${A[@]}" --editor=rules --data="$HELDOUT" --out="$OUT/edits_heldout.jsonl"
stage diff diff.py show "${A[@]}" --data="$OUT/edits.jsonl" --tokenizer="$OUT/sft" --n=2


title "three reward models: the same less preferred answers, number of steps and start"
reward() {  # NAME FLAGS...: trains a reward model, then measures it on held-out pairs
    stage "$1" reward_model.py "${A[@]}" --model="$OUT/sft" --eval_data="$HELDOUT" "${@:2}" \
        --out="$OUT/$1"
    stage "$1" evaluate.py rewards "${A[@]}" --reward_model="$OUT/$1" \
        --data="$HELDOUT,$OUT/edits_heldout.jsonl,$PROBE" --out="$OUT/$1/rewards.json"
}
reward rm_original --data="$PAIRS" --loss=sequence & a=$!
reward rm_edited --data="$OUT/diffs.jsonl" --loss=sequence & b=$!
wait $a
wait $b
reward rm_token --data="$OUT/diffs.jsonl" --loss=eq4 --anchor=0.3 & a=$!
stage bag_of_tokens extras/study/bag_of_tokens.py --train="$OUT/edits.jsonl" --data="$HELDOUT" \
    --tokenizer="$OUT/data/model" --out="$OUT/bag_of_tokens.json" & b=$!
wait $a
wait $b


# The rewards have different units. So kl_coef is a share of the standard deviation of each arm's
# return at the first rollout (return_sd in metrics.jsonl): 16%, 1%, 4% and 2% of 2.10, 6.30, 0.41
# and 9.24, the means of seeds 100 to 105 (extras/study/toy.jsonl). The shares, lam and reward_scale
# are the best of each arm's grid (EXPERIMENTS.md).
title "four PPO runs: sequence level twice, token level at gamma 1 and at gamma 0"
ppo() {  # NAME REWARD_MODEL LEVEL KL_COEF FLAGS...
    stage "$1" ppo.py "${A[@]}" --policy="$OUT/sft" --data="$OUT/data/prompts.jsonl" \
        --reward_model="$OUT/$2" --level="$3" --kl_coef="$4" "${@:5}" --out="$OUT/$1"
}
ppo ppo_rlhf rm_original sequence 0.336 & a=$!
ppo ppo_fine rm_edited sequence 0.063 --lam=0.95 & b=$!
wait $a
wait $b
ppo ppo_token rm_token token 0.0162 --reward_scale=mean & a=$!
ppo ppo_gamma0 rm_token token 0.185 --gamma=0 & b=$!
wait $a
wait $b


title "along training: the questions of val.jsonl to every model that was kept"
judged() {  # MODEL NAME QUESTIONS PREFIX: its answers, and the gold judge's verdicts on them
    stage "$2" evaluate.py decode "${A[@]}" --model="$1" --data="$3" --generator="$2" \
        --out="$4outputs.jsonl"
    stage "$2" evaluate.py judge "${A[@]}" --judge=gold --outputs="$4outputs.jsonl" \
        --reference="$3" --out="$4annotations.jsonl"
}
validate() {  # MODEL...
    local model
    for model in "$@"; do
        model=${model%/}
        judged "$model" "${model#"$OUT/"}" "$OUT/data/val.jsonl" "$model/val_"
    done
}
MODELS=("$OUT/sft" "$OUT"/ppo_*/ "$OUT"/ppo_*/step_*/)
HALF=$((${#MODELS[@]} / 2))
validate "${MODELS[@]:0:HALF}" & a=$!
validate "${MODELS[@]:HALF}" & b=$!
wait $a
wait $b


title "the evaluation: the best model of each run there, on questions it was not chosen on"
final() {  # reads lines "run model"
    local run model
    while read -r run model; do
        judged "$model" "$run" "$OUT/data/eval.jsonl" "$OUT/$run/"
    done
}
BEST=$("$PYTHON" evaluate.py best "$OUT/sft" "$OUT"/ppo_*/)
head -n 2 <<< "$BEST" | final & a=$!
tail -n +3 <<< "$BEST" | final & b=$!
wait $a
wait $b


title "one answer before and after, its tokens by reward: red is bad, green is good"
"$PYTHON" reward_model.py show "${A[@]}" --model="$OUT/rm_token" --n=1 \
    --data="$OUT/sft/outputs.jsonl,$OUT/ppo_gamma0/outputs.jsonl"


title "the report: what came out, the paper's tables in miniature"
"$PYTHON" reward_model.py show "${A[@]}" --model="$OUT/rm_token" --n=20 \
    --json="$OUT/painted.json" "$OUT"/sft/outputs.jsonl "$OUT"/ppo_*/outputs.jsonl
"$PYTHON" evaluate.py report "${A[@]}" --data="$OUT" --out="$OUT/report.html"
title "done: open $OUT/report.html"
