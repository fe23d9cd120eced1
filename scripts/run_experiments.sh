#!/usr/bin/env bash
# The quick start in one go: phase 1, the ablation, and what it showed. What is done already is not done again.
#
#   DATASET=digits EPOCHS=5 SEEDS="1 42" scripts/run_experiments.sh --dry-run
#
# DATASET, DATA_DIR, SEEDS, EPOCHS, BATCH_SIZE, LR and OUT change the defaults; further arguments go to both studies.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
OUT=${OUT:-results}
common=(--dataset "${DATASET:-cifar10}" --data_dir "${DATA_DIR:-data}" --batch_size "${BATCH_SIZE:-128}" --lr "${LR:-1e-3}")

# shellcheck disable=SC2086  # SEEDS is a list
"$PYTHON" -m src.trainer.run_phase1_experiments --seeds ${SEEDS:-1 42 123} --epochs "${EPOCHS:-30}" \
    "${common[@]}" --output "$OUT/phase1_results.csv" "$@"
# shellcheck disable=SC2086
"$PYTHON" -m src.trainer.run_ablation_study --seeds ${SEEDS:-1 42 123 456 789} --epochs "${EPOCHS:-25}" \
    "${common[@]}" --output_dir "$OUT/ablation_study" "$@"
if [[ " $* " != *" --dry-run "* && " $* " != *" --dry_run "* ]]; then
    "$PYTHON" -m src.trainer.simple_ablation_analysis "$OUT/ablation_study"
fi
