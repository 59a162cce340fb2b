#!/usr/bin/env bash
# bash reproduce.sh smoke | test | cpu | [table] [--dry-run]
set -euo pipefail
cd "$(dirname "$0")"

setup() {  # a python that has the packages is used, else the active environment or .venv gets them
    local packages='import torch, torchvision, tqdm, matplotlib, pytest, hypothesis'
    python -c "$packages" 2>/dev/null && return
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        [ -x .venv/bin/python ] || python3 -m venv .venv
        PATH="$PWD/.venv/bin:$PATH"
    fi
    python -c "$packages" 2>/dev/null || python -m pip install -r requirements.txt
}

tas() { python tas.py "$@"; }

smoke() {  # teacher, search and distillation on synthetic data
    tas prune --data synthetic --arch resnet20 --flops 0.5 --epochs "${EPOCHS:-4}" \
        --batch-size 64 --out runs/smoke
    tas report runs/smoke
}

# The CPU study: ResNet-20 on CIFAR-10 at 0.55 of the MACs; one schedule for all rows. A finished
# part is skipped and an unfinished one is resumed, so the same command goes on where it stopped.
STUDY=${STUDY:-results/cifar10-resnet20-cpu}
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

cpu() {  # most telling first
    tas train "${place[@]}" --arch resnet20 --epochs 20 --out $STUDY/teacher
    seeds() {  # seeds TRANSFER SEED ...
        local transfer=$1 seed
        for seed in "${@:2}"; do
            row tas "$seed" "$transfer"
            row uniform "$seed" "$transfer" --method uniform
            row random "$seed" "$transfer" --method random
        done
    }
    seeds kd 0 1
    row all 0 kd --num-samples 8  # two remedies of a weak search: less noise, and more epochs
    row long 0 kd --epochs 24
    published 0 kd
    row width 0 kd --search width
    row depth 0 kd --search depth
    row pad 0 kd --align pad
    seeds kd 2
    published 1 kd
    published 2 kd
    seeds none 0 1 2
    for seed in 0 1 2; do published "$seed" none; done
    tas report $STUDY/tas-0 $STUDY --out $STUDY  # the figure is of the first
}

# The paper's CIFAR tables (and ImageNet's where IMAGENET names a folder), on a GPU. Finished parts
# are skipped. EPOCHS, DATA and BATCH shorten the plan for a trial; --dry-run only prints it.
plan() {  # data, arch, kept MACs, MACs in millions, thousands of images, epochs, those of the search
    printf '%s\n' "cifar10 resnet20 0.550 41 50 300 600" "cifar10 resnet32 0.506 69 50 300 600" \
        "cifar10 resnet56 0.473 126 50 300 600" "cifar10 resnet110 0.470 253 50 300 600" \
        "cifar10 resnet164 0.719 248 50 300 600" "cifar100 resnet20 0.550 41 50 300 600" \
        "cifar100 resnet32 0.615 69 50 300 600" "cifar100 resnet56 0.487 126 50 300 600" \
        "cifar100 resnet110 0.474 253 50 300 600" "cifar100 resnet164 0.691 248 50 300 600"
    [ -z "${IMAGENET:-}" ] || printf '%s\n' "imagenet resnet18 0.667 1814 1281 120 120" \
        "imagenet resnet50 0.565 4089 1281 120 120"
}

table() {
    local root=runs/table data arch flops macs images epochs searched
    while read -r data arch flops macs images epochs searched; do
        set -- prune --data "${DATA:-$data}" --arch "$arch" --flops "$flops" \
            --out "$root/$data-$arch" ${EPOCHS:+--epochs "$EPOCHS"} ${BATCH:+--batch-size "$BATCH"}
        [ "$data" != imagenet ] || set -- "$@" --data-dir "$IMAGENET"
        echo "python tas.py $*"
        # A training step costs three forward passes of its images, a search step three of one half
        # and two of the other, distillation one of the teacher more.
        [ -z "$dry" ] || awk -v f="$flops" -v m="$macs" -v n="$images" -v e="${EPOCHS:-$epochs}" \
            -v s="${EPOCHS:-$searched}" 'BEGIN {
            p = m * n * (3 * e + 2.5 * s + (3 * f + 1) * e) / 1e6
            printf "    about %.1f x 10^15 MACs: %.1f hours at 10^12 MACs a second\n", p, p / 3.6}'
        [ -n "$dry" ] || tas "$@"
    done < <(plan)
    [ -n "$dry" ] || tas report "$root"
}

mode=${1:-table} dry=
case "$*" in
    smoke | test | cpu | table | "") setup ;;
    --dry-run | "table --dry-run") mode=table dry=yes ;;
    *) echo "usage: bash reproduce.sh smoke | test | cpu | [table] [--dry-run]" >&2; exit 2 ;;
esac
case $mode in
    test) python -m pytest -q test_tas.py ;;
    *) $mode ;;
esac
