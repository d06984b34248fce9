#!/usr/bin/env bash
# All that is to be looked at on a borrowed CUDA machine, within eleven minutes; from the repository's root:
#   benchmarks/gpu_check.sh                       # results under ${OUT:-runs/gpu}
#   benchmarks/gpu_check.sh --device cpu --quick  # without a GPU, to try the script itself
# The package need not be installed; torch is needed, and triton for its kernels. The summary comes last, and the exit
# status says whether anything failed.
set -u
cd "$(dirname "$0")/.." || exit 1
export OUT="${OUT:-runs/gpu}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
failed=0

section() { # name, seconds after which it begins nothing more, seconds after which it is ended
    local name=$1 seconds=$2 limit=$3
    shift 3
    echo "== $name"
    rm -f "$OUT/$name.json"
    timeout --kill-after=5 "$limit" "$python" -m benchmarks.gpu_check "$name" --seconds "$seconds" "$@" \
        || { echo "FAILED section $name (exit status $?)"; failed=$((failed + 1)); }
}

for name in ${SECTIONS:-versions equal launches capture scaler times}; do
    case $name in
        versions) section versions 30 60 "$@" ;;
        equal) section equal 120 150 "$@" ;;
        launches) section launches 60 90 "$@" ;;
        capture) section capture 100 130 "$@" ;;
        scaler) section scaler 60 90 "$@" ;;
        times) section times 120 150 "$@" ;;
        *) echo "there is no section $name"; failed=$((failed + 1)) ;;
    esac
done
echo "== summary"
"$python" -m benchmarks.gpu_check summary || failed=$((failed + 1))
exit $((failed > 0))
