# `make help` explains every target. Everything here needs Go (any version from
# 1.21 on fetches the one that go.mod names) and nothing else; see README.md
# for what the programs need when they run.

.DEFAULT_GOAL := help
.PHONY: help build image demo helm hubble-cli clients test test-all chaos chaos-long chaos-found prometheus model schedules e2e e2e-change e2e-up e2e-down e2e-measure measure-l7 generate lint floors race conformance bench measure prepare clean

# ---- the Go command ----------------------------------------------------

GO := $(or $(GO),$(shell command -v go 2>/dev/null || { test -x /usr/local/go/bin/go && echo /usr/local/go/bin/go; }))
ifneq ($(GO),)
export PATH := $(dir $(abspath $(shell command -v $(GO)))):$(PATH)
endif
# Some distributions ship Go with GOTOOLCHAIN=local; what go.mod asks for is
# fetched unless the environment forbids it.
export GOTOOLCHAIN ?= auto
# No C compiler is needed, and a broken one does no harm.
export CGO_ENABLED ?= 0
# Without a home directory (some CI systems) Go's caches live in out/.
ifeq ($(HOME),)
export HOME := $(CURDIR)/out/_home
endif
# A checkout that belongs to another user must not stop the build.
BUILDVCS := $(shell git rev-parse HEAD >/dev/null 2>&1 && echo auto || echo false)

