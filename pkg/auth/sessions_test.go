package auth_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

func TestLogin(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		h := auth.NewHasher(1)
		c := p.credential(t, u.Email)
		require.NoError(t, h.Check(t.Context(), c, password))
		requireFault(t, h.Check(t.Context(), c, password+" "), fault.Unauthenticated, "login_failed")
		wrong := h.Check(t.Context(), c, "")
		unknown := h.Check(t.Context(), p.credential(t, "nobody@example.com"), password)
		require.Equal(t, wrong, unknown, "a wrong password and an unknown account read the same")

		token, expires, err := p.start(t, c)
		require.NoError(t, err)
		kind, ok := p.realm.ParseToken(token)
		require.True(t, ok)
		require.Equal(t, auth.KindSession, kind)
		require.WithinDuration(t, time.Now().Add(30*24*time.Hour), expires, time.Minute)
		again, _, err := p.start(t, c)
		require.NoError(t, err)
		require.NotEqual(t, token, again, "each login makes a token of its own")

		i, err := p.who(t, token)
		require.NoError(t, err)
		require.Equal(t, p.realm.Name(), i.Realm)
		require.Equal(t, auth.KindSession, i.Kind)
		require.Equal(t, u.ID, i.UserID)
		require.Equal(t, u.Email, i.Email)
		require.Equal(t, u.Role, i.Role)
		require.Equal(t, auth.HashToken(token), i.TokenHash)
		require.True(t, i.ExpiresAt.Equal(expires))
		require.Empty(t, i.Scopes)
		require.Equal(t, 2, value[int](t, p, `select count(*) from {sessions}`))
		require.Zero(t, value[int](t, p, `select count(*) from {sessions} s where s::text like '%' || $1 || '%'`, token[4:]),
			"a token is stored as a hash only")
	})
}

func TestWhatIsNobodysCredentialStartsNoSession(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		_, _, err := p.start(t, auth.Credential{})
		requireFault(t, err, fault.Unauthenticated, "login_failed")

		before := p.credential(t, u.Email)
		p.sql(t, `update {users} set password_hash = '$argon2id$new'`)
		_, _, err = p.start(t, before)
		requireFault(t, err, fault.Unauthenticated, "login_failed")
		p.sql(t, `update {users} set password_hash = $1, disabled_at = now()`, hash(t))
		_, _, err = p.start(t, before)
		requireFault(t, err, fault.Unauthenticated, "login_failed")
		require.Zero(t, value[int](t, p, `select count(*) from {sessions}`))
		p.sql(t, `update {users} set disabled_at = null`)
		_, _, err = p.start(t, before)
		require.NoError(t, err, "the test's credential was good")
	})
}

// A login that is not committed yet is seen by the password change that comes after it.
func TestPasswordChangeWaitsForLogins(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		p.add(t, "ada@example.com", "")
		u := p.add(t, "bob@example.com", "")
		for name, change := range map[string]func(postgres.Querier) ([][]byte, error){
			"password": func(q postgres.Querier) ([][]byte, error) {
				_, ended, err := p.realm.SetPassword(t.Context(), q, u.ID, hash(t))
				return ended, err
			},
			"disabled": func(q postgres.Querier) ([][]byte, error) {
				_, ended, err := p.realm.DisableUser(t.Context(), q, u.ID)
				return ended, err
			},
		} {
			c := p.credential(t, u.Email)
			type result struct {
				ended [][]byte
				err   error
			}
			changed := make(chan result, 1)
			var token string
			p.must(t, func(q postgres.Querier) (err error) {
				if token, _, err = p.realm.StartSession(t.Context(), q, c, auth.DefaultSessionOptions()); err != nil {
					return err
				}
				go func() {
					var r result
					r.err = p.in(t.Context(), postgres.Write, func(q postgres.Querier) (err error) {
						r.ended, err = change(q)
						return err
					})
					changed <- r
				}()
				p.blocked(t)
				return nil
			})
			r := <-changed
			require.NoError(t, r.err, name)
			require.Equal(t, [][]byte{auth.HashToken(token)}, r.ended, name)
			p.requireUnknown(t, token, name)
			p.sql(t, `update {users} set disabled_at = null`)
		}
	})
}

