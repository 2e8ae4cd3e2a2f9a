#!/usr/bin/env bash
# The study of EXPERIMENTS.md: token rewards on people's edits, and the paper's 2 x 2 in the embedded world. One process at a time.
#
#     MODEL=SmolLM2-135M-Instruct bash extras/study.sh             # -> out/study and EXPERIMENTS.md; the model is a folder
#     MODEL=... OUT=out/study PAIRS=480 SEEDS="0 1" bash extras/study.sh people toy tables    # these parts only
#
# Interrupt it at will: the same command skips what is finished and goes on with the rest. CPU seconds are kept beside each run.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:?a folder of SmolLM2-135M-Instruct, or of another small model}
OUT=${OUT:-out/study}
PYTHON=${PYTHON:-python}
LAYERS=${LAYERS:-12}          # of the model's lowest decoder layers: enough to say which words people take out, at 40% of the cost
SEEDS=${SEEDS:-0 1}           # of the order of pairs
PAIRS=${PAIRS:-480}           # per run of the comparison
LONG=${LONG:-8000}            # pairs of the one long run
TOY_SEEDS=${TOY_SEEDS:-11 12 13 14 15}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
PARTS=${*:-people qa long toy tables}

timed() {  # run a command; append its CPU seconds to $1/cpu.jsonl, also when it was interrupted
    mkdir -p "$1"
    "$PYTHON" -c '
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1] + ".cpu.jsonl", "a") as file:
    file.write(json.dumps(dict(command=sys.argv[3], cpu_s=round(used.ru_utime + used.ru_stime, 1))) + "\n")
sys.exit(code)' "$1" "$PYTHON" "${@:2}"
}
rm_and_figures() {  # out, held-out files, then reward_model.py's flags
    [ -s "$1/rewards.json" ] && return
    timed "$1" reward_model.py --out="$1" --eval_every=0 --log_every=5 "${@:3}"
    timed "$1" evaluate.py rewards --reward_model="$1" --data="$2" --out="$1/rewards.json" --max_tokens=512 --resamples=100
}
first() { [ -s "$3" ] || head -n "$1" "$2" > "$3"; }  # the first rows of a file: sources stand in a drawn order

if [ ! -s "$OUT/backbone/config.json" ]; then
    "$PYTHON" -c '
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1], num_hidden_layers=int(sys.argv[2])).save_pretrained(sys.argv[3])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])' "$MODEL" "$LAYERS" "$OUT/backbone"
fi
RM="--model=$OUT/backbone --dtype=bfloat16 --batch=16 --micro_batch=16 --lr=3e-4 --warmup=0.05"

arms() {  # folder of the data, folder of the runs, held-out file, more flags: every loss on the same pairs, steps and start
    local data=$1 runs=$2 held_out=$3; shift 3
    for seed in $SEEDS; do
        for arm in "sequence sequence 0" "eq3 eq3 0" "eq4 eq4 0" "anchor_0.03 eq4 0.03" "anchor_0.1 eq4 0.1" "anchor_0.3 eq4 0.3" \
                   "gaps_0.1 eq4 0.1 gaps"; do
            set -- "$@"; read -r name loss anchor gaps <<< "$arm"
            rm_and_figures "$runs/seed$seed/$name" "$held_out" $RM "$@" --data="$data/diffs${gaps:+_gaps}.jsonl" \
                --loss="$loss" --anchor="$anchor" --seed="$seed"
        done
    done
}

for part in $PARTS; do case $part in
people)  # ParaDetox: one rewrite of each comment to learn from, the first 250 held-out comments to test on
    P=$OUT/paradetox
    [ -s "$P/edits_train.jsonl" ] || "$PYTHON" data/paradetox/prepare.py ${PARADETOX:+--source=$PARADETOX} --out="$P"
    mkdir -p "$P/few"
    [ -s "$P/few/edits.jsonl" ] || grep -- '-0", "instruction' "$P/edits_train.jsonl" | sed -n "1,${PAIRS}p" > "$P/few/edits.jsonl"
    first 250 "$P/edits_test.jsonl" "$P/few/test.jsonl"
    "$PYTHON" diff.py --data="$P/few/edits.jsonl" --tokenizer="$OUT/backbone" --out="$P/few/diffs.jsonl"
    "$PYTHON" diff.py --data="$P/few/edits.jsonl" --tokenizer="$OUT/backbone" --out="$P/few/diffs_gaps.jsonl" --gaps=true
    arms "$P/few" "$OUT/people" "$P/few/test.jsonl" ;;
esac; done
