#!/usr/bin/env bash
# Names this machine's tenants in /etc/hosts, where their domains are not under .localhost. Usage: scripts/hosts.sh [--print]
set -euo pipefail
cd "$(dirname "$0")/.."
go run -tags nomsgpack ./cmd/oneo hosts "${1:---apply}"
