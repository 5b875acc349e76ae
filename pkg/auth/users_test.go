package auth_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

func TestUsers(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		var made []auth.User
		for i := range 5 {
			var u auth.User
			p.must(t, func(q postgres.Querier) (err error) {
				u, err = p.realm.AddUser(t.Context(), q, auth.NewUser{
					Email: fmt.Sprintf("u%d@example.com", i), Name: "Ünal 🦊", PasswordHash: hash(t),
					Metadata: json.RawMessage(fmt.Sprintf(`{"n": %d}`, i)),
				})
				return err
			})
			require.Equal(t, p.realm.Roles()[0], u.Role, "no role: the realm's first")
			require.Equal(t, 1, u.Version)
			require.Nil(t, u.DisabledAt)
			require.EqualValues(t, 7, u.ID.Version())
			made = append(made, u)
		}

		var page, rest []auth.User
		var byID, byEmail auth.User
		require.NoError(t, p.in(t.Context(), postgres.Read, func(q postgres.Querier) (err error) {
			page, err = p.realm.Users(t.Context(), q, 2, nil)
			require.NoError(t, err)
			rest, err = p.realm.Users(t.Context(), q, 100, &page[1].ID)
			require.NoError(t, err)
			byID, err = p.realm.UserByID(t.Context(), q, made[3].ID)
			require.NoError(t, err)
			byEmail, err = p.realm.UserByEmail(t.Context(), q, "u3@example.com")
			return err
		}))
		require.Equal(t, made, append(page, rest...), "pages join without a gap, with each user's own metadata")
		require.Equal(t, made[3], byID)
		require.Equal(t, made[3], byEmail)
		raw, err := json.Marshal(byID)
		require.NoError(t, err)
		require.NotContains(t, string(raw), "argon2", "a user never carries the password's hash")

		require.NoError(t, p.in(t.Context(), postgres.Read, func(q postgres.Querier) error {
			_, err := p.realm.UserByID(t.Context(), q, uuid.New())
			requireFault(t, err, fault.NotFound, "unknown_user")
			_, err = p.realm.UserByEmail(t.Context(), q, "nobody@example.com")
			requireFault(t, err, fault.NotFound, "unknown_user")
			require.Contains(t, err.Error(), "nobody@example.com")
			return nil
		}))
	})
}

func TestUsersThatDoNotFit(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		p.add(t, "ada@example.com", "")
		good := func() auth.NewUser { return auth.NewUser{Email: "bob@example.com", PasswordHash: hash(t)} }
		for _, tc := range []struct {
			name    string
			change  func(*auth.NewUser)
			kind    fault.Kind
			code    string
			pointer string
		}{
			{"an address that is taken", func(n *auth.NewUser) { n.Email = "ada@example.com" }, fault.Conflict, "user_exists", ""},
			{"an address that is none", func(n *auth.NewUser) { n.Email = "bob" }, fault.Invalid, "invalid_email", ""},
			{"an address that was not parsed", func(n *auth.NewUser) { n.Email = "Bob@example.com" }, fault.Internal, "email_form", ""},
			{"the password instead of its hash", func(n *auth.NewUser) { n.PasswordHash = password }, fault.Internal, "not_a_hash", ""},
			{"no password", func(n *auth.NewUser) { n.PasswordHash = "" }, fault.Internal, "not_a_hash", ""},
			{"an unknown role", func(n *auth.NewUser) { n.Role = "owner" }, fault.Unfit, "unfit", "/role"},
			{"a long name", func(n *auth.NewUser) { n.Name = strings.Repeat("ä", 201) }, fault.Unfit, "unfit", "/name"},
			{"NUL in the name", func(n *auth.NewUser) { n.Name = "a\x00b" }, fault.Unfit, "unfit", "/name"},
			{"a terminal's escape in the name", func(n *auth.NewUser) { n.Name = "\x1b[2J" }, fault.Unfit, "unfit", "/name"},
			{"a name that is no text", func(n *auth.NewUser) { n.Name = "\xff" }, fault.Unfit, "unfit", "/name"},
			{"metadata: a list", func(n *auth.NewUser) { n.Metadata = json.RawMessage(`[]`) }, fault.Unfit, "unfit", "/metadata"},
			{"metadata: null", func(n *auth.NewUser) { n.Metadata = json.RawMessage(`null`) }, fault.Unfit, "unfit", "/metadata"},
			{"metadata: broken", func(n *auth.NewUser) { n.Metadata = json.RawMessage(`{"a":`) }, fault.Unfit, "unfit", "/metadata"},
			{"metadata: too much", func(n *auth.NewUser) {
				n.Metadata = json.RawMessage(`{"a":"` + strings.Repeat("x", auth.MaxMetadataBytes) + `"}`)
			}, fault.Unfit, "unfit", "/metadata"},
			{"metadata: what jsonb cannot hold", func(n *auth.NewUser) { n.Metadata = json.RawMessage(`{"a":"\u0000"}`) }, fault.Unfit, "value", ""},
		} {
			n := good()
			tc.change(&n)
			err := p.write(t, func(q postgres.Querier) error {
				_, err := p.realm.AddUser(t.Context(), q, n)
				return err
			})
			t.Log(tc.name)
			requireFault(t, err, tc.kind, tc.code)
			if tc.pointer != "" {
				require.Equal(t, tc.pointer, fault.Of(err).Fields[0].Pointer, tc.name)
			}
			require.NotContains(t, fault.Of(err).Message+fault.Of(err).Hint, password, tc.name)
		}
		require.Equal(t, 1, value[int](t, p, `select count(*) from {users}`), "what was refused changed nothing")
		n := good()
		n.Name = strings.Repeat("ä", 200)
		p.must(t, func(q postgres.Querier) error {
			_, err := p.realm.AddUser(t.Context(), q, n)
			return err
		})
	})
}

