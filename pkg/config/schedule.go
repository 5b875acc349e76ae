package config

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"
	_ "time/tzdata" // for time zones where the system has none, as in a slim image

	"github.com/robfig/cron/v3"

	"github.com/oneo-crm/oneo/pkg/tenant"
)

// The kinds of schedules.
const (
	KindBackup        = "backup"
	KindDrill         = "drill"
	KindPhysical      = "physical"
	KindPhysicalDrill = "physical-drill"
)

// Schedule says when which tenants are backed up by `oneo serve`, when it is proved that they can be restored, or when whole
// clusters are backed up, or recovered to prove that.
type Schedule struct {
	Name     string        `mapstructure:"name"`
	Kind     string        `mapstructure:"kind"` // empty: KindBackup
	Cron     string        `mapstructure:"cron"`
	TimeZone string        `mapstructure:"time_zone"` // empty: UTC
	Jitter   time.Duration `mapstructure:"jitter"`    // a due time is begun at most so much later
	Jobs     int           `mapstructure:"jobs"`      // tenants at one time; 0: 2
	Select   Select        `mapstructure:"select"`
	Keep     Keep          `mapstructure:"keep"`   // of a backup, physical or not: what is pruned behind it; zero: nothing
	Sample   *int          `mapstructure:"sample"` // of a drill: so many of the tenants, 0: all; nil: 5
	Copies   string        `mapstructure:"copies"` // of a physical backup: full, diff or incr; empty: full
}

// IsDrill reports whether the schedule proves tenants' backups, and makes none.
func (s Schedule) IsDrill() bool { return s.Kind == KindDrill }

// IsPhysical reports whether the schedule backs up whole clusters, and no tenants.
func (s Schedule) IsPhysical() bool { return s.Kind == KindPhysical }

// IsPhysicalDrill reports whether the schedule recovers whole clusters, to prove that it can be done.
func (s Schedule) IsPhysicalDrill() bool { return s.Kind == KindPhysicalDrill }

// OfClusters reports whether the schedule is about the physical backups of whole clusters, and about no tenant's archive.
func (s Schedule) OfClusters() bool { return s.IsPhysical() || s.IsPhysicalDrill() }

// KindOrBackup is what the schedule does.
func (s Schedule) KindOrBackup() string {
	if s.Kind == "" {
		return KindBackup
	}
	return s.Kind
}

// Drilled is how many of the tenants a drill restores; 0: all.
func (s Schedule) Drilled() int {
	if s.Sample == nil {
		return 5
	}
	return *s.Sample
}

// Select says which tenants are meant, in the words of the commands' flags.
type Select struct {
	AllTenants bool     `mapstructure:"all_tenants" json:"all_tenants,omitempty"`
	Tenant     []string `mapstructure:"tenant" json:"tenant,omitempty"`
	Exclude    []string `mapstructure:"exclude" json:"exclude,omitempty"`
	State      []string `mapstructure:"state" json:"state,omitempty"`
	Group      string   `mapstructure:"group" json:"group,omitempty"`
}

// Keep says which backups stay, in the words of `oneo backup prune`.
type Keep struct {
	Last    int    `mapstructure:"last"`
	Hourly  int    `mapstructure:"hourly"`
	Daily   int    `mapstructure:"daily"`
	Weekly  int    `mapstructure:"weekly"`
	Monthly int    `mapstructure:"monthly"`
	Within  string `mapstructure:"within"`
}

// String is the schedule as `oneo config show` lists it.
func (s Schedule) String() string {
	return fmt.Sprintf("%s (%s)", s.Name, s.Spec())
}

// Spec is what the due times follow from, and of what: where it changes, they are counted anew.
func (s Schedule) Spec() string {
	zone := s.TimeZone
	if zone == "" {
		zone = "UTC"
	}
	if kind := s.KindOrBackup(); kind != KindBackup {
		return kind + " " + s.Cron + " " + zone
	}
	return s.Cron + " " + zone
}

var (
	scheduleName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)
	// cronWords has no "@every 90m": its due times would depend on when somebody began to count.
	cronWords = cron.NewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.Descriptor)
)

// Times are a schedule's due times.
type Times struct {
	due  cron.Schedule
	zone *time.Location
}

// Next is the first due time behind t, in UTC.
func (t Times) Next(after time.Time) time.Time { return t.due.Next(after.In(t.zone)).UTC() }

// Times reads the schedule's cron words and time zone.
func (s Schedule) Times() (t Times, err error) {
	if t.zone, err = time.LoadLocation(s.TimeZone); err != nil || s.TimeZone == "Local" {
		return t, fmt.Errorf("%q is no time zone; write for example Europe/Berlin", s.TimeZone)
	}
	const form = "write minute, hour, day of the month, month and day of the week, as in 30 2 * * *, or @hourly, @daily, @weekly, @monthly"
	if strings.Contains(s.Cron, "TZ=") {
		return t, fmt.Errorf("the time zone is a setting of its own: time_zone")
	}
	if strings.HasPrefix(strings.TrimSpace(s.Cron), "@every") {
		return t, fmt.Errorf("%q counts from no fixed time; write for example */15 * * * *", s.Cron)
	}
	if t.due, err = cronWords.Parse(s.Cron); err != nil {
		return t, fmt.Errorf("%q cannot be read (%w); %s", s.Cron, err, form)
	}
	if t.due.Next(time.Now().In(t.zone)).IsZero() {
		return t, fmt.Errorf("%q never comes", s.Cron)
	}
	return t, nil
}

