#!/usr/bin/env bash
# Ten minutes on a machine with a GPU: does each layer train there on JAX and PyTorch, do the tests hold, which grouped
# matmul is fastest, and what do the layers cost in bfloat16?
#
#     bash benchmarks/accelerator/run.sh OUT                 # no network; Python with JAX and PyTorch must be there
#     STEPS="bench-jax" bash benchmarks/accelerator/run.sh OUT
#     QUICK=1 bash benchmarks/accelerator/run.sh OUT         # tiny sizes, on a CPU too: does the script run?
#
# Every step has a limit of its own and writes under OUT at once: a run that is cut off is still worth something.
# WHEELS names a folder with what is missing there (`pip download --no-deps keras optree namex`). Put OUT's jax.json,
# torch.json and candidates_*.json under benchmarks/results/<card>/, and read docs/design/accelerator.md.
set -u
out=${1:?usage: run.sh OUT}; mkdir -p "$out"
quick=${QUICK:+--quick}
steps=${STEPS:-card checks candidates-jax bench-jax bench-torch candidates-torch}
if [ -n "${WHEELS:-}" ] && ! python3 -c "import keras" 2>/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$out/site" "$WHEELS"/*.whl || exit 3
fi
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
export XLA_PYTHON_CLIENT_PREALLOCATE=false          # several processes share the card
export JAX_COMPILATION_CACHE_DIR="$out/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
if [ -n "$quick" ]; then export TINY=1; fi

run() {  # name, limit in seconds, command
  local name=$1 limit=$2 start=$SECONDS; shift 2
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1; local code=$?
  echo "$name: exit $code after $((SECONDS - start)) s" >> "$out/$name.log"
}
show() { echo "== $1"; tail -n "$2" "$out/$1.log" | cut -c1-200; }
wanted() { case " $steps " in *" $1 "*) ;; *) return 1;; esac; }

if wanted card; then
  run card 20 bash -c 'nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; python3 -m pip list 2>/dev/null | grep -iE "^(jax|jaxlib|keras|torch|triton|transformers|numpy) "'
  show card 9
fi
if wanted checks; then  # none of these is timed, so they go side by side
  # pytest-benchmark, where it is there, does not go with xdist. JAX multiplies float32 as tf32, 3e-4 off, unless asked.
  tests=(python3 -m pytest -o addopts= -q --maxfail=60 -p no:cacheprovider -p no:benchmark --tb=line -n "${WORKERS:-5}" tests/dispatch tests/oracle tests/parity)
  run train-torch 130 env KERAS_BACKEND=torch python3 -m benchmarks.accelerator.train &
  run train-jax 130 env KERAS_BACKEND=jax python3 -m benchmarks.accelerator.train &
  run tests-torch 130 env KERAS_BACKEND=torch "${tests[@]}" &
  run tests-jax 130 env KERAS_BACKEND=jax JAX_DEFAULT_MATMUL_PRECISION=highest "${tests[@]}" &
  wait
  show train-torch 24; show train-jax 24; show tests-torch 20; show tests-jax 20
fi
if wanted candidates-jax; then
  run candidates-jax 100 env KERAS_BACKEND=jax python3 -m benchmarks.accelerator.candidates "$out/candidates_jax.json"
  show candidates-jax 80
fi
bench=(python3 -m benchmarks.run --repeats 5 --seconds 2 --rows gpu gpu-mixed $quick)
if wanted bench-jax; then run bench-jax 150 "${bench[@]}" --backend jax --no-peers --out "$out/jax.json"; show bench-jax 40; fi
if wanted bench-torch; then run bench-torch 110 "${bench[@]}" --backend torch --out "$out/torch.json"; show bench-torch 60; fi
if wanted candidates-torch; then
  run candidates-torch 40 env KERAS_BACKEND=torch python3 -m benchmarks.accelerator.candidates "$out/candidates_torch.json"
  show candidates-torch 30
fi
