#!/usr/bin/env bash
# Everything that needs a GPU, in one call: cheap checks, then tests, then benchmarks, each step with a hard timeout.
#
#     scripts/gpu.sh [check] [tests] [bench] [search] [l2] [host] [memory] [models] [fused] [fusedmodels] [training]
#                    [traininggraphs] [kernels]
#
# The first three by default. With two GPUs, single benchmarks joined by a plus, such as host+fused, run side by side, each
# on a GPU of its own. Writes to $OUT (default: benchmarks/results/gpu): summary.txt (machine, one line a step),
# logs.txt (their output),
# gpu_findings.json (every plan that ran), the engine's raw numbers and table, gpu.json and gpu.md, and the search's,
# search.json and search.md, what the state of the second-level cache foretells, l2_state.json and l2_state.md; and each
# further benchmark's, by its own name. Several calls may share $OUT: one removes the results of the parts that it is asked
# for and no others, and adds to summary.txt and logs.txt. Ends with short tables of the parts that ran and a line
# `N passed, N failed`; exit 1 if anything failed.
#
# TEST_SECONDS, BENCH_SECONDS, SEARCH_SECONDS and so on limit each step; SEARCH_OPTIONS go to benchmarks/run_search.py, and
# HOST_OPTIONS, MEMORY_OPTIONS, MODELS_OPTIONS, FUSED_OPTIONS, FUSEDMODELS_OPTIONS, TRAINING_OPTIONS,
# TRAININGGRAPHS_OPTIONS and KERNELS_OPTIONS to their scripts. With several GPUs, MODELS_OPTIONS_1, FUSEDMODELS_OPTIONS_1
# and TRAINING_OPTIONS_1 are for a second run at the same time, on the second one, those with _2 for a third, and so on;
# SEARCH_OPTIONS_1 for a second one. Their tables become one.
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
export OUT PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
parts=${*:-check tests bench}
passed=0
failed=0
scratch=$(mktemp -d)
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
trap 'rm -rf "$scratch"' EXIT

results_of() { # part: the name of its files in $OUT
    case $1 in
    check) ;;
    tests) echo gpu_findings ;;
    bench) echo gpu ;;
    l2) echo l2_state ;;
    host) echo host_cost ;;
    search | memory | models | fused | training | kernels) echo "$1" ;;
    fusedmodels) echo fused_models ;;
    traininggraphs) echo training_graphs ;;
    *)
        echo "unknown part '$1', see the top of this script" >&2
        return 2
        ;;
    esac
}

results=()
for part in ${parts//+/ }; do
    name=$(results_of "$part") || exit 2
    [ -n "$name" ] && results+=("$name")
done
for name in ${results[@]+"${results[@]}"}; do
    rm -f "$OUT/$name.json" "$OUT/$name.md" "$OUT/$name"-[0-7].json "$OUT/$name"-[0-7].md
done

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

on_each() { # name, seconds, script, variable with the options, options where it is empty
    # One run on each GPU that has options, the first's in the variable itself, the next in VARIABLE_1 and so on.
    local name=$1 seconds=$2 script=$3 more gpus number names=()
    local options=("${!4:-$5}")
    for number in 1 2 3 4 5 6 7; do
        more=${4}_$number
        [ -n "${!more:-}" ] && options+=("${!more}")
    done
    if [ ${#options[@]} -eq 1 ]; then
        # shellcheck disable=SC2086 # options are words
        step "$name" "$seconds" "$PYTHON" "$script" ${options[0]}
        return
    fi
    mapfile -t gpus < <(visible_gpus)
    if [ ${#options[@]} -gt ${#gpus[@]} ]; then
        echo "$name has options for ${#options[@]} GPUs, but there are ${#gpus[@]}" >&2
        return 2
    fi
    for number in "${!options[@]}"; do
        names+=("$name-$number")
        # shellcheck disable=SC2086 # options are words
        CUDA_VISIBLE_DEVICES=${gpus[number]} run "$name-$number" "$seconds" "$PYTHON" "$script" \
            --name "$name-$number" ${options[number]} &
    done
    wait
    for number in "${!options[@]}"; do
        report "$name-$number" "$seconds" "$PYTHON" "$script" --name "$name-$number" "${options[number]}"
    done
    step "$name-merge" 60 "$PYTHON" "$script" --merge "$(IFS=,; echo "${names[*]}")"
}

benchmark() { # part: sets `timed` to name, seconds and command of one that runs by itself
    # shellcheck disable=SC2206 # options are words
    case $1 in
    bench) timed=(bench_gpu "${BENCH_SECONDS:-240}" "$PYTHON" benchmarks/run_gpu.py) ;;
    l2) timed=(l2_state "${L2_SECONDS:-300}" "$PYTHON" benchmarks/l2_state.py --models "${L2_MODELS:-resnet50,resnet18}") ;;
    host) timed=(host_cost "${HOST_SECONDS:-240}" "$PYTHON" benchmarks/host_cost.py --parts hits,profile ${HOST_OPTIONS:-}) ;;
    memory) timed=(memory "${MEMORY_SECONDS:-300}" "$PYTHON" benchmarks/memory.py ${MEMORY_OPTIONS:-}) ;;
    fused) timed=(fused "${FUSED_SECONDS:-200}" "$PYTHON" benchmarks/fused.py ${FUSED_OPTIONS:---stages 3}) ;;
    kernels) timed=(kernels "${KERNELS_SECONDS:-60}" "$PYTHON" benchmarks/kernels.py ${KERNELS_OPTIONS:-}) ;;
    traininggraphs)
        timed=(training_graphs "${TRAININGGRAPHS_SECONDS:-150}" "$PYTHON" benchmarks/training_graphs.py
            ${TRAININGGRAPHS_OPTIONS:-})
        ;;
    *)
        echo "'$1' does not run beside another part" >&2
        return 2
        ;;
    esac
}

