package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// measured is one row of a table.
type measured struct {
	perSecond float64
	ratio     float64 // of the floor's in the same round; 0: not taken
	p99       string
	backends  int
	privateMB float64
	serverMB  float64
}

func recordPath(id string) string { return "/api/v1/pipelines/deals/records/" + id }

// wrk reads records of the tenants by Host header, and returns what the program said. With zipf the tenants are drawn
// with exponent 1.1.
func (in *installation) wrk(ctx context.Context, p *process, zipf bool, d time.Duration, more ...string) (string, error) {
	ids, tokens := filepath.Join(in.b.dir, "ids"), filepath.Join(in.b.dir, "tokens")
	var lines, toks strings.Builder
	seen := map[int]bool{}
	line := func(i int) {
		fmt.Fprintf(&lines, "%s %s\n", in.slugs[i], recordPath(in.records[i][rand.IntN(len(in.records[i]))]))
		if !seen[i] {
			seen[i] = true
			fmt.Fprintf(&toks, "%s %s\n", in.slugs[i], token(in.slugs[i]))
		}
	}
	draws := max(20_000, 4*len(in.slugs))
	if zipf {
		for _, i := range zipfDraws(len(in.slugs), draws, 1.1) {
			line(i)
		}
	} else {
		for k := range draws {
			line(k % len(in.slugs))
		}
	}
	if err := os.WriteFile(ids, []byte(lines.String()), 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(tokens, []byte(toks.String()), 0o600); err != nil {
		return "", err
	}
	host, port, _ := strings.Cut(p.addr, ":")
	cmd := exec.CommandContext(ctx, "wrk", "-t1", "-c16", fmt.Sprintf("-d%ds", int(d.Seconds())), "--latency", "--timeout", "10s",
		"-s", filepath.Join("lua", "tenants.lua"), "http://"+host+":"+port)
	cmd.Env = append(append(os.Environ(), "IDS="+ids, "TOKENS="+tokens, "SUFFIX=localhost"), more...)
	text, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("wrk: %w: %s", err, text)
	}
	return string(text), nil
}

// drive measures a server by wrk. Any answer but 2xx is an error.
func (in *installation) drive(ctx context.Context, p *process, zipf bool, d time.Duration) (measured, error) {
	text, err := in.wrk(ctx, p, zipf, d)
	if err != nil {
		return measured{}, err
	}
	if !strings.Contains(text, "non2xx 0\n") {
		return measured{}, fmt.Errorf("wrk got answers other than 2xx:\n%s", text)
	}
	var m measured
	if g := regexp.MustCompile(`Requests/sec:\s+([\d.]+)`).FindStringSubmatch(text); g != nil {
		m.perSecond, _ = strconv.ParseFloat(g[1], 64)
	}
	if g := regexp.MustCompile(`(\d+) requests in`).FindStringSubmatch(text); g != nil {
		n, _ := strconv.Atoi(g[1])
		p.answered += n
	}
	if g := regexp.MustCompile(`(?m)^\s+99%\s+(\S+)`).FindStringSubmatch(text); g != nil {
		m.p99 = g[1]
	}
	m.serverMB = p.residentMB()
	m.backends, m.privateMB, err = in.backends(ctx)
	return m, err
}

// warm is how long a server is driven before it is measured.
func (in *installation) warm() time.Duration {
	if len(in.slugs) > 1000 { // until each backend has seen each tenant of its sub-pool several times
		return time.Minute
	}
	return 4 * time.Second
}

// zipfDraws draws tenants by rank with a weight of 1/rank^s; ranks are spread over the tenants at random.
func zipfDraws(n, draws int, s float64) []int {
	r := rand.New(rand.NewPCG(1, 2))
	perm := r.Perm(n)
	cumulated := make([]float64, n)
	sum := 0.0
	for i := range n {
		sum += 1 / math.Pow(float64(i+1), s)
		cumulated[i] = sum
	}
	out := make([]int, draws)
	for k := range draws {
		x := r.Float64() * sum
		lo, hi := 0, n-1
		for lo < hi {
			mid := (lo + hi) / 2
			if cumulated[mid] < x {
				lo = mid + 1
			} else {
				hi = mid
			}
		}
		out[k] = perm[lo]
	}
	return out
}

// contender is one way of serving the same read.
type contender struct {
	name string
	zipf bool
	run  func(context.Context) (*process, error)
}

// rounds is how often each contender takes turns with the floor.
const rounds = 5

