#!/usr/bin/env bash
# The study of EXPERIMENTS.md: token rewards on people's edits; the paper's 2 x 2 in the toy world.
#
#     MODEL=FOLDER bash extras/study/study.sh           # -> out/study, the tables of EXPERIMENTS.md
#     MODEL=FOLDER SEEDS="0 1 2" bash extras/study/study.sh people tables   # parts, seeds
#
# FOLDER holds SmolLM2-135M-Instruct or another small model. One process at a time. It can be
# interrupted: the same command skips what is finished. RUN.cpu.jsonl has a run's CPU seconds.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-out/study}
PYTHON=${PYTHON:-python}
LAYERS=${LAYERS:-12}   # only the model's lowest decoder layers, so that two CPU cores are enough
SEEDS=${SEEDS:-0 1}    # of the order of pairs
PAIRS=${PAIRS:-320}    # ParaDetox: pairs of each run of the comparison
LONG=${LONG:-3200}     # ParaDetox: pairs of the first long run; the others take all 18,099
QA=${QA:-250}          # QA-Feedback: corrections of each run, of which about half fit
TOY_SEEDS=${TOY_SEEDS:-11 12 13 14 15}
PARTS=${*:-people long toy qa tables}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

timed() {  # timed RUN python-words...: CPU seconds go to RUN.cpu.jsonl
    mkdir -p "$(dirname "$1")"
    "$PYTHON" -c '
import json, resource, subprocess, sys
run, *words = sys.argv[1:]
try:
    code = subprocess.call([sys.executable, *words])
finally:  # an interrupted run counts too
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = dict(stage=words[0], cpu_s=round(used.ru_utime + used.ru_stime, 1))
    print(json.dumps(row), file=open(f"{run}.cpu.jsonl", "a"))
sys.exit(code)' "$@"
}
measured() {  # measured RUN HELD_OUT flags...: a reward model's figures; its weights are not kept
    [ -s "$1/rewards.json" ] && return
    timed "$1" reward_model.py "${@:3}" --out="$1" --log_every=5
    timed "$1" evaluate.py rewards --reward_model="$1" --data="$2" --out="$1/rewards.json" \
        --resamples=100 ${REWARDS:-}
    rm -f "$1/model.safetensors"
}
diffs() {  # diffs EDITS: both masks, with and without gaps
    for gaps in false true; do
        "$PYTHON" diff.py --data="$1" --tokenizer="$OUT/backbone" --gaps=$gaps --max_tokens="$2" \
            --out="${1%/*}/diffs_$gaps.jsonl"
    done
}
arms() {  # arms RUNS FOLDER HELD_OUT flags...: every loss on the same pairs, order and steps
    # Gaps change neither a sequence reward nor Eq. 3, whose two sums add up to all tokens.
    local seed name loss anchor gaps
    for seed in $SEEDS; do
        while read -r name loss anchor gaps; do
            measured "$1/seed$seed/$name" "$3" --data="$2/diffs_$gaps.jsonl" --loss="$loss" \
                --anchor="$anchor" --seed="$seed" $RM "${@:4}" < /dev/null
        done <<< "sequence sequence 0 false
eq3 eq3 0 false
eq4 eq4 0 false
eq4_gaps eq4 0 true
anchor_003 eq4 0.03 false
anchor_003_gaps eq4 0.03 true
anchor_01 eq4 0.1 false
anchor_01_gaps eq4 0.1 true
anchor_03 eq4 0.3 false
anchor_03_gaps eq4 0.3 true"
    done
}

if [[ "$PARTS" =~ people|long|qa ]] && [ ! -s "$OUT/backbone/tokenizer.json" ]; then
    "$PYTHON" -c '
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, layers, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=int(layers))
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)' \
        "${MODEL:?a folder of SmolLM2-135M-Instruct}" "$LAYERS" "$OUT/backbone"
fi
RM="--model=$OUT/backbone --dtype=bfloat16 --batch=16 --micro_batch=16 --lr=1.5e-4 --warmup=0.05"

first() {  # first N FILE OUT: its first rows
    mkdir -p "${3%/*}" && sed -n "1,${1}p" "$2" > "$3.tmp"
    if cmp -s "$3.tmp" "$3"; then rm "$3.tmp"; else mv "$3.tmp" "$3"; fi
}

P=$OUT/paradetox
if [[ "$PARTS" =~ people|long ]]; then  # ParaDetox: the first rewrite of each comment
    "$PYTHON" data/paradetox/prepare.py ${PARADETOX:+--source="$PARADETOX"} --out="$P"
    [ -s "$P/single.jsonl" ] || sed -n '/"id": "[^"]*-0"/p' "$P/edits_train.jsonl" > "$P/single.tmp"
    [ -s "$P/single.jsonl" ] || mv "$P/single.tmp" "$P/single.jsonl"
