package tui

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// screen is one kind of list. How it is read, and its rows, are pure functions of what the source says.
type screen struct {
	name    string
	key     string // the digit that opens it
	alias   []string
	about   string
	columns []column
	sorting int
	down    bool
	every   time.Duration // how often it is read; longer when reading takes long
	// elsewhere is read from the servers or the store, not from the database.
	elsewhere bool
	needs     string // what its argument is, where it has to have one
	none      string // said when there are no rows
	load      func(ctx context.Context, s Source, q question) ([]row, string, error)
	enter     func(r row) (screen, arg string) // what enter opens; nil, or "": the details
}

// question is what a list is asked with.
type question struct {
	arg     string
	now     time.Time
	servers []Server
	load    map[int32]TenantRate
	head    int  // the version that the migrations lead to; 0: unknown
	values  bool // statements with the values in them
}

const home = "home"

// screens are all of them, in the order of their digits.
func screens() []*screen {
	return []*screen{
		{
			name: "tenants", key: "2", alias: []string{"t", "tenant"}, about: "Every tenant: its state, its version and its load.",
			columns: []column{{title: "NAME", width: 20, flex: true}, {title: "STATE", width: 11}, {title: "VERSION", width: 8, right: true},
				{title: "REQ/S", width: 7, right: true}, {title: "P95", width: 8, right: true}, {title: "ERR/S", width: 6, right: true},
				{title: "GROUP", width: 8}, {title: "AGE", width: 5, right: true},
				{title: "DB TIME", width: 8, right: true}, {title: "HOST", width: 34}, {title: "SCHEMA", width: 20, wide: true}, {title: "NUMBER", width: 8, right: true, wide: true}},
			every: 5 * time.Second, none: "there are no tenants: n makes one",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				ts, err := s.Tenants(ctx)
				return rowsOf(ts, func(t Tenant) row { return tenantRow(t, q.load[t.Number], q.head, q.now) }), "", err
			},
			enter: func(r row) (string, string) { return "users", r.tenant },
		},
		{
			name: "migrations", key: "3", alias: []string{"runs", "m"}, about: "Runs over many tenants: migrations, backups, statements.",
			columns: []column{{title: "RUN", width: 12}, {title: "KIND", width: 10}, {title: "STATE", width: 10}, {title: "PROGRESS", width: 20, flex: true},
				{title: "FAILED", width: 6, right: true}, {title: "LEFT", width: 7, right: true}, {title: "BEGUN", width: 5, right: true},
				{title: "TOOK", width: 5, right: true}, {title: "SKIPPED", width: 7, right: true}, {title: "WAVE", width: 7}, {title: "BY", width: 14}},
			sorting: 6, every: 2 * time.Second, none: "there were no runs yet",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				rs, err := s.Runs(ctx)
				return rowsOf(rs, func(r Run) row { return runRow(r, q.now) }), "", err
			},
			enter: func(r row) (string, string) { return "tasks", r.id },
		},
		{
			name: "backups", key: "4", alias: []string{"b"}, about: "What lies in the store of backups.",
			columns: []column{{title: "TENANT", width: 16, flex: true}, {title: "BACKUP", width: 10}, {title: "AGE", width: 5, right: true}, {title: "ROWS", width: 11, right: true},
				{title: "SIZE", width: 9, right: true}, {title: "VERSION", width: 8, right: true}, {title: "MARKS", width: 14}, {title: "REASON", width: 24}},
			sorting: 2, every: 30 * time.Second, elsewhere: true, none: "there are no backups: b on a tenant makes one",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				bs, err := s.Backups(ctx)
				return rowsOf(bs, func(b Backup) row { return backupRow(b, q.now) }), "", err
			},
		},
		{
			name: "queries", key: "5", alias: []string{"q", "sessions"}, about: "PostgreSQL sessions that work for tenants.",
			columns: []column{{title: "PID", width: 8, right: true}, {title: "TENANT", width: 14}, {title: "STATE", width: 12}, {title: "FOR", width: 5, right: true},
				{title: "STATEMENT", width: 20, flex: true}, {title: "WAITS FOR", width: 14}, {title: "LOGIN", width: 14}, {title: "GROUP", width: 8}, {title: "FROM", width: 16, wide: true}},
			sorting: 3, down: true, every: 2 * time.Second, none: "nothing is at work for a tenant",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				ss, err := s.Sessions(ctx)
				return rowsOf(ss, func(v Session) row { return sessionRow(v, q.now, q.values) }), hidden(ss), err
			},
		},
		{
			name: "locks", key: "6", alias: []string{"l"}, about: "Who waits for whom.",
			columns: []column{{title: "PID", width: 8, right: true}, {title: "TENANT", width: 16, flex: true}, {title: "STATE", width: 10}, {title: "FOR", width: 5, right: true},
				{title: "BEHIND", width: 14}, {title: "MODE", width: 20}, {title: "KIND", width: 12}, {title: "ON", width: 24}, {title: "GROUP", width: 8}},
			sorting: 3, down: true, every: 2 * time.Second, none: "nobody waits for a lock",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				ls, err := s.Locks(ctx)
				return rowsOf(ls, func(l Lock) row { return lockRow(l, q.now) }), "", err
			},
		},
		{
			name: "operations", key: "7", alias: []string{"o", "ops"}, about: "What is done to tenants in several steps.",
			columns: []column{{title: "OPERATION", width: 12}, {title: "KIND", width: 16}, {title: "TENANT", width: 16, flex: true}, {title: "STATE", width: 10},
				{title: "BEGUN", width: 5, right: true}, {title: "TOOK", width: 5, right: true}, {title: "BY", width: 14}, {title: "ERROR", width: 30}},
			sorting: 4, every: 3 * time.Second, none: "there were no operations yet",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				os, err := s.Operations(ctx)
				return rowsOf(os, func(o Operation) row { return operationRow(o, q.now) }), "", err
			},
			enter: func(r row) (string, string) {
				if r.tenant == "" {
					return "tasks", r.id
				}
				return "", ""
			},
		},
		{
			name: "audit", key: "8", alias: []string{"a"}, about: "Who changed what.",
			columns: []column{{title: "AGE", width: 5, right: true}, {title: "WHO", width: 16}, {title: "WHAT", width: 16}, {title: "TENANT", width: 16},
				{title: "DETAILS", width: 12, flex: true}, {title: "REQUEST", width: 24, wide: true}},
			every: 5 * time.Second, none: "nothing was changed yet",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				as, err := s.Audit(ctx)
				return rowsOf(as, func(a AuditLine) row { return auditRow(a, q.now) }), "the newest 1,000 lines", err
			},
		},
		{
			name: "domains", key: "9", alias: []string{"d"}, about: "Which host is whose.",
			columns: []column{{title: "HOST", width: 24, flex: true}, {title: "TENANT", width: 20}, {title: "PRIMARY", width: 7}, {title: "STATE", width: 11}, {title: "AGE", width: 5, right: true}},
			every:   10 * time.Second, none: "there are no domains",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				ds, err := s.Domains(ctx)
				return rowsOf(ds, func(d Domain) row { return domainRow(d, q.now) }), "", err
			},
			enter: func(r row) (string, string) { return "users", r.tenant },
		},
		{
			name: "logs", key: "0", alias: []string{"log"}, about: "The last lines of the servers; of one tenant: `:logs NAME`.",
			columns: []column{{title: "AGE", width: 5, right: true}, {title: "LEVEL", width: 7}, {title: "TENANT", width: 14}, {title: "MESSAGE", width: 20, flex: true},
				{title: "FIELDS", width: 24}, {title: "SERVER", width: 16, wide: true}},
			every: 2 * time.Second, elsewhere: true, none: "no server has logged anything that it still keeps",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				ls, err := s.Logs(ctx, q.servers, q.arg)
				return rowsOf(ls, func(l LogLine) row { return logRow(l, q.now) }), "", err
			},
		},
		{
			name: "users", alias: []string{"u"}, about: "The users of one tenant: `:users NAME`, or enter on a tenant.", needs: "a tenant",
			columns: []column{{title: "EMAIL", width: 28, flex: true}, {title: "NAME", width: 20}, {title: "ROLE", width: 10}, {title: "STATE", width: 10}, {title: "AGE", width: 5, right: true}},
			every:   10 * time.Second, none: "the tenant has no users",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				us, err := s.Users(ctx, q.arg)
				return rowsOf(us, func(u User) row { return userRow(u, q.arg, q.now) }), "", err
			},
		},
		{
			name: "tasks", about: "The tenants of one run: `:tasks RUN`, or enter on a run.", needs: "a run",
			columns: []column{{title: "TENANT", width: 16, flex: true}, {title: "STATE", width: 10}, {title: "FROM", width: 5, right: true}, {title: "TO", width: 5, right: true},
				{title: "TOOK", width: 8, right: true}, {title: "TRIES", width: 5, right: true}, {title: "ERROR", width: 30}},
			every: 2 * time.Second, none: "the run has no tenants",
			load: func(ctx context.Context, s Source, q question) ([]row, string, error) {
				ts, err := s.Tasks(ctx, q.arg)
				return rowsOf(ts, taskRow), "", err
			},
		},
	}
}

