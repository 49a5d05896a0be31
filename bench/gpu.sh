#!/usr/bin/env bash
# All benchmarks that need a GPU, in under 10 minutes on one, into bench/results/<gpu>/. From anywhere:
#
#     bench/gpu.sh                # on the first GPU
#     bench/gpu.sh cpu-small      # the same with tiny models and fewer contenders on the CPU, to see that it runs
#
# PYTHON picks the interpreter; it needs `pip install '.[bench]'` (torch, diffusers, cache-dit), and nothing from the
# network once that is done. LIMIT is the time in seconds (570; cpu-small: 1800). What there is no time for is a row that
# says so; what fails does not keep the rest from running, and makes the exit status 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
mode="${1:-gpu}"
failed=0
export PYTHONUNBUFFERED=1

case "$mode" in
gpu)
  name="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)" || name=""
  if [ -z "$name" ]; then
    echo "nvidia-smi names no GPU. Without one: bench/gpu.sh cpu-small" >&2
    exit 2
  fi
  limit="${LIMIT:-570}"
  common=(--device cuda --dtype bfloat16)
  # Four at a time: compiling keeps one core busy, and a GPU's machine has more. The first model is compiled alone.
  peers=("${common[@]}" --jobs 4 --rounds 5 --patience 240)
  overhead=("${common[@]}" --rounds 50)
  ;;
cpu-small)
  name="cpu-small"
  limit="${LIMIT:-1800}"
  common=(--device cpu)
  peers=("${common[@]}" --small --steps 6 --rounds 1 --patience 240)
  overhead=("${common[@]}" --rounds 3 --models host)
  ;;
*)
  echo "usage: bench/gpu.sh [cpu-small]" >&2
  exit 2
  ;;
esac
results="bench/results/$(printf '%s' "$name" | tr '[:upper:] ' '[:lower:]-' | tr -cd '[:alnum:].-')"
mkdir -p "$results"

left() { echo $((limit - SECONDS)); }

# run NAME SCRIPT ARGUMENTS...: with what is left of the time, and never longer.
run() {
  local what="$1" script="$2"
  shift 2
  if [ "$(left)" -lt 20 ]; then
    echo "== $what: no time left"
    failed=1
    return
  fi
  printf '\n== %s (%s s left)\n' "$what" "$(left)"
  timeout --kill-after=10 "$(left)" "$python" "bench/$script" "$@" --output "$results/$what.jsonl" || {
    echo "== $what failed with $?"
    failed=1
  }
}

# contest MODEL SHARE ARGUMENTS...: contenders on one model, none of them begun after SHARE percent of what is left.
contest() {
  local model="$1" share="$2"
  shift 2
  run "peers-$model" peers.py "${peers[@]}" --models "$model" --budget $(($(left) * share / 100)) "$@"
}

ours=(none@blocks dqar-none@own dqar-native@own dqar-int8@own)
others=(pab@under dbcache@blocks)
first=("${ours[@]}" "${others[@]}" none firstblock@under dqar-kv@own pab)
if [ "$mode" = cpu-small ]; then # compiling takes all the time, and two cores have been through all of them once
  ours=(dqar-int8@own)
fi
# What matters first, first: if time runs out, it is the last that are missing.
contest dit-xl-256 40 --jobs 1 --group 12 --contenders "${first[@]}"
contest dit-xl-512-b8 40 --no-second --contenders "${ours[@]}" "${others[@]}"
contest flux-1024 40 --no-second --steps 28 --contenders "${ours[@]}" "${others[@]}"
contest wan-480p 40 --no-second --steps 20 --rounds 2 --contenders "${ours[@]}" "${others[@]}"
contest dit-xl-256-b8 50 --no-second --contenders "${ours[@]}" pab@under
contest dit-xl-512 60 --no-second --contenders "${ours[@]}" pab@under
run overhead overhead.py "${overhead[@]}"

printf '\n== %s s; results in %s\n' "$SECONDS" "$results"
exit "$failed"
