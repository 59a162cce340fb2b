#!/usr/bin/env bash
# bash reproduce.sh NAME [--dry-run]; `bash reproduce.sh help` lists the names. A finished part is
# skipped and an unfinished one is resumed, so the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

help() {
    cat <<'END'
bash reproduce.sh NAME [--dry-run]     --dry-run prints the commands and, of most, what they cost

  smoke      teacher, search and distillation on synthetic data: a few minutes on two cores
  test       the tests
  cpu        ResNet-20 on CIFAR-10 at 0.55 of the MACs, short schedule: eight hours of two cores
  budgets    the same at 0.2, 0.3 and 0.4 of the MACs
  latency    the same for ResNet-20 and ResNet-56 under MACs and under milliseconds
  full20     ResNet-20 on CIFAR-10 with the paper's schedule: a day of two quiet cores
  table      the paper's rows of TAS with KD, CIFAR-10 and CIFAR-100 (and ImageNet's where IMAGENET
             names its folder); the name may be left out
  table1     CIFAR-100, ResNet-32: how sizes are found x how knowledge is transferred
  table2     CIFAR-10, ResNet-32: 1, 2, 3, 5 and 8 candidates mixed
  table3     CIFAR-10, ResNet-56: widths, depths and both
  figure3    CIFAR-10, ResNet-56, search alone: interpolation or padding x Gumbel or softmax, and
             without cost

  SEEDS="0 1 2" repeats (not smoke, cpu, full20); EPOCHS=1 DATA=synthetic BATCH=512 makes a trial of
  minutes of it; ROOT=DIR puts the runs there (runs/NAME; not smoke). cpu, budgets, latency and
  full20 read CIFAR-10 as image files from data/cifar10 unless DATA says otherwise.
END
}

setup() {  # a python that has the packages is used, else the active environment or .venv gets them
    local packages='import torch, torchvision, tqdm, matplotlib, pytest, hypothesis'
    python -c "$packages" 2>/dev/null && return
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        .venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv .venv
        PATH="$PWD/.venv/bin:$PATH"
    fi
    python -c "$packages" 2>/dev/null || python -m pip install -r requirements.txt
}

run() {  # a command, or in a dry run its line
    if [ -n "$dry" ]; then echo "python $*"; else python "$@"; fi
}

cost() {  # MACs of the unpruned network in millions, thousands of images, passes through each image
    [ -z "$dry" ] || awk -v m="$1" -v n="$2" -v passes="$3" 'BEGIN { p = m * n * passes / 1e6
        printf "    about %.2f x 10^15 MACs: %.1f hours at 10^12 MACs a second\n", p, p / 3.6 }'
}

# Passes: a training step costs three forward passes of its images (forward and twice backward), a
# search step three of one half and two of the other, distillation one of the teacher more.
# Epochs of the teacher and of the search, how many pruned networks, their share of MACs and epochs.
passes() {
    awk -v t="${EPOCHS:-$1}" -v s="${EPOCHS:-$2}" -v e="${EPOCHS:-${5:-300}}" -v k="$3" -v f="$4" \
        -v teacher="$1" -v search="$2" 'BEGIN { print 3 * t * (teacher > 0) \
            + 2.5 * s * (search > 0) + k * (3 * f + 1) * e }'
}

fixed_cost() {  # MACs and passes of a plan, unless its epochs or seeds are others
    [ -n "${EPOCHS:-}${SEEDS:-}" ] || cost "$1" 50 "$2"
}

smoke() {
    run tas.py prune --data synthetic --arch resnet20 --flops 0.5 --epochs "${EPOCHS:-4}" \
        --batch-size 64 --out runs/smoke
    run tools/report.py runs/smoke
}

test() {  # those of tas.py and those of the tools side by side, on a core each
    local log status=0
    [ -z "$dry" ] || { run -m pytest -q test_tas.py tools; return; }
    log=$(mktemp)
    export OMP_NUM_THREADS=1
    python -m pytest -q tools >"$log" 2>&1 &
    trap "kill $! 2>/dev/null || true" EXIT
    python -m pytest -q test_tas.py || status=$?
    wait $! || status=$?
    trap - EXIT
    cat "$log"
    rm "$log"
    return "$status"
}