func (p place) update(t *testing.T, u auth.User) (after auth.User, ended [][]byte, err error) {
	t.Helper()
	err = p.write(t, func(q postgres.Querier) (err error) {
		after, ended, err = p.realm.UpdateUser(t.Context(), q, u)
		return err
	})
	return after, ended, err
}

func TestUpdateUser(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", auth.RoleAdmin)
		token := p.login(t, u.Email)
		old := u
		u.Name, u.Metadata = "Ada", json.RawMessage(`{"team": "engines"}`)
		u.Email = "eve@example.com" // is not what it changes
		after, ended, err := p.update(t, u)
		require.NoError(t, err)
		require.Empty(t, ended, "a new name ends no session")
		require.Equal(t, "Ada", after.Name)
		require.JSONEq(t, `{"team": "engines"}`, string(after.Metadata))
		require.Equal(t, 2, after.Version)
		require.Equal(t, "ada@example.com", after.Email)
		_, err = p.who(t, token)
		require.NoError(t, err)

		old.Name = "Somebody else's idea"
		_, _, err = p.update(t, old)
		requireFault(t, err, fault.Stale, "stale")
		require.Equal(t, after, fault.Of(err).Details.(map[string]any)["current"], "who is refused sees what is there now")
		require.Equal(t, "Ada", value[string](t, p, `select name from {users}`))

		ahead := after
		ahead.Version++
		_, _, err = p.update(t, ahead)
		requireFault(t, err, fault.Stale, "stale")

		nobody := after
		nobody.ID = uuid.New()
		_, _, err = p.update(t, nobody)
		requireFault(t, err, fault.NotFound, "unknown_user")
	})
}

// Two callers have read the same version; one of them wins, whoever waits for whom.
func TestUpdateUserAtTheSameTime(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", auth.RoleAdmin)
		second := make(chan error, 1)
		p.must(t, func(q postgres.Querier) error {
			first := u
			first.Name = "first"
			if _, _, err := p.realm.UpdateUser(t.Context(), q, first); err != nil {
				return err
			}
			go func() {
				late := u
				late.Name = "second"
				second <- p.in(t.Context(), postgres.Write, func(q postgres.Querier) error {
					_, _, err := p.realm.UpdateUser(t.Context(), q, late)
					return err
				})
			}()
			p.blocked(t)
			return nil
		})
		err := <-second
		requireFault(t, err, fault.Stale, "stale")
		require.Equal(t, "first", fault.Of(err).Details.(map[string]any)["current"].(auth.User).Name)
		require.Equal(t, "first", value[string](t, p, `select name from {users}`))
	})
}

// between does something before the first statement that writes.
type between struct {
	postgres.Querier
	do func()
}

