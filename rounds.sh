#!/usr/bin/env bash
# Rounds: what the policy writes now is edited, and the next reward model learns from old and new
# edits. Edits of the first answers say nothing of the mistakes that a better policy makes.
#
#     bash rounds.sh config/demo.toml                # after demo.sh: one more round by the rules
#     ROUNDS=2 EDITOR=human bash rounds.sh my.toml   # two rounds, edited by a person
#     EDITOR=claude bash rounds.sh my.toml --yes     # shows the price of each round; --yes: goes on
#                                                    # without asking
#
# A round: answers of the last policy to the first N prompts -> edit.py -> diff.py ->
# reward_model.py on all diffs so far -> ppo.py, from SFT again. Round k is in $OUT/round_k, and the
# answers of its policy are edited in round k + 1. Presets and flags go to every stage. Stop it at
# any time: the same command resumes, and asks or pays for nothing twice.
set -euo pipefail
cd "$(dirname "$0")"
RUN=${RUN:-out/demo}                        # the finished run to start from
OUT=${OUT:-$RUN/rounds}
ROUNDS=${ROUNDS:-1}
N=${N:-400}                                 # prompts whose answers are edited in a round
EDITOR=${EDITOR:-rules}                     # rules, human, claude or local
SFT=${SFT:-$RUN/sft}
POLICY=${POLICY:-$RUN/ppo_gamma0}           # its answers are edited first
DIFFS=${DIFFS:-$RUN/diffs.jsonl}            # earlier diffs; several with commas
PROMPTS=${PROMPTS:-$RUN/data/prompts.jsonl}
EVAL=${EVAL:-$RUN/data/eval.jsonl}          # questions for the policy of each round
HELDOUT=${HELDOUT:-$RUN/data/pref_heldout.jsonl,$RUN/data/probe.jsonl}  # for each reward model
JUDGE=${JUDGE:-}                            # gold, claude: also judge those answers
REWARD=${REWARD:---loss=eq4 --anchor=0.3}   # flags of reward_model.py
# Flags of ppo.py. kl_coef is the demo's: another reward model has another unit.
PPO=${PPO:---gamma=0 --kl_coef=0.185}
NPROC=${NPROC:-1}                           # GPUs
PYTHON=${PYTHON:-python}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if ((NPROC == 1)); then export OMP_WAIT_POLICY=passive; fi
trap 'echo "rounds.sh: stopped; the same command resumes here" >&2; exit 130' INT TERM

YES=""
A=()  # the first arguments of every stage
for word in "$@"; do
    if [[ $word == --yes ]]; then YES=1; else A+=("$word"); fi
done

stage() {  # WORDS...
    "$PYTHON" "$@" || {
        echo "rounds.sh: $1 failed; fix what it says, then the same command resumes here" >&2
        return 2
    }
}

ranks() {  # WORDS...: a stage on all GPUs
    if ((NPROC == 1)); then
        stage "$@"
    else
        stage -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    fi
}

price() {  # FILE FLAGS...: what Claude costs; asks before it is paid, except with --yes
    local out=$1 answer=""
    if grep -qs '"finished": "' "$out.run.json"; then return; fi
    stage "${@:2}" --out="$out" --dry_run=true
    if [ "$YES" ]; then return; fi
    read -rp "rounds.sh: ask Claude and pay for it? [y/N] " answer || echo
    if [[ $answer != [yY]* ]]; then
        echo "rounds.sh: nothing asked; the same command resumes here" >&2
        exit 2
    fi
}

mkdir -p "$OUT"
head -n "$N" "$PROMPTS" > "$OUT/prompts.jsonl"

for ((k = 1; k <= ROUNDS; k++)); do
    R=$OUT/round_$k
    echo "== round $k of $ROUNDS: answers of $POLICY"
    ranks evaluate.py decode "${A[@]}" --model="$POLICY" --data="$OUT/prompts.jsonl" \
        --out="$R/answers.jsonl"

    echo "== round $k: edits and diffs"
    EDIT=(edit.py "${A[@]}" --editor="$EDITOR" --data="$R/answers.jsonl")
    if [ "$EDITOR" = claude ]; then price "$R/edits.jsonl" "${EDIT[@]}"; fi
    stage "${EDIT[@]}" --out="$R/edits.jsonl"
    stage diff.py "${A[@]}" --data="$R/edits.jsonl" --tokenizer="$SFT" --out="$R/diffs.jsonl"
    DIFFS=$DIFFS,$R/diffs.jsonl

    echo "== round $k: a reward model on $DIFFS"
    # shellcheck disable=SC2086
    ranks reward_model.py "${A[@]}" $REWARD --model="$SFT" --data="$DIFFS" --out="$R/rm"
    ranks evaluate.py rewards "${A[@]}" --reward_model="$R/rm" --data="$HELDOUT" \
        --out="$R/rm/rewards.json"

    echo "== round $k: PPO, from $SFT"
    # shellcheck disable=SC2086
    ranks ppo.py "${A[@]}" $PPO --policy="$SFT" --reward_model="$R/rm" --data="$PROMPTS" \
        --out="$R/ppo"
    ranks evaluate.py decode "${A[@]}" --model="$R/ppo" --data="$EVAL" --generator="round_$k" \
        --out="$R/ppo/outputs.jsonl"
    if [ "$JUDGE" ]; then
        VERDICTS=(evaluate.py judge "${A[@]}" --judge="$JUDGE" --outputs="$R/ppo/outputs.jsonl"
                  --reference="$EVAL")
        if [ "$JUDGE" = claude ]; then price "$R/ppo/annotations.jsonl" "${VERDICTS[@]}"; fi
        stage "${VERDICTS[@]}" --out="$R/ppo/annotations.jsonl"
    fi
    POLICY=$R/ppo
done