// The other way round: the login waits for the change and is refused. With an old session about, which the login would
// clear, the two take what they lock in the same order: neither is sacrificed to a deadlock.
func TestLoginsWaitForPasswordChanges(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		p.login(t, u.Email)
		p.sql(t, `update {sessions} set expires_at = now() - interval '1 second'`)
		c := p.credential(t, u.Email)
		login := make(chan error, 1)
		p.must(t, func(q postgres.Querier) error {
			// What SetPassword begins with; the login comes in between its two statements.
			if _, err := q.Exec(t.Context(), p.tables.Replace(`update {users} set version = version where id = $1`), u.ID); err != nil {
				return err
			}
			go func() {
				login <- p.in(t.Context(), postgres.Write, func(q postgres.Querier) error {
					_, _, err := p.realm.StartSession(t.Context(), q, c, auth.DefaultSessionOptions())
					return err
				})
			}()
			p.blocked(t)
			next, err := auth.NewHasher(1).Hash(t.Context(), "an entirely new password")
			if err != nil {
				return err
			}
			_, ended, err := p.realm.SetPassword(t.Context(), q, u.ID, next)
			require.Len(t, ended, 1)
			return err
		})
		requireFault(t, <-login, fault.Unauthenticated, "login_failed")
		require.Zero(t, value[int](t, p, `select count(*) from {sessions}`))
	})
}

func TestSessionsEnd(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		for _, tc := range []struct{ name, set string }{
			{"a second past its end", `expires_at = now() - interval '1 second'`},
			{"at its end", `expires_at = now()`},
			{"a day without a request", `last_seen = now() - interval '1 day'`},
			{"past its end, in use", `expires_at = now() - interval '1 second', last_seen = now()`},
		} {
			token := p.login(t, u.Email)
			_, err := p.who(t, token)
			require.NoError(t, err)
			p.sql(t, `update {sessions} set `+tc.set+` where token_hash = $1`, auth.HashToken(token))
			p.requireUnknown(t, token, tc.name)
			require.Equal(t, 1, value[int](t, p, `select count(*) from {sessions}`), "it lies there still")
			p.login(t, u.Email)
			require.Zero(t, value[int](t, p, `select count(*) from {sessions} where token_hash = $1`, auth.HashToken(token)),
				"the next login of its user clears it")
			p.sql(t, `delete from {sessions}`)
		}
		disabled := p.login(t, u.Email)
		p.sql(t, `update {users} set disabled_at = now()`)
		p.requireUnknown(t, disabled, "a user whom somebody disabled by hand and left the session")
		p.sql(t, `update {users} set disabled_at = null`)
		token := p.login(t, u.Email)
		p.sql(t, `update {sessions} set last_seen = now() - interval '23 hours 59 minutes', expires_at = now() + interval '1 minute'`)
		_, err := p.who(t, token)
		require.NoError(t, err, "a minute before both ends")
	})
}

func TestTouch(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		token := p.login(t, u.Email)
		p.login(t, u.Email) // another one, which must stay as it is
		_, key := p.key(t, u, auth.ScopeAdmin)
		touch := func(i auth.Identity) {
			p.must(t, func(q postgres.Querier) error { return p.realm.Touch(t.Context(), q, i) })
		}
		for _, tc := range []struct{ token, column, table string }{
			{token, "last_seen", "{sessions}"}, {key, "last_used", "{keys}"},
		} {
			i, err := p.who(t, tc.token)
			require.NoError(t, err)
			last := func() time.Time {
				return value[time.Time](t, p, `select coalesce(`+tc.column+`, 'epoch') from `+tc.table+` where token_hash = $1`, i.TokenHash)
			}
			if i.Kind == auth.KindKey {
				require.Nil(t, i.LastSeen, "a new key was never used")
				touch(i)
				require.WithinDuration(t, time.Now(), last(), time.Minute)
			}
			for _, s := range []struct {
				ago   string
				moves bool
			}{{"23 hours", true}, {"61 seconds", true}, {"50 seconds", false}} {
				p.sql(t, `update `+tc.table+` set `+tc.column+` = now() - $2::text::interval where token_hash = $1`, i.TokenHash, s.ago)
				before := last()
				touch(i)
				require.Equalf(t, s.moves, last().After(before), "%s of %s ago", tc.column, s.ago)
			}
		}
		require.Equal(t, 1, value[int](t, p, `select count(*) from {sessions} where last_seen = created_at`), "only the session in use was touched")

		// The idle time slides; the end does not.
		p.sql(t, `update {sessions} set last_seen = now() - interval '23 hours', expires_at = now() + interval '1 hour'`)
		i, err := p.who(t, token)
		require.NoError(t, err)
		touch(i)
		after, err := p.who(t, token)
		require.NoError(t, err)
		require.True(t, after.LastSeen.After(*i.LastSeen))
		require.Equal(t, i.ExpiresAt, after.ExpiresAt)
		touch(auth.Identity{Kind: auth.KindSession, TokenHash: auth.HashToken("nobody's")}) // nothing, and no error
	})
}

