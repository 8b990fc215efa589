#!/usr/bin/env bash
# Searches on tasks of other kinds: bash searches.sh [lstm|detector|lite|minilm ...]; the README tells what each needs.
set -uo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
cifar10=${AUTOPRUNE_CIFAR10:-cifar10.npz}

search() { # the task's module, its own settings
    local task=$1
    shift
    for budget in flops_60pct latency_70pct; do
        echo "\$ python -m autoprune search task._target_=$task.make_task budget=$budget $*"
        $python -m autoprune search "task._target_=$task.make_task" "budget=$budget" "$@"
        echo "exit $?"
    done
}

for task in ${*:-lstm detector lite minilm}; do
    case $task in
        lstm) search lstm finetune.epochs=1 ;;
        detector) search detector evaluator.images=128 strategy.sweep_levels=3 finetune.epochs=4 ;;
        lite) search lite "task.data=$cifar10" criterion=taylor evaluator.images=400 evaluator.recalibration=8 evaluator.short.epochs=0.1 evaluator.short.lr_fraction=0.25 finetune.epochs=3 finetune.lr_fraction=0.75 ;;
        minilm) search minilm evaluator.images=200 strategy.sweep_levels=4 evaluator.short.epochs=0.05 finetune.epochs=0.5 ;;
    esac
done
