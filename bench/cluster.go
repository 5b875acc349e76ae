package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

const secret = "benchmark-secret-benchmark-secret-0123456789"

// bench is one run: its own PostgreSQL and Redis, the binary, and the lines of the report.
type bench struct {
	dir      string
	jobs     int // tenants that are migrated at one time
	binary   string
	pg       *devstack.Postgres
	redis    *devstack.Redis
	duration time.Duration
	ways     *regexp.Regexp // of the ways to read
	out      io.Writer
}

func (b *bench) printf(format string, args ...any) { fmt.Fprintf(b.out, format+"\n", args...) }

// tell says on stderr what is going on; it is no part of the report.
func (b *bench) tell(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}

// goal stands below a table, behind an empty line: what was promised, and whether it is held.
func (b *bench) goal(held bool, goal, measured string) {
	verdict := "Held"
	if !held {
		verdict = "**Missed**"
	}
	b.printf("Goal: %s. %s: %s.\n", goal, verdict, measured)
}

// installation is one database with tenants of one shape.
type installation struct {
	b         *bench
	name      string
	isolation postgres.Isolation
	logins    int
	group     postgres.Group
	slugs     []string
	records   [][]string // ids, by tenant
}

func (b *bench) install(ctx context.Context, name string, isolation postgres.Isolation, logins int) (*installation, error) {
	as := func(role string) string {
		u, err := url.Parse(b.pg.URL(name))
		if err != nil {
			panic(err)
		}
		u.User = url.UserPassword(role, postgres.LoginPassword(secret, role))
		return u.String()
	}
	in := &installation{b: b, name: name, isolation: isolation, logins: logins,
		group: postgres.Group{URL: as("oneo_app"), OwnerURL: as("oneo_owner")}}
	_, err := postgres.Setup(ctx, postgres.SetupOptions{
		AdminURL: b.pg.URL(name), Group: in.group, AppRole: "oneo_app", OwnerRole: "oneo_owner", Secret: secret, Logins: logins,
	})
	if err != nil {
		return nil, err
	}
	return in, in.open(func(_ *postgres.DB, m *migrate.Migrator, _ *provision.Provisioner) error {
		_, err := m.Shared(ctx)
		return err
	})
}

// open gives fn the packages on one owner connection.
func (in *installation) open(fn func(*postgres.DB, *migrate.Migrator, *provision.Provisioner) error) error {
	return in.openPooled(0, fn)
}

// openPooled is open with a warm pool of size spares.
func (in *installation) openPooled(size int, fn func(*postgres.DB, *migrate.Migrator, *provision.Provisioner) error) error {
	o := postgres.DefaultOptions()
	o.Groups = map[string]postgres.Group{postgres.MainGroup: in.group}
	o.Secret, o.OwnerConns, o.Isolation = secret, 1, in.isolation
	db, err := postgres.Open(o)
	if err != nil {
		return err
	}
	defer db.Close()
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files})
	if err != nil {
		return err
	}
	base, err := tenant.ParseHost("localhost")
	if err != nil {
		return err
	}
	p, err := provision.New(provision.Options{
		DB: db, Migrate: m, BaseDomain: base, DropGrace: time.Hour, DomainHold: time.Hour, PoolSize: size, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	return fn(db, m, p)
}

// token is a tenant's session in the form that the server expects.
func token(slug string) string {
	sum := sha256.Sum256([]byte("bench " + slug))
	return sessionToken(sum)
}

const recordsEach = 50

// benchHash has the form of a password's hash; nobody knows the password.
const benchHash = "$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHQ$c29tZWhhc2hzb21laGFzaHNvbWVoYXNoc29tZWhhc2g"

// grow creates tenants until there are n, each with a user, a session, a pipeline and 50 records.
func (in *installation) grow(ctx context.Context, n int) error {
	return in.open(func(db *postgres.DB, _ *migrate.Migrator, p *provision.Provisioner) error {
		for i := len(in.slugs); i < n; i++ {
			slug, err := tenant.ParseSlug(fmt.Sprintf("t%05d", i))
			if err != nil {
				return err
			}
			t, err := p.Create(ctx, provision.CreateRequest{Slug: slug, AdminEmail: "bench@example.com", AdminPasswordHash: benchHash})
			if err != nil {
				return err
			}
			var ids []string
			err = db.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error {
				hash := sha256.Sum256([]byte(token(slug.String())))
				const session = `insert into sessions (token_hash, user_id, expires_at) select $1, id, now() + interval '30 days' from users limit 1`
				if _, err := tx.Exec(ctx, session, hash[:]); err != nil {
					return err
				}
				const pipeline = `insert into pipelines (id, key, name) values (gen_random_uuid(), 'deals', 'Deals')`
				if _, err := tx.Exec(ctx, pipeline); err != nil {
					return err
				}
				const field = `insert into fields (id, pipeline_id, key, name, type) select gen_random_uuid(), id, k, k, t
from pipelines, (values ('stage', 'text'), ('amount', 'number'), ('note', 'text')) f (k, t)`
				if _, err := tx.Exec(ctx, field); err != nil {
					return err
				}
				const records = `insert into records (id, pipeline_id, data)
select gen_random_uuid(), p.id, jsonb_build_object('stage', 'Won', 'amount', g * 17, 'note', repeat('x', 60)) from pipelines p, generate_series(1, $1) g
returning id::text`
				rows, err := tx.Query(ctx, records, recordsEach)
				if err != nil {
					return err
				}
				ids, err = pgx.CollectRows(rows, pgx.RowTo[string])
				return err
			})
			if err != nil {
				return err
			}
			in.slugs, in.records = append(in.slugs, slug.String()), append(in.records, ids)
		}
		return nil
	})
}

