package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"

	"google.golang.org/protobuf/encoding/protowire"
)

// tracing measures the served read by a binary that can trace, with traces off and on. The collector is in this process.
func (in *installation) tracing(ctx context.Context) error {
	binary := filepath.Join(in.b.dir, "oneo-otel")
	if err := build(ctx, binary, "nomsgpack,otel"); err != nil {
		return err
	}
	rows := []*struct {
		name string
		more []string // settings; the default of tracing.sample unless it is set
		to   *collector
	}{
		{name: "off"},
		{name: "one request in a hundred (the default)"},
		{name: "every request", more: []string{"ONEO_TRACING_SAMPLE=1"}},
	}
	servers := make([]*process, len(rows))
	defer func() {
		for _, p := range servers {
			if p != nil {
				p.stop()
			}
		}
	}()
	var err error
	for i, r := range rows {
		if i > 0 {
			if r.to, err = collect(); err != nil {
				return err
			}
			defer r.to.server.Close()
			r.more = append(r.more, "ONEO_TRACING_ENDPOINT="+r.to.url)
		}
		if servers[i], err = in.serveBy(ctx, binary, r.more...); err != nil {
			return err
		}
	}
	got, err := in.inTurns(ctx, servers)
	if err != nil {
		return err
	}
	told := make([]string, len(rows)) // spans a request
	for i, r := range rows {
		p := servers[i]
		servers[i] = nil
		p.stop() // sends what it holds
		if r.to == nil {
			told[i] = "0"
			continue
		}
		if bad := r.to.bad.Load(); bad != nil {
			return fmt.Errorf("tracing %s: the collector could not read what it got: %w", r.name, *bad)
		}
		if r.to.spans.Load() == 0 {
			return fmt.Errorf("tracing %s: the collector got no span", r.name)
		}
		told[i] = fmt.Sprintf("%.3f", float64(r.to.spans.Load())/float64(p.answered))
	}
	b := in.b
	b.printf("### Traces, %d tenants\n", len(in.slugs))
	b.printf("The served read of a record by id (16 connections, wrk), by a binary with OpenTelemetry, in turns; the collector is on the same cores.\n")
	b.printf("| traced | requests/s | of off | p99 | server MB | spans a request |\n| --- | --- | --- | --- | --- | --- |")
	for i, r := range rows {
		b.printf("| %s | %.0f | **%.2f** | %s | %.0f | %s |", r.name, got[i].perSecond, got[i].ratio, got[i].p99, got[i].serverMB, told[i])
	}
	b.printf("")
	b.goal(got[1].ratio >= leastOfOff, fmt.Sprintf("as by default at least %.2f of off", leastOfOff), fmt.Sprintf("%.3f", got[1].ratio))
	return nil
}

// collector takes traces, OTLP over HTTP, counts their spans and forgets them.
type collector struct {
	url    string
	server *http.Server
	spans  atomic.Int64
	bad    atomic.Pointer[error] // why a request could not be read
}

func collect() (*collector, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c := &collector{url: "http://" + l.Addr().String()}
	c.server = &http.Server{Handler: c}
	go func() { _ = c.server.Serve(l) }() // until it is closed
	return c, nil
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	n := 0
	if err == nil {
		n, err = count(body, 1, 2, 2) // of an ExportTraceServiceRequest: resource_spans, scope_spans, spans
	}
	if err != nil {
		c.bad.Store(&err)
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c.spans.Add(int64(n))
}

// count is how many messages stand at a path of fields in a message. It is cheaper than to decode them: the collector
// shares the machine with what is measured.
func count(message []byte, path ...protowire.Number) (n int, err error) {
	if len(path) == 0 {
		return 1, nil
	}
	for len(message) > 0 {
		field, kind, tag := protowire.ConsumeTag(message)
		if tag < 0 {
			return 0, protowire.ParseError(tag)
		}
		message = message[tag:]
		length := protowire.ConsumeFieldValue(field, kind, message)
		if length < 0 {
			return 0, protowire.ParseError(length)
		}
		if field == path[0] && kind == protowire.BytesType {
			inner, _ := protowire.ConsumeBytes(message)
			k, err := count(inner, path[1:]...)
			if err != nil {
				return 0, err
			}
			n += k
		}
		message = message[length:]
	}
	return n, nil
}
