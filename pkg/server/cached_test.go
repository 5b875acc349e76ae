package server_test

import (
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// A command that ends a key or an account is no server: what the servers remember must end all the same, and a look-up
// that it overtakes must leave nothing behind.
func TestWhatACommandEndsIsAskedAgain(t *testing.T) {
	tenants, admins := auth.Tenants(), auth.Administrators()
	for _, c := range []struct {
		name      string
		realm     *auth.Realm
		key       bool // the key ends; otherwise its user is disabled, and nobody knows the key's hash
		overtaken bool // a look-up is on its way; otherwise its answer has been stored
	}{
		{"an administrator", admins, false, false},
		{"an administrator's key", admins, true, false},
		{"a user", tenants, false, false},
		{"a user's key", tenants, true, false},
		{"a user who is being looked up", tenants, false, true},
		{"a key that is being looked up", tenants, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := open(t)
			me := scenario{name: "before", path: "/api/v1/pipelines", host: "acme.localhost", status: http.StatusOK}
			scope, changed := auth.ScopeRead, server.AccountChange{Tenant: st.acme, TTL: time.Hour}
			run := func(fn func(*postgres.Tx) error) error {
				return st.env.DB.InTenant(t.Context(), st.acme, postgres.Write, fn)
			}
			if c.realm == admins {
				me.host, me.path, scope, changed.Tenant = "localhost", "/api/v1/admin/tenants", auth.ScopeAdmin, tenant.Tenant{}
				run = func(fn func(*postgres.Tx) error) error { return st.env.DB.InShared(t.Context(), postgres.Write, fn) }
			}
			hash, err := auth.NewHasher(1).Hash(t.Context(), password)
			require.NoError(t, err)
			var u auth.User
			var key auth.Key
			require.NoError(t, run(func(tx *postgres.Tx) (err error) {
				if u, err = c.realm.AddUser(t.Context(), tx, auth.NewUser{Email: "eve@example.com", Role: auth.RoleAdmin, PasswordHash: hash}); err != nil {
					return err
				}
				key, me.token, err = c.realm.AddKey(t.Context(), tx, u.ID, "test", []string{scope}, nil)
				return err
			}))
			p := pausing{databases{st.env.DB}, &atomic.Bool{}, make(chan struct{}), make(chan struct{})}
			addr := st.again(t, func(o *server.Options) {
				o.LocalTTL, o.IdentityTTL = time.Millisecond, time.Hour
				if c.overtaken {
					o.Databases = p
				}
			})
			answered := make(chan int, 1)
			if c.overtaken {
				r := me.request(t, addr)
				go func() {
					resp, err := http.DefaultTransport.RoundTrip(r)
					if err != nil {
						answered <- -1
						return
					}
					_ = resp.Body.Close()
					answered <- resp.StatusCode
				}()
				<-p.inside
			} else {
				st.doAt(t, addr, me)
			}

			require.NoError(t, run(func(tx *postgres.Tx) (err error) {
				if c.key {
					var hash []byte
					hash, err = c.realm.RevokeKey(t.Context(), tx, key.ID, nil)
					changed.Hashes = [][]byte{hash}
					return err
				}
				changed.User = u.ID
				_, changed.Hashes, err = c.realm.DisableUser(t.Context(), tx, u.ID)
				return err
			}))
			server.BarAccount(t.Context(), st.cache, changed)
			if c.overtaken {
				close(p.release)
				require.Equal(t, http.StatusOK, <-answered, "it was good when it was asked about")
			}
			me.name, me.status = "after", http.StatusUnauthorized
			st.doAt(t, addr, me)
		})
	}
}
