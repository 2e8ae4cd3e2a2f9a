#!/usr/bin/env bash
# Does a run that was killed twenty times equal one that was not? In a tiny world, on CPUs: kill -9
# at random points inside the rollout, the update, the write of a checkpoint, its rename and the
# write of a model folder. Then the weights must be the same to the last bit, and metrics.jsonl must
# have each step once.
#
#     bash extras/study/soak.sh                     # about ten minutes on two cores
#     RANKS=2 SEED=1 bash extras/study/soak.sh      # under torchrun; one of the ranks is killed
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-out/soak}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if [ ! -e "$OUT/world/rm/config.json" ]; then
    W=$OUT/world
    "$PYTHON" data/toy/prepare.py --out="$W/data" --hidden_size=32 --heads=2 --sft_rows=160 \
        --pref_rows=48 --heldout_rows=24 --eval_rows=8
    "$PYTHON" sft.py --model="$W/data/model" --data="$W/data/sft.jsonl" --out="$W/sft" \
        --batch=32 --lr=2e-3
    "$PYTHON" edit.py --data="$W/data/pref.jsonl" --editor=rules --out="$W/edits.jsonl"
    "$PYTHON" diff.py --data="$W/edits.jsonl" --tokenizer="$W/sft" --out="$W/diffs.jsonl"
    "$PYTHON" reward_model.py --model="$W/sft" --data="$W/diffs.jsonl" --out="$W/rm" \
        --micro_batch=8 --lr=1e-3
fi
exec "$PYTHON" extras/study/soak.py drive "$OUT" "${RANKS:-1}" "${SEED:-0}" "${KILLS:-20}"
