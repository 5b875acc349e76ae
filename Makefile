# oneo. `make help` lists the targets.
SHELL := /bin/bash
TAGS := nomsgpack
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
GO_BUILD := go build -tags $(TAGS) -trimpath -ldflags "-X main.version=$(VERSION)"
LINT := go tool -modfile=tools/go.mod golangci-lint
FUZZTIME ?= 20s

.DEFAULT_GOAL := help
.PHONY: help build dev test check lint fmt bench fuzz golden cover

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
	go test -race -tags $(TAGS) -timeout 14m ./...

check: lint build test ## lint, build and test

lint: ## run golangci-lint
	$(LINT) run --build-tags $(TAGS) ./...

fmt: ## format
	gofmt -w cmd pkg schemas bench

bench: ## run the benchmarks; ARGS="-only create" goes to them
	./scripts/bench.sh $(ARGS)

fuzz: ## run each fuzz target for FUZZTIME (20s)
	@grep -rlE '^func Fuzz' --include='*_test.go' pkg | while read -r file; do \
	  for target in $$(grep -oE '^func Fuzz[A-Za-z0-9]+' "$$file" | sed 's/func //'); do \
	    echo "$$file $$target"; go test -tags $(TAGS) -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) "./$$(dirname "$$file")" || exit 1; \
	  done; done

golden: ## rewrite the golden files
	ONEO_UPDATE_GOLDEN=1 go test -tags $(TAGS) ./cmd/... ./pkg/server/...

cover: ## show the coverage by package
	@./scripts/setup.sh --ci
	go test -tags $(TAGS) -coverprofile=/tmp/oneo-cover.out -coverpkg=./pkg/... ./... >/dev/null
	go tool cover -func=/tmp/oneo-cover.out | tail -n 1
