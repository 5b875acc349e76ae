package provision_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/provision"
)

// F07: a disk that is full in the middle of a create is told by its name, leaves nothing in the tenant's database, and
// the same command succeeds when there is room again.
func TestDiskFullDuringCreate(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			c := pgtest.Admin(t, f.adminURL(group))
			_, err := c.PgConn().Exec(t.Context(), `create function public.full() returns event_trigger language plpgsql as $$
begin if exists (select from pg_event_trigger_ddl_commands() where object_identity = 'acme.records') then
raise exception 'could not extend file "base/1/2": No space left on device' using errcode = '53100'; end if; end $$;
create event trigger full_disk on ddl_command_end when tag in ('CREATE TABLE') execute function public.full()`).ReadAll()
			require.NoError(t, err)
			create := func() error {
				_, err := f.p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
				return err
			}
			for range 2 {
				err := create()
				require.Truef(t, fault.Is(err, fault.Unavailable), "the disk is full: %v", err)
				require.Equal(t, "disk_full", fault.Of(err).StableCode())
				var left int
				require.NoError(t, c.QueryRow(t.Context(), `select (select count(*) from pg_namespace where nspname = 'acme') + (select count(*) from public.placements) + (select count(*) from public.ledger where set = 'tenant')`).Scan(&left))
				require.Zero(t, left, "nothing of the tenant is left in its database")
			}
			_, err = c.PgConn().Exec(t.Context(), `drop event trigger full_disk; drop function public.full()`).ReadAll()
			require.NoError(t, err)
			if err := create(); err != nil { // the operation that was left open may have been finished first
				require.Contains(t, err.Error(), "exists already")
			}
			f.reached(t, "create", group)
			f.invariants(t)
		})
	}
}

// F08: PostgreSQL loses every connection in the middle of a create, at each step; the command ends by itself or says
// that the database is away, and run again it reaches the end.
func TestConnectionsLostDuringCreate(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		for _, point := range []string{"create.started", "create.schema", "create.finish"} {
			t.Run(group+" "+point, func(t *testing.T) {
				t.Parallel()
				f := newFixture(t, group)
				k := task{Operation: "create", Group: group, Groups: f.groups}
				raw, err := json.Marshal(k)
				require.NoError(t, err)
				self, err := os.Executable()
				require.NoError(t, err)
				goOn := filepath.Join(t.TempDir(), "go-on")
				cmd := exec.Command(self)
				cmd.Env = append(os.Environ(), childTask+"="+string(raw), "ONEO_FAILPOINTS="+point+"=wait:"+goOn)
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				require.NoError(t, cmd.Start())
				c := pgtest.Admin(t, f.env.AdminURL)
				const asleep = `select count(*) from pg_stat_activity where state = 'idle in transaction' and usename = 'oneo_owner' and datname = any ($1)`
				const cut = `select count(pg_terminate_backend(pid, 60000)) from pg_stat_activity where pid <> pg_backend_pid() and datname = any ($1)`
				var databases []string
				for g := range f.groups {
					url := f.adminURL(g)
					databases = append(databases, url[strings.LastIndex(url, "/")+1:])
				}
				for i, d := range databases {
					databases[i], _, _ = strings.Cut(d, "?")
				}
				for deadline := time.Now().Add(pgtest.Patience); ; {
					var n int
					require.NoError(t, c.QueryRow(t.Context(), asleep, databases).Scan(&n))
					if n > 0 {
						break
					}
					if time.Now().After(deadline) {
						_ = cmd.Process.Kill()
						_ = cmd.Wait() // nobody writes to out any more
						t.Fatalf("the child never reached %s:\n%s", point, out.String())
					}
				}
				_, err = c.Exec(t.Context(), cut, databases)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(goOn, nil, 0o600))
				if err := cmd.Wait(); err != nil {
					require.Regexp(t, `(?i)lost|reached|not available|terminat|may or may not`, out.String())
				}
				pause := time.NewTimer(250 * time.Millisecond) // until the child's operation has gone stale
				<-pause.C
				if err := k.do(t.Context(), f.p); err != nil {
					require.Contains(t, err.Error(), "exists already")
				}
				f.reached(t, "create", group)
				f.invariants(t)
			})
		}
	}
}