fi

for part in $PARTS; do case $part in
people)  # a few pairs, tested on 150 comments of the held-out file; and what needs no reward model
    first "$PAIRS" "$P/single.jsonl" "$OUT/few/edits.jsonl"
    first 150 "$P/edits_test.jsonl" "$OUT/few/test.jsonl"
    diffs "$OUT/few/edits.jsonl" 512
    arms "$OUT/people" "$OUT/few" "$OUT/few/test.jsonl"
    for n in "$PAIRS" 3200 0; do
        [ -s "$OUT/people/baselines_$n.jsonl" ] && continue
        "$PYTHON" extras/study/baselines.py --train="$P/edits_train.jsonl" --limit="$n" \
            --data="$P/edits_test.jsonl" --tokenizer="$OUT/backbone" \
            --out="$OUT/people/baselines_$n.jsonl"
    done ;;
long)  # single runs on many pairs and on all rewrites, tested on the complete held-out file
    first "$LONG" "$P/single.jsonl" "$OUT/many/edits.jsonl"
    first 20000 "$P/edits_train.jsonl" "$OUT/all/edits.jsonl"
    diffs "$OUT/many/edits.jsonl" 512
    diffs "$OUT/all/edits.jsonl" 512
    while read -r name data anchor lr head; do
        measured "$OUT/long/seed0/$name" "$P/edits_test.jsonl" \
            --data="$OUT/$data/diffs_true.jsonl" --loss=eq4 --anchor="$anchor" $RM --batch=32 \
            --micro_batch=32 --lr="$lr" --head_lr_factor="$head" < /dev/null
    done <<< "anchor_03_gaps many 0.3 6e-5 1
anchor_1_gaps many 1 3e-4 0.1
anchor_1_gaps_all all 1 3e-4 0.1
anchor_10_gaps_all all 10 3e-4 0.03" ;;
qa)  # QA-Feedback: corrections that fit 256 tokens; tested on other questions, with marked spans
    "$PYTHON" data/qa_feedback/prepare.py ${QA_FEEDBACK:+--source="$QA_FEEDBACK"} --words=60 \
        --out="$OUT/qa_feedback"
    first "$QA" "$OUT/qa_feedback/edits_train.jsonl" "$OUT/qa/edits.jsonl"
    first 100 "$OUT/qa_feedback/edits_test.jsonl" "$OUT/qa/test.jsonl"
    diffs "$OUT/qa/edits.jsonl" 256
    REWARDS=--max_tokens=256 arms "$OUT/qa" "$OUT/qa" "$OUT/qa/test.jsonl" --max_tokens=256 \
        --batch=8 --micro_batch=8 ;;
toy)  # the toy world, where the truth is known: the same loss on original and on edited pairs
    for seed in $TOY_SEEDS; do
        T=$OUT/toy/seed$seed; A=(config/demo.toml --seed="$seed")
        [ -s "$T/rm_edited/rewards.json" ] && continue
        timed "$T/data" data/toy/prepare.py "${A[@]}" --items=short --out="$T/data"
        timed "$T/sft" sft.py "${A[@]}" --model="$T/data/model" --data="$T/data/sft.jsonl" \
            --out="$T/sft"
        "$PYTHON" edit.py "${A[@]}" --editor=rules --data="$T/data/pref.jsonl" \
            --out="$T/edits.jsonl"
        "$PYTHON" edit.py "${A[@]}" --editor=rules --data="$T/data/pref_heldout.jsonl" \
            --out="$T/edits_heldout.jsonl"
        "$PYTHON" diff.py "${A[@]}" --data="$T/edits.jsonl" --tokenizer="$T/sft" \
            --out="$T/diffs.jsonl"
        for rm in original edited; do
            [ $rm = original ] && data=$T/data/pref.jsonl || data=$T/diffs.jsonl
            timed "$T/rm_$rm" reward_model.py "${A[@]}" --model="$T/sft" --data="$data" \
                --loss=sequence --out="$T/rm_$rm"
            timed "$T/rm_$rm" evaluate.py rewards "${A[@]}" --reward_model="$T/rm_$rm" \
                --out="$T/rm_$rm/rewards.json" \
                --data="$T/data/pref_heldout.jsonl,$T/edits_heldout.jsonl"
        done
    done ;;
tables)
    "$PYTHON" extras/study/tables.py --data="$OUT" --out=EXPERIMENTS.md ;;
*) echo "study.sh: the parts are people, long, toy, qa, tables; got $part" >&2; exit 2 ;;
esac; done