# ---- Studies on a CPU ---------------------------------------------------------------------------

small=(--data "${DATA:-folder}" --data-dir "${DATA_DIR:-data/cifar10}" ${BATCH:+--batch-size "$BATCH"})

searching=(tas.py) arch=resnet20

row() {  # row STUDY NAME SEED TRANSFER EPOCHS TARGET [search flags]: find a shape, train it
    local dir=$1/$2-$3 seed=$3 transfer=$4 epochs=$5 target=$6
    shift 6
    run "${searching[@]}" search "${small[@]}" --arch "$arch" --flops "$target" \
        --seed "$seed" --epochs "${EPOCHS:-12}" --out "$dir/search" "$@"
    run tas.py train "${small[@]}" --shape "$dir/search/shape.json" --teacher "$teacher" \
        --transfer "$transfer" --epochs "${EPOCHS:-$epochs}" --seed "$seed" --out "$dir/$transfer"
}

published() {  # published STUDY SEED TRANSFER EPOCHS
    run tas.py train "${small[@]}" --shape shapes/cifar10-resnet20.json --teacher "$teacher" \
        --transfer "$3" --epochs "${EPOCHS:-$4}" --seed "$2" --out "$1/published-$2/$3"
}

cpu() {  # most telling first
    local study=${ROOT:-runs/cpu} seed transfer
    teacher=$study/teacher
    run tas.py train "${small[@]}" --arch resnet20 --epochs "${EPOCHS:-20}" --out "$teacher"
    seeds() {  # seeds TRANSFER SEED ...
        transfer=$1
        for seed in "${@:2}"; do
            row "$study" tas "$seed" "$transfer" 15 0.55
            row "$study" uniform "$seed" "$transfer" 15 0.55 --method uniform
            row "$study" random "$seed" "$transfer" 15 0.55 --method random
        done
    }
    seeds kd 0 1
    row "$study" all 0 kd 15 0.55 --num-samples 8  # two remedies of a weak search: less noise,
    row "$study" long 0 kd 15 0.55 --epochs "${EPOCHS:-24}"  # and more epochs
    published "$study" 0 kd 15
    row "$study" width 0 kd 15 0.55 --search width
    row "$study" depth 0 kd 15 0.55 --search depth
    row "$study" pad 0 kd 15 0.55 --align pad
    seeds kd 2
    for seed in 1 2; do published "$study" "$seed" kd 15; done
    seeds none 0 1 2
    for seed in 0 1 2; do published "$study" "$seed" none 15; done
    fixed_cost 41 "$(awk 'BEGIN { print 3 * 20 + 9 * 2.5 * 12 + (17 * 2.65 + 12 * 1.65) * 15 }')"
    run tools/report.py "$study/tas-0" "$study" --out "$study"
}

budgets() {
    local study=${ROOT:-runs/budgets} seed target
    teacher=results/cifar10-resnet20-cpu/teacher
    for seed in ${SEEDS:-0 1}; do
        for target in 0.3 0.2 0.4; do
            row "$study" "uniform-$target" "$seed" kd 15 "$target" --method uniform
            row "$study" "tas-$target" "$seed" kd 15 "$target"
        done
        # Of depths alone one network is near 0.3, which needs no search, and none near the others.
        row "$study" depth-0.3 "$seed" kd 15 0.3 --search depth --method random
        for target in 0.3 0.2 0.4; do
            row "$study" "random-$target" "$seed" kd 15 "$target" --method random
        done
    done
    for target in 0.3 0.2 0.4; do
        row "$study" "random-$target" 2 kd 15 "$target" --method random
    done
    # Beyond the paper: searches that pad, one from nothing and others from the teacher's weights.
    row "$study" pad-0.3 0 kd 15 0.3 --align pad
    searching=(tools/warm.py "$teacher")
    warm() {  # warm TARGET SEED
        row "$study" "warm-$1" "$2" kd 15 "$1" --align pad --tau-start 3 --epochs "${EPOCHS:-4}"
    }
    for seed in ${SEEDS:-0 1}; do
        for target in 0.3 0.2 0.4 0.55; do warm "$target" "$seed"; done
    done
    warm 0.55 2
    fixed_cost 41 "$(awk 'BEGIN { print (7 * 12 + 9 * 4) * 2.5 + (30 * 1.9 + 3 * 2.65) * 15 }')"
    run tools/report.py "$study"
}

