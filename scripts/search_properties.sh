#!/usr/bin/env bash
# Draws new examples for every property, so many times (10): what CI repeats exactly is searched here.
# Prints each failing example once, with the seed that gives it again. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

times="${1:-10}"
shift || true
mapfile -t files < <(grep -rlE "^@given|^    @given" tests)
failed=0
for ((turn = 0; turn < times; turn++)); do
  seed=$((RANDOM * 32768 + RANDOM))
  HYPOTHESIS_PROFILE=search python -m pytest -q -p no:cacheprovider --hypothesis-seed="$seed" "$@" "${files[@]}" ||
    { failed=1; echo "again with: HYPOTHESIS_PROFILE=search pytest --hypothesis-seed=$seed"; }
done
exit "$failed"