func rowsOf[T any](items []T, f func(T) row) []row {
	rows := make([]row, len(items))
	for i, it := range items {
		rows[i] = newRow(f(it))
	}
	return rows
}

func tenantRow(t Tenant, l TenantRate, head int, now time.Time) row {
	version := number(t.Version)
	if t.Version == 0 {
		version = cell{nums: true}
	} else if t.Version < head && t.State != "dropped" {
		version.text, version.tone = "▲ "+version.text, warn
	}
	return row{
		id: t.Slug, tenant: t.Slug, state: t.State,
		cells: []cell{text(t.Slug), state(t.State), version, float(l.Requests, blank(l.Requests)), float(l.P95, blankMS(l.P95)), errorsCell(l.Errors),
			dim(t.Group), age(now, t.Created), float(l.Database, blankPercent(l.Database)), text(t.Host), dim(t.Schema), number(t.Number)},
		detail: []pair{{"name", t.Slug}, {"display", t.Name}, {"state", t.State}, {"version", strconv.Itoa(t.Version)}, {"host", t.Host}, {"group", t.Group},
			{"schema", t.Schema}, {"number", strconv.Itoa(int(t.Number))}, {"id", t.ID}, {"created", stamp(t.Created)}, {"goes", stamp(t.Purge)}},
	}
}

