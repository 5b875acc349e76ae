#!/usr/bin/env bash
# Runs the benchmarks (bench/) and prints the tables of docs/benchmarks.md. Arguments go to the program: -only create,read,
# -only fleet or parts of it: pending,column,live,blocked,memory,fingerprint,doctor (-help lists the others).
# tracing builds a second binary, with the tag otel; dashboard runs `oneo tui` in tmux. Both are measured only when they are named.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
if ! command -v wrk >/dev/null || ! command -v psql >/dev/null || ! command -v tmux >/dev/null; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "bench: please install: wrk postgresql-client tmux" >&2
    exit 1
  fi
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq wrk postgresql-client tmux >/dev/null
fi
cd bench
go run -tags nomsgpack . "$@"