func TestEndAndRevokeSessions(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		ada, bob := p.add(t, "ada@example.com", ""), p.add(t, "bob@example.com", "")
		a1, a2, a3, b := p.login(t, ada.Email), p.login(t, ada.Email), p.login(t, ada.Email), p.login(t, bob.Email)
		_, key := p.key(t, ada, auth.ScopeAdmin)
		i, err := p.who(t, a1)
		require.NoError(t, err)
		p.must(t, func(q postgres.Querier) error { return p.realm.EndSession(t.Context(), q, i) })
		p.requireUnknown(t, a1, "ended")
		_, err = p.who(t, a2)
		require.NoError(t, err, "logging out here does not log out there")
		p.must(t, func(q postgres.Querier) error { return p.realm.EndSession(t.Context(), q, i) }) // once more does nothing

		var ended [][]byte
		p.must(t, func(q postgres.Querier) (err error) {
			ended, err = p.realm.RevokeSessions(t.Context(), q, ada.ID)
			return err
		})
		require.ElementsMatch(t, [][]byte{auth.HashToken(a2), auth.HashToken(a3)}, ended)
		p.requireUnknown(t, a2, "revoked")
		_, err = p.who(t, b)
		require.NoError(t, err, "nobody else is logged out")

		a4 := p.login(t, ada.Email)
		p.must(t, func(q postgres.Querier) (err error) {
			ended, err = p.realm.RevokeAllSessions(t.Context(), q)
			return err
		})
		require.ElementsMatch(t, [][]byte{auth.HashToken(a4), auth.HashToken(b)}, ended)
		p.requireUnknown(t, a4, "all revoked")
		p.requireUnknown(t, b, "all revoked")
		_, err = p.who(t, key)
		require.NoError(t, err, "an API key is no session")
	})
}

func TestPurgeExpired(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		live, idle, over := p.login(t, u.Email), p.login(t, u.Email), p.login(t, u.Email)
		p.sql(t, `update {sessions} set last_seen = now() - interval '25 hours' where token_hash = $1`, auth.HashToken(idle))
		p.sql(t, `update {sessions} set expires_at = now() - interval '1 hour' where token_hash = $1`, auth.HashToken(over))
		for _, want := range []int64{2, 0} {
			p.must(t, func(q postgres.Querier) error {
				n, err := p.realm.PurgeExpired(t.Context(), q, 24*time.Hour)
				require.Equal(t, want, n)
				return err
			})
		}
		_, err := p.who(t, live)
		require.NoError(t, err)
	})
}

func TestWhatClientsSayOfThemselvesIsBounded(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		c := p.credential(t, u.Email)
		for said, want := range map[string]string{
			"Mozilla/5.0":                   "Mozilla/5.0",
			"a\x00b\xffc":                   "abc",
			strings.Repeat("x", 10_000):     strings.Repeat("x", 200),
			"x" + strings.Repeat("ä", 5000): "x" + strings.Repeat("ä", 99), // never half a letter
		} {
			p.must(t, func(q postgres.Querier) error {
				o := auth.DefaultSessionOptions()
				o.UserAgent, o.Remote = said, said
				_, _, err := p.realm.StartSession(t.Context(), q, c, o)
				return err
			})
			require.Equal(t, want, value[string](t, p, `select user_agent from {sessions}`))
			require.Equal(t, want, value[string](t, p, `select remote from {sessions}`))
			p.sql(t, `delete from {sessions}`)
		}
	})
}

