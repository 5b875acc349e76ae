package observe

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// LogQuery says which lines are read.
type LogQuery struct {
	Tenants []string // names or patterns with * and ?; none: all
	Level   string   // the least one; empty: all
	Since   time.Time
	Follow  bool  // go on with those that come
	After   int64 // the number of the last line that is known already; 0: none
}

// LogLine is a line of a server's log.
type LogLine struct {
	Instance registry.Instance
	Number   int64 // counts from 1 in each server
	At       time.Time
	Level    string
	Message  string
	// Attrs are the other members of Text, which is a JSON object.
	Attrs map[string]any
	Text  json.RawMessage
	// Missed lines before this one are gone; it is no line itself.
	Missed int64
}

const (
	// readWithin bounds the reading of the lines that one server keeps.
	readWithin = 10 * time.Second
	// silentFor is how long a server that is followed may say nothing, not even that there is nothing.
	silentFor = 3 * heartbeatEach
)

// Logs hands the lines of one server to each, as they come, until there are no more, each fails or ctx ends; of one that is
// followed it returns only with an error. A server has a second to begin, and must not fall silent.
func (c *Client) Logs(ctx context.Context, s registry.Instance, q LogQuery, each func(LogLine) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := time.AfterFunc(clientFor, func() { cancel(context.DeadlineExceeded) })
	defer silent.Stop()
	params := url.Values{"tenant": q.Tenants}
	if q.Level != "" {
		params.Set("level", q.Level)
	}
	if !q.Since.IsZero() {
		params.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	if q.After > 0 {
		params.Set("after", strconv.FormatInt(q.After, 10))
	}
	if q.Follow {
		params.Set("follow", "true")
	}
	resp, err := c.Get(ctx, s, "/logs", params)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.Header.Get(instanceHeader) != s.ID.String() {
		return fault.New(fault.Unavailable, "another server answers at %s", s.OpsAddr).WithCode("other_instance")
	}
	silent.Reset(readWithin)
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 2*maxLine)
	for lines.Scan() {
		if q.Follow {
			silent.Reset(silentFor)
		}
		line, cut, err := parseLine(lines.Bytes())
		if err != nil {
			return unreadable(s, err)
		}
		if cut != "" {
			return fault.New(fault.Unavailable, "the server at %s has cut the log: %s", s.OpsAddr, cut).WithCode("cut")
		}
		if line == nil {
			continue
		}
		line.Instance = s
		if err := each(*line); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return unreadable(s, err)
	}
	if q.Follow {
		return unreadable(s, errors.New("it has ended the log"))
	}
	return nil
}

// parseLine reads a line of GET /logs; nil: a heartbeat.
func parseLine(text []byte) (line *LogLine, cut string, err error) {
	var m map[string]any
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber() // so that a large number is shown as it was written
	if err := dec.Decode(&m); err != nil {
		return nil, "", fmt.Errorf("a line of its log is no JSON: %w", err)
	}
	str := func(key string) string { s, _ := m[key].(string); return s }
	num := func(key string) int64 {
		n, _ := m[key].(json.Number)
		i, _ := n.Int64() // no number of ours is another one
		return i
	}
	switch {
	case m["heartbeat"] != nil:
		return nil, "", nil
	case m["cut"] != nil && m["seq"] == nil:
		return nil, str("cut"), nil
	case m["missed"] != nil && m["seq"] == nil:
		return &LogLine{At: time.Now(), Missed: num("missed")}, "", nil
	}
	line = &LogLine{Number: num("seq"), Level: str("level"), Message: str("msg"), Text: append(json.RawMessage(nil), text...)}
	if line.At, err = time.Parse(time.RFC3339Nano, str("time")); err != nil {
		return nil, "", err
	}
	for _, key := range []string{"seq", "time", "level", "msg"} {
		delete(m, key)
	}
	line.Attrs = m
	return line, "", nil
}

// Missing is a server whose log could not be read.
type Missing struct {
	Instance registry.Instance
	Err      error
}

// AllLogs are the lines that all servers keep, by time, and the servers that do not answer. It never fails.
func (c *Client) AllLogs(ctx context.Context, servers []registry.Instance, q LogQuery) (all []LogLine, missing []Missing) {
	q.Follow = false
	each := make([][]LogLine, len(servers))
	errs := make([]error, len(servers))
	var wg sync.WaitGroup
	for i, s := range servers {
		wg.Go(func() {
			errs[i] = c.Logs(ctx, s, q, func(l LogLine) error { each[i] = append(each[i], l); return nil })
		})
	}
	wg.Wait()
	for i, s := range servers {
		all = append(all, each[i]...)
		if errs[i] != nil {
			missing = append(missing, Missing{s, errs[i]})
		}
	}
	ByTime(all)
	return all, missing
}
