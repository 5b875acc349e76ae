package app_test

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// An old snapshot of Redis, put back by whatever is to be restored, brings nothing back: neither for a server that has been
// there all the time, nor for one that knows only what Redis tells it. Everything in Redis is young enough to be believed.
func TestAnOldSnapshotOfRedisRevivesNothing(t *testing.T) {
	t.Parallel()
	for _, kept := range []struct {
		name, files string
		conf        map[string]string
	}{
		{"a snapshot", "dump.rdb", map[string]string{"appendonly": "no"}},
		{"an append-only file", "appendonlydir", nil},
	} {
		t.Run(kept.name, func(t *testing.T) {
			t.Parallel()
			rollBack(t, kept.files, kept.conf)
		})
	}
}

func rollBack(t *testing.T, files string, conf map[string]string) {
	ctx := t.Context()
	env := pgtest.New(t)
	acme, beta, gamma, delta := env.Tenant(t, "acme"), env.Tenant(t, "beta"), env.Tenant(t, "gamma"), env.Tenant(t, "delta")
	o := devstack.RedisOptions{Dir: t.TempDir(), Keep: true, Conf: conf}
	redis, err := devstack.StartRedis(ctx, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, redis.Stop(context.Background())) })
	ro, err := goredis.ParseURL(redis.URL())
	require.NoError(t, err)
	raw := goredis.NewClient(ro)
	t.Cleanup(func() { require.NoError(t, raw.Close()) })

	here := open(t, env, redis.URL(), func(c *config.Config) { c.Tenancy.DomainHold = 0 })
	addr := serve(t, here)
	require.NoError(t, here.Cache.Ping(ctx))
	old, err := tenant.ParseHost("old.example")
	require.NoError(t, err)
	domains := func(fn func(tx *postgres.OwnerTx) error) {
		t.Helper()
		require.NoError(t, env.DB.AsOwner(ctx, postgres.MainGroup, fn))
		here.Changed(ctx, gamma, old)
	}
	domains(func(tx *postgres.OwnerTx) error { return registry.AddDomain(ctx, tx, gamma, old, false) })
	leaves, admin, atBeta, atGamma, atDelta := session(t, env, acme), session(t, env, tenant.Tenant{}), session(t, env, beta), session(t, env, gamma), session(t, env, delta)
	stays := again(t, env, acme)
	var user auth.User
	var key string
	require.NoError(t, env.DB.InTenant(ctx, acme, postgres.Write, func(tx *postgres.Tx) (err error) {
		hash, err := here.Hasher.Hash(ctx, "correct horse battery staple")
		if err != nil {
			return err
		}
		if user, err = auth.Tenants().AddUser(ctx, tx, auth.NewUser{Email: "eve@example.com", Role: auth.RoleAdmin, PasswordHash: hash}); err != nil {
			return err
		}
		_, key, err = auth.Tenants().AddKey(ctx, tx, user.ID, "ci", []string{auth.ScopeAdmin}, nil)
		return err
	}))
	var archive bytes.Buffer
	_, err = here.Transfers.Export(ctx, delta, &archive, transfer.ExportOptions{})
	require.NoError(t, err)
	settings := func(addr string) string {
		_, body := ask(t, addr, "GET", "acme.localhost", "/api/v1/settings", stays, "")
		return body
	}
	status, body := ask(t, addr, "PATCH", "acme.localhost", "/api/v1/settings", stays, `{"public":{"color":"red"}}`)
	require.Equal(t, http.StatusOK, status, body)
	// What has just changed is not cached for a while.
	bars, err := raw.Keys(ctx, "*").Result()
	require.NoError(t, err)
	require.NoError(t, raw.Del(ctx, bars...).Err())

	me := func(addr, host, token string) int {
		t.Helper()
		status, _ := ask(t, addr, "GET", host, "/api/v1/me", token, "")
		return status
	}
	users := func(addr string) int { // for administrators alone
		status, _ := ask(t, addr, "GET", "acme.localhost", "/api/v1/users", key, "")
		return status
	}
	for range 2 {
		require.Equal(t, http.StatusOK, me(addr, "acme.localhost", leaves))
		require.Equal(t, http.StatusOK, me(addr, "localhost", admin))
		require.Equal(t, http.StatusOK, me(addr, "beta.localhost", atBeta))
		require.Equal(t, http.StatusOK, me(addr, "old.example", atGamma))
		require.Equal(t, http.StatusOK, me(addr, "delta.localhost", atDelta))
		require.Equal(t, http.StatusOK, users(addr))
		require.Contains(t, settings(addr), "red")
	}
	names := func() string {
		t.Helper()
		found, err := raw.Keys(ctx, "*").Result()
		require.NoError(t, err)
		return strings.Join(found, "\n")
	}
	for _, want := range []string{"acme:1:identity:", "acme:1:settings:", "beta:1:identity:", "gamma:1:identity:", "delta:1:identity:", "public:identity:", "public:host:old.example", "public:host:beta.localhost"} {
		require.Contains(t, names(), want, "the test itself: it must be cached")
	}
	require.NoError(t, raw.Save(ctx).Err())
	copied := filepath.Join(t.TempDir(), files)
	require.NoError(t, exec.Command("cp", "-a", filepath.Join(o.Dir, files), copied).Run())

	logout := func(host, token string) {
		t.Helper()
		status, body := ask(t, addr, "POST", host, "/api/v1/auth/logout", token, "")
		require.Equal(t, http.StatusNoContent, status, body)
	}
	logout("acme.localhost", leaves)
	logout("localhost", admin)
	_, err = here.Provision.Suspend(ctx, beta.Slug, "test")
	require.NoError(t, err)
	domains(func(tx *postgres.OwnerTx) error { return registry.RemoveDomain(ctx, tx, gamma, old, 0) })
	_, _, err = here.Transfers.Restore(ctx, delta, &archive, time.Hour, false, transfer.Loading{Actor: "test"})
	require.NoError(t, err)
	require.NoError(t, env.DB.InTenant(ctx, acme, postgres.Write, func(tx *postgres.Tx) (err error) {
		user.Role = auth.RoleMember
		user, _, err = auth.Tenants().UpdateUser(ctx, tx, user)
		return err
	}))
	here.AccountChanged(ctx, acme, user.ID, nil)
	status, body = ask(t, addr, "PATCH", "acme.localhost", "/api/v1/settings", stays, `{"public":{"color":"blue"}}`)
	require.Equal(t, http.StatusOK, status, body)
	holds := func(addr, when string) {
		t.Helper()
		require.Equal(t, http.StatusUnauthorized, me(addr, "acme.localhost", leaves), when+": a session that has ended")
		require.Equal(t, http.StatusUnauthorized, me(addr, "localhost", admin), when+": an administrator's session that has ended")
		require.Equal(t, http.StatusServiceUnavailable, me(addr, "beta.localhost", atBeta), when+": a suspended tenant")
		require.Equal(t, http.StatusNotFound, me(addr, "old.example", atGamma), when+": a domain that was taken away")
		require.Equal(t, http.StatusUnauthorized, me(addr, "delta.localhost", atDelta), when+": a session of a tenant that was restored")
		require.Equal(t, http.StatusForbidden, users(addr), when+": a role that was taken away")
		require.Contains(t, settings(addr), "blue", when+": settings that have changed")
		require.Equal(t, http.StatusOK, me(addr, "gamma.localhost", atGamma), when+": what is good stays good")
	}
	holds(addr, "before")

	require.NoError(t, redis.Stop(ctx))
	require.NoError(t, os.RemoveAll(filepath.Join(o.Dir, files)))
	require.NoError(t, exec.Command("cp", "-a", copied, filepath.Join(o.Dir, files)).Run())
	redis, err = devstack.StartRedis(ctx, o)
	require.NoError(t, err)
	require.Contains(t, names(), "public:host:old.example", "the test itself: the snapshot must be back")
	require.NotContains(t, names(), "acme:1:user:", "the test itself: what was told later must not be")
	usable(t, here)
	holds(addr, "a server that was there")
	fresh := serve(t, open(t, env, redis.URL()))
	holds(fresh, "a server that was started later")
	holds(addr, "a server that was there, again")
}
