# oneo. `make help` lists the targets.
SHELL := /bin/bash
TAGS := nomsgpack
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
# The version comes from -ldflags, so git is not asked twice: a clone that another user owns would fail the build.
GO_BUILD := go build -tags $(TAGS) -trimpath -buildvcs=false -ldflags "-X main.version=$(VERSION)"
LINT := go tool -modfile=tools/go.mod golangci-lint
# A count, not a time: a time's end is sometimes told as a failure (go.dev/issue/75804, until Go 1.27).
FUZZTIME ?= 500000x
# Their tests are child processes, servers and SQL for the most part. The race detector doubles their time, and what they do at
# one time they do by rooms that are tested with it; `make race` runs it over them too. So is lint: it waits for an interpreter.
# They are built with traces (the tag otel), the others as oneo is.
PLAIN := /(cmd/oneo|pkg/(app|lint|provision|transfer|backup|snapshot|migrate|physical))$$

.DEFAULT_GOAL := help
.PHONY: help build dev test race check lint fmt bench fuzz golden cover

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-8s %s\n", $$1, $$2}'

build: ## build bin/oneo
	@mkdir -p bin
	$(GO_BUILD) -o bin/oneo ./cmd/oneo

dev: ## run everything on this machine, with demo data; ARGS="--addr :9000" goes to oneo dev
	@./scripts/setup.sh
	@mkdir -p bin && $(GO_BUILD) -o bin/oneo ./cmd/oneo
	@exec ./bin/oneo dev $(ARGS)

test: ## run the tests, on PostgreSQL and Redis servers that they start themselves
	@./scripts/setup.sh --ci
	go test -race -tags $(TAGS) -timeout 18m $$(go list -tags $(TAGS) ./... | grep -vE '$(PLAIN)')
	go test -tags $(TAGS),otel -timeout 18m ./pkg/trace $$(go list -tags $(TAGS) ./... | grep -E '$(PLAIN)')

race: ## run all tests with the race detector: half an hour
	@./scripts/setup.sh --ci
	go test -race -tags $(TAGS) -timeout 40m ./...

check: lint build test ## lint, build and test

lint: ## run golangci-lint
	$(LINT) run --build-tags $(TAGS) ./...

fmt: ## format
	gofmt -w cmd pkg schemas bench

bench: ## run the benchmarks; ARGS="-only fleet -fleet 200 -many 500" goes to them
	./scripts/bench.sh $(ARGS)

fuzz: ## run each fuzz target for FUZZTIME (500000x)
	@grep -rlE '^func Fuzz' --include='*_test.go' pkg | while read -r file; do \
	  for target in $$(grep -oE '^func Fuzz[A-Za-z0-9]+' "$$file" | sed 's/func //'); do \
	    echo "$$file $$target"; go test -tags $(TAGS) -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) "./$$(dirname "$$file")" || exit 1; \
	  done; done

golden: ## rewrite the golden files
	@./scripts/setup.sh --ci
	@dirs=$$(grep -rl ONEO_UPDATE_GOLDEN --include='*_test.go' . | xargs -r -n1 dirname | sort -u); \
	  if [ -z "$$dirs" ]; then echo "no test has golden files"; exit 0; fi; \
	  ONEO_UPDATE_GOLDEN=1 go test -tags $(TAGS) -count=1 $$dirs && git status --short -- '*/testdata/*'

cover: ## show the coverage by package
	@./scripts/setup.sh --ci
	go test -tags $(TAGS) -timeout 18m -coverprofile=cover.out -coverpkg=./pkg/...,./cmd/... ./...
	@# A statement is in the profile once for each test binary: it is covered when one of them ran it.
	@awk 'NR > 1 { of[$$1] = $$2; if ($$3 > 0) ran[$$1] = 1 } \
	  END { for (b in of) { d = b; sub(/\/[^\/]*$$/, "", d); all[d] += of[b]; every += of[b]; if (b in ran) { hit[d] += of[b]; hits += of[b] } } \
	    for (d in all) printf "  %5.1f%%  %s\n", 100 * hit[d] / all[d], d | "sort -k2"; close("sort -k2"); printf "  %5.1f%%  all\n", 100 * hits / every }' cover.out
