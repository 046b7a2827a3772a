#!/usr/bin/env bash
# Everything dpgbench wants to know of one GPU, in about twelve minutes and without a network.
#
#   bash benchmarks/gpu.sh                      results/gpu/*.json
#   bash benchmarks/gpu.sh --smoke              small sizes, on a CPU if there is no GPU: does the script work?
#   OUT=elsewhere bash benchmarks/gpu.sh engine profile      some of the parts
#
# engine   benchmarks/gpu_engine.py: metagradients against training, T = 1, 4, 16, fp32, TF32, bf16
# profile  benchmarks/step_profile.py: where a DPG step's time goes at scale `small`
# suite    the cells of suite=small and suite=small_language, into results/runs
#
# With no SmolLM2 on the machine (`make smollm2`, or the model hub's cache) `profile` takes a randomly initialised model of the same shape,
# which says as much about speed, and `suite` is left out. A part that fails leaves its log beside the results, and the next one runs.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-results/gpu}
WORKERS=${WORKERS:-4}
smoke=""
parts=()
for word in "$@"; do
    case $word in
        --smoke) smoke=--smoke ;;
        engine | profile | suite) parts+=("$word") ;;
        *) echo "$word: not a part; choose from: engine profile suite, or --smoke" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(engine profile suite)
mkdir -p "$OUT"
has() { printf '%s\n' "${parts[@]}" | grep -qx "$1"; }

model=HuggingFaceTB/SmolLM2-135M-Instruct
real=$($PYTHON benchmarks/random_smollm2.py --is-there)
if [ "$real" != yes ] || [ -n "$smoke" ]; then
    model=$OUT/random-smollm2
    has profile && $PYTHON benchmarks/random_smollm2.py $smoke "$model"
fi

if has engine; then
    timeout 360 $PYTHON benchmarks/gpu_engine.py $smoke --repetitions 3 --out "$OUT/engine.json" 2>&1 | tee "$OUT/engine.log"
fi
if has profile; then
    sizes="steps=4"
    [ -n "$smoke" ] && sizes="steps=2 completions=8 deployment_texts=8 threads=1"
    words="scale=small scale.generator=$model scale.target=$model task=l2_norm snapshots=2 $sizes"
    for precision in full tf32; do
        timeout 240 $PYTHON benchmarks/step_profile.py $words training.precision=$precision --json > "$OUT/profile-$precision.json" \
            2> "$OUT/profile-$precision.log" || tail -n 3 "$OUT/profile-$precision.log"
    done
fi
if has suite; then
    if [ "$real" = yes ] && [ -z "$smoke" ]; then
        for name in small small_language; do
            $PYTHON -m dpgbench sweep suite=$name launcher=local launcher.workers="$WORKERS"
        done 2>&1 | tee "$OUT/suite.log"
    else
        echo "suite: left out (--smoke, or SmolLM2's weights are not here)"
    fi
fi
rm -rf "$OUT/random-smollm2"