visible_gpus() { # one index a line
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then tr , '\n' <<<"$CUDA_VISIBLE_DEVICES"; else
        nvidia-smi --query-gpu=index --format=csv,noheader
    fi
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
} 2>&1 | tee -a "$OUT/summary.txt"

for part in $parts; do
    case $part in
    check)
        step doctor 60 "$PYTHON" -m convplan doctor
        step imports 30 "$PYTHON" -c 'import convplan; print(convplan.__version__)'
        ;;
    tests)
        # Side by side, but for those that look at the whole GPU's memory, which have it for themselves. Where there is a
        # second GPU, those that take longest begin on it meanwhile.
        alone=tests/gpu/test_faults_gpu.py early=
        mapfile -t gpus < <(visible_gpus)
        if [ ${#gpus[@]} -gt 1 ]; then
            early=tests/gpu/test_shipping_gpu.py
            CUDA_VISIBLE_DEVICES=${gpus[1]} test_file run "$early" &
        fi
        CUDA_VISIBLE_DEVICES=${gpus[0]} test_file run "$alone"
        for file in tests/gpu/test_*.py; do
            [ "$file" = "$alone" ] || [ "$file" = "$early" ] || test_file run "$file" &
        done
        wait
        rm -f "$OUT"/*.lock
        for file in tests/gpu/test_*.py; do
            test_file report "$file"
            count_tests "$(basename "$file" .py)"
        done
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
    models)
        on_each models "${MODELS_SECONDS:-500}" benchmarks/run_models.py MODELS_OPTIONS "" || exit 2
        ;;
    fusedmodels)
        on_each fused_models "${FUSEDMODELS_SECONDS:-430}" benchmarks/fused_models.py \
            FUSEDMODELS_OPTIONS "--limit-s 390" || exit 2
        ;;
    training)
        on_each training "${TRAINING_SECONDS:-580}" benchmarks/training.py \
            TRAINING_OPTIONS "--limit-s 540" || exit 2
        ;;
    *+*)
        mapfile -t gpus < <(visible_gpus)
        mapfile -t beside < <(tr + '\n' <<<"$part")
        for number in "${!beside[@]}"; do
            benchmark "${beside[number]}" || exit 2
            if [ "${#beside[@]}" -gt "${#gpus[@]}" ]; then # one after the other, since they would disturb each other
                run "${timed[@]}"
            else
                CUDA_VISIBLE_DEVICES=${gpus[number]} run "${timed[@]}" &
            fi
        done
        wait
        for one in "${beside[@]}"; do
            benchmark "$one"
            report "${timed[@]}"
        done
        ;;
    *)
        benchmark "$part" || exit 2
        step "${timed[@]}"
        ;;
    esac
done

for table in ${results[@]+"${results[@]}"}; do
    [ -f "$OUT/$table.md" ] && sed -n '1,30p' "$OUT/$table.md"
done
echo "$passed passed, $failed failed" | tee -a "$OUT/summary.txt"
[ "$failed" -eq 0 ]
