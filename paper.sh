#!/usr/bin/env bash
# The paper's run, whole, as demo.sh plays it in small: AlpacaFarm's data, Claude's edits, SFT, three reward models,
# three PPO runs, Claude as the judge, the tables. The defaults are the paper's: LLaMA-7B on 8 GPUs of 80 GB.
#
#     bash paper.sh                                   # -> out/paper; asks before it pays, and shows how much
#     bash paper.sh --yes mine.toml --seed=3          # --yes: asks nothing. Presets and flags go to every stage
#     OUT=out/small NPROC=1 bash paper.sh mine.toml   # one GPU: plain python, no torchrun
#
# ANTHROPIC_API_KEY pays for the edits and the verdicts. Interrupt it at will: the same command skips what is finished,
# goes on with the rest and pays for nothing twice. What Claude failed to answer is asked again by edit.py and
# evaluate.py judge, not from here.
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-out/paper} NPROC=${NPROC:-8} PYTHON=${PYTHON:-python}
HELDOUT=${HELDOUT:-500}     # preference pairs, the last ones, that no reward model learns from: Table 2
VAL=${VAL:-300}             # questions of val.jsonl on which the models kept along training are compared
ANCHOR=${ANCHOR:-0}         # of the token-level reward model; 0 is the paper's
# ppo.py's kl_coef of each arm: AlpacaFarm's for simulated preferences (0.02 for human ones). The three rewards differ
# in units: hold it against return_sd in metrics.jsonl.
KL_RLHF=${KL_RLHF:-0.0067} KL_FINE=${KL_FINE:-0.0067} KL_TOKEN=${KL_TOKEN:-0.0067}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
SECONDS=0
trap 'echo "paper.sh: stopped; the same command goes on from here" >&2; exit 130' INT TERM

YES="" PRESETS=() A=()
for word in "$@"; do
    [[ $word != --yes ]] || { YES=1; continue; }
    [[ $word != *.toml ]] || PRESETS+=("$word")
    A+=("$word")
done

title() { printf '\n== %s  (%ss)\n' "$1" "$SECONDS"; }
stage() { local name=$1; shift; "$PYTHON" "$@" 2>&1 | (trap '' INT; exec sed -u "s|^|[$name] |"); }
ranks() {  # a stage on all GPUs
    local name=$1; shift
    ((NPROC == 1)) || set -- -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    stage "$name" "$@"
}

JOBS=()
later() {  # OUT WORDS...: a stage that asks Claude; nothing if its output is finished
    if grep -qs '"finished": "' "$1.run.json"; then echo "$1 is finished; nothing to pay"; return; fi
    JOBS+=("$(printf '%q ' "${@:2}" "--out=$1")")
}
pay() {  # N: shows the price of the first N of JOBS, asks, runs them all
    ((${#JOBS[@]})) || return 0
    for job in "${JOBS[@]:0:$1}"; do eval "stage price $job --dry_run=true"; done
    ((${#JOBS[@]} <= $1)) || echo "There are ${#JOBS[@]} of these, each at about that price; nothing is paid twice."
    if [[ ! $YES ]]; then
        read -rp "paper.sh: ask Claude and pay for it? [y/N] " answer || echo
        [[ ${answer:-} == [yY]* ]] || { echo "paper.sh: nothing asked; the same command goes on here" >&2; exit 2; }
    fi
    for job in "${JOBS[@]}"; do eval "stage claude $job"; done
    JOBS=()
}

title "data: AlpacaFarm's splits; the last $HELDOUT preference pairs are held out"
stage prepare data/alpacafarm/prepare.py ${PRESETS[@]+"${PRESETS[@]}"} --out="$OUT/data"
D=$OUT/data
LEARNT=$(($(wc -l < "$D/pref.jsonl") - HELDOUT))
((LEARNT > 0)) || { echo "paper.sh: HELDOUT=$HELDOUT leaves no preference pair to learn from" >&2; exit 2; }
head -n "$LEARNT" "$D/pref.jsonl" > "$OUT/pref.jsonl"
tail -n "$HELDOUT" "$D/pref.jsonl" > "$OUT/pref_heldout.jsonl"
head -n "$VAL" "$D/val.jsonl" > "$OUT/val.jsonl"

title "Claude's edits of the less preferred answers"
later "$OUT/edits.jsonl" edit.py "${A[@]}" --data="$OUT/pref.jsonl"
later "$OUT/edits_heldout.jsonl" edit.py "${A[@]}" --data="$OUT/pref_heldout.jsonl"
pay 2

title "SFT: the starting policy"
ranks sft sft.py "${A[@]}" --data="$D/sft.jsonl" --out="$OUT/sft"
stage diff diff.py "${A[@]}" --data="$OUT/edits.jsonl" --tokenizer="$OUT/sft" --out="$OUT/diffs.jsonl"

title "three reward models: the same less preferred answers, steps and start"
reward() {  # NAME FLAGS...
    ranks "$1" reward_model.py "${A[@]}" --model="$OUT/sft" --eval_data="$OUT/pref_heldout.jsonl" "${@:2}" \
        --out="$OUT/$1"
    ranks "$1" evaluate.py rewards "${A[@]}" --reward_model="$OUT/$1" --out="$OUT/$1/rewards.json" \
        --data="$OUT/pref_heldout.jsonl,$OUT/edits_heldout.jsonl"
}
reward rm_original --data="$OUT/pref.jsonl" --loss=sequence
reward rm_edited --data="$OUT/diffs.jsonl" --loss=sequence
reward rm_token --data="$OUT/diffs.jsonl" --loss=eq4 --anchor="$ANCHOR"

title "three PPO runs: the same settings but for the reward"
ppo() {  # NAME REWARD_MODEL LEVEL KL_COEF; activation checkpointing: the update takes 34.5 GB a GPU instead of 55.6
    ranks "$1" ppo.py --activation_checkpointing=true "${A[@]}" --policy="$OUT/sft" --reward_model="$OUT/$2" \
        --data="$D/prompts.jsonl" --level="$3" --kl_coef="$4" --out="$OUT/$1"
}
ppo ppo_rlhf rm_original sequence "$KL_RLHF"
ppo ppo_fine rm_edited sequence "$KL_FINE"
ppo ppo_token rm_token token "$KL_TOKEN"

judged() {  # RUN MODEL QUESTIONS PREFIX: a model's answers now, their verdicts with the next pay
    ranks "$1" evaluate.py decode "${A[@]}" --model="$2" --data="$3" --generator="$1" --out="$4outputs.jsonl"
    later "$4annotations.jsonl" evaluate.py judge "${A[@]}" --outputs="$4outputs.jsonl" --reference="$3"
}
title "along training: $VAL questions of val.jsonl to every model that was kept"
for run in sft ppo_rlhf ppo_fine ppo_token; do
    for model in "$OUT/$run" "$OUT/$run"/step_*; do
        [[ ! -e $model/config.json ]] || judged "$run" "$model" "$OUT/val.jsonl" "$model/val_"
    done
done
pay 1

title "the evaluation: of each run the model that did best there"
BEST=$("$PYTHON" evaluate.py best "$OUT/sft" "$OUT"/ppo_*/)
while read -r run model; do
    judged "$run" "$model" "$D/eval.jsonl" "$OUT/$run/"
done <<< "$BEST"
pay 1

title "the paper's tables"
"$PYTHON" evaluate.py report "${A[@]}" --data="$OUT" --out="$OUT/report.html"
title "done: open $OUT/report.html"
