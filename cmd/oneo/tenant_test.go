package main

import (
	"bytes"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// command runs oneo on the test's databases, the main one and a group called second.
type command struct {
	t       *testing.T
	env     *pgtest.Env
	environ []string
}

func newCommand(t *testing.T) command {
	t.Helper()
	env := pgtest.New(t)
	second := env.SecondGroup(t)
	c := command{t: t, env: env, environ: append(slices.Clone(patience), []string{
		"ONEO_DATABASE_URL=" + env.Group.URL, "ONEO_DATABASE_OWNER_URL=" + env.Group.OwnerURL, "ONEO_SERVER_SECRET=" + pgtest.Secret,
		"ONEO_DATABASE_GROUPS_SECOND_URL=" + second.URL, "ONEO_DATABASE_GROUPS_SECOND_OWNER_URL=" + second.OwnerURL,
	}...)}
	c.run(0, "migrate --shared")
	return c
}

// run returns what the command tells, its answer before its story, and holds its exit code.
func (c command) run(code int, line string) string {
	c.t.Helper()
	var out, story bytes.Buffer
	got := run(c.t.Context(), strings.Fields(line), c.environ, strings.NewReader(""), &out, &story)
	require.Equalf(c.t, code, got, "oneo %s:\n%s%s", line, &out, &story)
	return out.String() + story.String()
}

func (c command) sql(statement string) {
	c.t.Helper()
	_, err := pgtest.Admin(c.t, c.env.AdminURL).Exec(c.t.Context(), statement)
	require.NoError(c.t, err)
}

// A creation that was interrupted is finished by the same command, which then succeeds and invents no password.
func TestInterruptedCreateIsFinished(t *testing.T) {
	t.Parallel()
	c := newCommand(t)
	c.run(0, "tenant create acme --group second --admin-email ada@acme.example")
	for _, flag := range []string{"", " --if-not-exists"} {
		c.sql(`update public.tenants set state = 'creating'`)
		told := c.run(0, "tenant create acme --group second --admin-email ada@acme.example"+flag)
		require.Contains(t, told, "finished tenant acme")
		require.Contains(t, told, "oneo user set-password ada@acme.example -t acme")
		require.NotRegexp(t, `(?m)^password`, told)
		require.Regexp(t, `state +active`, told)
	}
	c.run(1, "tenant create acme --group second")
}

// What a selector names and is not there is told, with what there is.
func TestSelectors(t *testing.T) {
	t.Parallel()
	c := newCommand(t)
	for _, slug := range []string{"acme", "beta", "gamma"} {
		c.run(0, "tenant create "+slug)
	}
	require.Contains(t, c.run(10, "migrate --all-tenants --exclude acm"), "acme")
	require.Contains(t, c.run(10, "tenant list --exclude acm"), "acme")
	c.run(0, "tenant list --exclude none-*")
	for _, line := range []string{"migrate --all-tenants --group secnd", "tenant list --group secnd", "cache flush --all-tenants --group secnd"} {
		require.Contains(t, c.run(10, line), "main, second")
	}
	c.run(0, "tenant list --group second")

	c.run(0, "tenant drop beta --yes")
	c.sql(`update public.tenants set state = 'creating' where slug = 'gamma'`)
	told := c.run(0, "migrate -t acme -t beta -t gamma")
	require.Contains(t, told, "skipped beta: it is dropped")
	require.Contains(t, told, "skipped gamma: it is creating")
	require.NotContains(t, told, "every selected tenant")
	require.NotContains(t, c.run(0, "migrate --all-tenants"), "skipped beta")
	require.NotContains(t, c.run(0, "migrate -t acme -t beta --exclude beta"), "skipped beta")

	require.NotContains(t, c.run(0, "tenant list --behind"), "acme")
	c.sql(`with l as (delete from public.ledger where set = 'tenant' and version = 2 and tenant = 1) update public.placements set version = 1 where number = 1`)
	told = c.run(0, "tenant list --behind")
	require.Contains(t, told, "acme")
	require.NotContains(t, told, "beta")
}

// A public host is the administrators', whoever asks for it; the lines of /etc/hosts have it too.
func TestPublicHosts(t *testing.T) {
	t.Parallel()
	c := newCommand(t)
	c.environ = append(c.environ, "ONEO_SERVER_PUBLIC_HOSTS=localhost,admin.example,ops.localhost")
	c.run(0, "tenant create acme")
	for _, line := range []string{
		"domain add acme admin.example", "tenant create beta --domain ADMIN.example", "tenant create ops", "tenant rename acme ops",
		"tenant create beta --domain admin.example --dry-run",
	} {
		require.Contains(t, c.run(2, line), "public host")
	}
	require.NotContains(t, c.run(0, "tenant list"), "beta")
	c.run(0, "domain add acme crm.example")
	told := c.run(0, "hosts --print")
	require.Equal(t, "127.0.0.1 admin.example\n127.0.0.1 crm.example\n", told)
}

// A hosts file is written over only where it cannot be replaced.
func TestHostsInPlace(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]bool{
		nil: false, fs.ErrPermission: true, syscall.EACCES: true, syscall.EPERM: true, syscall.EROFS: true, syscall.EBUSY: true, syscall.EXDEV: true,
		syscall.ENOSPC: false, syscall.EIO: false, syscall.EDQUOT: false,
	} {
		require.Equalf(t, want, cannotReplace(&os.LinkError{Op: "rename", Err: err}), "%v", err)
	}
}

// What can be undone prints the whole command that undoes it: run, it does.
func TestPrintedUndoUndoes(t *testing.T) {
	t.Parallel()
	c := newCommand(t)
	undo := func(told string) string {
		t.Helper()
		m := regexp.MustCompile(`(?m)undo: (.*)$`).FindStringSubmatch(told)
		require.NotNilf(t, m, "no undo command in:\n%s", told)
		return m[1]
	}
	c.run(0, "tenant create acme")
	c.run(0, "tenant create beta --name Beta")
	before := func(name string) string {
		return c.run(0, "tenant show "+name) + c.run(0, "domain list "+name+" -o name")
	}
	for _, change := range []string{
		"tenant rename acme globex", "tenant rename acme globex --schema globex_2 --name Globex", "tenant rename acme acme --name Other", "tenant rename acme globex --name globex",
		"tenant rename beta initech", "tenant rename beta initech --schema initech --name initech",
		"domain add acme crm.example", "domain add acme crm.example --primary",
	} {
		name := strings.Fields(change)[2]
		was := before(name)
		command := undo(c.run(0, change))
		require.NotContains(t, command, "\"")
		for one := range strings.SplitSeq(command, " && ") {
			c.run(0, strings.ReplaceAll(strings.TrimPrefix(one, "oneo "), "'", ""))
		}
		require.Equalf(t, was, before(name), "after %q and its undo %q", change, command)
	}
	c.run(0, "domain add acme crm.example")
	for _, change := range []string{"domain primary acme crm.example", "domain remove acme crm.example"} {
		was := before("acme")
		c.run(0, strings.TrimPrefix(undo(c.run(0, change)), "oneo "))
		require.Equalf(t, was, before("acme"), "after %q and its undo", change)
	}
	require.NotContains(t, c.run(0, "domain primary acme acme.localhost"), "undo:", "nothing was changed")
	require.Equal(t, `'it'\''s'`, shellQuote("it's"))
}
