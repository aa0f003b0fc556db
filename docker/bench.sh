#!/usr/bin/env bash
# Builds bundles, or compiles the kits of a folder; verifies and measures each; writes one JSON per bundle.
# Runs in the images of this folder and on any machine with sam-export.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bench.sh [options]

Builds RECIPES x PRECISIONS for TARGET (compiling them where TARGET runs engines), or with --kits compiles what a host
built; verifies and measures every bundle and writes RESULTS/<target>/<recipe>-<precision>.json, whole or not at all.
A bundle that fails is reported, and the rest goes on.

  --target TARGET           device, see `sam-export targets`; with --kits: only its kits   [cpu; --kits: all]
  --recipes "A B"           what to build                                                  [reference]
  --precisions "fp32 int8"  in what precisions                                             [fp32 int8]
  --kits FOLDER             compile the kits in FOLDER, build nothing; FOLDER stays as it is
  --results FOLDER          where the results go                                           [/results]
  --work FOLDER             where bundles are made and kept                                [a temporary folder]
  --runs N                  timed runs                                                     [50]

Defaults come from BENCH_TARGET, BENCH_RECIPES, BENCH_PRECISIONS, BENCH_KITS, BENCH_RESULTS, BENCH_WORK and BENCH_RUNS
where they are set. Exit codes: 0 all done, 1 something failed, 2 wrong usage.
TEXT
}

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $2"
    exit "$1"
}

# step NAME COMMAND...: the command's answer goes to $scratch/NAME.json; a failure is told by name.
step() {
    local name=$1 code=0
    shift
    say "$label: $name"
    "$@" >"$scratch/$name.json" || code=$?
    [[ $code -eq 0 ]] || say "failed: $label: $name ended with exit code $code"
    return "$code"
}

# finish FOLDER: compiles a kit in place, verifies and measures the bundle, writes its result.
finish() {
    local folder=$1 description name
    description=$(python3 "$collect" describe "$folder") || return 1
    if [[ $description == kit\ * ]]; then
        step compile sam-export compile "$folder" --json || return 1
    fi
    step verify sam-export verify "$folder" --json || return 1
    step bench sam-export bench "$folder" --runs "$runs" --json || return 1
    local answers=()
    for name in build compile verify bench; do
        [[ -e $scratch/$name.json ]] && answers+=("--$name" "$scratch/$name.json")
    done
    python3 "$collect" write "$folder" "$results" "${answers[@]}" || {
        say "failed: $label: its result could not be written"
        return 1
    }
}

from_recipe() {
    local recipe=$1 precision=$2
    label="$target/$(basename "$recipe" .toml)-$precision"
    local folder=$work/$label
    rm -f "$scratch"/*.json
    mkdir -p "$work/$target" || return 1
    step build sam-export build "$recipe" --precision "$precision" --target "$target" -o "$folder" --json || return 1
    finish "$folder"
}

# The kit is copied: its folder may be read-only, and compiling writes beside it too (the timing cache).
from_kit() {
    local kit=$1 description state kit_target recipe precision
    label=$kit
    rm -f "$scratch"/*.json
    description=$(python3 "$collect" describe "$kit") || {
        say "failed: $label is no kit"
        return 1
    }
    read -r state kit_target recipe precision <<<"$description"
    [[ $state == kit && (-z $target || $target == "$kit_target") ]] || return 0
    taken=$((taken + 1))
    label="$kit_target/$recipe-$precision"
    local folder=$work/$label
    mkdir -p "$work/$kit_target" && rm -rf -- "$folder" && cp -r -- "$kit" "$folder" || return 1
    finish "$folder"
}

target=${BENCH_TARGET:-}
recipes=${BENCH_RECIPES:-reference}
precisions=${BENCH_PRECISIONS:-fp32 int8}
kits=${BENCH_KITS:-}
results=${BENCH_RESULTS:-/results}
work=${BENCH_WORK:-}
runs=${BENCH_RUNS:-50}

while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --target | --recipes | --precisions | --kits | --results | --work | --runs)
            [[ $# -ge 2 ]] || die 2 "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        *) die 2 "unknown option $1; see bench.sh --help" ;;
    esac
done

collect=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/benchmarks/collect.py
[[ $runs =~ ^[1-9][0-9]*$ ]] || die 2 "--runs must be a whole number from 1 on, got '$runs'"
[[ -z $kits || -d $kits ]] || die 2 "--kits $kits is not a folder: mount the folder that sam-export build wrote kits to"
command -v sam-export >/dev/null || die 1 "sam-export is not on PATH: install edgesam-deploy"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Before any work, as building may take long.
{ mkdir -p "$results" && probe=$(mktemp "$results/.bench.XXXXXX") && rm -f "$probe"; } 2>/dev/null ||
    die 1 "cannot write to the results folder $results: mount one that user $(id -u) may write to, or run as its owner (--user)"
work=${work:-$scratch/bundles}
label=""
taken=0
failed=()

if [[ -n $kits ]]; then
    while IFS= read -r -d '' manifest; do
        from_kit "$(dirname "$manifest")" || failed+=("$label")
    done < <(find -H "$kits" -mindepth 1 -name '.*' -prune -o -name manifest.json -print0 | sort -z)
    [[ $((taken + ${#failed[@]})) -gt 0 ]] ||
        die 1 "no kits${target:+ for $target} in $kits: build them on a host with  sam-export build --target DEVICE"
else
    target=${target:-cpu}
    read -ra recipes <<<"$recipes"
    read -ra precisions <<<"$precisions"
    for recipe in "${recipes[@]}"; do
        for precision in "${precisions[@]}"; do
            from_recipe "$recipe" "$precision" || failed+=("$label")
        done
    done
fi

[[ ${#failed[@]} -eq 0 ]] || die 1 "failed: ${failed[*]}"