// environment is the configuration of a binary that works on the installation.
func (in *installation) environment(more ...string) []string {
	return append(append(os.Environ(),
		"ONEO_DATABASE_URL="+in.group.URL, "ONEO_DATABASE_OWNER_URL="+in.group.OwnerURL,
		"ONEO_SERVER_SECRET="+secret, "ONEO_REDIS_URL="+in.b.redis.URL(), "ONEO_LOG_LEVEL=error",
		"ONEO_TENANCY_ISOLATION="+string(in.isolation), "ONEO_DATABASE_MAX_CONNS=16"), more...)
}

// process is a server under measurement.
type process struct {
	cmd  *exec.Cmd
	addr string
	ops  string // of `oneo serve`
	log  *os.File

	answered int // requests that drive has sent
}

// serve starts `oneo serve` on a free port and waits until it answers.
func (in *installation) serve(ctx context.Context, more ...string) (*process, error) {
	return in.serveBy(ctx, in.b.binary, more...)
}

// serveBy is serve with a binary of another build.
func (in *installation) serveBy(ctx context.Context, binary string, more ...string) (*process, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	ops, err := freeAddr()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, "serve")
	cmd.Env = in.environment(append([]string{"ONEO_SERVER_ADDR=" + addr, "ONEO_SERVER_OPS_ADDR=" + ops, "ONEO_SERVER_PUBLIC_URL=http://localhost"}, more...)...)
	p, err := start(ctx, cmd, addr, "http://"+ops+"/readyz", filepath.Join(in.b.dir, "serve.log"))
	if err != nil {
		return nil, err
	}
	p.ops = ops
	return p, nil
}

func start(ctx context.Context, cmd *exec.Cmd, addr, ready, log string) (*process, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, addr: addr, log: f}
	deadline := time.Now().Add(20 * time.Second)
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, ready, nil)
		if err != nil {
			return nil, err
		}
		res, err := http.DefaultClient.Do(req)
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return p, nil
			}
		}
		if time.Now().After(deadline) {
			p.stop()
			text, _ := os.ReadFile(log)
			return nil, fmt.Errorf("%s was not ready in time:\n%s", cmd.Path, text)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(os.Interrupt)
	_ = p.cmd.Wait()
	_ = p.log.Close()
}

// residentMB is the resident memory of the process.
func (p *process) residentMB() float64 {
	mb, _ := memoryOf(p.cmd.Process.Pid, "VmRSS:")
	return mb
}

// memoryOf is a line of what the kernel tells of a process, in MB: VmRSS: is what it holds, VmHWM: the most that it ever did.
func memoryOf(pid int, of string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for _, line := range strings.Split(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, of); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("the kernel does not tell %s of process %d", of, pid)
}

// backends is the number and the private memory of the backends that work for a database.
func (in *installation) backends(ctx context.Context) (n int, privateMB float64, err error) {
	c, err := pgx.Connect(ctx, in.b.pg.URL("postgres"))
	if err != nil {
		return 0, 0, err
	}
	defer c.Close(ctx)
	rows, err := c.Query(ctx, `select pid from pg_stat_activity where datname = $1 and backend_type = 'client backend'`, in.name)
	if err != nil {
		return 0, 0, err
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		return 0, 0, err
	}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			continue // it has ended meanwhile
		}
		for _, line := range strings.Split(string(text), "\n") {
			if rest, ok := strings.CutPrefix(line, "Pss_Anon:"); ok {
				kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
				privateMB += kb / 1024
			}
		}
	}
	return len(pids), privateMB, nil
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