# What `portcullis version` says: RELEASE=v1.2.3.
RELEASE ?=
STAMP = $(if $(RELEASE),-X portcullis/agent.release=$(RELEASE))
BUILD = $(GO) build -trimpath -buildvcs=$(BUILDVCS) -ldflags='$(strip $(LINK) $(STAMP))'
TEST_FLAGS ?= -count=1 -timeout=12m
TEST_PACKAGES ?= ./...
GENERATORS := $(wildcard */generate.sh */*/generate.sh */*/*/generate.sh)

.PHONY: need-go
need-go:
	@test -n "$(GO)" || { echo "make: no Go found in PATH or /usr/local/go/bin: install Go 1.21 or newer (https://go.dev/dl/)" >&2; exit 1; }

# ---- for everybody -----------------------------------------------------

help: ## print this list
	@echo "Portcullis. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

build: need-go ## build bin/portcullis (no clang needed: the BPF object is committed)
	$(BUILD) -o bin/portcullis ./cmd/portcullis
	@echo "built bin/portcullis"

IMAGE ?= portcullis:dev
ARCHS ?= amd64 arm64
LABELS = org.opencontainers.image.title=portcullis org.opencontainers.image.licenses=Apache-2.0 org.opencontainers.image.version=$(RELEASE) arm64:portcullis.io/not-tried=true
image: LINK = -s -w
image: need-go ## write out/portcullis-image.tar, the image that deploy/ names, for amd64 and arm64 (ARCHS=amd64 for one; RELEASE=v1.2.3 names it), without Docker (`ctr -n k8s.io images import` it on the nodes)
	for a in $(ARCHS); do CGO_ENABLED=0 GOOS=linux GOARCH=$$a $(BUILD) -o out/image/portcullis-$$a ./cmd/portcullis || exit 1; done
	$(GO) run ./deploy/image/pack -o out/portcullis-image.tar -tag $(IMAGE) -arch '$(ARCHS)' -entrypoint /portcullis $(foreach l,$(LABELS),-label '$(l)') \
		-label 'org.opencontainers.image.description=Network policy that knows who holds an IP, and falls shut when it does not' 'out/image/portcullis-{arch}=portcullis'

demo: build ## run the story, the stale-identity attack and the agent's faults in a lab on this machine (root, under a minute)
	@test/prepare strict
	bin/portcullis demo

test: need-go ## run all tests, the privileged ones too when root; ends with a count (under 15 minutes)
	@test/prepare
	@$(BUILD) -o out/summary ./test/summary
	@echo "running the tests of $(TEST_PACKAGES); a line for each package as it ends"
	@out/summary $(TEST_FLAGS) $(TEST_PACKAGES)

CHAOS_FLAGS ?=
# What is judged has no state of the checkout in it: the page that a run writes
# would make it another binary, whose runs are not those that are kept.
CHAOS_BUILD = $(GO) build -trimpath -buildvcs=false -o out/chaos/portcullis ./cmd/portcullis
CHAOS_COMMIT = $(shell git rev-parse --short=12 HEAD 2>/dev/null && { git diff --quiet HEAD -- . ':(exclude)docs' || echo with changes; })
chaos: need-go ## break the lab in every way under every kind of evidence, and write docs/chaos-results.md (root, half an hour; goes on where it was stopped)
	@test/prepare strict
	$(CHAOS_BUILD)
	$(GO) run ./test/chaos -portcullis out/chaos/portcullis -commit '$(CHAOS_COMMIT)' -write docs/chaos-results.md $(CHAOS_FLAGS)

chaos-long: need-go ## 5000 reuses of IPs without a fault and under a partition, and write docs/chaos-results-long.md (root, an hour; goes on where it was stopped)
	@test/prepare strict
	$(CHAOS_BUILD)
	$(GO) run ./test/chaos -portcullis out/chaos/portcullis -commit '$(CHAOS_COMMIT)' -long -write docs/chaos-results-long.md $(CHAOS_FLAGS)

chaos-found: build ## try again whatever chaos runs have ever found (docs/chaos-found.md), and that they still see what is wrong (root, minutes)
	@test/prepare strict
	$(GO) run ./test/chaos -found docs/chaos-found.md

prometheus: build ## try dashboard and alerts of deploy/monitoring on a real Prometheus that scrapes a lab (root, two minutes; needs Debian's package prometheus)
	@test/prepare strict
	$(GO) run ./test/prometheus -write docs/metrics.md

# A real Kubernetes: three nodes on this machine. The first time it is built
# from source, for minutes; see test/e2e.
E2E_FLAGS ?= -count=1 -timeout=90m
e2e: need-go ## install on a real Kubernetes that is made on this machine, and try it there; ends with a count (root)
	@$(BUILD) -o out/summary ./test/summary
	@out/summary -tags=e2e -skip='^TestChange$$' $(E2E_FLAGS) ./test/e2e ./test/e2e/install

e2e-change: need-go ## pods, agents, versions, disks and nodes that come, go, fill up and change on such a cluster, under traffic (root, half an hour)
	@$(BUILD) -o out/summary ./test/summary
	@out/summary -tags=e2e $(E2E_FLAGS) -run='^TestChange$$' ./test/e2e -e2e.podbits=27

hubble-cli: build ## build the real hubble command and compare what it shows of a lab with `portcullis observe` (root; ten minutes the first time)
	cd test/hubble && CGO_ENABLED=0 $(GO) build -ldflags='-s -w' -o ../../out/hubble github.com/cilium/cilium/hubble
	test/hubble/try out/hubble bin/portcullis

helm: build ## build the real helm and compare what it makes of the chart with `portcullis install --dry-run` (ten minutes the first time)
	cd test/helm && CGO_ENABLED=0 $(GO) build -ldflags='-s -w' -o ../../out/helm helm.sh/helm/v4/cmd/helm
	$(GO) test -count=1 -v -tags=helm -run '^TestHelm' ./agent/install -helm=$(CURDIR)/out/helm

clients: build ## try curl, wget, nginx, haproxy, gRPC, WebSocket, TLS and DNS clients against the L7 proxy, and write docs/l7.md (root, five minutes; installs Debian packages by apt-get)
	@test/prepare strict
	$(GO) run ./test/clients -write docs/l7.md

e2e-up: need-go ## make such a cluster and leave it, with Portcullis in it (root; `go run ./test/e2e/cluster/cmd kubectl ...`)
	$(GO) run ./test/e2e/cluster/cmd up

e2e-down: need-go ## remove it
	$(GO) run ./test/e2e/cluster/cmd down

e2e-measure: need-go ## memory, requests, pod starts and policy changes of agents on such a cluster, measured (root, half an hour)
	$(GO) run ./test/e2e/measure $(E2E_MEASURE_FLAGS)

# ---- for those who change it -------------------------------------------

test-all: test model schedules ## `test`, `model`, `schedules` and a minute of every fuzz target (hours)
	@test/fuzz 60s

MODEL_FLAGS ?= -model.states=0 -model.time=10m -test.parallel=2
model: need-go ## search the formal model of the leases as far as ten minutes for each of its configurations go (docs/model)
	GOMEMLIMIT=5GiB $(GO) test -count=1 -timeout=12h -v -run '^Test(Configs|KernelConfigs)$$' ./ipcache/lease/model $(MODEL_FLAGS)

SCHEDULES ?= 1000000
schedules: need-go ## run 1,000,000 schedules of the lease machines, or SCHEDULES=n; goes on where it was stopped (an hour on two cores)
	@mkdir -p out
	$(GO) test -count=1 -timeout=12h -v -run '^TestSchedules$$' ./ipcache/lease/sim -sim.schedules=$(SCHEDULES) -sim.resume=$(CURDIR)/out/schedules

generate: need-go ## rebuild what is generated and committed (needs clang 19.1.x, llvm-strip and protoc)
	@for g in $(GENERATORS); do echo "$$g"; ./$$g || exit 1; done

lint: need-go ## gofmt, go vet, staticcheck
	@echo gofmt; files=$$(find . -name '*.go' -not -path './out/*' -not -path './.git/*' -print0 | xargs -0 "$$($(GO) env GOROOT)/bin/gofmt" -l) && test -z "$$files" || { echo "gofmt would change:" $$files; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags=e2e ./test/e2e ./test/e2e/install
	$(GO) tool staticcheck ./...

floors: need-go ## check the layout: who imports whom, purity, sizes, comments, documents
	$(GO) test -count=1 ./test/floors

conformance: need-go ## agreement with the published truth tables of policy, in numbers
	$(GO) test -count=1 -v -run 'Corpus$$' ./test/conformance

# The machines, parsers and stores, and the parts that run goroutines.
RACE_PACKAGES ?= ./identity/... ./ipcache/... ./authz/... ./observe/... ./proxy/... ./datapath/hold ./agent/... ./test/summary
race: need-go ## run the tests of RACE_PACKAGES under the race detector (needs gcc)
	@test/prepare
	@$(BUILD) -o out/summary ./test/summary
	@CGO_ENABLED=1 out/summary -race -short -count=1 -timeout=20m $(RACE_PACKAGES)

bench: need-go ## ns per packet by program test-run, beside the empty program in the same run (root)
	@test/prepare strict
	$(GO) test -count=1 -run '^$$' -bench . ./test/bench

measure: build ## first contacts, IP reuse, storms, throughput, scale and policy compilation, measured with real agents (root, half an hour)
	@test/prepare strict
	$(GO) run ./test/bench/contacts -portcullis bin/portcullis first
	$(GO) run ./test/bench/contacts -portcullis bin/portcullis reuse
	$(GO) run ./test/bench/contacts -portcullis bin/portcullis -add-first reuse
	$(GO) run ./test/bench/contacts -portcullis bin/portcullis flood
	$(GO) run ./test/bench/throughput -portcullis bin/portcullis
	$(GO) run ./test/bench/scale -portcullis bin/portcullis
	$(GO) run ./test/bench/policy
	$(MAKE) measure-l7

measure-l7: build ## requests through the proxy beside direct, nginx and haproxy (installed by apt-get), idle connections, fresh names (root, ten minutes)
	@test/prepare strict
	$(GO) run ./test/bench/l7 -portcullis bin/portcullis requests
	$(GO) run ./test/bench/l7 -portcullis bin/portcullis idle
	$(GO) run ./test/bench/l7 -portcullis bin/portcullis names

prepare: ## check the kernel and mount the BPF file system where it is missing
	@test/prepare strict

clean: ## remove bin/ and out/
	@if [ -d out/_home ]; then chmod -R u+w out/_home; fi
	rm -rf bin out
