package observe_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// during is a context of a request of a tenant.
func during(t *testing.T, request, slug string) context.Context {
	t.Helper()
	a := &tenant.About{Request: request}
	if slug != "" {
		s, err := tenant.ParseSlug(slug)
		require.NoError(t, err)
		a.For(s)
	}
	return tenant.WithAbout(t.Context(), a)
}

// logged is a server of the operators' listener with a log of so many bytes.
type logged struct {
	*httptest.Server
	logs *observe.Logs
	log  *slog.Logger
	out  *bytes.Buffer
	as   registry.Instance
}

const opsSecret = "a secret that is shared by all of them"

func newLogged(t *testing.T, most int) *logged {
	t.Helper()
	l := &logged{logs: observe.NewLogs(most), out: &bytes.Buffer{}}
	l.log = slog.New(l.logs.Handler(slog.NewTextHandler(l.out, nil)))
	host, err := os.Hostname()
	require.NoError(t, err)
	l.as = registry.Instance{ID: uuid.New(), Host: host, PID: 1, Version: "v1"}
	l.Server = httptest.NewServer(observe.Guard([]byte(opsSecret), l.logs.Handle(l.as.ID)))
	t.Cleanup(l.Server.Close)
	l.as.OpsAddr = l.Listener.Addr().String()
	return l
}

func (l *logged) get(t *testing.T, query string) (int, []map[string]any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, l.URL+"/logs?"+query, nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+observe.Token([]byte(opsSecret)))
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode, nil
	}
	var all []map[string]any
	for line := range strings.Lines(string(body)) {
		var m map[string]any
		require.NoError(t, json.Unmarshal([]byte(line), &m), line)
		all = append(all, m)
	}
	return resp.StatusCode, all
}

func messages(all []map[string]any) (m []string) {
	for _, line := range all {
		m = append(m, fmt.Sprint(line["msg"]))
	}
	return m
}

func TestEachLineSaysForWhomItIs(t *testing.T) {
	t.Parallel()
	l := newLogged(t, 1<<20)
	acme := named(t, 1, "acme")
	l.log.InfoContext(during(t, "request-1", "acme"), "one", "took", 1500*time.Millisecond)
	l.log.InfoContext(during(t, "request-2", ""), "two")
	l.log.InfoContext(during(t, "request-3", "acme"), "three", "tenant", "named", "request_id", "itself")
	l.log.With("tenant", acme.Slug).WithGroup("g").InfoContext(t.Context(), "four", "host", "x")
	l.log.InfoContext(t.Context(), "five")
	l.log.DebugContext(t.Context(), "not wanted")
	_, all := l.get(t, "")
	require.Equal(t, []string{"one", "two", "three", "four", "five"}, messages(all))
	require.Equal(t, "request-1", all[0]["request_id"])
	require.Equal(t, "acme", all[0]["tenant"])
	require.Equal(t, "1.5s", all[0]["took"])
	require.NotContains(t, all[1], "tenant")
	require.Equal(t, []any{"named", "itself"}, []any{all[2]["tenant"], all[2]["request_id"]})
	require.Equal(t, "acme", all[3]["tenant"], "a slug is a text in JSON too")
	require.InDelta(t, 5, all[4]["seq"], 0)
	require.Contains(t, l.out.String(), "msg=one took=1.5s request_id=request-1 tenant=acme\n")
	require.Equal(t, 1, strings.Count(l.out.String(), "tenant=named"), l.out.String())
	require.NotContains(t, l.out.String(), "request-3")
	require.NotContains(t, l.out.String(), "not wanted")

	_, all = l.get(t, "tenant=ac*&tenant=nobody")
	require.Equal(t, []string{"one", "four"}, messages(all))
}

func TestLinesAreKeptInABound(t *testing.T) {
	t.Parallel()
	const most = 100 << 10
	l := newLogged(t, most)
	for i := range 5000 {
		l.log.Info("line", "n", i, "fill", strings.Repeat("x", i%200))
	}
	code, all := l.get(t, "")
	require.Equal(t, http.StatusOK, code)
	size := 0
	for i, line := range all {
		text, err := json.Marshal(line)
		require.NoError(t, err)
		size += len(text)
		require.InDelta(t, 5000-len(all)+i, line["n"], 0)
	}
	require.Less(t, size, most)
	require.Greater(t, size, most/3)

	l.log.Info("huge", "tenant", "acme", "what", strings.Repeat("y", 200<<10))
	_, all = l.get(t, "after=5000")
	require.Equal(t, []string{"huge"}, messages(all))
	require.Equal(t, "acme", all[0]["tenant"])
	require.NotContains(t, all[0], "what")
	require.Greater(t, all[0]["too_long_bytes"], 200_000.0)
}