// shortest is the least time between two of the next due times.
func (t Times) shortest() time.Duration {
	at := t.Next(time.Now())
	least := time.Duration(1<<63 - 1)
	for range 50 {
		next := t.Next(at)
		least, at = min(least, next.Sub(at)), next
	}
	return least
}

// checkSchedules names what cannot be used of backup.schedules.
func (c Config) checkSchedules(bad func(key, format string, args ...any)) {
	const key = "backup.schedules"
	if c.Backup.URL == "" && slices.ContainsFunc(c.Backup.Schedules, func(s Schedule) bool { return !s.OfClusters() }) {
		bad(key, "needs backup.url: the place where backups are kept")
	}
	known := c.AllGroups()
	seen := map[string]bool{}
	for i, s := range c.Backup.Schedules {
		at := fmt.Sprintf("%s[%d]", key, i)
		if !scheduleName.MatchString(s.Name) {
			bad(at+".name", "%q is no name for a schedule; use small letters, digits and hyphens, at most 32", s.Name)
		} else if seen[s.Name] {
			bad(at+".name", "%q is there twice", s.Name)
		}
		seen[s.Name] = true
		times, err := s.Times()
		switch {
		case err != nil:
			bad(at+".cron", "%s", err)
		case s.Jitter < 0 || s.Jitter > 0 && s.Jitter >= times.shortest():
			bad(at+".jitter", "must be from 0s to less than the time between two due times")
		}
		if s.Jobs < 0 || s.Jobs > 100 {
			bad(at+".jobs", "must be from 1 to 100, or 0: 2")
		}
		switch sel := s.Select; {
		case s.IsPhysicalDrill():
			if !reflect.DeepEqual(sel, Select{}) {
				bad(at+".select", "a physical drill is of all clusters, and draws from the tenants that were there at its moment: none can be selected")
			}
		case s.IsPhysical():
			if sel.AllTenants || len(sel.Tenant) > 0 || len(sel.Exclude) > 0 || len(sel.State) > 0 {
				bad(at+".select", "a physical backup is of whole clusters: only group may be given, for the cluster of one")
			}
		case !sel.AllTenants && len(sel.Tenant) == 0:
			bad(at+".select", "selects no tenants: add all_tenants: true, or tenant: [names or globs]")
		case sel.AllTenants && len(sel.Tenant) > 0:
			bad(at+".select", "all_tenants and tenant exclude each other")
		}
		for _, name := range slices.Concat(s.Select.Tenant, s.Select.Exclude) {
			if strings.HasPrefix(name, "@") {
				bad(at+".select", "%q: a list in a file is for the command line only", name)
			}
		}
		for _, st := range s.Select.State {
			if state, err := tenant.ParseState(st); err != nil || state != tenant.Active && state != tenant.Suspended {
				bad(at+".select.state", "%q is no state to be backed up; use active or suspended", st)
			}
		}
		if _, is := known[s.Select.Group]; s.Select.Group != "" && !is {
			bad(at+".select.group", "database group %q is not configured", s.Select.Group)
		}
		switch {
		case !slices.Contains([]string{"", KindBackup, KindDrill, KindPhysical, KindPhysicalDrill}, s.Kind):
			bad(at+".kind", "%q is no kind of schedule; use backup, drill, physical or physical-drill", s.Kind)
		case s.OfClusters() && c.Backup.Physical.Engine == "":
			bad(at+".kind", "a physical backup needs backup.physical.engine")
		case !s.IsPhysical() && s.Copies != "":
			bad(at+".copies", "is for physical backups")
		case !slices.Contains([]string{"", "full", "diff", "incr"}, s.Copies):
			bad(at+".copies", "%q is no kind of physical backup; use full, diff or incr", s.Copies)
		case s.Copies != "" && s.Copies != "full" && c.Backup.Physical.Engine == "files":
			bad(at+".copies", "the engine files makes full backups only")
		case (s.IsDrill() || s.IsPhysicalDrill()) && s.Keep != (Keep{}):
			bad(at+".keep", "is for backups: a drill takes none away")
		case !s.IsDrill() && !s.IsPhysicalDrill() && s.Sample != nil:
			bad(at+".sample", "is for drills: a backup is made of all that are selected")
		case s.Drilled() < 0:
			bad(at+".sample", "must not be below 0")
		case s.IsDrill() && len(c.Backup.Recipients) > 0 && c.Backup.IdentityFile == "":
			bad(at+".kind", "a drill opens backups: it needs backup.identity_file where they are encrypted to backup.recipients")
		}
		if k := s.Keep; slices.Min([]int{k.Last, k.Hourly, k.Daily, k.Weekly, k.Monthly}) < 0 {
			bad(at+".keep", "what is kept must not be below 0")
		}
	}
}

// schedulesHook reads schedules from JSON, where the environment holds them.
func schedulesHook(from, to reflect.Type, data any) (any, error) {
	if to != reflect.TypeFor[[]Schedule]() || from.Kind() != reflect.String {
		return data, nil
	}
	list := []map[string]any{}
	if text := data.(string); text != "" {
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return nil, fmt.Errorf("schedules must be a list in JSON: %w", err)
		}
	}
	return list, nil
}