func (b *between) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if strings.HasPrefix(sql, "update") && b.do != nil {
		b.do()
		b.do = nil
	}
	return b.Querier.QueryRow(ctx, sql, args...)
}

// A version guessed ahead must not slip past the lock: between reading and writing, the account becomes that version,
// and the last administrator.
func TestUpdateUserWithAGuessedVersion(t *testing.T) {
	t.Parallel()
	env := install(t)
	p := inTenant(env, env.Tenant(t, "acme"))
	p.add(t, "ada@example.com", auth.RoleAdmin)
	u := p.add(t, "bob@example.com", auth.RoleMember)
	u.Version++
	u.Role = auth.RoleViewer
	err := p.write(t, func(q postgres.Querier) error {
		_, _, err := p.realm.UpdateUser(t.Context(), &between{Querier: q, do: func() {
			p.sql(t, `update {users} set role = case role when 'admin' then 'member' else 'admin' end, version = version + 1`)
		}}, u)
		return err
	})
	requireFault(t, err, fault.Stale, "stale")
	require.Equal(t, 1, value[int](t, p, `select count(*) from {users} where role = 'admin'`))
}

func TestNewRoleEndsSessions(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		if len(p.realm.Roles()) == 1 {
			u := p.add(t, "ada@example.com", "")
			u.Role = auth.RoleMember
			_, _, err := p.update(t, u)
			requireFault(t, err, fault.Unfit, "unfit")
			return
		}
		p.add(t, "ada@example.com", auth.RoleAdmin)
		u := p.add(t, "bob@example.com", auth.RoleMember)
		a, b, other := p.login(t, u.Email), p.login(t, u.Email), p.login(t, "ada@example.com")
		for _, role := range []string{auth.RoleAdmin, auth.RoleViewer} {
			u.Role = role
			var ended [][]byte
			var err error
			u, ended, err = p.update(t, u)
			require.NoError(t, err)
			require.ElementsMatch(t, [][]byte{auth.HashToken(a), auth.HashToken(b)}, ended, "the caches are told which")
			p.requireUnknown(t, a, "a session from before the new role")
			a, b = p.login(t, u.Email), p.login(t, u.Email)
			i, err := p.who(t, a)
			require.NoError(t, err)
			require.Equal(t, role, i.Role)
		}
		_, err := p.who(t, other)
		require.NoError(t, err, "nobody else is logged out")
	})
}

func (p place) disable(t *testing.T, id uuid.UUID) (u auth.User, ended [][]byte, err error) {
	t.Helper()
	err = p.write(t, func(q postgres.Querier) (err error) {
		u, ended, err = p.realm.DisableUser(t.Context(), q, id)
		return err
	})
	return u, ended, err
}

func TestDisableUser(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		p.add(t, "ada@example.com", "")
		u := p.add(t, "bob@example.com", p.realm.Roles()[len(p.realm.Roles())-1])
		token, other := p.login(t, u.Email), p.login(t, "ada@example.com")
		scope := auth.ScopeRead
		if p.tenant.IsZero() {
			scope = auth.ScopeAdmin
		}
		_, key := p.key(t, u, scope)
		before := p.credential(t, u.Email)

		u, ended, err := p.disable(t, u.ID)
		require.NoError(t, err)
		require.NotNil(t, u.DisabledAt)
		require.Equal(t, [][]byte{auth.HashToken(token)}, ended)
		require.Zero(t, value[int](t, p, `select count(*) from {sessions} where user_id = $1`, u.ID))
		p.requireUnknown(t, token, "a session of a disabled user")
		p.requireUnknown(t, key, "a key of a disabled user")
		_, err = p.who(t, other)
		require.NoError(t, err, "nobody else is logged out")
		require.Equal(t, auth.Credential{}, p.credential(t, u.Email), "there is nothing that a password could match")
		_, _, err = p.start(t, before)
		requireFault(t, err, fault.Unauthenticated, "login_failed")
		err = p.write(t, func(q postgres.Querier) error {
			_, _, err := p.realm.AddKey(t.Context(), q, u.ID, "ci", []string{scope}, nil)
			return err
		})
		requireFault(t, err, fault.NotFound, "unknown_user")

		at := *u.DisabledAt
		u, ended, err = p.disable(t, u.ID)
		require.NoError(t, err, "once more does nothing")
		require.Empty(t, ended)
		require.Equal(t, at, *u.DisabledAt, "it has been disabled since the first time")

		p.must(t, func(q postgres.Querier) error {
			u, err = p.realm.EnableUser(t.Context(), q, u.ID)
			return err
		})
		require.Nil(t, u.DisabledAt)
		p.requireUnknown(t, token, "a session from before: enabling revives none")
		_, err = p.who(t, key)
		require.NoError(t, err, "a key that nobody revoked")
		p.login(t, u.Email)

		_, _, err = p.disable(t, uuid.New())
		requireFault(t, err, fault.NotFound, "unknown_user")
		err = p.write(t, func(q postgres.Querier) error {
			_, err := p.realm.EnableUser(t.Context(), q, uuid.New())
			return err
		})
		requireFault(t, err, fault.NotFound, "unknown_user")
	})
}

