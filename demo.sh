#!/usr/bin/env bash
# The whole paper in the embedded world, on two CPU cores: data, SFT, edits, diffs, three reward models, three PPO runs, the judge,
# the tables.
#
#     bash demo.sh                                # -> out/demo, ends with the tables and report.html
#     OUT=out/demo3 bash demo.sh --seed=3         # arguments go to every stage: a seed, or a preset that changes sizes
#
# Interrupt it at will: the same command skips what is finished and goes on with the rest.
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-out/demo}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1  # one job a core, see below
SECONDS=0
trap 'echo; echo "demo.sh: stopped; the same command goes on from here" >&2; trap - INT TERM; kill 0' INT TERM

title() { printf '\n== %s  (%ss)\n' "$1" "$SECONDS"; }
stage() { local name=$1; shift; "$PYTHON" "$@" 2>&1 | sed -u "s|^|[$name] |"; }  # every line says whose it is
together() {  # a command a line, two at a time
    local failed=0
    while IFS= read -r job; do
        while (( $(jobs -rp | wc -l) >= 2 )); do wait -n || failed=1; done
        eval "$job" &
    done
    while (( $(jobs -rp | wc -l) > 0 )); do wait -n || failed=1; done
    return $failed
}
A=("config/demo.toml" "$@")

title "data: prompts, demonstrations, pairs with 25% wrong labels"
stage prepare data/toy/prepare.py "${A[@]}" --out="$OUT/data"

title "SFT: the starting policy"
stage sft sft.py "${A[@]}" --model="$OUT/data/model" --data="$OUT/data/sft.jsonl" --out="$OUT/sft"

title "edits of the less preferred answers, and which tokens they changed"
stage edit edit.py "${A[@]}" --editor=rules --data="$OUT/data/pref.jsonl" --out="$OUT/edits.jsonl"
stage diff diff.py "${A[@]}" --data="$OUT/edits.jsonl" --tokenizer="$OUT/sft" --out="$OUT/diffs.jsonl"
stage edit edit.py "${A[@]}" --editor=rules --data="$OUT/data/pref_heldout.jsonl" --out="$OUT/edits_heldout.jsonl"
stage diff diff.py show "${A[@]}" --data="$OUT/edits.jsonl" --tokenizer="$OUT/sft" --n=2

title "three reward models: the same pairs of less preferred answers, steps and start"
RM="--model=$OUT/sft --eval_data=$OUT/data/pref_heldout.jsonl"
together <<JOBS
stage rm_original reward_model.py ${A[*]} $RM --data=$OUT/data/pref.jsonl --loss=sequence --out=$OUT/rm_original
stage rm_edited   reward_model.py ${A[*]} $RM --data=$OUT/diffs.jsonl --loss=sequence --out=$OUT/rm_edited
stage rm_token    reward_model.py ${A[*]} $RM --data=$OUT/diffs.jsonl --loss=eq4 --anchor=0.3 --out=$OUT/rm_token
JOBS
together <<JOBS
$(for rm in rm_original rm_edited rm_token; do
    echo "stage $rm evaluate.py rewards ${A[*]} --reward_model=$OUT/$rm --data=$OUT/data/pref_heldout.jsonl,$OUT/edits_heldout.jsonl --out=$OUT/$rm/rewards.json"
done)
stage bag_of_tokens extras/study/bag_of_tokens.py --train=$OUT/edits.jsonl --data=$OUT/data/pref_heldout.jsonl --tokenizer=$OUT/data/model --out=$OUT/bag_of_tokens.json
JOBS

# kl_coef is 0.05 of the standard deviation of each arm's return at the first rollout (return_sd in metrics.jsonl), the mean of
# seeds 100 to 102: 0.94, 5.25 and 7.04. The three rewards have different units.
title "three PPO runs: the same settings but for the reward"
PPO="--policy=$OUT/sft --data=$OUT/data/prompts.jsonl"
together <<JOBS
stage ppo_rlhf  ppo.py ${A[*]} $PPO --reward_model=$OUT/rm_original --level=sequence --kl_coef=0.05 --out=$OUT/ppo_rlhf
stage ppo_fine  ppo.py ${A[*]} $PPO --reward_model=$OUT/rm_edited --level=sequence --kl_coef=0.26 --out=$OUT/ppo_fine
stage ppo_token ppo.py ${A[*]} $PPO --reward_model=$OUT/rm_token --level=token --kl_coef=0.35 --out=$OUT/ppo_token
JOBS

judged() {  # MODEL NAME QUESTIONS PREFIX: a model's answers, and the gold judge's verdicts against a fixed reference
    stage "$2" evaluate.py decode "${A[@]}" --model="$1" --data="$3" --generator="$2" --out="$4outputs.jsonl"
    stage "$2" evaluate.py judge "${A[@]}" --judge=gold --outputs="$4outputs.jsonl" --reference="$3" --out="$4annotations.jsonl"
}
title "along training: the questions of val.jsonl to every model that was kept"
together <<JOBS
$(for model in "$OUT/sft" "$OUT"/ppo_*/ "$OUT"/ppo_*/step_*/; do
    model=${model%/}
    echo "judged $model ${model#"$OUT/"} $OUT/data/val.jsonl $model/val_"
done)
JOBS

title "the evaluation: of each run the model that did best there, on questions it was not chosen on"
BEST=$("$PYTHON" evaluate.py best "$OUT/sft" "$OUT"/ppo_*/)
together <<JOBS
$(while read -r run model; do echo "judged $model $run $OUT/data/eval.jsonl $OUT/$run/"; done <<< "$BEST")
JOBS

title "one answer before and after, its tokens by reward: red is bad, green is good"
"$PYTHON" reward_model.py show "${A[@]}" --model="$OUT/rm_token" --data="$OUT/sft/outputs.jsonl,$OUT/ppo_token/outputs.jsonl" --n=1

title "the paper's tables, in miniature"
"$PYTHON" evaluate.py report "${A[@]}" --data="$OUT" --out="$OUT/report.html"
title "done: open $OUT/report.html"