func TestStrongerHashes(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		h := auth.NewHasher(1)
		token := p.login(t, u.Email)
		stronger, err := h.Strengthen(t.Context(), p.credential(t, u.Email), password)
		require.NoError(t, err)
		require.Empty(t, stronger, "today's hash stays")

		old := weakHash(password)
		p.sql(t, `update {users} set password_hash = $1`, old)
		c := p.credential(t, u.Email)
		require.NoError(t, h.Check(t.Context(), c, password))
		stronger, err = h.Strengthen(t.Context(), c, password)
		require.NoError(t, err)
		var session string
		p.must(t, func(q postgres.Querier) (err error) {
			if c, err = p.realm.Rehash(t.Context(), q, c, stronger); err != nil {
				return err
			}
			session, _, err = p.realm.StartSession(t.Context(), q, c, auth.DefaultSessionOptions())
			return err
		})
		require.Equal(t, stronger, value[string](t, p, `select password_hash from {users}`))
		require.NoError(t, h.Check(t.Context(), p.credential(t, u.Email), password))
		for _, s := range []string{token, session} {
			_, err = p.who(t, s)
			require.NoError(t, err, "the same password: nobody is logged out")
		}

		// Whoever changed the password meanwhile has the last word.
		p.sql(t, `update {users} set password_hash = $1`, old)
		c = p.credential(t, u.Email)
		p.sql(t, `update {users} set password_hash = $1`, hash(t))
		p.must(t, func(q postgres.Querier) error {
			after, err := p.realm.Rehash(t.Context(), q, c, stronger)
			require.Equal(t, c, after)
			return err
		})
		require.Equal(t, hash(t), value[string](t, p, `select password_hash from {users}`))
		_, _, err = p.start(t, c)
		requireFault(t, err, fault.Unauthenticated, "login_failed")

		err = p.write(t, func(q postgres.Querier) error {
			_, err := p.realm.Rehash(t.Context(), q, c, password)
			return err
		})
		requireFault(t, err, fault.Internal, "not_a_hash")
	})
}

func TestTokensBelongToOneRealmAndOneTenant(t *testing.T) {
	t.Parallel()
	env := install(t)
	acme, globex := inTenant(env, env.Tenant(t, "acme")), inTenant(env, env.Tenant(t, "globex"))
	var all []string
	for _, p := range []place{acme, globex} {
		u := p.add(t, "ada@example.com", auth.RoleAdmin)
		_, key := p.key(t, u, auth.ScopeAdmin)
		all = append(all, p.login(t, u.Email), key)
	}
	for _, token := range all[:2] {
		i, err := acme.who(t, token)
		require.NoError(t, err)
		require.Equal(t, "ada@example.com", i.Email)
		globex.requireUnknown(t, token, "a token of another tenant")
		require.NoError(t, env.DB.InTenant(t.Context(), globex.tenant, postgres.Write, func(tx *postgres.Tx) error {
			return auth.Tenants().EndSession(t.Context(), tx, i)
		}))
		_, err = acme.who(t, token)
		require.NoError(t, err, "no other tenant can end it")
	}
	for _, token := range all {
		err := env.DB.InShared(t.Context(), postgres.Single, func(tx *postgres.Tx) error {
			_, err := auth.Administrators().Authenticate(t.Context(), tx, token, time.Hour)
			return err
		})
		requireFault(t, err, fault.Unauthenticated, "unauthenticated")
	}
	require.NoError(t, env.DB.InTenant(t.Context(), acme.tenant, postgres.Write, func(tx *postgres.Tx) error {
		_, err := auth.Tenants().RevokeAllSessions(t.Context(), tx)
		return err
	}))
	acme.requireUnknown(t, all[0], "revoked with all of its tenant")
	_, err := globex.who(t, all[2])
	require.NoError(t, err, "one tenant's revocation ends no session of another")
	acme.requireUnknown(t, all[3], "a key of another tenant")

	// A handler that mistakes the realm finds nobody, rather than somebody else.
	err = env.DB.InTenant(t.Context(), acme.tenant, postgres.Read, func(tx *postgres.Tx) error {
		_, err := auth.Administrators().UserByEmail(t.Context(), tx, "ada@example.com")
		return err
	})
	require.Equal(t, "42501", postgres.SQLState(err), "%v", err)
	err = env.DB.InShared(t.Context(), postgres.Read, func(tx *postgres.Tx) error {
		_, err := auth.Tenants().UserByEmail(t.Context(), tx, "ada@example.com")
		return err
	})
	require.Equal(t, "42P01", postgres.SQLState(err), "%v", err)
}

// A text that is no token costs no statement: there is nothing here that could run one.
func TestMalformedTokensNeverReachTheDatabase(t *testing.T) {
	t.Parallel()
	for _, r := range []*auth.Realm{auth.Tenants(), auth.Administrators()} {
		for _, token := range []string{"", "x", "ons_", "' or true --", strings.Repeat("A", 47), "ons_" + strings.Repeat("A", 42) + "B"} {
			i, err := r.Authenticate(t.Context(), nil, token, time.Hour)
			requireFault(t, err, fault.Unauthenticated, "unauthenticated")
			require.True(t, i.IsZero())
		}
	}
}