func TestLastAdmin(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		ada := p.add(t, "ada@example.com", auth.RoleAdmin)
		bob := p.add(t, "bob@example.com", auth.RoleAdmin)
		token := p.login(t, ada.Email)
		_, _, err := p.disable(t, bob.ID)
		require.NoError(t, err, "there is another one")

		_, _, err = p.disable(t, ada.ID)
		requireFault(t, err, fault.Conflict, "last_admin")
		require.NotEmpty(t, fault.Of(err).Hint)
		if !p.tenant.IsZero() {
			p.add(t, "eve@example.com", auth.RoleMember)
			demoted := ada
			demoted.Role = auth.RoleMember
			_, _, err = p.update(t, demoted)
			requireFault(t, err, fault.Conflict, "last_admin")
		}
		require.True(t, value[bool](t, p, `select disabled_at is null and role = 'admin' from {users} where id = $1`, ada.ID))
		_, err = p.who(t, token)
		require.NoError(t, err, "what was refused ended no session")

		p.must(t, func(q postgres.Querier) error {
			_, err := p.realm.EnableUser(t.Context(), q, bob.ID)
			return err
		})
		_, _, err = p.disable(t, ada.ID)
		require.NoError(t, err)
	})
}

// Of two administrators who take each other's office at the same time, one keeps it.
func TestLastAdminRace(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		ada, bob := p.add(t, "ada@example.com", auth.RoleAdmin), p.add(t, "bob@example.com", auth.RoleAdmin)
		disable := func(u auth.User) error {
			return p.in(t.Context(), postgres.Write, func(q postgres.Querier) error {
				_, _, err := p.realm.DisableUser(t.Context(), q, u.ID)
				return err
			})
		}
		demote := func(u auth.User) error {
			return p.in(t.Context(), postgres.Write, func(q postgres.Querier) error {
				u, err := p.realm.UserByID(t.Context(), q, u.ID)
				if err != nil {
					return err
				}
				u.Role = auth.RoleViewer
				_, _, err = p.realm.UpdateUser(t.Context(), q, u)
				return err
			})
		}
		ways := map[string][2]func(auth.User) error{"disable, disable": {disable, disable}}
		if !p.tenant.IsZero() {
			ways["demote, demote"] = [2]func(auth.User) error{demote, demote}
			ways["disable, demote"] = [2]func(auth.User) error{disable, demote}
		}
		for name, way := range ways {
			for round := range 10 {
				p.sql(t, `update {users} set disabled_at = null, role = 'admin'`)
				var wg sync.WaitGroup
				start := make(chan struct{})
				errs := make([]error, 2)
				for n, u := range []auth.User{bob, ada} {
					wg.Go(func() {
						<-start
						errs[n] = way[n](u)
					})
				}
				close(start)
				wg.Wait()
				left := value[int](t, p, `select count(*) from {users} where role = 'admin' and disabled_at is null`)
				require.Equalf(t, 1, left, "%s, round %d: %v", name, round, errs)
				requireFault(t, errors.Join(errs...), fault.Conflict, "last_admin")
				require.Truef(t, errs[0] == nil || errs[1] == nil, "%s, round %d: one of them succeeds: %v", name, round, errs)
			}
		}
	})
}