latency() {  # scaled widths, and searches under MACs, in multiples of 8 and under milliseconds
    local study=${ROOT:-runs/latency} seed arch macs
    while read -r arch macs; do
        teacher=$study/$arch-teacher
        run tas.py train "${small[@]}" --arch "$arch" --epochs "${EPOCHS:-20}" --out "$teacher"
        run tools/latency.py "$arch" ${BATCH:+--batch-size "$BATCH"} -o "$study/$arch.json"
        for seed in ${SEEDS:-0 1}; do
            row "$study" "$arch-uniform" "$seed" kd 15 0.4 --method uniform
            row "$study" "$arch-macs" "$seed" kd 15 0.4
            row "$study" "$arch-macs8" "$seed" kd 15 0.4 --round 8
            row "$study" "$arch-time" "$seed" kd 15 0.6 --cost "$study/$arch.json"
        done
        run tools/bench.py "$arch" --shape "$study/$arch"-*/search --json "$study/$arch-times.json"
        run tools/times.py "$study/$arch-times.json"
        fixed_cost "$macs" "$(awk 'BEGIN { print 3 * 20 + 6 * 2.5 * 12 + 8 * 2.2 * 15 }')"
    done <<<$'resnet20 41\nresnet56 126'
    run tools/report.py "$study"
}

full20() {
    local study=${ROOT:-runs/full20}
    teacher=$study/teacher
    run tas.py train "${small[@]}" --arch resnet20 --epochs "${EPOCHS:-300}" --out "$teacher"
    published "$study" 0 kd 300
    row "$study" tas 0 kd 300 0.55 --epochs "${EPOCHS:-600}"
    row "$study" uniform 0 kd 300 0.55 --method uniform
    row "$study" random 0 kd 300 0.55 --method random
    cost 41 50 "$(passes 300 600 4 0.55)"
    run tools/report.py "$study"
}

# ---- The paper's experiments, on a GPU ----------------------------------------------------------
# tools/graphs.py is tas.py with a step as a single launch where that is possible.

trial=(${EPOCHS:+--epochs "$EPOCHS"} ${BATCH:+--batch-size "$BATCH"})

table() {  # the targets are the achieved costs of the paper's rows
    local root=${ROOT:-runs/table} data arch share macs images epochs searched seed
    while read -r data arch share macs images epochs searched; do
        for seed in ${SEEDS:-0}; do
            set -- tools/graphs.py prune --data "${DATA:-$data}" --arch "$arch" --flops "$share" \
                --seed "$seed" --out "$root/$data-$arch-$seed" "${trial[@]}"
            [ "$data" != imagenet ] || set -- "$@" --data-dir "$IMAGENET"
            run "$@"
            cost "$macs" "$images" "$(passes "$epochs" "$searched" 1 "$share" "$epochs")"
        done
    done < <(
        printf '%s 300 600\n' "cifar10 resnet20 0.550 41 50" "cifar10 resnet32 0.506 69 50" \
            "cifar10 resnet56 0.473 126 50" "cifar10 resnet110 0.470 253 50" \
            "cifar10 resnet164 0.719 248 50" "cifar100 resnet20 0.550 41 50" \
            "cifar100 resnet32 0.615 69 50" "cifar100 resnet56 0.487 126 50" \
            "cifar100 resnet110 0.474 253 50" "cifar100 resnet164 0.691 248 50"
        [ -z "${IMAGENET:-}" ] || printf '%s 120 120\n' "imagenet resnet18 0.667 1814 1281" \
            "imagenet resnet50 0.565 4089 1281")
    run tools/report.py "$root"
}

