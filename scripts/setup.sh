#!/usr/bin/env bash
# Installs what oneo's two README commands need on a Debian machine and is not there: PostgreSQL, Redis, and with --ci
# PgBouncer for the tests. It says nothing and takes no time when everything is there.
set -euo pipefail

find_postgres() {
  local dir
  for dir in /usr/lib/postgresql/*/bin /usr/local/pgsql/bin; do
    if [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ]; then return 0; fi
  done
  command -v initdb >/dev/null && command -v postgres >/dev/null
}

missing=()
find_postgres || missing+=(postgresql)
command -v redis-server >/dev/null || missing+=(redis-server)
if [ "${1:-}" = --ci ]; then
  command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
fi
[ ${#missing[@]} -gt 0 ] || exit 0

sudo=()
if [ "$(id -u)" -ne 0 ]; then
  if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo=(sudo -n); else
    echo "setup: please install: ${missing[*]} (for example: sudo apt-get install ${missing[*]})" >&2
    exit 1
  fi
fi
if ! command -v apt-get >/dev/null; then
  echo "setup: please install with this system's package manager: ${missing[*]}" >&2
  exit 1
fi

# The packages must not start servers of their own: a policy for invoke-rc.d, only while they are installed.
policy=/usr/sbin/policy-rc.d
placed=
cleanup() { if [ -n "$placed" ]; then "${sudo[@]}" rm -f "$policy"; fi; }
trap cleanup EXIT
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
  placed=1
  "${sudo[@]}" chmod 755 "$policy"
fi

echo "setup: installing ${missing[*]}" >&2
install() {
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/tmp/oneo-setup.log 2>&1
}
if ! install; then
  "${sudo[@]}" apt-get update -qq >>/tmp/oneo-setup.log 2>&1
  if ! install; then
    tail -n 20 /tmp/oneo-setup.log >&2
    echo "setup: could not install ${missing[*]}; please install them by hand" >&2
    exit 1
  fi
fi