// The same with each step held: the second waits for the first, and then finds itself alone.
func TestLastAdminWaits(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		ada, bob := p.add(t, "ada@example.com", auth.RoleAdmin), p.add(t, "bob@example.com", auth.RoleAdmin)
		second := make(chan error, 1)
		p.must(t, func(q postgres.Querier) error {
			if _, _, err := p.realm.DisableUser(t.Context(), q, ada.ID); err != nil {
				return err
			}
			go func() {
				second <- p.in(t.Context(), postgres.Write, func(q postgres.Querier) error {
					_, _, err := p.realm.DisableUser(t.Context(), q, bob.ID)
					return err
				})
			}()
			p.blocked(t)
			return nil
		})
		requireFault(t, <-second, fault.Conflict, "last_admin")
	})
}

func TestSetPassword(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		p.add(t, "bob@example.com", "")
		token, other := p.login(t, u.Email), p.login(t, "bob@example.com")
		h := auth.NewHasher(1)
		next, err := h.Hash(t.Context(), "an entirely new password")
		require.NoError(t, err)
		set := func(id uuid.UUID, hash string) (u auth.User, ended [][]byte, err error) {
			err = p.write(t, func(q postgres.Querier) (err error) {
				u, ended, err = p.realm.SetPassword(t.Context(), q, id, hash)
				return err
			})
			return u, ended, err
		}
		_, _, err = set(u.ID, "an entirely new password")
		requireFault(t, err, fault.Internal, "not_a_hash")
		_, _, err = set(uuid.New(), next)
		requireFault(t, err, fault.NotFound, "unknown_user")
		_, err = p.who(t, token)
		require.NoError(t, err, "what was refused ended no session")

		after, ended, err := set(u.ID, next)
		require.NoError(t, err)
		require.Equal(t, 2, after.Version)
		require.Equal(t, [][]byte{auth.HashToken(token)}, ended)
		p.requireUnknown(t, token, "a session from before the new password")
		_, err = p.who(t, other)
		require.NoError(t, err, "nobody else is logged out")
		c := p.credential(t, u.Email)
		require.NoError(t, h.Check(t.Context(), c, "an entirely new password"))
		requireFault(t, h.Check(t.Context(), c, password), fault.Unauthenticated, "login_failed")
	})
}

// Whoever changes their own password replaces the one that they proved to know, and no other.
func TestChangePassword(t *testing.T) {
	t.Parallel()
	places(t, func(t *testing.T, p place) {
		u := p.add(t, "ada@example.com", "")
		p.add(t, "bob@example.com", "admin") // so that ada may be disabled
		h := auth.NewHasher(1)
		own, err := h.Hash(t.Context(), "a password of one's own")
		require.NoError(t, err)
		reset, err := h.Hash(t.Context(), "what the administrator set")
		require.NoError(t, err)
		change := func(c auth.Credential, hash string) (ended [][]byte, err error) {
			err = p.write(t, func(q postgres.Querier) (err error) {
				_, ended, err = p.realm.ChangePassword(t.Context(), q, c, hash)
				return err
			})
			return ended, err
		}
		before := p.credential(t, u.Email)
		_, err = change(before, "a password of one's own")
		requireFault(t, err, fault.Internal, "not_a_hash")
		p.must(t, func(q postgres.Querier) error {
			_, _, err := p.realm.SetPassword(t.Context(), q, u.ID, reset)
			return err
		})
		token := p.login(t, u.Email)
		_, err = change(before, own)
		requireFault(t, err, fault.Unauthenticated, "login_failed")
		require.NoError(t, h.Check(t.Context(), p.credential(t, u.Email), "what the administrator set"), "the reset stays")
		_, err = p.who(t, token)
		require.NoError(t, err, "what was refused ended no session")

		now := p.credential(t, u.Email)
		ended, err := change(now, own)
		require.NoError(t, err)
		require.Equal(t, [][]byte{auth.HashToken(token)}, ended)
		require.NoError(t, h.Check(t.Context(), p.credential(t, u.Email), "a password of one's own"))

		now = p.credential(t, u.Email)
		_, _, err = p.disable(t, u.ID)
		require.NoError(t, err)
		_, err = change(now, reset)
		requireFault(t, err, fault.Unauthenticated, "login_failed")
		_, err = change(auth.Credential{}, reset)
		requireFault(t, err, fault.Unauthenticated, "login_failed")
	})
}
