#!/usr/bin/env bash
# Builds the wheel and uses it as a stranger would: installed in an empty environment, run from another folder.
# usage: tools/check_wheel.sh PYTHON-WITH-THE-DEV-EXTRAS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The smallest run that trains, evaluates and plots two models.
toy=(compare --models deltanet osdn-apf --seeds 1 --steps 4 --warmup-steps 1 --batch-size 4 --seq-len 32
    --num-pairs 4 --eval-pairs 4 --eval-sequences 8 --workers 1 --out run)

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# By way of the sdist, so that nothing stale under build/ gets in. Isolation would fetch what dev already pins.
"$1" -m build --no-isolation --outdir "$tmp/dist" . >"$tmp/build.log" 2>&1 || { cat "$tmp/build.log"; exit 1; }
wheel=("$tmp"/dist/osdn-*.whl)

names=$("$1" -m zipfile --list "${wheel[0]}")
grep -q '^osdn/py\.typed ' <<<"$names" || { echo "wheel check: py.typed is missing"; exit 1; }
if grep -vE '^(osdn/|osdn-[^/]*\.dist-info/|File Name)' <<<"$names"; then
    echo "wheel check: the files above do not belong in the wheel"
    exit 1
fi

"$1" -m venv "$tmp/env"
"$tmp/env/bin/python" -m pip install --quiet --no-compile --constraint constraints.txt "${wheel[0]}"
mkdir "$tmp/elsewhere"
cd "$tmp/elsewhere"
bin="$tmp/env/bin"
"$bin/python" -c 'import osdn, sys; assert osdn.__file__.startswith(sys.prefix), osdn.__file__'
"$bin/osdn" --version
"$bin/osdn" "${toy[@]}" >"$tmp/toy.log" 2>&1 || { cat "$tmp/toy.log"; exit 1; }
ls run/*.json run/*.png >/dev/null
echo "wheel check: $(basename "${wheel[0]}") installs and runs"
