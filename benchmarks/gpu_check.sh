#!/usr/bin/env bash
# All that is to be looked at on a borrowed CUDA machine, within eight minutes; from the repository's root:
#   benchmarks/gpu_check.sh                       # results under ${OUT:-runs/gpu}
#   benchmarks/gpu_check.sh --device cpu --quick  # without a GPU, to try the script itself
# The package need not be installed; torch is needed, and triton for its kernels. Wheels of other libraries are taken
# from ${WHEELS:-wheels}; ncu and compute-sanitizer run where they are installed. Sections write what they find as they
# find it; all of it is packed into $OUT/results.tar.gz at the end. The summary comes last, and the exit status says
# whether anything failed. `tests` is `pytest -m cuda`, on several workers where pytest-xdist is installed. SECTIONS chooses;
# `compiled` is one more, which compiles all kernels for other devices by the Triton that is installed, and takes minutes
# of a processor (pytest and hypothesis are needed for both).
set -u
cd "$(dirname "$0")/.." || exit 1
export OUT="${OUT:-runs/gpu}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
failed=0
ends=$((SECONDS + ${TOTAL:-450}))  # the summary takes seconds
mkdir -p "$OUT"

section() { # name, seconds after which it begins nothing more
    local name=$1 seconds=$2
    shift 2
    local left=$((ends - SECONDS))
    echo "== $name"
    rm -f "$OUT/$name.json"
    if [ "$left" -lt 5 ]; then echo '[{"what": "all", "skipped": "out of time"}]' > "$OUT/$name.json"; return; fi
    seconds=$((seconds < left ? seconds : left))
    timeout --kill-after=5 $((seconds + 20)) "$python" -m benchmarks.gpu_check "$name" --seconds "$seconds" "$@" \
        || { echo "FAILED section $name (exit status $?)"; failed=$((failed + 1)); }
}

pytests() { # name, seconds, and what pytest is given: what it prints goes into a file
    local name=$1 seconds=$2 left=$((ends - SECONDS))
    shift 2
    echo "== $name"
    timeout --kill-after=5 $((seconds < left ? seconds : left > 5 ? left : 5)) \
        "$python" -m pytest -q -p no:cacheprovider "$@" > "$OUT/$name.txt" 2>&1
    local status=$?  # 5: all are deselected or skipped for want of a device
    tail -n 3 "$OUT/$name.txt"
    if [ $status -ne 0 ] && [ $status -ne 5 ]; then echo "FAILED section $name"; failed=$((failed + 1)); fi
}

workers=$("$python" -c 'import os, xdist; print(f"-n {min(12, os.cpu_count())}")' 2> /dev/null || true)
for name in ${SECTIONS:-versions tests repeats equal launches capture scaler times peers profiler sanitizer}; do
    case $name in
        versions) section versions 15 "$@" ;;
        # shellcheck disable=SC2086  # two words, or none
        tests) OMP_NUM_THREADS=1 pytests tests 120 --tb=short -m cuda $workers tests/kernels/test_cuda.py ;;
        repeats) section repeats 40 "$@" ;;
        equal) section equal 40 "$@" ;;
        launches) section launches 35 "$@" ;;
        capture) section capture 70 "$@" ;;
        scaler) section scaler 30 "$@" ;;
        times) section times 80 "$@" ;;
        peers) section peers 40 "$@" ;;
        profiler) section profiler 40 "$@" ;;
        sanitizer) section sanitizer 60 "$@" ;;
        compiled) TRITON_INTERPRET=0 pytests compiled 900 -s tests/kernels/triton_compiled.py ;;
        *) echo "there is no section $name"; failed=$((failed + 1)) ;;
    esac
done
echo "== summary"
"$python" -m benchmarks.gpu_check summary > "$OUT/summary.txt" || failed=$((failed + 1))
cat "$OUT/summary.txt"
(cd "$OUT" && rm -f results.tar.gz && tar -czf results.tar.gz --exclude=results.tar.gz ./*.json ./*.txt 2> /dev/null)
exit $((failed > 0))
