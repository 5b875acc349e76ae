#!/usr/bin/env bash
# Installs what `make dev` needs beside Go and is not on this machine: PostgreSQL and Redis, from the distribution's
# packages. With --ci also what the tests need: PgBouncer, pgBackRest, tmux, a C compiler for the race detector, and of the package prometheus
# promtool alone, into /usr/local/bin: the rest is a server and 80 MB of what its pages need.
# It says nothing and takes no time when everything is there. The packages' own servers are neither made nor started.
set -euo pipefail

has_postgres() {
  local dir
  for dir in /usr/lib/postgresql/*/bin /usr/local/pgsql/bin /usr/pgsql/bin /opt/homebrew/opt/postgresql@*/bin; do
    if [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ]; then return 0; fi
  done
  command -v initdb >/dev/null && command -v postgres >/dev/null
}

has() {
  command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ]
}

case "${1:-}" in
  '' | --ci) ;;
  *) echo "usage: scripts/setup.sh [--ci]" >&2; exit 2 ;;
esac

missing=()
has_postgres || missing+=(postgresql)
has redis-server || missing+=(redis-server)
if [ "${1:-}" = --ci ]; then
  has pgbouncer || missing+=(pgbouncer)
  has pgbackrest || missing+=(pgbackrest)
  has tmux || missing+=(tmux)
  has "${CC:-gcc}" || has clang || missing+=(gcc libc6-dev)
fi
promtool=
if [ "${1:-}" = --ci ] && ! has promtool; then promtool=missing; fi
if [ ${#missing[@]} -eq 0 ] && [ -z "$promtool" ]; then exit 0; fi

if ! command -v apt-get >/dev/null; then
  echo "setup: please install, with this system's package manager: ${missing[*]}${promtool:+ promtool}" >&2
  exit 1
fi
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
    echo "setup: please install what is missing: sudo apt-get install ${missing[*]}${promtool:+ prometheus}" >&2
    exit 1
  fi
  sudo=(sudo -n)
fi
as_root() {
  # An empty array is "unbound" to bash before 4.4.
  ${sudo[@]+"${sudo[@]}"} "$@"
}

fetch_promtool() {
  # _apt, whom apt-get would download as, cannot write to a folder of ours.
  (cd "$1" && as_root apt-get -o APT::Sandbox::User=root -qq download prometheus) &&
    dpkg-deb --fsys-tarfile "$1"/prometheus_*.deb | tar -x -C "$1" ./usr/bin/promtool &&
    as_root install -m 755 "$1/usr/bin/promtool" /usr/local/bin/promtool
}
if [ -n "$promtool" ]; then
  echo "setup: fetching promtool" >&2
  fetched=$(mktemp -d)
  if ! said=$(fetch_promtool "$fetched" 2>&1); then
    # The lists may be old or missing. An update that fails for one source may still have brought the one that is needed:
    # the second try decides, and what the update said is told with it.
    updated=$(as_root apt-get update -qq 2>&1) || updated+=$'\n'"setup: apt-get update failed"
    if ! said=$(fetch_promtool "$fetched" 2>&1); then
      rm -rf "$fetched"
      tail -n 20 <<<"$updated" >&2
      tail -n 20 <<<"$said" >&2
      echo "setup: promtool could not be fetched from the package prometheus" >&2
      exit 1
    fi
  fi
  as_root rm -rf "$fetched"
fi
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi

# While the packages are installed, and no longer: no service is started (unless the machine has a policy of its own),
# and PostgreSQL's does not make a cluster.
policy=/usr/sbin/policy-rc.d
cluster=/etc/postgresql-common/createcluster.d/oneo-setup.conf
log=$(mktemp)
placed=()
cleanup() {
  local file
  for file in ${placed[@]+"${placed[@]}"}; do as_root rm -f "$file"; done
  # Only when the installation failed: otherwise it is the package's folder, and holds more than ours. A folder that
  # stays is told, and is not how the script ends: that is how the installation ended.
  if [ ! -e /etc/postgresql-common/createcluster.conf ] && [ -d "$(dirname "$cluster")" ]; then
    as_root rmdir -p --ignore-fail-on-non-empty "$(dirname "$cluster")" || echo "setup: the empty folder $(dirname "$cluster") stays" >&2
  fi
  rm -f "$log"
}
trap cleanup EXIT
if [ ! -e "$policy" ]; then
  placed+=("$policy")
  printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
  as_root chmod 755 "$policy"
fi
placed+=("$cluster")
as_root mkdir -p "$(dirname "$cluster")"
echo "create_main_cluster = false" | as_root tee "$cluster" >/dev/null

install() {
  as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
    apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1
}
echo "setup: installing ${missing[*]}" >&2
if ! install; then
  # A fresh machine has no list of packages, or an old one.
  # Where it can be refreshed in part only, the packages may be there all the same; its words are told if they are not.
  updated=$(as_root apt-get update -qq 2>&1) || updated="apt-get update failed: $updated"
  if ! install; then
    tail -n 20 "$log" >&2
    if [ -n "$updated" ]; then tail -n 20 <<<"$updated" >&2; fi
    echo "setup: apt-get could not install what is missing: ${missing[*]}" >&2
    exit 1
  fi
fi

# Nor are they started when the machine starts.
if [ -d /run/systemd/system ] && command -v systemctl >/dev/null; then
  for service in redis-server pgbouncer; do
    case " ${missing[*]} " in
      *" $service "*) as_root systemctl disable --quiet "$service" ||
        echo "setup: $service starts with the machine: systemctl disable $service stops that" >&2 ;;
    esac
  done
fi
