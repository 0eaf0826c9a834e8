#!/usr/bin/env bash
# Everything that needs a GPU, in one call: cheap checks, then tests, then benchmarks, each step with a hard timeout.
#
#     scripts/gpu.sh [check] [tests] [bench] [search] [l2] [host] [memory] [models] [fused] [fusedmodels] [kernels]
#
# The first three by default. Writes to $OUT (default: benchmarks/results/gpu): summary.txt (machine, one line a step),
# logs.txt (their output),
# gpu_findings.json (every plan that ran), the engine's raw numbers and table, gpu.json and gpu.md, and the search's,
# search.json and search.md, what the state of the second-level cache foretells, l2_state.json and l2_state.md; and each
# further benchmark's, by its own name. Ends with short tables and a line `N passed, N failed`; exit 1 if anything failed.
#
# TEST_SECONDS, BENCH_SECONDS, SEARCH_SECONDS and so on limit each step; SEARCH_OPTIONS go to benchmarks/run_search.py, and
# HOST_OPTIONS, MEMORY_OPTIONS, MODELS_OPTIONS, FUSED_OPTIONS, FUSEDMODELS_OPTIONS and KERNELS_OPTIONS to their scripts. With two
# GPUs, SEARCH_OPTIONS_1 are for a second run of it at the same time, on the second one; their tables become one.
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
export OUT PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
parts=${*:-check tests bench}
passed=0
failed=0
: >"$OUT/logs.txt"
rm -f "$OUT/gpu_findings.json" "$OUT/gpu.json" "$OUT/gpu.md" "$OUT/search.json" "$OUT/search.md" \
    "$OUT/l2_state.json" "$OUT/l2_state.md"
scratch=$(mktemp -d)
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
trap 'rm -rf "$scratch"' EXIT

step() { # name, seconds, command...
    run "$@"
    report "$@"
}

run() { # the same, leaving log, status and time behind
    local name=$1 seconds=$2 begin=$SECONDS
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$scratch/$name.log" 2>&1
    echo "$? $((SECONDS - begin))" >"$scratch/$name.end"
}

report() { # the same, once it has run
    local name=$1 seconds=$2 status took
    shift 2
    read -r status took <"$scratch/$name.end"
    # Where this machine keeps things says nothing to a reader.
    { echo "=== $name: $*"; tail -c 400000 "$scratch/$name.log"; } |
        sed -e "s#$PWD#.#g" -e "s#$prefix#PYTHON#g" -e "s#$HOME#~#g" >>"$OUT/logs.txt"
    if [ $status -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    local word=ok
    [ $status -eq 124 ] || [ $status -eq 137 ] && word="stopped after $seconds s"
    [ $status -ne 0 ] && [ "$word" = ok ] && word="failed ($status)"
    printf '%-24s %5d s  %-22s %s\n' "$name" "$took" "$word" "$(tail -n 1 "$scratch/$name.log" | cut -c 1-120)" |
        tee -a "$OUT/summary.txt"
}

test_file() { # run or report, file
    local limits=("${TEST_SECONDS:-250}" "$PYTHON" -m pytest -m gpu "$2" -p no:cacheprovider --timeout 150)
    "$1" "$(basename "$2" .py)" "${limits[@]}"
}

count_tests() { # add a pytest log's own counts to the totals, instead of one for the whole step
    local line
    line=$(grep -E '^(=+ )?[0-9]+ (passed|failed)|[0-9]+ (passed|failed|error)' "$scratch/$1.log" | tail -n 1)
    local ok bad
    ok=$(grep -oE '[0-9]+ passed' <<<"$line" | cut -d ' ' -f 1)
    bad=$(grep -oE '[0-9]+ (failed|error)' <<<"$line" | cut -d ' ' -f 1 | paste -sd+ | sed 's/^$/0/')
    passed=$((passed + ${ok:-0}))
    failed=$((failed + ${bad:-0}))
}

{
    date -u +%Y-%m-%dT%H:%M:%SZ
    echo "commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader
    "$PYTHON" -c 'import platform, torch, triton; print(platform.platform(), "Python", platform.python_version(),
"torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "Triton", triton.__version__)'
} 2>&1 | tee "$OUT/summary.txt"

for part in $parts; do
    case $part in
    check)
        step doctor 60 "$PYTHON" -m convplan doctor
        step imports 30 "$PYTHON" -c 'import convplan; print(convplan.__version__)'
        ;;
    tests)
        # Side by side, but for those that look at the whole GPU's memory.
        test_file run tests/gpu/test_faults_gpu.py
        for file in tests/gpu/test_*.py; do
            [ "$file" = tests/gpu/test_faults_gpu.py ] || test_file run "$file" &
        done
        wait
        rm -f "$OUT"/*.lock
        for file in tests/gpu/test_*.py; do
            test_file report "$file"
            count_tests "$(basename "$file" .py)"
        done
        ;;
    bench)
        step bench_gpu "${BENCH_SECONDS:-240}" "$PYTHON" benchmarks/run_gpu.py
        ;;
    search)
        search=("${SEARCH_SECONDS:-900}" "$PYTHON" benchmarks/run_search.py)
        # shellcheck disable=SC2086 # options are words
        if [ -z "${SEARCH_OPTIONS_1:-}" ]; then
            step search "${search[@]}" ${SEARCH_OPTIONS:-}
        else
            run search-0 "${search[@]}" --device-index 0 --name search-0 ${SEARCH_OPTIONS:-} &
            run search-1 "${search[@]}" --device-index 1 --name search-1 ${SEARCH_OPTIONS_1} &
            wait
            report search-0 "${search[@]}" --device-index 0 --name search-0 ${SEARCH_OPTIONS:-}
            report search-1 "${search[@]}" --device-index 1 --name search-1 ${SEARCH_OPTIONS_1}
            step merge 60 "$PYTHON" benchmarks/run_search.py --merge search-0,search-1
        fi
        ;;
    l2)
        step l2_state "${L2_SECONDS:-300}" "$PYTHON" benchmarks/l2_state.py --models "${L2_MODELS:-resnet50,resnet18}"
        ;;
    # shellcheck disable=SC2086 # options are words
    host)
        step host_cost "${HOST_SECONDS:-120}" "$PYTHON" benchmarks/host_cost.py --parts hits,profile ${HOST_OPTIONS:-}
        ;;
    memory)
        step memory "${MEMORY_SECONDS:-200}" "$PYTHON" benchmarks/memory.py ${MEMORY_OPTIONS:-}
        ;;
    models)
        step models "${MODELS_SECONDS:-500}" "$PYTHON" benchmarks/run_models.py ${MODELS_OPTIONS:-}
        ;;
    fused)
        step fused "${FUSED_SECONDS:-200}" "$PYTHON" benchmarks/fused.py ${FUSED_OPTIONS:-}
        ;;
    fusedmodels)
        step fused_models "${FUSEDMODELS_SECONDS:-400}" "$PYTHON" benchmarks/fused_models.py ${FUSEDMODELS_OPTIONS:-}
        ;;
    kernels)
        step kernels "${KERNELS_SECONDS:-60}" "$PYTHON" benchmarks/kernels.py ${KERNELS_OPTIONS:-}
        ;;
    *)
        echo "unknown part '$part', see the top of this script" >&2
        exit 2
        ;;
    esac
done

for table in gpu search l2_state host_cost memory models fused fused_models kernels; do
    [ -f "$OUT/$table.md" ] && sed -n '1,30p' "$OUT/$table.md"
done
echo "$passed passed, $failed failed" | tee -a "$OUT/summary.txt"
[ "$failed" -eq 0 ]
