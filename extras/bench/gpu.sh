#!/usr/bin/env bash
# Does ppo.py work on this machine's GPUs, and how fast? One command, no network, minutes:
#
#     bash extras/bench/gpu.sh            # on all GPUs, with torchrun where there are several
#     bash extras/bench/gpu.sh --small    # tiny models: a minute on a CPU
#
# The exit code is 0 if every check is ok. gpu.py says what is checked.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON_EXEC:-python}" extras/bench/gpu.py "$@"
