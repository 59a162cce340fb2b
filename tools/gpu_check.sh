#!/usr/bin/env bash
# bash tools/gpu_check.sh [PART ...]: what has to hold on a real GPU, without network, in parts of
# at most ten minutes: tests bench prune ddp (all of them without PART). Leaves in $OUT
# (gpu-check) a log of each part and result.json. ARCHS, BATCH, ROUNDS, EPOCHS, DEVICE change it;
# COMPILED=1 adds torch.compile.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-check} device=${DEVICE:-cuda} epochs=${EPOCHS:-10} batch=${BATCH:-256}
mkdir -p "$out"

tests() { CUDA_VISIBLE_DEVICES= python -m pytest -q test_tas.py tools; }  # made for a CPU

bench() {  # compiled apart, as compiling takes minutes
    local arch shape how
    for arch in ${ARCHS:-resnet20 resnet56 resnet110}; do
        shape=$([ -f "shapes/cifar10-$arch.json" ] && echo "--shape shapes/cifar10-$arch.json")
        for how in "eager graphs" "eager compiled"; do
            [[ $how = *compiled && -z "${COMPILED:-}" ]] && continue
            [[ $how = *graphs && $device = cpu ]] && continue
            # shellcheck disable=SC2086
            python tools/bench.py "$arch" --device "$device" --batch-size "$batch" --how $how \
                --rounds "${ROUNDS:-20}" $shape --json "$out/bench-$arch-${how#* }.json" || return
        done
    done
}

prune() {  # in captured steps; each part is stopped in the middle, and goes on
    local line=(tools/graphs.py prune --data synthetic --arch resnet20 --epochs "$epochs"
                --device "$device" --batch-size "$batch" --out "$out/prune") part
    rm -rf "$out/prune"
    for part in teacher search pruned; do
        python "${line[@]}" & local process=$!
        until [ "$(cat "$out/prune/$part/metrics.jsonl" 2>/dev/null | wc -l)" \
                -ge $(((epochs + 1) / 2)) ]; do
            kill -0 $process 2>/dev/null || break
            sleep 0.2
        done
        kill -9 $process 2>/dev/null
        wait $process
    done
    python "${line[@]}" && python tas.py eval "$out/prune/pruned" --data synthetic \
        --device "$device"
}

ddp() {
    rm -rf "$out/ddp"
    python -m torch.distributed.run --standalone --nproc_per_node=1 tas.py search \
        --data synthetic --arch resnet20 --epochs 2 --device "$device" --batch-size "$batch" \
        --out "$out/ddp"
}

for part in "${@:-tests bench prune ddp}"; do
    for name in $part; do
        start=$(date +%s)
        export -f tests bench prune ddp
        export out device epochs batch
        timeout 600 bash -c "$name" 2>&1 | tee "$out/$name.log"
        status=${PIPESTATUS[0]}
        # A step that runs as it is, because it could not be captured, is a failure here.
        [ "$name" = tests ] || ! grep -q "not compiled or captured" "$out/$name.log" || status=3
        echo "{\"status\": $status, \"seconds\": $(($(date +%s) - start))}" \
            > "$out/$name.status.json"
    done
done
python - "$out" <<'END'
import json, sys
from pathlib import Path
out, found = Path(sys.argv[1]), {}
for path in sorted(out.glob("*.json")):
    if path.name != "result.json":
        found[path.stem] = json.loads(path.read_text())
for path in sorted(out.glob("*/*/metrics.jsonl")):
    found[f"{path.parent.name}.metrics"] = [json.loads(line) for line in path.open()]
(out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
print({name: part["status"] for name, part in found.items() if "status" in part})
sys.exit(any(part["status"] for part in found.values() if "status" in part))
END