// blank leaves out what is nothing.
func blank(f float64) string {
	if f == 0 {
		return ""
	}
	return rate(f)
}

func blankMS(f float64) string {
	if f == 0 {
		return ""
	}
	return millis(f)
}

func blankPercent(f float64) string {
	if f == 0 {
		return ""
	}
	return percent(f, 1)
}

func errorsCell(f float64) cell {
	c := float(f, blank(f))
	if f > 0 {
		c.tone = bad
	}
	return c
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// tail is the end of an id, by which commands find it: its beginning is the time.
func tail(id string) string {
	if len(id) == 36 {
		return id[24:]
	}
	return id
}

func (r Run) tasks() int { return r.Queued + r.Running + r.OK + r.Skipped + r.Failed }

func (r Run) ended() int { return r.OK + r.Skipped + r.Failed }

func runRow(r Run, now time.Time) row {
	took := cell{nums: true}
	switch {
	case !r.Finished.IsZero():
		took = float(r.Finished.Sub(r.Created).Seconds(), short(r.Finished.Sub(r.Created)))
	case r.State == "running":
		took = float(now.Sub(r.Created).Seconds(), short(now.Sub(r.Created)))
	}
	st := state(r.State)
	if r.State == "running" && !r.Alive {
		st = cell{text: "? " + r.State, key: r.State, tone: warn}
	}
	failed := number(r.Failed)
	if r.Failed > 0 {
		failed.tone = bad
	}
	share := 0.0
	if r.tasks() > 0 {
		share = float64(r.ended()) / float64(r.tasks())
	}
	alive := "a process works on it"
	if !r.Alive {
		alive = "no process works on it"
	}
	if r.State != "running" {
		alive = ""
	}
	return row{
		id: r.ID, state: r.State,
		cells: []cell{dim(tail(r.ID)), text(r.Kind), st, {text: bar(share, 1, 10) + " " + count(r.ended()) + "/" + count(r.tasks()), num: share, nums: true},
			failed, number(r.tasks() - r.ended()), age(now, r.Created), took, number(r.Skipped), text(strconv.Itoa(r.Wave) + " of " + strconv.Itoa(r.Waves)), text(r.Actor)},
		detail: []pair{{"run", r.ID}, {"kind", r.Kind}, {"state", r.State}, {"alive", alive}, {"done", count(r.OK)}, {"skipped", count(r.Skipped)}, {"failed", count(r.Failed)},
			{"at work", count(r.Running)}, {"waiting", count(r.Queued)}, {"by", r.Actor}, {"begun", stamp(r.Created)}, {"ended", stamp(r.Finished)}, {"error", r.Error}},
	}
}

func taskRow(t Task) row {
	took := cell{nums: true}
	if t.Duration > 0 {
		took = float(t.Duration.Seconds(), millis(float64(t.Duration.Milliseconds())))
	}
	e := text(t.Error)
	if t.State == "failed" {
		e.tone = bad
	}
	return row{
		id: t.Tenant, tenant: t.Tenant, state: t.State,
		cells: []cell{text(t.Tenant), state(t.State), number(t.From), number(t.To), took, number(t.Attempts), e},
		detail: []pair{{"tenant", t.Tenant}, {"state", t.State}, {"from", strconv.Itoa(t.From)}, {"to", strconv.Itoa(t.To)}, {"tries", strconv.Itoa(t.Attempts)},
			{"error", t.Error}, {"hint", t.Hint}},
	}
}

func backupRow(b Backup, now time.Time) row {
	var marks []string
	if b.Kept {
		marks = append(marks, "kept")
	}
	if b.Encrypted {
		marks = append(marks, "encrypted")
	}
	return row{
		id: b.ID, tenant: b.Tenant,
		cells: []cell{text(b.Tenant), dim(head(b.ID, 8)), age(now, b.Made), number(b.Rows), {text: size(b.Bytes), num: float64(b.Bytes), nums: true},
			number(b.Version), text(strings.Join(marks, " ")), text(b.Reason)},
		detail: []pair{{"backup", b.ID}, {"tenant", b.Tenant}, {"made", stamp(b.Made)}, {"version", strconv.Itoa(b.Version)}, {"rows", count(b.Rows)},
			{"size", size(b.Bytes)}, {"marks", strings.Join(marks, ", ")}, {"reason", b.Reason}},
	}
}

func head(s string, n int) string { return s[:min(n, len(s))] }

func sessionRow(s Session, now time.Time, values bool) row {
	since := cmp.Or(s.Since, s.Begun)
	query := s.Query
	if !values {
		query = redact(query)
	}
	st, long := text(s.State), age(now, since)
	switch {
	case s.State == "":
		st = dim("not shown")
	case s.State == "active":
		st = cell{text: "▶ active", key: "active", tone: accent}
	case strings.HasPrefix(s.State, "idle in transaction"):
		st = cell{text: "◐ idle in tx", key: s.State, tone: warn}
	}
	if s.State == "active" && now.Sub(since) > 5*time.Second && !since.IsZero() {
		long.tone = warn
	}
	return row{
		id: s.Group + "/" + strconv.Itoa(int(s.PID)), tenant: s.Tenant, state: s.State,
		cells: []cell{{text: strconv.Itoa(int(s.PID)), num: float64(s.PID), nums: true}, text(s.Tenant), st, long, text(strings.Join(strings.Fields(query), " ")), text(s.Wait),
			dim(s.Login), dim(s.Group), dim(s.From)},
		detail: []pair{{"pid", strconv.Itoa(int(s.PID))}, {"tenant", s.Tenant}, {"login", s.Login}, {"state", s.State}, {"waits for", s.Wait}, {"begun", stamp(s.Begun)},
			{"since", stamp(s.Since)}, {"from", s.From}, {"group", s.Group}, {"statement", query}},
	}
}

// hidden says that PostgreSQL does not show what sessions do to who asks.
func hidden(ss []Session) string {
	for _, s := range ss {
		if s.State == "" {
			return "PostgreSQL hides what other logins' sessions do: grant pg_read_all_stats to the owner's login (oneo init does)"
		}
	}
	return ""
}

// literals finds what in a statement may be somebody's data: strings, in dollars too, and numbers; a string that is cut off to its end.
var literals = regexp.MustCompile(`(?s)[eE]'(?:[^'\\]|\\.|'')*(?:'|$)|'(?:[^']|'')*(?:'|$)|\$([A-Za-z_][A-Za-z_0-9]*)?\$.*|--[^\n]*|/\*.*?(?:\*/|$)|\$\d+|"(?:[^"]|"")*(?:"|$)|[A-Za-z_][A-Za-z_0-9$]*|\d[\d.eE+-]*`)

// redact takes the values out of a statement. What is in dollar quotes goes to the end: nothing says where it ends for sure.
func redact(sql string) string {
	return literals.ReplaceAllStringFunc(sql, func(s string) string {
		switch {
		case strings.HasPrefix(s, "--"), strings.HasPrefix(s, "/*"):
			return " "
		case strings.HasSuffix(s, "'") || s[0] == '\'' || (len(s) > 1 && s[1] == '\'') || s[0] >= '0' && s[0] <= '9':
			return "?"
		case s[0] == '$' && (len(s) < 2 || s[1] < '0' || s[1] > '9'):
			return "?"
		}
		return s
	})
}

func lockRow(l Lock, now time.Time) row {
	st := "waiting"
	if l.Granted {
		st = "granted"
	}
	var behind []string
	for _, pid := range l.Behind {
		behind = append(behind, strconv.Itoa(int(pid)))
	}
	id := fmt.Sprint(l.Group, "/", l.PID, "/", l.Kind, "/", l.On, "/", l.Mode, "/", st)
	return row{
		id: id, tenant: l.Tenant, state: st,
		cells: []cell{{text: strconv.Itoa(int(l.PID)), num: float64(l.PID), nums: true}, text(l.Tenant), state(st), age(now, l.Since), text(strings.Join(behind, " ")),
			text(l.Mode), text(l.Kind), text(l.On), dim(l.Group)},
		detail: []pair{{"pid", strconv.Itoa(int(l.PID))}, {"tenant", l.Tenant}, {"state", st}, {"behind", strings.Join(behind, ", ")}, {"mode", l.Mode}, {"kind", l.Kind}, {"on", l.On},
			{"since", stamp(l.Since)}, {"group", l.Group}},
	}
}

func operationRow(o Operation, now time.Time) row {
	took := cell{nums: true}
	begun := cmp.Or(o.Started, o.Created)
	switch {
	case !o.Finished.IsZero():
		took = float(o.Finished.Sub(begun).Seconds(), short(o.Finished.Sub(begun)))
	case o.State == "running":
		took = float(now.Sub(begun).Seconds(), short(now.Sub(begun)))
	}
	e := text(o.Error)
	if o.State == "failed" {
		e.tone = bad
	}
	return row{
		id: o.ID, tenant: o.Tenant, state: o.State,
		cells: []cell{dim(tail(o.ID)), text(o.Kind), text(o.Tenant), state(o.State), age(now, o.Created), took, text(o.Actor), e},
		detail: []pair{{"operation", o.ID}, {"kind", o.Kind}, {"tenant", o.Tenant}, {"state", o.State}, {"by", o.Actor}, {"tries", strconv.Itoa(o.Attempts)},
			{"asked for", stamp(o.Created)}, {"begun", stamp(o.Started)}, {"ended", stamp(o.Finished)}, {"error", o.Error}, {"hint", o.Hint}},
	}
}

func auditRow(a AuditLine, now time.Time) row {
	details := detailsOf(a.Details)
	if details == "{}" || details == "null" {
		details = ""
	}
	return row{
		id: strconv.FormatInt(a.ID, 10), tenant: a.Tenant,
		cells:  []cell{age(now, a.At), text(a.Actor), text(a.Action), text(a.Tenant), dim(details), dim(a.Request)},
		detail: []pair{{"at", stamp(a.At)}, {"who", a.Actor}, {"what", a.Action}, {"tenant", a.Tenant}, {"request", a.Request}, {"details", details}},
	}
}

// detailsOf are the details of a line, with no values in the statement that is among them.
func detailsOf(text json.RawMessage) string {
	var m map[string]any
	if json.Unmarshal(text, &m) != nil {
		return ""
	}
	if sql, has := m["statement"].(string); has {
		m["statement"] = redact(sql)
	}
	out, err := json.Marshal(m)
	if err != nil {
		return ""
	}
	return string(out)
}

func domainRow(d Domain, now time.Time) row {
	primary := ""
	if d.Primary {
		primary = "✓"
	}
	return row{
		id: d.Host, tenant: d.Tenant, state: d.State,
		cells:  []cell{text(d.Host), text(d.Tenant), text(primary), state(d.State), age(now, d.Created)},
		detail: []pair{{"host", d.Host}, {"tenant", d.Tenant}, {"primary", strconv.FormatBool(d.Primary)}, {"state", d.State}, {"added", stamp(d.Created)}},
	}
}

func userRow(u User, tenant string, now time.Time) row {
	st := "active"
	if !u.Disabled.IsZero() {
		st = "disabled"
	}
	return row{
		id: u.ID, tenant: tenant, state: st,
		cells:  []cell{text(u.Email), text(u.Name), text(u.Role), state(st), age(now, u.Created)},
		detail: []pair{{"email", u.Email}, {"name", u.Name}, {"role", u.Role}, {"state", st}, {"disabled", stamp(u.Disabled)}, {"created", stamp(u.Created)}, {"id", u.ID}},
	}
}

func logRow(l LogLine, now time.Time) row {
	return row{
		id: l.Server + l.At.Format(time.RFC3339Nano) + l.Message + l.Request + l.Fields, tenant: l.Tenant, state: l.Level,
		cells: []cell{age(now, l.At), state(l.Level), text(l.Tenant), text(l.Message), dim(l.Fields), dim(l.Server)},
		detail: []pair{{"at", l.At.UTC().Format(time.RFC3339Nano)}, {"level", l.Level}, {"server", l.Server}, {"tenant", l.Tenant}, {"request", l.Request},
			{"message", l.Message}, {"fields", l.Fields}},
	}
}
