package app

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// NeedState says how it stands with a Need.
type NeedState string

const (
	// NeedOK is there.
	NeedOK NeedState = "ok"
	// NeedMissing is not.
	NeedMissing NeedState = "missing"
	// NeedRestart is set, and counts when PostgreSQL has been started again.
	NeedRestart NeedState = "restart"
	// NeedFailed is there, and does not do what it should.
	NeedFailed NeedState = "failed"
	// NeedUnknown cannot be looked at before the others are there.
	NeedUnknown NeedState = "unknown"
)

// Need is one thing that a cluster wants before its WAL is archived.
type Need struct {
	Cluster string
	Check   string // repository, the name of a setting, grants, pg_hba, file or archiving
	State   NeedState
	Has     string
	Wants   string
	// Do is what to do: lines to copy into what Where names.
	Where string
	Do    []string
	// Reloads: the server reads it when it is told to.
	Reloads bool

	setting  bool
	database string // of SQL that is no setting
}

// Healthy reports whether nothing is left to be done.
func (n Need) Healthy() bool { return n.State == NeedOK }

// PhysicalPlan is what a cluster wants, whether it has it or not. Nothing is asked but the configuration.
func (a *App) PhysicalPlan(ctx context.Context, k Cluster) ([]Need, error) {
	plan, err := k.Engine.Plan(ctx)
	if err != nil {
		return nil, err
	}
	var needs []Need
	for _, name := range slices.Sorted(maps.Keys(plan.Settings)) {
		needs = append(needs, k.setting(name, plan.Settings[name]))
	}
	for _, g := range k.bases {
		needs = append(needs, k.grants(g))
	}
	if len(plan.SQL) > 0 {
		needs = append(needs, k.rights(plan))
	}
	if plan.HBA != "" {
		needs = append(needs, k.hba(plan))
	}
	for _, path := range slices.Sorted(maps.Keys(plan.Files)) {
		needs = append(needs, k.file(path, plan.Files[path]))
	}
	return needs, nil
}

func (k Cluster) setting(name, wants string) Need {
	return Need{Cluster: k.Name, Check: name, State: NeedMissing, Wants: wants, Reloads: true, setting: true, Where: "any database, as a superuser",
		Do: []string{"alter system set " + postgres.Quote(name) + " = " + literal(wants) + ";"}}
}

func (k Cluster) grants(g base) Need {
	n := Need{Cluster: k.Name, Check: "grants", State: NeedMissing, Wants: "REPLICATION, pg_create_restore_point, pg_switch_wal for " + g.owner}
	return n.sql(g.database, physical.Grants(g.owner))
}

// rights are those that the engine says are missing.
func (k Cluster) rights(plan physical.Plan) Need {
	n := Need{Cluster: k.Name, Check: "engine", State: NeedMissing, Has: "not all rights", Wants: "what " + k.Engine.Name() + " needs besides"}
	return n.sql(k.database, plan.SQL)
}

func (n Need) sql(database string, statements []string) Need {
	n.Where, n.database = "the database "+database+", as a superuser", database
	for _, sql := range statements {
		n.Do = append(n.Do, sql+";")
	}
	return n
}

func (k Cluster) hba(plan physical.Plan) Need {
	return Need{Cluster: k.Name, Check: "pg_hba", State: NeedMissing, Wants: "a connection for replication", Where: "pg_hba.conf", Reloads: true, Do: []string{plan.HBA}}
}

func (k Cluster) file(path, text string) Need {
	return Need{Cluster: k.Name, Check: "file", State: NeedMissing, Wants: path, Where: "the file " + path, Do: strings.Split(strings.TrimRight(text, "\n"), "\n")}
}

// literal is a text in SQL.
func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// SetUpPhysical makes a cluster's repository, and says what else the cluster wants. With the URL of a superuser it sets and grants
// what is missing, and nothing else. Once nothing is missing it proves that WAL is archived. Conflict: the repository, or the
// URL, is another cluster's.
func (a *App) SetUpPhysical(ctx context.Context, k Cluster, adminURL string) ([]Need, error) {
	if adminURL != "" {
		if err := a.meetAll(ctx, k, adminURL, false); err != nil {
			return nil, err
		}
	}
	repository := Need{Cluster: k.Name, Check: "repository", State: NeedOK, Has: k.Where}
	if err := k.Engine.Prepare(ctx); fault.Is(err, fault.Forbidden) { // a right is missing, which is said below
		repository.State, repository.Has = NeedUnknown, fault.Of(err).Message
	} else if err != nil {
		return nil, err
	}
	// Not before there is what archive_command runs: an archiver that cannot run it rests for a minute.
	if adminURL != "" && repository.Healthy() {
		if err := a.meetAll(ctx, k, adminURL, true); err != nil {
			return nil, err
		}
	}
	needs, err := a.physicalNeeds(ctx, k)
	if err != nil {
		return nil, err
	}
	needs = append([]Need{repository}, needs...)
	proof := Need{Cluster: k.Name, Check: "archiving", State: NeedUnknown, Wants: "WAL comes into the repository"}
	if !lacking(needs) {
		switch err := k.Flush(ctx); {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			proof.State, proof.Has, proof.Where = NeedFailed, fault.Of(err).Message, fault.Of(err).Hint
		default:
			proof.State, proof.Has = NeedOK, "a segment of WAL was archived just now"
		}
	}
	return append(needs, proof), nil
}