// read compares the contenders with the first, the floor, at a number of tenants. Each is warmed up until its backends
// have seen its tenants, and then takes turns with the floor, so that a ratio compares neighbours in time: the rows are
// the medians of all turns.
func (in *installation) read(ctx context.Context, contenders []contender) error {
	n := len(in.slugs)
	contenders = append(contenders[:1], slices.DeleteFunc(contenders[1:], func(c contender) bool { return !in.b.ways.MatchString(c.name) })...)
	if len(contenders) == 1 {
		return nil
	}
	turn := max(2*time.Second, in.b.duration/rounds)
	start := func(c contender) (*process, measured, error) {
		p, err := c.run(ctx)
		if err != nil {
			return nil, measured{}, fmt.Errorf("%s: %w", c.name, err)
		}
		m, err := in.drive(ctx, p, c.zipf, in.warm())
		if err != nil {
			p.stop()
			return nil, m, fmt.Errorf("%s: %w", c.name, err)
		}
		return p, m, nil
	}
	floor, alone, err := start(contenders[0])
	if err != nil {
		return err
	}
	defer floor.stop()

	var floors, rows []measured
	for _, c := range contenders[1:] {
		p, _, err := start(c)
		if err != nil {
			return err
		}
		var turns []measured
		for range rounds {
			f, ferr := in.drive(ctx, floor, false, turn)
			m, err := in.drive(ctx, p, c.zipf, turn)
			if err := errors.Join(ferr, err); err != nil {
				p.stop()
				return fmt.Errorf("%s: %w", c.name, err)
			}
			m.ratio = m.perSecond / f.perSecond
			m.backends, m.privateMB = m.backends-alone.backends, m.privateMB-alone.privateMB // the floor's are still there
			floors, turns = append(floors, f), append(turns, m)
		}
		p.stop()
		rows = append(rows, middle(turns))
	}
	f := middle(floors)
	in.b.printf("### A record by id, %d tenants\n", n)
	in.b.printf("16 connections (wrk), login checked, tenant resolved; floor: the same handler with a fixed, qualified, prepared statement and no tenant.\n")
	in.b.printf("| way | requests/s | of the floor | p99 | backends, private MB | server MB |\n| --- | --- | --- | --- | --- | --- |")
	in.b.printf("| %s | %.0f | **1.00** | %s | %d, %.0f | %.0f |", contenders[0].name, f.perSecond, f.p99, alone.backends, alone.privateMB, f.serverMB)
	for i, m := range rows {
		in.b.printf("| %s | %.0f | **%.2f** | %s | %d, %.0f | %.0f |", contenders[i+1].name, m.perSecond, m.ratio, m.p99, m.backends, m.privateMB, m.serverMB)
	}
	in.b.printf("")
	return nil
}

// middle is the turn in the middle, by its ratio or, of the floor, its speed; memory is that of the last turn.
func middle(turns []measured) measured {
	last := turns[len(turns)-1]
	sorted := slices.SortedFunc(slices.Values(turns), func(a, b measured) int {
		return cmp.Or(cmp.Compare(a.ratio, b.ratio), cmp.Compare(a.perSecond, b.perSecond))
	})
	m := sorted[len(sorted)/2]
	m.backends, m.privateMB, m.serverMB = last.backends, last.privateMB, last.serverMB
	return m
}

// reads grows one installation from few to many tenants, and measures reading at both sizes.
func (b *bench) reads(ctx context.Context, few, many int) error {
	in, err := b.install(ctx, "bench_role", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	if err := in.grow(ctx, few); err != nil {
		return err
	}
	schema, err := b.install(ctx, "bench_schema", postgres.BySchema, 8)
	if err != nil {
		return err
	}
	if err := schema.grow(ctx, few); err != nil {
		return err
	}
	if err := in.read(ctx, []contender{
		{"floor", false, in.floor("floor")},
		{"oneo, gate and role", false, func(ctx context.Context) (*process, error) { return in.serve(ctx) }},
		{"naive: begin, set local search_path, query, commit", false, in.floor("naive")},
		{"oneo, no statement of a tenant's own", false, func(ctx context.Context) (*process, error) { return in.serve(ctx, "ONEO_DATABASE_HOT_STATEMENTS=0") }},
	}); err != nil {
		return err
	}
	if err := schema.read(ctx, []contender{
		{"floor", false, schema.floor("floor")},
		{"oneo, isolation: schema", false, func(ctx context.Context) (*process, error) { return schema.serve(ctx) }},
	}); err != nil {
		return err
	}
	start := time.Now()
	if err := in.grow(ctx, many); err != nil {
		return err
	}
	b.printf("(%d tenants with 50 records each were made in %s.)\n", many-few, time.Since(start).Round(time.Second))
	oneo := func(more ...string) func(context.Context) (*process, error) {
		return func(ctx context.Context) (*process, error) { return in.serve(ctx, more...) }
	}
	return in.read(ctx, []contender{
		{"floor", false, in.floor("floor")},
		{"oneo, uniform", false, oneo()},
		{"oneo, Zipf 1.1", true, oneo()},
		{"oneo, uniform, the cap reached (backends of at most 24 MB)", false, oneo("ONEO_DATABASE_BACKEND_MEMORY=24MB")},
		{"naive, uniform", false, in.floor("naive")},
	})
}
