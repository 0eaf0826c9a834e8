#!/usr/bin/env bash
# Ranks of a distributed job on two GPUs over NCCL: the tests of tests/gpu/test_ranks_gpu.py, in one call.
#
#     scripts/ranks_gpu.sh
#
# Writes to $OUT (default: benchmarks/results/ranks): ranks_summary.txt (machine, one line a test), gpu_findings.json (what
# every rank ran each problem by, its counters, and what a question to the job's store takes). Exit 1 if a test failed or
# was skipped.
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/ranks}
mkdir -p "$OUT"
export OUT PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # multicast over NVLink is not to be had on every shared host
PYTHON=${PYTHON:-python3}
{
    date -u +%Y-%m-%dT%H:%M:%SZ
    echo "commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN",
torch.backends.cudnn.version(), "NCCL", ".".join(map(str, torch.cuda.nccl.version())))'
    timeout --kill-after=10 "${RANKS_SECONDS:-400}" \
        "$PYTHON" -m pytest -m gpu tests/gpu/test_ranks_gpu.py -p no:cacheprovider --timeout 150 -v --durations=0
    status=$?
    echo "status $status"
} 2>&1 | sed -e "s#$PWD#.#g" -e "s#$HOME#~#g" | tee "$OUT/ranks_summary.txt"
rm -f "$OUT"/*.lock
grep -q '^status 0$' "$OUT/ranks_summary.txt" && ! grep -q skipped "$OUT/ranks_summary.txt"