// MeetPhysical sets and grants what is missing, with the URL of a superuser, and makes the cluster's repository. Faults as of SetUpPhysical.
func (a *App) MeetPhysical(ctx context.Context, k Cluster, adminURL string) error {
	if err := a.meetAll(ctx, k, adminURL, false); err != nil {
		return err
	}
	if err := k.Engine.Prepare(ctx); err != nil {
		return err
	}
	return a.meetAll(ctx, k, adminURL, true)
}

// meetAll does what is missing of the settings, or of all else, and waits until the server has read it.
func (a *App) meetAll(ctx context.Context, k Cluster, adminURL string, settings bool) error {
	needs, err := a.physicalNeeds(ctx, k)
	if err != nil {
		return err
	}
	if needs = slices.DeleteFunc(needs, func(n Need) bool { return n.setting != settings }); !lacking(needs) {
		return nil
	}
	if err := a.meet(ctx, k, adminURL, needs); err != nil {
		return err
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		if needs, err = a.physicalNeeds(ctx, k); err != nil {
			return err
		}
		// One that cannot be set so, as it stands on the server's command line, is told as missing.
		if !settings || !slices.ContainsFunc(needs, func(n Need) bool { return n.State == NeedMissing && n.setting }) || time.Now().After(deadline) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func lacking(needs []Need) bool {
	return slices.ContainsFunc(needs, func(n Need) bool { return !n.Healthy() })
}

// disabled is how PostgreSQL shows archive_command where no WAL is archived, whatever it is.
const disabled = "(disabled)"

// physicalNeeds asks the cluster.
func (a *App) physicalNeeds(ctx context.Context, k Cluster) ([]Need, error) {
	plan, err := k.Engine.Plan(ctx)
	if err != nil {
		return nil, err
	}
	var needs []Need
	conn, err := k.connect(ctx, k.url)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	waits := false // archive_mode is set, and wants a restart
	const ask = `select setting, coalesce(unit, ''), pending_restart from pg_catalog.pg_settings where name = $1`
	for _, name := range slices.Sorted(maps.Keys(plan.Settings)) {
		n := k.setting(name, plan.Settings[name])
		var unit string
		var pending bool
		if err := conn.QueryRow(ctx, ask, name).Scan(&n.Has, &unit, &pending); err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return nil, err
		}
		switch {
		case suffices(name, n.Has, n.Wants):
			n.State = NeedOK
		case pending:
			n.State = NeedRestart
			waits = waits || name == "archive_mode"
		}
		n.Has += unit
		needs = append(needs, n)
	}
	for i := range needs {
		if waits && needs[i].Has == disabled {
			needs[i].State = NeedRestart
		}
	}
	for _, g := range k.bases {
		n := k.grants(g)
		if n.Has, err = k.lacks(ctx, g); err != nil {
			return nil, err
		}
		if n.Has == "" {
			n.State = NeedOK
		} else {
			n.Has = "not " + n.Has
		}
		needs = append(needs, n)
	}
	if len(plan.SQL) > 0 {
		needs = append(needs, k.rights(plan))
	}
	if plan.HBA != "" {
		n := k.hba(plan)
		n.State, n.Has = k.replicates(ctx)
		needs = append(needs, n)
	}
	for _, path := range slices.Sorted(maps.Keys(plan.Files)) {
		n := k.file(path, plan.Files[path])
		if _, err := os.Stat(path); err == nil { // it may have been changed, and is not ours to judge
			n.State = NeedOK
		} else {
			n.Has = "nothing that can be seen here"
		}
		needs = append(needs, n)
	}
	return needs, nil
}

// suffices reports whether a setting is as it should be, or more.
func suffices(name, has, wants string) bool {
	switch name {
	case "wal_level":
		return has == wants || has == "logical"
	case "archive_mode":
		return has == "on" || has == "always"
	case "archive_timeout": // how often is the operator's choice
		return has != "0"
	case "archive_command": // there may be more around it
		return strings.Contains(has, wants)
	}
	if h, err := strconv.ParseInt(has, 10, 64); err == nil {
		if w, err := strconv.ParseInt(wants, 10, 64); err == nil {
			return h >= w
		}
	}
	return has == wants
}

// lacks says what the owner of a database may not.
func (k Cluster) lacks(ctx context.Context, g base) (string, error) {
	conn, err := k.connect(ctx, g.url)
	if err != nil {
		return "", err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var lacks []string
	const ask = `select array_remove(array[case when not (rolreplication or rolsuper) then 'REPLICATION' end,
	case when not has_function_privilege('pg_catalog.pg_create_restore_point(text)', 'execute') then 'pg_create_restore_point' end,
	case when not has_function_privilege('pg_catalog.pg_switch_wal()', 'execute') then 'pg_switch_wal' end], null) from pg_catalog.pg_roles where rolname = current_user`
	if err := conn.QueryRow(ctx, ask).Scan(&lacks); err != nil {
		return "", err
	}
	return strings.Join(lacks, ", "), nil
}

// replicates reports whether the server lets the owner in to copy it, as far as its address goes.
func (k Cluster) replicates(ctx context.Context) (NeedState, string) {
	cfg, err := pgconn.ParseConfig(k.url)
	if err != nil {
		return NeedUnknown, "the URL cannot be read"
	}
	cfg.RuntimeParams["replication"] = "true"
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err == nil {
		_ = conn.Close(context.WithoutCancel(ctx))
		return NeedOK, ""
	}
	var refused *pgconn.PgError
	if !errors.As(err, &refused) {
		return NeedUnknown, "the server does not answer"
	}
	if strings.Contains(refused.Message, "pg_hba.conf") {
		return NeedMissing, "no line lets " + k.role + " in"
	}
	return NeedOK, "" // it is the grant that is missing
}

// meet does what is missing, as a superuser, as far as SQL can.
func (a *App) meet(ctx context.Context, k Cluster, adminURL string, needs []Need) error {
	admin, err := k.connect(ctx, adminURL)
	if err != nil {
		return err
	}
	defer admin.Close(context.WithoutCancel(ctx))
	own, err := k.connect(ctx, k.url)
	if err != nil {
		return err
	}
	defer own.Close(context.WithoutCancel(ctx))
	const who = `select system_identifier::text from pg_catalog.pg_control_system()`
	var theirs, ours string
	if err := errors.Join(admin.QueryRow(ctx, who).Scan(&theirs), own.QueryRow(ctx, who).Scan(&ours)); err != nil {
		return err
	}
	if theirs != ours {
		return fault.New(fault.Conflict, "the URL of the superuser leads to another cluster than that of %s", strings.Join(k.Groups, ", ")).WithCode("other_cluster").WithHint("name the cluster with --group")
	}
	set := false
	for _, n := range needs {
		switch {
		case n.Healthy():
		case n.setting:
			if _, err := admin.Exec(ctx, strings.TrimSuffix(n.Do[0], ";")); err != nil {
				return refusedAs(err, n)
			}
			set = true
		case n.database != "":
			if err := inDatabase(ctx, k, adminURL, n); err != nil {
				return err
			}
		}
	}
	if set {
		_, err = admin.Exec(ctx, `select pg_catalog.pg_reload_conf()`)
	}
	return err
}

func inDatabase(ctx context.Context, k Cluster, adminURL string, n Need) error {
	u, err := url.Parse(adminURL)
	if err != nil {
		return fault.New(fault.Invalid, "the URL of the superuser cannot be read").WithCode("bad_url")
	}
	u.Path = "/" + n.database
	conn, err := k.connect(ctx, u.String())
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, sql := range n.Do {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return refusedAs(err, n)
		}
	}
	return nil
}

func refusedAs(err error, n Need) error {
	if code := postgres.SQLState(err); code != "" {
		return fault.Wrap(err, fault.Forbidden, "PostgreSQL does not let this role set up %s (SQLSTATE %s)", n.Check, code).WithCode("grant").WithHint("give the URL of a superuser")
	}
	return err
}

func (k Cluster) connect(ctx context.Context, to string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(to)
	if err != nil {
		return nil, fault.New(fault.Invalid, "a connection URL of the cluster %s cannot be read", k.Name).WithCode("bad_url")
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "the cluster of %s cannot be reached", strings.Join(k.Groups, ", ")).WithCode("unreachable")
	}
	return conn, nil
}

// String names it and what it holds.
func (k Cluster) String() string { return fmt.Sprintf("%s (%s)", k.Name, strings.Join(k.Groups, ", ")) }
