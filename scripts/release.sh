#!/usr/bin/env bash
# Builds static binaries for a release into dist/, with checksums. Usage: scripts/release.sh VERSION
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/release.sh VERSION}
rm -rf dist
mkdir -p dist
for arch in amd64 arm64; do
  out="dist/oneo-$version-linux-$arch"
  CGO_ENABLED=0 GOOS=linux GOARCH=$arch go build -tags nomsgpack -trimpath -ldflags "-s -w -X main.version=$version" -o "$out" ./cmd/oneo
done
(cd dist && sha256sum oneo-* >SHA256SUMS)
cat dist/SHA256SUMS