func TestLogsAreFilteredAndGuarded(t *testing.T) {
	t.Parallel()
	l := newLogged(t, 1<<20)
	l.log.Info("one")
	l.log.Warn("two")
	l.log.Error("three")
	_, all := l.get(t, "level=warn")
	require.Equal(t, []string{"two", "three"}, messages(all))
	_, all = l.get(t, "since="+time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	require.Empty(t, all)
	_, all = l.get(t, "since="+time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)+"&after=1&level=error")
	require.Equal(t, []string{"three"}, messages(all))
	for _, bad := range []string{"level=loud", "since=5m", "after=-1", "after=x", "follow=perhaps", "tenant=", "tenant=[", "limit=1"} {
		code, _ := l.get(t, bad)
		require.Equal(t, http.StatusBadRequest, code, bad)
	}
	resp, err := http.Get(l.URL + "/logs")
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusUnauthorized, resp.StatusCode)
}

// A reader that takes nothing holds nobody who logs, and is cut off.
func TestASlowReaderIsCutOff(t *testing.T) {
	t.Parallel()
	l := newLogged(t, 64<<10)
	l.log.Info("first")
	client := observe.NewClient([]byte(opsSecret))
	defer client.Close()
	began, goOn := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		var once sync.Once
		done <- client.Logs(t.Context(), l.as, observe.LogQuery{Follow: true}, func(observe.LogLine) error {
			once.Do(func() { close(began); <-goOn })
			return nil
		})
	}()
	<-began
	for range 200_000 { // more than what lies between the two can hold, many times what is kept
		l.log.Info("line", "fill", strings.Repeat("x", 200))
	}
	close(goOn)
	err := <-done
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	require.Equal(t, "cut", fault.Of(err).Code, "%v", err)
}

func TestFollowersAreFew(t *testing.T) {
	t.Parallel()
	l := newLogged(t, 1<<20)
	l.log.Info("first")
	client := observe.NewClient([]byte(opsSecret))
	defer client.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var following sync.WaitGroup
	for range 16 {
		began := make(chan struct{})
		following.Go(func() {
			_ = client.Logs(ctx, l.as, observe.LogQuery{Follow: true}, func(observe.LogLine) error { close(began); return nil })
		})
		<-began
	}
	require.Error(t, client.Logs(t.Context(), l.as, observe.LogQuery{Follow: true}, func(observe.LogLine) error { return nil }))
	cancel()
	following.Wait()
	require.Eventually(t, func() bool { // their room is free
		ok := errors.New("ok")
		return errors.Is(client.Logs(t.Context(), l.as, observe.LogQuery{Follow: true}, func(observe.LogLine) error { return ok }), ok)
	}, pgtest.Patience, 10*time.Millisecond)
}

// Servers come, go away, and come back: each line is shown once, and those that do not answer are named once.
func TestLogsOfManyServersAreFollowed(t *testing.T) {
	t.Parallel()
	one, two := newLogged(t, 1<<20), newLogged(t, 1<<20)
	gone := registry.Instance{ID: uuid.New(), Host: "gone", OpsAddr: "127.0.0.1:1"}
	one.log.Info("one 1")
	two.log.Info("two 1")
	one.log.Info("one 2")
	client := observe.NewClient([]byte(opsSecret))
	defer client.Close()
	all, missing := client.AllLogs(t.Context(), []registry.Instance{one.as, two.as, gone}, observe.LogQuery{})
	var texts []string
	for _, l := range all {
		texts = append(texts, l.Message)
	}
	require.Equal(t, []string{"one 1", "two 1", "one 2"}, texts)
	require.Len(t, missing, 1)
	require.Equal(t, gone, missing[0].Instance)

	var mu sync.Mutex
	servers, seen, lost, asked := []registry.Instance{one.as, gone}, map[string]int{}, map[string]int{}, 0
	var down error
	change := func(f func()) { mu.Lock(); defer mu.Unlock(); f() }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f := observe.Follower{
		Client: client,
		Servers: func(context.Context) ([]registry.Instance, error) {
			mu.Lock()
			defer mu.Unlock()
			return servers, down
		},
		Lines: func(ls []observe.LogLine) error {
			change(func() {
				for _, l := range ls {
					seen[l.Message]++
				}
			})
			return nil
		},
		Lost:  func(s registry.Instance, _ error) { change(func() { lost[s.ID.String()]++ }) },
		Found: func(registry.Instance) {},
		Asked: func(error) { change(func() { asked++ }) },
	}
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	within := func(what string, is func() bool) {
		t.Helper()
		require.Eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return is() }, pgtest.Patience, 10*time.Millisecond, what)
	}
	within("what was kept", func() bool { return seen["one 2"] == 1 && lost[gone.ID.String()] == 1 })
	change(func() { servers = append(servers, two.as) })
	within("a server that begins later", func() bool { return seen["two 1"] == 1 })
	one.CloseClientConnections() // the connection breaks; the server lives
	within("a server that is cut off", func() bool { return lost[one.as.ID.String()] == 1 })
	one.log.Info("one 3")
	within("it is followed again behind what was read", func() bool { return seen["one 3"] == 1 })
	change(func() { down = errors.New("PostgreSQL is away") })
	within("the list cannot be read", func() bool { return asked == 1 })
	two.log.Info("two 2")
	within("those that are known are followed", func() bool { return seen["two 2"] == 1 })
	cancel()
	require.NoError(t, <-ended)
	require.Equal(t, map[string]int{"one 1": 1, "one 2": 1, "one 3": 1, "two 1": 1, "two 2": 1}, seen)
	require.Equal(t, 1, lost[gone.ID.String()])
}

