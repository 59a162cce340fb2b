#!/usr/bin/env bash
# bash reproduce.sh smoke | test | cpu | [table] [--dry-run]
# Everything sets itself up: the active virtual environment is used, else .venv is made.
set -euo pipefail
cd "$(dirname "$0")"

setup() {
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        [ -x .venv/bin/python ] || python3 -m venv .venv
        PATH="$PWD/.venv/bin:$PATH"
    fi
    python -c 'import torch, torchvision, tqdm, matplotlib, pytest, hypothesis' 2>/dev/null ||
        python -m pip install -r requirements.txt
}

tas() { python tas.py "$@"; }

smoke() {  # teacher, search and distillation on synthetic data
    tas prune --data synthetic --arch resnet20 --flops 0.5 --epochs "${EPOCHS:-4}" \
        --batch-size 64 --out runs/smoke
    tas report runs/smoke
}

# The CPU study: ResNet-20 on CIFAR-10 at 0.55 of the MACs; one schedule for all rows. A finished
# part is skipped and an unfinished one is resumed, so the same command goes on where it stopped.
STUDY=results/cifar10-resnet20-cpu
place=(--data "${DATA:-folder}" --data-dir "${DATA_DIR:-data/cifar10}")

row() {  # row NAME SEED TRANSFER [search flags]: find a shape, train it
    local name=$1 seed=$2 transfer=$3 dir=$STUDY/$1-$2
    shift 3
    tas search "${place[@]}" --arch resnet20 --flops 0.55 --epochs 12 --seed "$seed" \
        --out "$dir/search" "$@"
    tas train "${place[@]}" --shape "$dir/search/shape.json" --teacher $STUDY/teacher \
        --transfer "$transfer" --epochs 15 --seed "$seed" --out "$dir/$transfer"
}

published() {  # published SEED TRANSFER
    tas train "${place[@]}" --shape shapes/cifar10-resnet20.json --teacher $STUDY/teacher \
        --transfer "$2" --epochs 15 --seed "$1" --out "$STUDY/published-$1/$2"
}

cpu() {
    tas train "${place[@]}" --arch resnet20 --epochs 20 --out $STUDY/teacher
    for transfer in kd none; do
        for seed in 0 1 2; do
            row tas "$seed" "$transfer"
            row uniform "$seed" "$transfer" --method uniform
            row random "$seed" "$transfer" --method random
        done
        for seed in 0 1 2; do published "$seed" "$transfer"; done
        [ "$transfer" = none ] || for seed in 0; do  # ablations, with KD
            row width "$seed" kd --search width
            row depth "$seed" kd --search depth
            row all "$seed" kd --num-samples 8
            row pad "$seed" kd --align pad
        done
    done
    tas report $STUDY
}

# The paper's CIFAR tables (and ImageNet's where IMAGENET names a folder), on a GPU. EPOCHS and DATA
# shorten the plan for a trial. Finished parts are skipped.
table() {
    local root=runs/table dry=${1:-} data arch flops
    while read -r data arch flops; do
        set -- prune --data "${DATA:-$data}" --arch "$arch" --flops "$flops" \
            --out "$root/$data-$arch" ${EPOCHS:+--epochs "$EPOCHS"} ${BATCH:+--batch-size "$BATCH"}
        [ "$data" = imagenet ] && set -- "$@" --data-dir "$IMAGENET"
        echo "python tas.py $*"
        [ "$dry" = --dry-run ] || tas "$@"
    done < <(printf '%s\n' \
        "cifar10 resnet20 0.550" "cifar10 resnet32 0.506" "cifar10 resnet56 0.473" \
        "cifar10 resnet110 0.470" "cifar10 resnet164 0.719" "cifar100 resnet20 0.550" \
        "cifar100 resnet32 0.615" "cifar100 resnet56 0.487" "cifar100 resnet110 0.474" \
        "cifar100 resnet164 0.691"
        if [ -n "${IMAGENET:-}" ]; then
            printf '%s\n' "imagenet resnet18 0.667" "imagenet resnet50 0.565"
        fi)
    if [ "$dry" = --dry-run ]; then
        echo "each prune: 300 + 600 + 300 epochs of CIFAR (120 each of ImageNet); not timed on a GPU"
    else
        tas report "$root"
    fi
}

mode=${1:-table}
[ "$mode" = --dry-run ] && { table --dry-run; exit; }
setup
case "$mode" in
    smoke) smoke ;;
    test) python -m pytest -q test_tas.py ;;
    cpu) cpu ;;
    table) table "${2:-}" ;;
    *) echo "usage: bash reproduce.sh smoke | test | cpu | [table] [--dry-run]" >&2; exit 2 ;;
esac