teacher() {  # teacher DATA ARCH MACS SEED
    run tools/graphs.py train --data "${DATA:-$1}" --arch "$2" --seed "$4" --out "$root/teacher-$4" \
        "${trial[@]}"
    cost "$3" 50 "$(passes 300 0 0 1)"
}

ablation() {  # ablation DATA ARCH MACS SHARE NAME SEED "TRANSFER ..." [search flags]
    local data=${DATA:-$1} arch=$2 macs=$3 share=$4 dir=$root/$5-$6 seed=$6 transfers=$7 transfer
    shift 7
    local teacher=$root/teacher-$seed searched=600
    run tools/graphs.py search --data "$data" --arch "$arch" --flops "$share" --seed "$seed" \
        --out "$dir/search" "${trial[@]}" "$@"
    for transfer in $transfers; do
        run tools/graphs.py train --data "$data" --shape "$dir/search/shape.json" --teacher "$teacher" \
            --transfer "$transfer" --seed "$seed" --out "$dir/$transfer" "${trial[@]}"
    done
    case "$*" in *random* | *uniform*) searched=0 ;; esac
    cost "$macs" 50 "$(passes 0 "$searched" "$(wc -w <<<"$transfers")" "$share")"
}

table1() {
    local root=${ROOT:-runs/table1} seed
    for seed in ${SEEDS:-0}; do
        set -- cifar100 resnet32 69
        teacher "$@" "$seed"
        ablation "$@" 0.595 predefined "$seed" "none init kd" --method uniform
        ablation "$@" 0.620 random "$seed" "none init kd" --method random --search width
        ablation "$@" 0.615 tas "$seed" "none init kd" --search width
    done
    run tools/report.py "$root"
}

table2() {
    local root=${ROOT:-runs/table2} seed mixed
    for seed in ${SEEDS:-0}; do
        teacher cifar10 resnet32 69 "$seed"
        for mixed in 1 2 3 5 8; do
            ablation cifar10 resnet32 69 0.506 "mixed$mixed" "$seed" kd --num-samples "$mixed"
        done
    done
    run tools/report.py "$root"
    run tools/bench.py resnet32 --candidates 1 2 3 5 8 ${BATCH:+--batch-size "$BATCH"} \
        --json "$root/bench.json"
}

table3() {
    local root=${ROOT:-runs/table3} seed what
    for seed in ${SEEDS:-0}; do
        teacher cifar10 resnet56 126 "$seed"
        for what in width depth both; do
            ablation cifar10 resnet56 126 0.473 "$what" "$seed" kd --search "$what"
        done
    done
    run tools/report.py "$root"
}

figure3() {
    local root=${ROOT:-runs/figure3} seed align sampler
    for seed in ${SEEDS:-0}; do
        for align in cwi pad; do
            for sampler in gumbel softmax; do
                ablation cifar10 resnet56 126 0.473 "$align-$sampler" "$seed" "" \
                    --align "$align" --sampler "$sampler"
            done
        done
        ablation cifar10 resnet56 126 0.473 no-cost "$seed" "" --cost-weight 0
    done
    run tools/report.py "$root"
}

name=${1:-table} dry=
[ "${*: -1}" != --dry-run ] || dry=yes
[ "$name" != --dry-run ] || name=table
case "$#$dry:$name" in
    0:table | [12]*yes:* | 1:*) ;;
    *) help >&2; exit 2 ;;
esac
case $name in
    help) help; exit ;;
    smoke | test | cpu | budgets | full20 | latency | table | table1 | table2 | table3 | figure3) ;;
    *) help >&2; exit 2 ;;
esac
[ -n "$dry" ] || setup
$name