func lostLine(n int64) []byte { return fmt.Appendf(nil, "lost %d\n", n) }

// A pipe that nobody reads costs lines, and says so when somebody does.
func TestALogThatNobodyReadsIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	out := observe.NewLogWriter(w, 64<<10, lostLine)
	line := []byte(strings.Repeat("x", 999) + "\n")
	const lines = 1000 // a pipe takes 64 of them, and so does the writer
	for range lines {
		n, err := out.Write(line)
		require.NoError(t, err)
		require.Equal(t, len(line), n)
	}
	out.Close(time.Millisecond) // gives up: it is not taken
	read := make(chan string, 1)
	go func() {
		all, err := io.ReadAll(r)
		if err != nil {
			panic(err)
		}
		read <- string(all)
	}()
	out.Close(pgtest.Patience)
	_, err = out.Write(line)
	require.NoError(t, err, "also when it is closed")
	require.NoError(t, w.Close())
	var told, got int
	for l := range strings.Lines(<-read) {
		if n := 0; strings.HasPrefix(l, "lost") {
			_, err := fmt.Sscanf(l, "lost %d", &n)
			require.NoError(t, err)
			told += n
		} else if l == string(line) {
			got++
		}
	}
	require.Equal(t, lines, got+told, "each line is there or counted")
	require.Greater(t, told, lines/2)
}

// A full disk and a closed pipe are the same to whoever logs; once there is room, it says what was lost.
func TestALogOnAFullDisk(t *testing.T) {
	t.Parallel()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	require.NoError(t, err)
	defer full.Close()
	var room bytes.Buffer
	to := &switched{to: full}
	out := observe.NewLogWriter(to, 1<<20, lostLine)
	for range 3 {
		_, err := out.Write([]byte("line\n"))
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return to.count() >= 3 }, pgtest.Patience, time.Millisecond)
	to.turn(&room)
	_, err = out.Write([]byte("there is room\n"))
	require.NoError(t, err)
	out.Close(pgtest.Patience)
	require.Equal(t, "lost 3\nthere is room\n", room.String())
}

// switched writes to one place and then to another.
type switched struct {
	mu    sync.Mutex
	to    io.Writer
	lines int
}

func (s *switched) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if string(p) == "line\n" {
		s.lines++
	}
	return s.to.Write(p)
}

func (s *switched) count() int { s.mu.Lock(); defer s.mu.Unlock(); return s.lines }

func (s *switched) turn(to io.Writer) { s.mu.Lock(); defer s.mu.Unlock(); s.to = to }

// A server that ends the log again and again is gone on with behind its last line.
func TestALogThatEndsIsGoneOnWith(t *testing.T) {
	t.Parallel()
	l := newLogged(t, 1<<20)
	ending := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		q.Del("follow") // what there is, and then the end
		r.URL.RawQuery = q.Encode()
		l.Config.Handler.ServeHTTP(w, r)
	}))
	t.Cleanup(ending.Close)
	as := l.as
	as.OpsAddr = ending.Listener.Addr().String()
	const rounds, each = 3, 400
	write := func() {
		for range each {
			l.log.Info("line")
		}
	}
	write()
	client := observe.NewClient([]byte(opsSecret))
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), pgtest.Patience)
	defer cancel()
	seen, last := 0, int64(0)
	f := observe.Follower{
		Client: client, Found: func(registry.Instance) {}, Lost: func(registry.Instance, error) {}, Asked: func(error) {},
		Servers: func(context.Context) ([]registry.Instance, error) { return []registry.Instance{as}, nil },
		Lines: func(lines []observe.LogLine) error {
			for _, line := range lines {
				require.Equal(t, last+1, line.Number)
				last = line.Number
			}
			seen += len(lines)
			if seen == rounds*each {
				cancel()
			} else if seen%each == 0 {
				write()
			}
			return nil
		},
	}
	require.NoError(t, f.Run(ctx))
	require.Equal(t, rounds*each, seen)
}
